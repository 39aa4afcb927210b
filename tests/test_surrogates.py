"""Laws of the surrogates.

Those of the whole objective (micro-batches, half precision, no tokens) are run over them in test_objective.py, those
of neutral coefficients in test_controls.py.
"""

import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from surrogate_loops import PLAIN
from torch import Tensor

from rlvr.controls import build
from rlvr.errors import ConfigError
from rlvr.objective import policy_loss
from rlvr.surrogates import SURROGATES, Cispo, Dppo, Gmpo, Gpg, Gspo, PpoClip, Sapo, Surrogate, Unclipped
from rlvr.types import Coefficients, Tokens

EXACT = {"rtol": 0.0, "atol": 1e-10}
# Bounds tight enough that `batch` crosses each of them.
BOUNDED: dict[str, Surrogate] = {
    "ppo_clip": PpoClip(low=0.2, high=0.28, dual_clip=2.0),
    "unclipped": Unclipped(),
    "gpg": Gpg(),
    "sapo": Sapo(tau_pos=2.0, tau_neg=3.0),
    "cispo": Cispo(ratio_low=0.8, ratio_high=1.3),
    "dppo": Dppo(low=0.05, high=0.08, kl_coef=0.1),
    "gspo": Gspo(low=0.02, high=0.03),
    "gmpo": Gmpo(low=0.2, high=0.3),
}
every_surrogate = pytest.mark.parametrize("name", SURROGATES)
seeds = st.integers(0, 2**31 - 1)


def test_bounded_covers_every_surrogate() -> None:
    assert {name: type(x) for name, x in BOUNDED.items()} == SURROGATES


