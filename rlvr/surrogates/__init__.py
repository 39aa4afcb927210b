"""Policy-gradient surrogates by name. Adding one is a class in this folder and a line in `SURROGATES`."""

from collections.abc import Mapping
from typing import Any

from rlvr.surrogates.base import LOG_RATIO_LIMIT, Clipped, Surrogate, log_ratio
from rlvr.surrogates.per_sequence import Gmpo, Gspo
from rlvr.surrogates.per_token import Cispo, Dppo, Gpg, PpoClip, Sapo, Unclipped

SURROGATES: Mapping[str, Any] = {
    "ppo_clip": PpoClip,
    "unclipped": Unclipped,
    "gpg": Gpg,
    "sapo": Sapo,
    "cispo": Cispo,
    "dppo": Dppo,
    "gspo": Gspo,
    "gmpo": Gmpo,
}
"""Surrogates by the name that `surrogate` gives them."""

__all__ = [
    "LOG_RATIO_LIMIT",
    "SURROGATES",
    "Cispo",
    "Clipped",
    "Dppo",
    "Gmpo",
    "Gpg",
    "Gspo",
    "PpoClip",
    "Sapo",
    "Surrogate",
    "Unclipped",
    "log_ratio",
]
