"""What each group of a rollout earned, and which prompts a run has met: what is trained is what is read."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from ppo_cases import ppo_trainer
from test_grpo_trainer import FixedRollouts, parity_of_sum, trainer

from rlvr.errors import ConfigError
from rlvr.monitor.groups import Groups, prompt_id, prompt_text
from rlvr.monitor.recorder import Recorder
from rlvr.monitor.records import read_groups, read_prompts, read_steps


def groups(*prompts: str) -> Groups:
    """Groups of 4, of which the first has no reward."""
    number = len(prompts)
    rewards = [math.nan, *(n / 4 for n in range(1, number))]
    return Groups(prompts, passed=range(number), scored=[0, *[4] * (number - 1)], reward=rewards)


# ------------------------------------------------------------------------------------------------------------- records


def test_groups_are_read_back_and_each_prompt_once(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.record_groups(1, groups("a", "b", "a", "half \ud83d"))
    recorder.record_groups(1, groups("c"))
    recorder.record_groups(3, groups("b", "d"))
    ids = {text: hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:12] for text in ("a", "b", "c", "d")}
    ids["half \ud83d"] = prompt_id("half ?")
    first, *others = read_groups(tmp_path)
    assert first == {
        "step": 1,
        "prompts": [ids[text] for text in ("a", "b", "a", "half \ud83d")],
        "passed": [0, 1, 2, 3],
        "scored": [0, 4, 4, 4],
        "reward": [None, 0.25, 0.5, 0.75],
    }
    assert [(record["step"], record["prompts"]) for record in others] == [(1, [ids["c"]]), (3, [ids["b"], ids["d"]])]
    met = [(1, "a"), (1, "b"), (1, "half \ud83d"), (1, "c"), (3, "d")]
    assert read_prompts(tmp_path) == [{"step": step, "id": ids[text], "text": text} for step, text in met]
    for name in ("groups.jsonl", "prompts.jsonl"):
        for line in (tmp_path / name).read_text().splitlines():
            json.loads(line, parse_constant=lambda constant: pytest.fail(constant))
    with pytest.raises(ValueError, match="groups need one value each, got"):
        Groups(["a"], [1], [1, 2], [0.5])


def test_groups_without_texts_keep_their_ids(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.record_groups(1, groups("a", "b"), texts=False)
    assert read_prompts(tmp_path) == [] and not (tmp_path / "prompts.jsonl").exists()
    assert read_groups(tmp_path)[0]["prompts"] == [prompt_id("a"), prompt_id("b")]


def test_run_without_samples_writes_no_text_of_a_prompt(tiny_model_dir: Path, tmp_path: Path) -> None:
    trainer(tiny_model_dir, tmp_path, max_steps=1, record_sequences=0).train()
    assert read_groups(tmp_path)[0]["prompts"] and not (tmp_path / "prompts.jsonl").exists()
    assert not (tmp_path / "tokens").exists()


def test_resume_drops_later_groups_and_meets_their_prompts_again(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    for step, texts in ((1, "ab"), (2, "bc"), (3, "cd")):
        recorder.record_step(step, {})
        recorder.record_groups(step, groups(*texts))
    with open(tmp_path / "groups.jsonl", "ab") as file:
        file.write(b'{"step": 4, "prom')
    with open(tmp_path / "prompts.jsonl", "ab") as file:
        file.write(b'{"step": 4, "id": "0", "text"')
    assert len(read_groups(tmp_path)) == 3 and [p["text"] for p in read_prompts(tmp_path)] == ["a", "b", "c", "d"]
    resumed = Recorder.resume(tmp_path, 2)
    assert [record["step"] for record in read_groups(tmp_path)] == [1, 2]
    resumed.record_groups(3, groups("d", "a"))
    assert [(p["step"], p["text"]) for p in read_prompts(tmp_path)] == [(1, "a"), (1, "b"), (2, "c"), (3, "d")]
    assert read_groups(tmp_path)[-1]["prompts"] == [prompt_id("d"), prompt_id("a")]


@pytest.mark.parametrize("name", ["groups.jsonl", "prompts.jsonl"])
def test_damage_before_the_last_line_is_refused(name: str, tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    for step in (1, 2, 3):
        recorder.record_groups(step, groups(f"prompt {step}"))
    lines = (tmp_path / name).read_bytes().splitlines(keepends=True)
    (tmp_path / name).write_bytes(lines[0] + b'{"step": 2}\n' + lines[2])
    with pytest.raises(ConfigError, match=rf"{name} line 2 is damaged"):
        (read_groups if name == "groups.jsonl" else read_prompts)(tmp_path)
    with pytest.raises(ConfigError, match=rf"{name} line 2 is damaged"):
        Recorder.resume(tmp_path, 3)


def test_run_without_groups_reads_as_none(tmp_path: Path) -> None:
    Recorder(tmp_path).record_step(1, {})
    assert read_groups(tmp_path) == read_prompts(tmp_path) == []
    Recorder.resume(tmp_path, 1).record_groups(2, groups("a"))
    assert [record["step"] for record in read_groups(tmp_path)] == [2]


def test_prompt_text_of_a_conversation_has_all_that_is_said() -> None:
    user = {"role": "user", "content": "2+2?"}
    assert prompt_text("plain") == "plain"
    assert prompt_text([user]) == "2+2?"
    assert prompt_text([{"role": "system", "content": "Be brief."}, user]) == "system: Be brief.\n\nuser: 2+2?"
    seen = [{"type": "image", "image": object()}, {"type": "text", "text": "What is it?"}]
    assert prompt_text([{"role": "user", "content": seen}]) == "<image>What is it?"
    assert prompt_text([user, {"role": "assistant", "content": None}]) == "user: 2+2?\n\nassistant: "


# ------------------------------------------------------------------------------------------------------------ training


class Scored:
    """A reward function that remembers what it has judged. The prompt `unscored` has no reward."""

    __name__ = "scored"

    def __init__(self, unscored: str = "") -> None:
        self.unscored = unscored
        self.judged: list[tuple[str, float | None]] = []

    def __call__(self, prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        rewards: list[float | None] = [
            None if prompt == self.unscored else reward
            for prompt, reward in zip(prompts, parity_of_sum(completion_ids), strict=True)
        ]
        self.judged += zip(prompts, rewards, strict=True)
        return rewards


def expected(judged: list[tuple[str, float | None]], size: int) -> list[tuple[str, int, int, float | None]]:
    """(prompt's id, passed, scored, reward) of each group in the order in which they were judged."""
    found = []
    for start in range(0, len(judged), size):
        prompts, rewards = zip(*judged[start : start + size], strict=True)
        assert len(set(prompts)) == 1
        known = [x for x in rewards if x is not None]
        found.append((prompt_id(prompts[0]), int(sum(known)), len(known), sum(known) / len(known) if known else None))
    return found


def recorded(run_dir: Path) -> list[tuple[str, int, int, float | None]]:
    columns = ("prompts", "passed", "scored", "reward")
    return [entry for r in read_groups(run_dir) for entry in zip(*(r[name] for name in columns), strict=True)]


def scored(one: Any, reward: Scored) -> Any:
    """The trainer with this reward function."""
    one.reward_funcs = [reward]
    return one


def test_groups_are_those_that_were_judged(tiny_model_dir: Path, tmp_path: Path) -> None:
    """36 prompts, 4 in a rollout, two updates on each rollout: after 18 steps they come again."""
    reward = Scored(unscored="3+4=")
    settings = {"per_device_train_batch_size": 16, "num_iterations": 2, "max_steps": 24, "learning_rate": 1e-3}
    scored(trainer(tiny_model_dir, tmp_path, **settings), reward).train()
    assert [record["step"] for record in read_groups(tmp_path)] == list(range(1, 24, 2))
    assert recorded(tmp_path) == expected(reward.judged, 4)
    none = [entry for entry in recorded(tmp_path) if entry[0] == prompt_id("3+4=")]
    assert none and all(entry[1:] == (0, 0, None) for entry in none)
    prompts = read_prompts(tmp_path)
    assert {p["text"]: p["id"] for p in prompts} == {text: prompt_id(text) for text, _ in reward.judged}
    assert len(prompts) == 36 < len(recorded(tmp_path))
    firsts: dict[str, int] = {}
    for record in read_groups(tmp_path):
        for key in record["prompts"]:
            firsts.setdefault(key, record["step"])
    assert {p["id"]: p["step"] for p in prompts} == firsts
    for step in read_steps(tmp_path):
        mine = [
            entry
            for r in read_groups(tmp_path)
            if r["step"] == (step["step"] - 1) // 2 * 2 + 1
            for entry in zip(r["passed"], r["scored"], strict=True)
        ]
        constant = sum(passed in (0, number) for passed, number in mine) / len(mine)
        assert step["metrics"]["reward/zero_variance_groups"] == constant


def test_rollouts_of_one_step_are_lines_of_that_step(tiny_model_dir: Path, tmp_path: Path) -> None:
    reward = Scored()
    settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "steps_per_generation": 1}
    scored(trainer(tiny_model_dir, tmp_path, max_steps=2, **settings), reward).train()
    assert [record["step"] for record in read_groups(tmp_path)] == [1, 1, 2, 2]
    assert recorded(tmp_path) == expected(reward.judged, 4)