def batch(seed: int = 0, *, drift: float = 0.3, longest: int = 9, **changes: Any) -> Tokens:
    """12 sequences of up to `longest` tokens; current policy and engine are `drift` nats from the old policy."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, longest + 1, (12,), generator=generator)
    lengths[0] = longest
    sequence = torch.arange(12).repeat_interleave(lengths)

    def draw(n: int = len(sequence)) -> Tensor:
        return torch.randn(n, generator=generator, dtype=torch.float64)

    old = -draw().abs()
    tokens = Tokens(
        logps=(old + drift * draw()).requires_grad_(),
        old_logps=old,
        rollout_logps=old + drift * draw(),
        advantages=draw(12)[sequence],
        sequence=sequence,
        num_sequences=12,
    )
    return replace(tokens, **changes)


def loss_and_gradient(
    surrogate: Surrogate, tokens: Tokens, mode: Any = "seq_mean_token_mean"
) -> tuple[Tensor, Tensor]:
    loss = policy_loss(tokens, surrogate, Coefficients(), mode=mode)
    return loss.detach(), torch.autograd.grad(loss, tokens.logps)[0]


def pick(tokens: Tokens, index: Tensor, **changes: Any) -> Tokens:
    moved = {f.name: x[index] for f in fields(tokens) if isinstance(x := getattr(tokens, f.name), Tensor)}
    return replace(tokens, **{**moved, **changes})


@every_surrogate
def test_surrogate_equals_a_plain_loop(name: str) -> None:
    tokens, surrogate = batch(), BOUNDED[name]
    ratio = surrogate.ratio(tokens)
    clipped = surrogate.clipped(ratio, tokens)
    log_ratio = (tokens.logps - tokens.old_logps).tolist()
    columns = (tokens.advantages.tolist(), log_ratio, tokens.logps.tolist(), tokens.old_logps.tolist())
    rows = [[x for x, j in zip(log_ratio, tokens.sequence, strict=True) if j == i] for i in tokens.sequence]
    expected = [PLAIN[name](*token, row) for *token, row in zip(*columns, rows, strict=True)]
    losses, low, high = zip(*expected, strict=True)
    torch.testing.assert_close(surrogate.loss(ratio, tokens), torch.tensor(losses, dtype=torch.float64), **EXACT)
    assert clipped.low.tolist() == list(low) and clipped.high.tolist() == list(high)
    bounds = name not in ("unclipped", "gpg", "sapo")
    assert any(low) == any(high) == bounds, "the batch must cross every bound"


@every_surrogate
@given(seed=seeds)
def test_gradient_on_policy_is_that_of_reinforce(name: str, seed: int) -> None:
    """Of the defaults, for advantages of whole sequences and their mean: where old and current policy are equal."""
    tokens = batch(seed, drift=0.0)
    lengths = torch.bincount(tokens.sequence, minlength=12)
    expected = -tokens.advantages / lengths[tokens.sequence] / (lengths > 0).sum()
    torch.testing.assert_close(loss_and_gradient(SURROGATES[name](), tokens)[1], expected, **EXACT)


@given(seed=seeds, tau_pos=st.sampled_from((0.5, 1.0, 2.0)), tau_neg=st.sampled_from((0.5, 1.0, 4.0)))
def test_sapo_gradient_on_policy_is_exactly_reinforce(seed: int, tau_pos: float, tau_neg: float) -> None:
    """Powers of two, whose products do not round; its value is -2 A / tau."""
    tokens = batch(seed, drift=0.0)
    surrogate = Sapo(tau_pos=tau_pos, tau_neg=tau_neg)
    losses = surrogate.loss(surrogate.ratio(tokens), tokens)
    assert torch.equal(torch.autograd.grad(losses.sum(), tokens.logps)[0], -tokens.advantages)
    tau = torch.where(tokens.advantages > 0, tau_pos, tau_neg)
    assert torch.equal(losses.detach(), -2 * tokens.advantages / tau)


@given(x=st.floats(0.01, 3.0), tau=st.floats(0.5, 5.0), sign=st.sampled_from((-1.0, 1.0)))
def test_sapo_fades_smoothly_on_both_sides(x: float, tau: float, sign: float) -> None:
    """Its gradient beside that of the plain ratio, 4 sigma (1 - sigma), falls with |r - 1|, the same both ways."""
    r = torch.tensor([1 - x, 1 - x / 2, 1.0, 1 + x / 2, 1 + x], dtype=torch.float64).requires_grad_()
    zeros = torch.zeros(5, dtype=torch.float64)
    tokens = Tokens(logps=zeros, old_logps=zeros, advantages=zeros + sign, sequence=torch.arange(5), num_sequences=5)
    loss = Sapo(tau_pos=tau, tau_neg=tau).loss(r, tokens)
    weight = -sign * torch.autograd.grad(loss.sum(), r)[0]
    torch.testing.assert_close(weight, weight.flip(0), **EXACT)
    assert weight[0] < weight[1] < weight[2] == pytest.approx(1.0)


@given(seed=seeds)
def test_gpg_gradient_is_ppos_first(seed: int) -> None:
    tokens = batch(seed, drift=0.0)
    for mode in ("token_mean", "seq_mean_token_mean"):
        ppo_gradient = loss_and_gradient(PpoClip(), tokens, mode)[1]
        assert torch.equal(loss_and_gradient(Gpg(), tokens, mode)[1], ppo_gradient)


@given(seed=seeds)
def test_gpg_does_not_see_the_old_policy(seed: int) -> None:
    tokens = batch(seed)
    elsewhere = replace(tokens, old_logps=tokens.old_logps - 1.0)
    for got, expected in zip(loss_and_gradient(Gpg(), elsewhere), loss_and_gradient(Gpg(), tokens), strict=True):
        assert torch.equal(got, expected)


@given(seed=seeds)
def test_gmpo_of_single_tokens_within_bounds_is_unclipped(seed: int) -> None:
    tokens = batch(seed, longest=1)
    got, expected = (loss_and_gradient(s, tokens) for s in (Gmpo(low=9.0, high=9.0), Unclipped()))
    torch.testing.assert_close(got, expected, **EXACT)


@given(seed=seeds)
def test_gmpo_within_bounds_is_gspo_within_bounds(seed: int) -> None:
    """Without a clip both are -A times the geometric mean of the ratios."""
    tokens = batch(seed)
    got, expected = (loss_and_gradient(s, tokens) for s in (Gmpo(low=9.0, high=9.0), Gspo(low=1e4, high=1e4)))
    torch.testing.assert_close(got, expected, **EXACT)


@given(seed=seeds)
def test_gmpo_gives_each_unclipped_token_s_a_over_length(seed: int) -> None:
    tokens, surrogate = batch(seed), BOUNDED["gmpo"]
    lengths = torch.bincount(tokens.sequence, minlength=12)[tokens.sequence]
    ratio = surrogate.ratio(tokens)
    s_times_a = -surrogate.loss(ratio, tokens).detach()
    expected = -s_times_a / lengths / len(tokens.sequence.unique()) * ~surrogate.clipped(ratio, tokens).any
    torch.testing.assert_close(loss_and_gradient(surrogate, tokens)[1], expected, **EXACT)


@given(seed=seeds)
def test_dppo_of_wide_bounds_without_penalty_is_unclipped(seed: int) -> None:
    tokens = batch(seed, drift=2.0)
    wide = Dppo(low=1.0, high=math.inf, kl_coef=0.0)
    for mode in ("token_mean", "seq_mean_token_mean"):
        for got, expected in zip(*(loss_and_gradient(s, tokens, mode) for s in (wide, Unclipped())), strict=True):
            assert torch.equal(got, expected)


def test_dppo_keeps_rare_tokens_and_holds_frequent_ones() -> None:
    """Where PPO does the opposite: 1e-4 -> 1e-3 is a ratio of 10 but moves .0009; .95 -> .72 is .76 but moves .23."""
    old, new = (torch.tensor(p, dtype=torch.float64).log() for p in ([1e-4, 0.95], [1e-3, 0.72]))
    advantages = torch.tensor([1.0, -1.0], dtype=torch.float64)
    tokens = Tokens(logps=new, old_logps=old, advantages=advantages, sequence=torch.arange(2), num_sequences=2)
    clipped = {s: s.clipped(s.ratio(tokens), tokens).any.tolist() for s in (Dppo(), PpoClip(low=0.28, high=0.28))}
    assert list(clipped.values()) == [[False, True], [True, False]]


@given(seed=seeds)
def test_dppo_anchored_to_the_rollout_takes_the_engines_log_probs(seed: int) -> None:
    """For ratio, difference and penalty alike: as if the engine's policy were the old one."""
    tokens = batch(seed)
    from_rollout, from_old = replace(BOUNDED["dppo"], anchor="rollout"), BOUNDED["dppo"]  # type: ignore[type-var]
    swapped = replace(tokens, old_logps=tokens.rollout_logps, rollout_logps=None)
    got, expected = loss_and_gradient(from_rollout, tokens), loss_and_gradient(from_old, swapped)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    masks = [s.clipped(s.ratio(t), t) for s, t in ((from_rollout, tokens), (from_old, swapped))]
    assert torch.equal(masks[0].low, masks[1].low) and torch.equal(masks[0].high, masks[1].high)


