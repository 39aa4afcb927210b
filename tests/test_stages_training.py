"""Training in stages from end to end: killed in the second stage and resumed; refused before a model is loaded."""

import signal
import time
from pathlib import Path
from typing import Any

import pytest
from test_end_to_end import config as recipe
from test_end_to_end import run, start
from test_stages import LEGS, SUMS, WORDS

from rlvr.errors import ConfigError
from rlvr.monitor.records import read_evals, read_run, read_steps, read_tokens, token_steps
from rlvr.monitor.summary import format_summary, summarize
from rlvr.tasks import TaskConfig, load_task
from rlvr.trainers.staged import prompt_order, rows_by_part


def settings(model: Path, out: Path, stages: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    whole = recipe(model, out, stages=stages, reward="toy_verifiers:share_of_ascii", save_steps=1, **changes)
    return {k: v for k, v in whole.items() if k not in ("task", "task_kwargs", "max_steps", "train_size")}


def test_a_killed_run_of_two_stages_goes_on_in_the_second(tiny_model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    small = {"train_size": 12, "heldout_size": 4}
    stages = [
        {"steps": 2, **SUMS, **small},
        {"steps": 60, "tasks": [{**WORDS, **small}, {**LEGS, **small}]},
    ]
    process = start(settings(tiny_model_dir, out, stages), tmp_path)
    deadline = time.time() + 240
    while len(read_steps(out)) < 5 and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed_after = len(read_steps(out))
    assert 5 <= killed_after < 60, (tmp_path / "log.txt").read_text()

    total = killed_after + killed_after % 2 + 4
    stages[1]["steps"] = total - 2
    code, log = run(settings(tiny_model_dir, out, stages), tmp_path, "--resume_from_checkpoint")
    assert code == 0, log
    steps = read_steps(out)
    assert [step["step"] for step in steps] == list(range(1, total + 1))
    assert [step["metrics"]["reward/stage"] for step in steps] == [0, 0] + [1] * (total - 2)
    assert read_run(out)["resumed"][0]["step"] > 2
    order = order_of_run(stages, total)
    for step in token_steps(out):
        seen = [row["prompt"] for row in read_tokens(out, step)]
        rollout = (step - 1) // 2  # two updates per rollout of two prompts
        assert set(seen) <= set(order[2 * rollout : 2 * rollout + 2]) and seen
    first, last = read_evals(out)[0], read_evals(out)[-1]
    assert (first["step"], last["step"]) == (0, total)
    domains = last["domains"]
    assert {name: domain["prompts"] for name, domain in domains.items()} == dict.fromkeys(
        ("chain_sum", "words", "leg_counting"), 4
    )
    mean = sum(domain["heldout/reward"] for domain in domains.values()) / 3
    assert last["metrics"]["heldout/reward"] == pytest.approx(mean, rel=1e-6)  # rewards are float32
    assert "  words" in format_summary(summarize(out))


def order_of_run(stages: list[dict[str, Any]], total: int) -> list[str]:
    """The prompts of the run in their order: as many as steps, for two updates share a rollout of two."""
    task = load_task(TaskConfig(stages=stages))
    rows = rows_by_part(task.train["stage"], task.train["domain"])
    return list(task.train[prompt_order(task.schedule, rows, [2, total - 2], 42)]["prompt"])


@pytest.mark.parametrize(
    ("stages", "changes", "says"),
    [
        ([{"steps": 3, **SUMS}], {}, r"stages\[0\].steps=3 must be whole rollouts of 2 .*nearest are 2 and 4"),
        ([{"steps": 2, **SUMS}], {"max_steps": 8}, "max_steps=8, but the stages have 2"),
        ([{"steps": 2, **SUMS, "train_size": 1}], {}, "1 prompts, its share of a rollout is 2"),
    ],
)
def test_bad_stages_are_refused_before_the_model_is_loaded(
    stages: list[dict[str, Any]],
    changes: dict[str, Any],
    says: str,
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import trl

    from rlvr import GRPOConfig, GRPOTrainer

    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(trl.GRPOTrainer, "__init__", load)
    task = load_task(TaskConfig(stages=stages))
    args = GRPOConfig(
        str(tmp_path / "run"),
        per_device_train_batch_size=8,
        num_generations=4,
        num_iterations=2,
        report_to="none",
        bf16=False,
        **changes,
    )
    with pytest.raises(ConfigError, match=says) as error:
        GRPOTrainer(str(tiny_model_dir), task.reward, args, task.train, schedule=task.schedule)
    assert "\n" not in str(error.value)
