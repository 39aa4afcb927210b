"""Fine-tune Hugging Face LLMs with RL from verifiable rewards while the policy's entropy is under control.

`import rlvr` is cheap: the trainers, which need trl, are loaded when first asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlvr.trainers.config import GRPOConfig as GRPOConfig
    from rlvr.trainers.grpo import GRPOTrainer as GRPOTrainer
    from rlvr.trainers.ppo import PPOTrainer as PPOTrainer
    from rlvr.trainers.ppo_config import PPOConfig as PPOConfig

__version__ = "0.1.0"
__all__ = ["GRPOConfig", "GRPOTrainer", "PPOConfig", "PPOTrainer", "__version__"]

_LAZY = {
    "GRPOConfig": "rlvr.trainers.config",
    "GRPOTrainer": "rlvr.trainers.grpo",
    "PPOConfig": "rlvr.trainers.ppo_config",
    "PPOTrainer": "rlvr.trainers.ppo",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'rlvr' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
