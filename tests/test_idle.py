"""Sequences without gradient are not trained on, and nothing else changes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from test_grpo_trainer import trainer, weights

import rlvr_kernels
from rlvr.objective import idle_sequences, policy_loss
from rlvr.surrogates import SURROGATES
from rlvr.types import Coefficients, Tokens

SEQUENCE = torch.tensor([0, 0, 1, 1, 2, 4, 4])  # sequence 3 has no tokens
ADVANTAGES = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, -2.0, -2.0])


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize(
    ("coefficients", "idle"),
    [
        (Coefficients(), [1, 2, 3]),
        (Coefficients(weight=numbers(0, 0, 1, 1, 1, 0, 1)), [0, 1, 2, 3]),
        (Coefficients(advantage=numbers(0, 0, 0, 0.1, 0, 0, 0)), [2, 3]),
        (Coefficients(advantage=numbers(-1, -1, 0, 0, 0, 0, 0)), [0, 1, 2, 3]),
        (Coefficients(drift=numbers(0, 0, 0, 0, 1, 0, 0)), [1, 3]),
        (Coefficients(entropy=numbers(0, 0, 1, 0, 0, 0, 0)), [2, 3]),
        (Coefficients(reference=numbers(1, 1, 1, 1, 1, 1, 1)), [3]),
        (Coefficients(keep=torch.tensor([True, False, True, True, True, False, False])), [1, 2, 3, 4]),
    ],
    ids=["none", "weight", "advantage", "cancelled", "drift", "entropy", "reference", "keep"],
)
def test_idle_are_those_without_advantage_and_penalty(coefficients: Coefficients, idle: list[int]) -> None:
    found = idle_sequences(ADVANTAGES, coefficients, SEQUENCE, 5)
    assert found.nonzero().squeeze(1).tolist() == idle


@pytest.mark.parametrize("name", SURROGATES)
def test_a_surrogate_is_proportional_to_the_advantage_or_says_so(name: str) -> None:
    """An idle sequence has gradient 0 and adds 0, however far the policy has moved."""
    surrogate = SURROGATES[name]()
    logps = torch.linspace(-3, -0.1, 7, dtype=torch.float64, requires_grad=True)
    tokens = Tokens(
        logps=logps,
        old_logps=logps.detach().flip(0),
        rollout_logps=logps.detach().flip(0),
        advantages=ADVANTAGES.double(),
        sequence=SEQUENCE,
        num_sequences=5,
    )
    loss = policy_loss(tokens, surrogate, Coefficients(), mode="token_mean", denominator=1.0)
    (grad,) = torch.autograd.grad(loss, logps)
    idle = idle_sequences(ADVANTAGES, Coefficients(), SEQUENCE, 5)[SEQUENCE]
    if surrogate.penalizes:
        assert (grad[idle] != 0).any()
        return
    assert (grad[idle] == 0).all()
    active = policy_loss(tokens.select(~idle), surrogate, Coefficients(), mode="token_mean", denominator=1.0)
    torch.testing.assert_close(active, loss, rtol=1e-14, atol=0)


def watched(one: Any) -> list[tuple[int, bool]]:
    """Rows and whether there was a gradient, of every pass that the trainer makes."""
    passes: list[tuple[int, bool]] = []
    forward = one._pass

    def counted(model: Any, ids: torch.Tensor, *args: Any) -> Any:
        passes.append((len(ids), torch.is_grad_enabled()))
        return forward(model, ids, *args)

    one._pass = counted
    return passes


RUNS: dict[str, dict[str, Any]] = {
    "several updates": {"num_iterations": 2},
    "one update": {"num_iterations": 1, "max_steps": 1},
    "micro-batches": {"num_iterations": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    "a rollout's control": {"num_iterations": 2, "controls": [{"name": "kl_cov", "fraction": 0.1}]},
    "sequence means": {"num_iterations": 2, "surrogate": "gspo", "loss_type": "grpo"},
    "own denominators": {"num_iterations": 2, "loss_type": "bnpo"},
    "shared prompts": {"num_iterations": 2, "share_prompts": True},
    "leave one out": {"num_iterations": 2, "advantage_estimator": "leave_one_out"},
    "a token budget": {"num_iterations": 2, "controls": [{"name": "token_budget", "tokens": 60}]},
}


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_training_is_the_same_as_with_them(settings: dict[str, Any], tiny_model_dir: Path, tmp_path: Path) -> None:
    settings = {"per_device_train_batch_size": 16, "max_steps": 2, **settings}
    ends, metrics, passes = {}, {}, {}
    for skip in (True, False):
        one = trainer(tiny_model_dir, tmp_path / str(skip), skip_idle_sequences=skip, **settings)
        start = weights(one)
        passes[skip] = watched(one)
        one.train()
        ends[skip], metrics[skip] = weights(one), one.step_metrics
    moved = (ends[False] - start).norm()
    assert moved > 0
    assert (ends[True] - ends[False]).norm() < 1e-5 * moved
    skipped = metrics[True]["policy/skipped"]
    assert skipped > 0
    assert metrics[False]["policy/skipped"] == 0
    trained = {skip: sum(rows for rows, grad in made if grad) for skip, made in passes.items()}
    assert trained[True] < trained[False]
    if settings["num_iterations"] == 2:  # the rollout's own pass has measured what is skipped
        measured = {skip: sum(rows for rows, grad in made if not grad) for skip, made in passes.items()}
        assert measured[True] == measured[False]


def test_a_thermostat_steers_by_the_entropy_of_the_policy_at_hand(tiny_model_dir: Path, tmp_path: Path) -> None:
    """It reads each step's entropy, so that in later updates all sequences are measured anew."""
    levers, skipped = {}, {}
    for skip in (True, False):
        one = trainer(
            tiny_model_dir,
            tmp_path / str(skip),
            skip_idle_sequences=skip,
            per_device_train_batch_size=16,
            max_steps=4,
            num_iterations=4,
            controls=[{"name": "kl_cov", "fraction": 0.1}],
            thermostat={"lever": "kl_cov.coef", "low": 1e-3, "high": 1e-2, "lowest": 0.0, "highest": 5.0},
        )
        one.train()
        history = [entry for entry in one.state.log_history if "loss" in entry]
        levers[skip] = [entry["thermostat/value"] for entry in history]
        skipped[skip] = [entry["policy/skipped"] > 0 for entry in history]
    assert skipped[True] == [True, False, False, False]
    assert levers[True] == pytest.approx(levers[False], rel=1e-5)


