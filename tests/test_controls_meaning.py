"""What entropy controls are for: on a tabular softmax policy, updates with one move true entropy as it promises."""

import pytest
import torch
from control_cases import CASES, Case, batch
from test_controls import decide, surrogate_of
from torch import Tensor

from rlvr.advantages import group_relative
from rlvr.controls import ClipCov, KlCov
from rlvr.objective import policy_loss
from rlvr.surrogates import Unclipped
from rlvr.types import Coefficients, Tokens, token_keys

STATES, ACTIONS, SAMPLES, SEEDS = 200, 8, 8, 24


def true_entropy(logits: Tensor) -> float:
    """Mean over states, in nats."""
    logps = logits.log_softmax(dim=1)
    return float(-(logps.exp() * logps).sum(dim=1).mean())


def entropy_after(case: Case, seed: int, *, controlled: bool) -> float:
    """One rollout from a random policy, then the case's number of gradient steps on it."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(STATES, ACTIONS, generator=generator, dtype=torch.float64)
    worth = torch.randn(STATES, ACTIONS, generator=generator, dtype=torch.float64)
    state = torch.arange(STATES).repeat_interleave(SAMPLES)
    action = torch.multinomial(logits.softmax(dim=1), SAMPLES, replacement=True, generator=generator).flatten()
    advantages = group_relative(worth[state, action], state)
    old = logits.log_softmax(dim=1)[state, action]

    def tokens(logits: Tensor) -> Tokens:
        sequence, zeros = torch.arange(STATES * SAMPLES), torch.zeros(STATES * SAMPLES, dtype=torch.int64)
        logps = logits.log_softmax(dim=1)
        probs = logps.exp()
        entropy = -(probs * logps).sum(dim=1)
        discriminator = (probs.square() * (logps + entropy[:, None])).sum(dim=1).detach()
        return Tokens(
            logps=logps[state, action],
            old_logps=old,
            advantages=advantages,
            sequence=sequence,
            num_sequences=len(sequence),
            position=zeros,
            key=token_keys(seed, 0, sequence, zeros),
            entropy=entropy[state],
            rollout_logps=old,
            ref_logps=old,
            mean_discriminator=discriminator[state],
        )

    coefficients = decide(case.active, tokens(logits)).coefficients if controlled else Coefficients()
    for _ in range(case.updates):
        logits = logits.requires_grad_()
        loss = policy_loss(tokens(logits), surrogate_of(case.active), coefficients, mode="token_mean")
        (grad,) = torch.autograd.grad(loss, logits)
        logits = (logits - case.learning_rate * grad).detach()
    return true_entropy(logits)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.entropy])
def test_control_moves_entropy_as_it_promises(name: str) -> None:
    case = CASES[name]
    gained = [
        entropy_after(case, seed, controlled=True) - entropy_after(case, seed, controlled=False)
        for seed in range(SEEDS)
    ]
    # A coin would reach 20 of 24 in one run of 1300.
    assert sum(case.entropy * x > 0 for x in gained) >= 20, gained


def test_kl_cov_on_policy_does_nothing() -> None:
    """Penalty and gradient are zero while old and current policy are equal, whatever is selected."""
    tokens = batch()
    same = Tokens(
        logps=tokens.logps,
        old_logps=tokens.logps.detach(),
        advantages=tokens.advantages,
        sequence=tokens.sequence,
        num_sequences=tokens.num_sequences,
        key=tokens.key,
    )
    coefficients = decide(KlCov(fraction=0.5, coef=3.0), same).coefficients
    assert coefficients.drift is not None and coefficients.drift.any()
    results = []
    for c in (coefficients, Coefficients()):
        loss = policy_loss(same, Unclipped(), c, mode="token_mean")
        results.append((loss, *torch.autograd.grad(loss, same.logps)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def covariances(tokens: Tokens) -> Tensor:
    logps, advantages = tokens.logps.detach(), tokens.advantages
    return (logps - logps.mean()) * (advantages - advantages.mean())


def test_kl_cov_selects_the_largest_covariances() -> None:
    for seed, fraction, coef in ((0, 0.05, 1.0), (1, 0.3, 0.25), (2, 0.0, 1.0), (3, 1.0, 2.0)):
        tokens = batch(seed)
        k = max(1, int(fraction * len(tokens)))
        expected = torch.zeros(len(tokens), dtype=torch.float64)
        expected[covariances(tokens).topk(k).indices] = coef
        drift = decide(KlCov(fraction=fraction, coef=coef), tokens).coefficients.drift
        assert drift is not None and torch.equal(drift, expected)


def test_clip_cov_masks_a_fraction_among_the_candidates() -> None:
    for seed, fraction, low, high in (
        (0, 0.02, 0.3, 20.0),
        (1, 0.5, 0.1, 5.0),
        (2, 0.0, 0.1, 5.0),
        (3, 0.1, 9e2, 9e3),
    ):
        tokens = batch(seed)
        cov = covariances(tokens)
        control = ClipCov(fraction=fraction, low=low, high=high, exclude_clipped=False)
        weight = decide(control, tokens).coefficients.weight
        assert weight is not None
        candidates, masked = (cov > low) & (cov < high), weight == 0
        assert not (masked & ~candidates).any()
        assert int(masked.sum()) == min(max(1, int(fraction * len(tokens))), int(candidates.sum()))
        assert ((weight == 0) | (weight == 1)).all()


def test_clip_cov_leaves_clipped_tokens_alone() -> None:
    tokens = batch(4)
    surrogate = surrogate_of(CASES["clip_cov"].active)
    clipped = surrogate.clipped(surrogate.ratio(tokens), tokens).any
    cov, everything = covariances(tokens), {"fraction": 1.0, "low": 0.0, "high": 1e3}
    assert (clipped & (cov > 0)).any()
    weight = decide(ClipCov(**everything), tokens).coefficients.weight
    assert weight is not None and torch.equal(weight == 0, (cov > 0) & ~clipped)
    weight = decide(ClipCov(**everything, exclude_clipped=False), tokens).coefficients.weight
    assert weight is not None and torch.equal(weight == 0, cov > 0)


def test_clip_cov_draws_every_candidate_equally_often() -> None:
    tokens = batch(0)
    candidates = covariances(tokens) > 0.3
    n, rounds = int(candidates.sum()), 2000
    k = max(1, int(0.05 * len(tokens)))
    control = ClipCov(fraction=0.05, low=0.3, high=1e6, exclude_clipped=False)
    counts = torch.zeros(len(tokens))
    position = torch.arange(len(tokens))
    for step in range(rounds):
        keyed = Tokens(
            logps=tokens.logps.detach(),
            old_logps=tokens.old_logps,
            advantages=tokens.advantages,
            sequence=tokens.sequence,
            num_sequences=tokens.num_sequences,
            key=token_keys(0, step, tokens.sequence, position),
        )
        weight = decide(control, keyed).coefficients.weight
        assert weight is not None
        counts += weight == 0
    share = k / n
    deviation = (rounds * share * (1 - share)) ** 0.5
    assert n > 2 * k
    assert (counts[candidates] - rounds * share).abs().max() < 5 * deviation