def test_dppo_anchored_to_the_rollout_needs_it() -> None:
    tokens, surrogate = batch(rollout_logps=None), Dppo(anchor="rollout")
    for call in (lambda: surrogate.ratio(tokens), lambda: surrogate.clipped(torch.ones(len(tokens)), tokens)):
        with pytest.raises(ValueError, match=r"anchor='rollout' needs tokens\.rollout_logps.*anchor='old'"):
            call()


@every_surrogate
@given(seed=seeds)
def test_permuting_tokens_and_renumbering_sequences_change_nothing(name: str, seed: int) -> None:
    """Nor do sequences without tokens."""
    tokens, surrogate = batch(seed), BOUNDED[name]
    generator = torch.Generator().manual_seed(seed)
    order, number = torch.randperm(len(tokens), generator=generator), torch.randperm(30, generator=generator)
    moved = pick(tokens, order, sequence=number[tokens.sequence[order]], num_sequences=30)
    losses = [surrogate.loss(surrogate.ratio(t), t) for t in (tokens, moved)]
    torch.testing.assert_close(losses[1], losses[0][order], **EXACT)
    masks = [surrogate.clipped(surrogate.ratio(t), t) for t in (tokens, moved)]
    assert torch.equal(masks[1].low, masks[0].low[order]) and torch.equal(masks[1].high, masks[0].high[order])
    loss, gradient = loss_and_gradient(surrogate, tokens)
    moved_loss = policy_loss(moved, surrogate, Coefficients(), mode="seq_mean_token_mean")
    torch.testing.assert_close(moved_loss.detach(), loss, **EXACT)
    torch.testing.assert_close(torch.autograd.grad(moved_loss, tokens.logps)[0], gradient, **EXACT)


