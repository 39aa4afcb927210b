"""How one update changes a policy's entropy: exactly, to first order, and as each published estimator has it.

For one state with logits z and p = softmax(z): H = -sum_k p_k log p_k, and dH/dz_k = -S_k with the discriminator
S_k = p_k (log p_k + H). So an update dz changes entropy by -sum_k S_k dz_k + O(dz^2), which is Lemma 1 of Cui et al.
2025 (arXiv 2505.22617), -Cov_{k~p}(log p_k, dz_k), because E_p[log p] = -H. The theorems differ in the update alone:

    predicted = first_order_change(logits, policy_gradient_step(logits, advantages, eta))    # their Theorem 1
    predicted = first_order_change(logits, natural_gradient_step(advantages, eta))           # their Theorem 2
    predicted = first_order_change(logits, token_step(logits, token, alpha))                 # -alpha (S_k - E_S)

and `exact_change` takes the same update. Everything here is float64, over any leading dimensions [...]; a logit of
-inf is a token of probability 0, which adds nothing.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from rlvr.types import Reduce

# ------------------------------------------------------------------------------------------------ one distribution


def _distribution(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(p, log p) [..., V]; log p is 0 where p is 0, so that products with p are 0 there."""
    logp = torch.log_softmax(logits.double(), dim=-1)
    p = logp.exp()
    return p, logp.masked_fill(p == 0, 0.0)


def entropy(logits: Tensor) -> Tensor:
    """H = -sum_k p_k log p_k in nats, [..., V] -> [...]."""
    p, logp = _distribution(logits)
    return -(p * logp).sum(-1)


def discriminator(logits: Tensor) -> Tensor:
    """S_k = p_k (log p_k + H) = -dH/dz_k, [..., V] -> [..., V]; positive exactly where p_k > exp(-H).

    Ref: arXiv 2602.03392.
    """
    p, logp = _distribution(logits)
    return p * (logp + entropy(logits).unsqueeze(-1))


def mean_discriminator(logits: Tensor) -> Tensor:
    """E_S = sum_k p_k S_k, [..., V] -> [...]."""
    return (_distribution(logits)[0] * discriminator(logits)).sum(-1)


# ------------------------------------------------------------------------------------------------- updates of logits


def single_logit_step(logits: Tensor, token: Tensor, size: Tensor | float) -> Tensor:
    """size e_k: the sampled token's logit alone moves, and dH = -size S_k.

    token: int64 [...].   size: [...] or a number.
    """
    return _one_hot(logits, token) * _column(size)


def token_step(logits: Tensor, token: Tensor, size: Tensor | float) -> Tensor:
    """size (e_k - p), the gradient step on size log p_k: dH = -size (S_k - E_S), E_S of `mean_discriminator`.

    The token's part of a GRPO update, with size = learning rate * ratio * advantage. Ref: arXiv 2602.03392.
    """
    return (_one_hot(logits, token) - _distribution(logits)[0]) * _column(size)


def own_logit_step(logits: Tensor, token: Tensor, size: Tensor | float) -> Tensor:
    """size (1 - p_k) e_k, what STEER assumes of `token_step`: dH = -size (1 - p_k) S_k.

    The other logits also move to first order, so this misses part of the change. Ref: arXiv 2510.10150.
    """
    one = _one_hot(logits, token)
    return one * (1 - _distribution(logits)[0]) * _column(size)


def policy_gradient_step(logits: Tensor, advantages: Tensor, eta: float) -> Tensor:
    """eta p_k A_k, the expected policy-gradient step for advantages [..., V] with mean 0 under p.

    dH = -eta Cov_{k~p}(log p_k, p_k A_k), which is also the mean of `token_step` with sizes eta A_k over k ~ p.
    Ref: Cui et al. 2025, arXiv 2505.22617, Proposition 1 and Theorem 1.
    """
    return eta * _distribution(logits)[0] * advantages.double()


