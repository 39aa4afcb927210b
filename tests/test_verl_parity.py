"""Against verl itself: its own losses, its configuration and its engine; skipped where verl is not installed."""

import inspect
from pathlib import Path
from typing import Any

import fake_verl
import pytest
import torch
from test_verl import B, T, actor, batch, grad_of, keyed_tokens, run
from torch import Tensor

from rlvr.controls import LocalReduce, apply  # noqa: F401

pytest.importorskip("verl", reason="verl is not installed; see docs/verl.md")

from verl.trainer.ppo import core_algos
from verl.workers import config as verl_config
from verl.workers.utils import losses

EXACT = {"rtol": 0.0, "atol": 1e-10}
REGION = {"low": 0.1, "high": 0.15}
RATIOS = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.15}
ALL_CANDIDATES = {"fraction": 1.0, "low": 0.05, "high": 3.0}  # more than there are: verl's random draw takes all
SEQUENCES = "seq-mean-token-mean"

# verl's loss, its settings of the actor and of policy_loss, and our section for the same.
PAIRS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "ppo_clip": ("vanilla", RATIOS, {}, {"surrogate": {"name": "ppo_clip", "dual_clip": 3.0, **REGION}}),
    "dual_clip": (
        "vanilla",
        {**RATIOS, "clip_ratio_c": 1.2},
        {},
        {"surrogate": {"name": "ppo_clip", "dual_clip": 1.2, **REGION}},
    ),
    "clip_cov": (
        "clip_cov",
        RATIOS,
        {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.05, "clip_cov_ub": 3.0},
        {"surrogate": {"name": "ppo_clip", **REGION}, "controls": [{"name": "clip_cov", **ALL_CANDIDATES}]},
    ),
    "kl_cov": (
        "kl_cov",
        {},
        {"kl_cov_ratio": 0.3, "ppo_kl_coef": 0.7},
        {"controls": [{"name": "kl_cov", "fraction": 0.3, "coef": 0.7}]},
    ),
    "gspo": ("gspo", RATIOS, {}, {"surrogate": {"name": "gspo", **REGION}}),
    "sapo": ("sapo", {"tau_pos": 1.5, "tau_neg": 2.5}, {}, {"surrogate": {"name": "sapo", "tau_pos": 1.5, "tau_neg": 2.5}}),
    "gmpo": ("geo_mean", RATIOS, {}, {"surrogate": {"name": "gmpo", **REGION}}),
    "gpg": ("gpg", {}, {}, {"surrogate": "gpg"}),
    "cispo": ("cispo", RATIOS, {}, {"surrogate": {"name": "cispo", "ratio_low": 0.9, "ratio_high": 1.15}}),
}