@every_surrogate
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_impossible_tokens_are_no_nan(name: str, dtype: torch.dtype) -> None:
    """log pi = -inf: a ratio of 0, and where the loss is -A log pi itself, nothing at A = 0."""
    new = torch.tensor([-torch.inf, -1.0, -torch.inf, -0.5], dtype=dtype).requires_grad_()
    for advantage in (0.0,) if name in ("gpg", "cispo") else (0.0, 1.0, -1.0):
        tokens = Tokens(
            logps=new,
            old_logps=torch.tensor([-1.0, -torch.inf, -60.0, -0.5], dtype=dtype),
            advantages=torch.full((4,), advantage, dtype=dtype),
            sequence=torch.tensor([0, 1, 2, 2]),
            num_sequences=3,
        )
        loss, gradient = loss_and_gradient(BOUNDED[name], tokens)
        assert loss.isfinite() and gradient.isfinite().all()


REFUSED: dict[str, tuple[tuple[str, Any], ...]] = {
    "ppo_clip": (("low", -0.1), ("high", math.nan), ("dual_clip", 1.1)),
    "sapo": (("tau_pos", 0.0), ("tau_neg", -1.0), ("tau_pos", math.inf), ("tau_neg", math.nan)),
    "cispo": (("ratio_low", -1.0), ("ratio_high", 0.0)),
    "dppo": (("low", -0.1), ("high", math.nan), ("kl_coef", -1.0), ("kl_coef", math.inf), ("anchor", "new")),
    "gspo": (("low", -1e-9), ("high", math.nan)),
    "gmpo": (("low", -0.4), ("high", math.nan)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_hyper_parameters_are_refused_by_name(name: str) -> None:
    for field, value in REFUSED[name]:
        with pytest.raises(ValueError, match=f"{field}={value!r}.*(must|need)"):
            SURROGATES[name](**{field: value})
        with pytest.raises(ConfigError, match=rf"^surrogate {name}: .*{field}={value!r}") as raised:
            build("surrogate", SURROGATES, {"name": name, field: value})
        assert "\n" not in str(raised.value)


def test_a_string_option_is_built_and_its_kind_checked() -> None:
    assert build("surrogate", SURROGATES, {"name": "dppo", "anchor": "rollout"}) == Dppo(anchor="rollout")
    for value in (1, True, None):
        with pytest.raises(ConfigError, match=f"surrogate dppo: anchor={value}: write a name, such as old"):
            build("surrogate", SURROGATES, {"name": "dppo", "anchor": value})


@pytest.mark.parametrize("name", SURROGATES)
def test_token_impossible_under_both_policies_is_no_nan(name: str) -> None:
    logps = torch.tensor([-torch.inf, -1.0], dtype=torch.float64)
    tokens = Tokens(
        logps=logps.requires_grad_(),
        old_logps=logps.detach(),
        advantages=torch.tensor([0.0, 1.0], dtype=torch.float64),
        sequence=torch.tensor([0, 1]),
        num_sequences=2,
    )
    penalty = Coefficients(drift=torch.tensor([0.0, 1.0], dtype=torch.float64))
    loss = policy_loss(tokens, SURROGATES[name](), penalty, mode="seq_mean_token_mean")
    (grad,) = torch.autograd.grad(loss, tokens.logps)
    assert loss.isfinite() and grad[1] != 0 and grad.isfinite().all()
