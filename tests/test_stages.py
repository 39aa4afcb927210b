"""Runs in stages: their settings, the rows of several tasks, the order of prompts, one pool for all verifiers."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from torch.utils.data import BatchSampler

from rlvr.errors import ConfigError
from rlvr.tasks import Task, TaskConfig, load_task
from rlvr.trainers.heldout import domain_rewards
from rlvr.trainers.staged import StagedSampler, check_rows, prompt_order, rows_by_part, total_steps

SUMS = {"task": "chain_sum", "task_kwargs": {"max_terms": 2, "max_digits": 1}, "train_size": 12, "heldout_size": 4}
WORDS = {"task": "spell_backward", "train_size": 10, "heldout_size": 6, "domain": "words"}
LEGS = {"task": "leg_counting", "train_size": 6, "heldout_size": 2}
STAGES = [
    {"steps": 2, **SUMS},
    {"steps": 4, "tasks": [{**WORDS, "share": 3}, {**LEGS, "share": 1}]},
]
SCHEDULE = TaskConfig(stages=STAGES).schedule


@pytest.fixture(scope="module")
def staged() -> Task:
    return load_task(TaskConfig(stages=STAGES, num_shots=1, verifier_workers=2))


# ------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "task is not set: name a task, or give stages"),
        ({"task": "gsm8k", "stages": STAGES}, "task='gsm8k' and stages both"),
        ({"stages": "[{"}, r"stages='\[\{' is not JSON"),
        ({"stages": []}, r"stages=\[\] must be a list"),
        ({"stages": "gsm8k"}, "stages='gsm8k' is not JSON"),
        ({"stages": ["gsm8k"]}, r"stages\[0\]='gsm8k' must be a mapping"),
        ({"stages": [{"task": "gsm8k"}]}, r"stages\[0\].steps=None must be an integer of at least 1"),
        ({"stages": [{"steps": 0, "task": "gsm8k"}]}, r"stages\[0\].steps=0 must be"),
        ({"stages": [{"steps": 1}]}, r"stages\[0\].task=None must be a name"),
        ({"stages": [{"steps": 1, "tasks": []}]}, r"stages\[0\].tasks=\[\] must be a list"),
        ({"stages": [{"steps": 1, "tasks": [LEGS], "num_shots": 1}]}, r"stages\[0\].num_shots stands beside tasks"),
        (
            {"stages": [STAGES[0], {"steps": 1, **LEGS, "task_kwarg": {}}]},
            r"stages\[1\] key='task_kwarg'.*task_kwargs",
        ),
        ({"stages": [{"steps": 1, **LEGS, "share": 1}]}, r"stages\[0\] key='share' is not known"),
        ({"stages": [{"steps": 1, "tasks": [{**LEGS, "stages": []}]}]}, r"stages\[0\].tasks\[0\] key='stages'"),
        ({"stages": [{"steps": 1, "tasks": [{**LEGS, "share": 0}]}]}, r"stages\[0\].tasks\[0\].share=0 must be"),
        ({"stages": [{"steps": 1, "tasks": [{**LEGS, "share": math.nan}]}]}, r"tasks\[0\].share=nan must be"),
        ({"stages": [{"steps": 1, **LEGS, "domain": ""}]}, r"stages\[0\].domain='' must be a name"),
        ({"stages": [{"steps": 1, **LEGS, "task": 3}]}, r"stages\[0\].task=3 must be a name"),
        ({"stages": [{"steps": 1, **LEGS, "verifier_workers": 2}]}, r"stages\[0\].verifier_workers=2.*beside stages"),
        (
            {"stages": [STAGES[0], {"steps": 1, "tasks": [{**LEGS, "task_kwargs": {"max_animal": 2}}]}]},
            r"stages\[1\].tasks\[0\].task_kwargs='max_animal' is not known; did you mean max_animals",
        ),
        ({"stages": [{"steps": 1, **LEGS, "heldout_size": -1}]}, r"stages\[0\].heldout_size=-1 must be"),
        ({"stages": STAGES, "num_shots": -1}, "^num_shots=-1 must be"),
        (
            {"stages": [{"steps": 1, "tasks": [LEGS, LEGS]}]},
            r"tasks\[0\].domain='leg_counting' is twice in stages\[0\]",
        ),
        (
            {"stages": [STAGES[0], {"steps": 1, **SUMS, "train_size": 3}]},
            r"stages\[1\].domain='chain_sum' is also the name of stages\[0\], whose settings differ",
        ),
    ],
)
def test_stage_errors_name_the_place(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        TaskConfig(**settings)
    assert "\n" not in str(error.value)


def test_stages_are_json_too_and_inherit_what_stands_beside_them() -> None:
    config = TaskConfig(stages=json.dumps(STAGES), num_shots=1)
    parts = [part for stage in config.schedule for part in stage.parts]
    assert [(part.domain, part.share) for part in parts] == [("chain_sum", 1), ("words", 0.75), ("leg_counting", 0.25)]
    assert [part.task.num_shots for part in parts] == [1, 1, 1]
    assert parts[2].task == TaskConfig(**LEGS, num_shots=1)
    assert config.schedule == TaskConfig(stages=STAGES, num_shots=1).schedule


def test_load_errors_name_the_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^stages\[1\]\.task='.*missing.jsonl' names no file"):
        load_task(TaskConfig(stages=[STAGES[0], {"steps": 1, "task": str(tmp_path / "missing.jsonl")}]))
    with pytest.raises(ConfigError, match=r"^stages\[1\]\.chat=True: messages here and plain text in stages\[0\]"):
        load_task(TaskConfig(stages=[STAGES[0], {"steps": 1, **LEGS, "chat": True}]))


# ------------------------------------------------------------------------------------------------ rows


def test_rows_are_those_of_the_tasks_by_stage_and_domain(staged: Task) -> None:
    assert staged.heldout is not None
    assert list(zip(staged.train["stage"], staged.train["domain"], strict=True)) == (
        [(0, "chain_sum")] * 12 + [(1, "words")] * 10 + [(1, "leg_counting")] * 6
    )
    assert Counter(staged.heldout["domain"]) == {"chain_sum": 4, "words": 6, "leg_counting": 2}
    alone = load_task(TaskConfig(**{k: v for k, v in WORDS.items() if k != "domain"}, num_shots=1))
    mine = staged.train.filter(lambda row: row["domain"] == "words")
    assert list(mine["prompt"]) == list(alone.train["prompt"]) and list(mine["answer"]) == list(alone.train["answer"])
    assert "2 steps of chain_sum; 4 steps of 75 % words, 25 % leg_counting" in staged.describe


def test_a_question_held_out_by_one_task_is_trained_on_by_none(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"question": f"{i} + 1", "answer": str(i + 1)}) + "\n" for i in range(20)))
    entries = [
        {"steps": 1, "task": str(data), "domain": f"seed {seed}", "task_seed": seed, "heldout_size": 5}
        for seed in (0, 1)
    ]
    task = load_task(TaskConfig(stages=entries))
    assert task.heldout is not None
    held, trained = set(task.heldout["question"]), Counter(task.train["question"])
    assert len(held) > 5 and not held & trained.keys()
    assert trained.keys() | held == {f"{i} + 1" for i in range(20)} and set(trained.values()) == {2}  # once per stage


# ------------------------------------------------------------------------------------------------ rewards


def test_each_row_is_judged_by_its_own_tasks_verifier_in_one_pool(staged: Task, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"question": f"{i} + 1", "answer": f"{i + 1}"}) + "\n" for i in range(3)))
    math_rows = {"task": str(data), "domain": "math", "heldout_size": 0}
    own = {**math_rows, "domain": "own", "reward": "toy_verifiers:share_of_ascii", "num_shots": 1}
    entries = [{"steps": 1, "tasks": [math_rows, own, {**WORDS, "binary_reward": False}]}]
    task = load_task(TaskConfig(stages=entries, verifier_workers=2))
    rows = [task.train[list(task.train["domain"]).index(name)] for name in ("math", "own", "words", "own", "math")]
    completions = [f"\\boxed{{{rows[0]['answer']}}}", "aé", rows[2]["answer"], "a\nQuestion: é", "\\boxed{77}"]
    columns = {name: [row[name] for row in rows] for name in task.train.column_names}
    metrics: dict[str, float] = {}
    columns["answer"][4] = ""  # the reference cannot be read: an error, not a 0
    rewards = task.reward(
        prompts=columns.pop("prompt"), completions=completions, log_metric=metrics.__setitem__, **columns
    )
    # "a" of "aé" is ASCII; the one shot of `own` makes it cut at the next example
    assert rewards == [1.0, 0.5, 1.0, 1.0, None]
    assert metrics["reward/verifier_errors"] == 0.2 and metrics["reward/verifier_timeouts"] == 0
    assert len(task.reward.pool._pool) == 2
    task.reward.pool.close()


# ------------------------------------------------------------------------------------------------ order of prompts

GROUP, PROMPTS, REPEATS = 2, 8, 4  # 4 micro-batches of 4 per rollout and pass: two passes over two of 8 sequences


def order_of(task: Task, seed: int = 0) -> list[int]:
    return prompt_order(SCHEDULE, rows_by_part(task.train["stage"], task.train["domain"]), [16, 32], seed)


def sampler_of(task: Task) -> StagedSampler:
    return StagedSampler(order_of(task), group=GROUP, per_rollout=PROMPTS, repeats=REPEATS)


def test_every_rollout_is_of_its_stage_with_whole_groups_and_shares(staged: Task) -> None:
    drawn = list(sampler_of(staged))
    assert len(drawn) == len(sampler_of(staged)) == 6 * PROMPTS * GROUP * REPEATS  # 48 prompts in 6 rollouts of 8
    size = PROMPTS * GROUP
    rollouts = [drawn[i : i + size] for i in range(0, len(drawn), size)]
    assert all(rollouts[i] == rollouts[i - i % REPEATS] for i in range(len(rollouts)))
    for number, rollout in enumerate(rollouts[::REPEATS]):
        assert rollout[::2] == rollout[1::2]
        rows = staged.train[rollout[::GROUP]]
        assert set(rows["stage"]) == {0 if number < 2 else 1}
        expected = {"chain_sum": 8} if number < 2 else {"words": 6, "leg_counting": 2}  # 3/4 and 1/4 of 8
        assert Counter(rows["domain"]) == expected


def test_no_domain_is_a_prompt_ahead_of_its_share_and_rows_come_in_passes(staged: Task) -> None:
    order = order_of(staged)[16:]
    domains = staged.train[order]["domain"]
    for so_far in range(1, len(domains) + 1):
        for name, share in (("words", 0.75), ("leg_counting", 0.25)):
            assert abs(domains[:so_far].count(name) - share * so_far) < 1
    words = [row for row, name in zip(order, domains, strict=True) if name == "words"]
    assert sorted(words[:10]) == sorted(words[10:20]) == list(range(12, 22)) and words[:10] != words[10:20]


def test_order_depends_on_the_seed_alone_and_a_stage_not_on_later_ones(staged: Task) -> None:
    assert order_of(staged) == order_of(staged) and order_of(staged) != order_of(staged, seed=1)
    rows = rows_by_part(staged.train["stage"], staged.train["domain"])
    assert prompt_order(SCHEDULE[:1], rows, [16], 0) == order_of(staged)[:16]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_goes_on_with_the_prompts_that_are_left(staged: Task, ranks: int) -> None:
    def batches(rank: int, skip: int = 0) -> list[list[int]]:
        whole = BatchSampler(sampler_of(staged), batch_size=PROMPTS * GROUP // ranks, drop_last=False)
        return list(SkipBatchSampler(BatchSamplerShard(whole, ranks, rank), skip_batches=skip))

    everything = [batches(rank) for rank in range(ranks)]
    assert [len(mine) for mine in everything] == [6 * REPEATS] * ranks
    for rank, mine in enumerate(everything):
        assert batches(rank, skip=13) == mine[13:]
    for number, parts in enumerate(zip(*everything, strict=True)):  # what the ranks generate at once is one rollout
        rows = [row for part in parts for row in part]
        assert rows[::2] == rows[1::2] and len(set(staged.train[rows]["stage"])) == 1
        assert rows[::GROUP] == order_of(staged)[number // REPEATS * PROMPTS :][:PROMPTS]


def test_stages_are_whole_rollouts_and_agree_with_max_steps(staged: Task) -> None:
    assert total_steps(SCHEDULE, -1, 2.0) == total_steps(SCHEDULE, 6, 0.5) == 6
    with pytest.raises(ConfigError, match=r"stages\[0\].steps=2 must be whole rollouts of 4 .*nearest are 4"):
        total_steps(SCHEDULE, -1, 4.0)
    with pytest.raises(ConfigError, match=r"stages\[1\].steps=4 .*whole rollouts of 3 .*nearest are 3 and 6"):
        total_steps([replace(SCHEDULE[0], steps=3), SCHEDULE[1]], -1, 3.0)
    with pytest.raises(ConfigError, match="max_steps=5, but the stages have 6 optimizer steps together: remove it"):
        total_steps(SCHEDULE, 5, 1.0)
    rows = rows_by_part(staged.train["stage"], staged.train["domain"])
    check_rows(SCHEDULE, rows, 12)
    with pytest.raises(ConfigError, match=r"stages\[0\]: 'chain_sum' has 12 prompts, its share of a rollout is 13"):
        check_rows(SCHEDULE, rows, 13)


# ------------------------------------------------------------------------------------------------ runs


def test_heldout_reward_of_each_domain() -> None:
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, torch.nan])  # two samples of three prompts
    found = domain_rewards(rewards, 2, ["a", "a", "b", "b", "a", "a"])
    half_width = 1.96 * math.sqrt(0.125) / math.sqrt(2)  # of the prompt means 0.5 and 0
    assert found["a"] == pytest.approx(
        {"heldout/reward": 0.25, "heldout/reward_ci95": half_width, "prompts": 2}, 1e-10
    )
    assert found["b"]["heldout/reward"] == 1.0 and found["b"]["prompts"] == 1