def natural_gradient_step(advantages: Tensor, eta: float) -> Tensor:
    """eta A_k: dH = -eta Cov_{k~p}(log p_k, A_k). Ref: Cui et al. 2025, arXiv 2505.22617, Theorem 2."""
    return eta * advantages.double()


def entropy_bonus_step(logits: Tensor, size: float) -> Tensor:
    """size dH/dz, the gradient step on size H: dH = size sum_k S_k^2, never negative.

    size: learning rate * coefficient of the bonus.
    """
    return -size * discriminator(logits)


# ------------------------------------------------------------------------------------------------------ their effect


def exact_change(logits: Tensor, step: Tensor) -> Tensor:
    """H(logits + step) - H(logits) [...]."""
    return entropy(logits.double() + step) - entropy(logits)


def first_order_change(logits: Tensor, step: Tensor) -> Tensor:
    """-Cov_{k~p}(log p_k, step_k) = -sum_k S_k step_k [...]; a shift of all logits counts for nothing.

    Ref: Cui et al. 2025, arXiv 2505.22617, Lemma 1.
    """
    return -(discriminator(logits) * step).sum(-1)


def expected_own_logit_change(logits: Tensor, old_logits: Tensor, advantages: Tensor, eta: float) -> Tensor:
    """Omega = -eta E_{k~p}[(A_k / p_old,k) p_k (1 - p_k) (log p_k + H)] [...], STEER's estimate for a state.

    The sum over tokens of what `own_logit_step` predicts for sizes eta A_k p_k / p_old,k.
    advantages: [..., V], 0 where the surrogate clips (the paper's I_clip).   eta: includes the paper's 1 / L.
    Ref: arXiv 2510.10150, Eq. 7.
    """
    p, old = _distribution(logits)[0], _distribution(old_logits)[0]
    ratio = torch.where(p > 0, p / old, 0.0)
    return -eta * (ratio * advantages.double() * (1 - p) * discriminator(logits)).sum(-1)