def test_what_has_moved_is_told_of_the_sequences_that_were_passed(tiny_model_dir: Path, tmp_path: Path) -> None:
    """In a later update skipped sequences are not counted as if they had not moved; they do count as tokens."""
    found = {}
    for skip in (True, False):
        out = tmp_path / str(skip)
        settings = {"per_device_train_batch_size": 16, "max_steps": 2, "num_iterations": 2, "learning_rate": 0.5}
        one = trainer(tiny_model_dir, out, skip_idle_sequences=skip, **settings)
        one.train()
        found[skip] = one.step_metrics
    assert found[True]["policy/tokens"] == found[False]["policy/tokens"]
    assert found[True]["policy/kl_old"] > found[False]["policy/kl_old"]


def test_skipped_sequences_are_in_every_metric(tiny_model_dir: Path, tmp_path: Path) -> None:
    """On the rollout's own policy nothing that is recorded changes."""
    for iterations in (1, 2):
        found = []
        for skip in (True, False):
            out = tmp_path / f"{iterations}{skip}"
            one = trainer(
                tiny_model_dir,
                out,
                skip_idle_sequences=skip,
                per_device_train_batch_size=16,
                max_steps=1,
                num_iterations=iterations,
            )
            one.train()
            found.append({k: v for k, v in one.step_metrics.items() if k != "policy/skipped"})
        assert found[0].keys() == found[1].keys()
        assert found[0] == pytest.approx(found[1], rel=1e-5, abs=1e-7)


def test_a_micro_batch_without_any_gradient_trains_nothing(tiny_model_dir: Path, tmp_path: Path) -> None:
    one = trainer(tiny_model_dir, tmp_path, per_device_train_batch_size=8, max_steps=2, num_iterations=2)
    one.reward_funcs = [lambda completions, **_: [1.0] * len(completions)]
    start, passes = weights(one), watched(one)
    one.train()
    assert torch.equal(weights(one), start)
    assert one.step_metrics["policy/skipped"] == 1
    assert one.step_metrics["optim/grad_norm"] == 0
    assert [rows for rows, grad in passes if grad] == [1, 1]


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.1},
        {"surrogate": "dppo"},
        {"controls": [{"name": "entropy_bonus", "coef": 0.01}]},
        {"controls": [{"name": "kl_cov", "scope": "micro_batch", "fraction": 0.1}]},
    ],
    ids=["reference", "penalty", "bonus", "micro-batch"],
)
def test_what_may_push_them_keeps_them(settings: dict[str, Any], tiny_model_dir: Path, tmp_path: Path) -> None:
    one = trainer(tiny_model_dir, tmp_path, per_device_train_batch_size=16, max_steps=2, num_iterations=2, **settings)
    one.train()
    assert one.step_metrics["policy/skipped"] == 0
    assert one.step_metrics["reward/zero_variance_groups"] > 0


def test_what_a_tool_said_is_passed_but_not_projected(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither when log-probs are recomputed nor in an update."""
    one = trainer(
        tiny_model_dir,
        tmp_path,
        per_device_train_batch_size=16,
        max_steps=2,
        num_iterations=2,
        skip_idle_sequences=False,
    )
    generate, said, projected = trl.GRPOTrainer._generate, [], []

    def with_a_tool(self: Any, prompts: list[Any]) -> Any:
        """The first token of each longer completion is a tool's."""
        ids, completions, _, *rest = generate(self, prompts)
        mask = [[int(i > 0 or len(tokens) == 1) for i in range(len(tokens))] for tokens in completions]
        said.append(sum(map(sum, mask)))
        return (ids, completions, mask, *rest)

    statistics = rlvr_kernels.token_stats
    monkeypatch.setattr(trl.GRPOTrainer, "_generate", with_a_tool)
    monkeypatch.setattr(
        rlvr_kernels, "token_stats", lambda h, *a, **k: projected.append(len(h)) or statistics(h, *a, **k)
    )
    one.train()
    assert projected == [said[0]] * 3
    assert one.step_metrics["policy/tokens"] == said[0]
