"""KL to a reference policy, as a control: it holds the policy, and with it its entropy, near the reference's."""

from dataclasses import dataclass
from typing import ClassVar

from rlvr.controls.base import Control, Outcome, Scope, in_loss_precision, required
from rlvr.controls.entropy import check_coef, constant
from rlvr.surrogates import Clipped
from rlvr.types import Coefficients, Mean, Reduce, Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceKl(Control):
    """Pay for distance from the reference policy: the loss gets coef (exp(d) - d - 1), d = log pi_ref - log pi.

    coef: >= 0, GRPO's beta; 0 is no penalty at all.
    Raises: ValueError if coef is negative or not finite.
    Metrics: reference_kl/coef; the KL itself is policy/reference_kl.
    Ref: Shao et al. 2024, arXiv 2402.03300, Eq. 4.
    Differs: none from `beta`, in whose place it stands so that it composes with other controls; like it, it is
    multiplied by the importance ratio where `use_bias_correction_kl` says so, which is TRL's default. No lever: it
    pulls entropy toward the reference's, up from below and down from above.
    """

    coef: float = 0.001

    name: ClassVar[str] = "reference_kl"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"ref_logps"} if self.coef else ())

    @property
    def idle(self) -> bool:
        return self.coef == 0

    @property
    def scope(self) -> Scope:
        """Tokens share nothing, and the gradient is that of the current policy's KL."""
        return "micro_batch"

    def __post_init__(self) -> None:
        check_coef("coef", self.coef)

    def __call__(self, tokens: Tokens, clipped: Clipped, reduce: Reduce) -> Outcome:
        coef, penalty = constant(self.coef, tokens), None
        if self.coef:
            required(tokens.ref_logps, "ref_logps")
            penalty = in_loss_precision(coef, tokens)
        return Outcome(Coefficients(reference=penalty), {"reference_kl/coef": Mean.of(coef)})