def _one_hot(logits: Tensor, token: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(token, logits.size(-1)).double()


def _column(size: Tensor | float) -> Tensor | float:
    return size.double().unsqueeze(-1) if isinstance(size, Tensor) else size


# ------------------------------------------------------------------------------------- estimators for sampled tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStatistics:
    """What a trainer knows of its sampled tokens, all [N]; the optional ones only where an estimator needs them.

    logps: log p_k of the sampled token.   entropy: H, nats.   step: alpha = -d(loss)/d(logp), how hard the update
    pushes the token's log-prob up; any common factor, such as the learning rate, scales the prediction.
    mean_discriminator: E_S.   covariance: (A - mean A)(logp - mean logp), means over the whole batch and all ranks, of
    `rlvr.controls.covariance.covariance`.
    Raises: ValueError if shapes differ.
    """

    logps: Tensor
    entropy: Tensor
    step: Tensor
    mean_discriminator: Tensor | None = None
    covariance: Tensor | None = None

    def __post_init__(self) -> None:
        for f in fields(self):
            x = getattr(self, f.name)
            if x is not None and x.shape != self.logps.shape:
                raise ValueError(
                    f"TokenStatistics.{f.name} has shape {tuple(x.shape)}, logps has {tuple(self.logps.shape)}"
                )

    @property
    def p(self) -> Tensor:
        return self.logps.double().exp()

    @property
    def discriminator(self) -> Tensor:
        """S [N]; 0 where the log-prob is -inf."""
        return torch.where(self.p > 0, self.p * (self.logps.double() + self.entropy.double()), 0.0)


def _covariance(t: TokenStatistics) -> Tensor:
    return -_known(t.covariance, "covariance").double()


def _single_logit(t: TokenStatistics) -> Tensor:
    return -t.step.double() * t.discriminator


def _steer(t: TokenStatistics) -> Tensor:
    return -t.step.double() * (1 - t.p) * t.discriminator


def _steer_released(t: TokenStatistics) -> Tensor:
    return _steer(t) / t.p.clamp(min=1e-8)  # the release bounds its divisor so


def _discriminator(t: TokenStatistics) -> Tensor:
    return -t.step.double() * (t.discriminator - _known(t.mean_discriminator, "mean_discriminator").double())


ESTIMATORS: Mapping[str, Callable[[TokenStatistics], Tensor]] = {
    "covariance": _covariance,
    "single_logit": _single_logit,
    "steer": _steer,
    "steer_released": _steer_released,
    "discriminator": _discriminator,
}
"""Predicted change of entropy at each token, [N] float64, from statistics of the token.

covariance: -(A - mean A)(logp - mean logp), blind to the step (Clip-Cov and KL-Cov, arXiv 2505.22617).
single_logit: -alpha S.   discriminator: -alpha (S - E_S), exact to first order where states do not share parameters
(arXiv 2602.03392).   steer: -alpha (1 - p) S (arXiv 2510.10150).   steer_released: steer / p, as in STEER's release.
Raises: ValueError if the statistic that the estimator needs is None.
Differs: STEER's release divides by p of the old policy, which is p / ratio; the ratio stands in alpha here.
"""


def _known(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise ValueError(f"TokenStatistics.{name} is None: this estimator needs it, compute it")
    return value


# ------------------------------------------------------------------------------------------ predicted and measured


@dataclass(frozen=True, slots=True)
class Agreement:
    """How a prediction x agrees with a measurement y over tokens, as sums that add over micro-batches and ranks.

    sums: [count, sum x, sum y, sum xx, sum xy, sum yy], float64. Results are floats, NaN with fewer than 3 tokens or
    where x or y does not vary (its standard deviation is below 1e-6 of its root mean square, where sums lose it).
    """

    sums: Tensor

    @classmethod
    def of(cls, predicted: Tensor, measured: Tensor) -> "Agreement":
        """Both [N], of the same tokens. Raises: ValueError if shapes differ."""
        if predicted.shape != measured.shape:
            raise ValueError(f"predicted has shape {tuple(predicted.shape)}, measured has {tuple(measured.shape)}")
        x, y = predicted.detach().double(), measured.detach().double()
        return cls(torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y]).sum(1))

    def __add__(self, other: "Agreement") -> "Agreement":
        return Agreement(self.sums + other.sums)

    def over_ranks(self, reduce: Reduce) -> "Agreement":
        return Agreement(reduce.sum(self.sums))

    @property
    def count(self) -> int:
        return int(self.sums[0])

    @property
    def total_predicted(self) -> float:
        return float(self.sums[1])

    @property
    def total_measured(self) -> float:
        return float(self.sums[2])

    @property
    def slope(self) -> float:
        """Of the least-squares line of measured on predicted: 1 for a prediction of the right size."""
        xx, xy, _ = self._moments()
        return xy / xx

    @property
    def correlation(self) -> float:
        """Pearson's, in [-1, 1]."""
        xx, xy, yy = self._moments()
        return math.nan if math.isnan(xx) else max(-1.0, min(1.0, xy / math.sqrt(xx * yy)))

    @property
    def r2(self) -> float:
        """Share of the measured variance that the least-squares line explains."""
        return self.correlation**2

    def _moments(self) -> tuple[float, float, float]:
        """(var x, cov xy, var y), all NaN where they say nothing."""
        n, x, y, xx, xy, yy = self.sums.tolist()
        if n < 3:
            return math.nan, math.nan, math.nan
        var_x, cov, var_y = xx / n - (x / n) ** 2, xy / n - x / n * y / n, yy / n - (y / n) ** 2
        if not (var_x > 1e-12 * xx / n and var_y > 1e-12 * yy / n):
            return math.nan, math.nan, math.nan
        return var_x, cov, var_y