def test_groups_of_an_evaluation_are_not_recorded(tiny_model_dir: Path, tmp_path: Path) -> None:
    reward = Scored()
    one = scored(trainer(tiny_model_dir, tmp_path, per_device_train_batch_size=16, max_steps=1), reward)
    heldout = Dataset.from_list([{"prompt": "held out"}] * 4)
    one.evaluate(heldout)
    judged = len(reward.judged)
    assert judged > 0
    one.train()
    trained = reward.judged[judged:]
    one.evaluate(heldout)
    assert recorded(tmp_path) == expected(trained, 4) and len(trained) == 16
    assert "held out" not in {p["text"] for p in read_prompts(tmp_path)}


def test_ppo_has_groups_of_one(tiny_model_dir: Path, tmp_path: Path) -> None:
    reward = Scored()
    scored(ppo_trainer(tiny_model_dir, tmp_path, max_steps=2, critic_warmup_steps=1), reward).train()
    assert [(r["step"], len(r["prompts"]), set(r["scored"])) for r in read_groups(tmp_path)] == [
        (1, 16, {1}),
        (2, 16, {1}),
    ]
    assert recorded(tmp_path) == expected(reward.judged, 1)


def test_conversations_are_recorded_as_text(tiny_model_dir: Path, tmp_path: Path) -> None:
    one = trainer(tiny_model_dir, tmp_path, per_device_train_batch_size=16, max_steps=1)
    one.train_dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": f"{n}?"}]} for n in range(4)])
    assert isinstance(one, FixedRollouts)
    one.train()
    assert {p["text"] for p in read_prompts(tmp_path)} == {f"{n}?" for n in range(4)}
