"""Which measurement says that a checkpoint is the best one, known before anything is measured."""

from typing import TYPE_CHECKING

from rlvr.errors import ConfigError

if TYPE_CHECKING:
    from rlvr.trainers.config import PolicyConfig

DEFAULT = "heldout/reward"
SCHEDULERS = ("reduce_lr_on_plateau", "greedy")  # which follow that measurement, too


def choose_best(args: "PolicyConfig") -> None:
    """Set `metric_for_best_model` where something follows it, by default to the held-out reward: transformers' own
    default is a loss, which an evaluation does not compute. Raises: ConfigError for one that none measures.
    """
    follows = args.load_best_model_at_end or args.save_strategy == "best" or args.lr_scheduler_type in SCHEDULERS
    if args.metric_for_best_model is None:
        if not follows:
            return
        args.metric_for_best_model = DEFAULT
    measured = _measured(args.num_generations_eval or args.num_generations)
    if not _is_one(args.metric_for_best_model, measured):
        raise ConfigError(
            f"metric_for_best_model={args.metric_for_best_model!r}: an evaluation samples and scores, with no loss; "
            f"use one of {', '.join(measured)} (of one of several evaluations: NAME_{DEFAULT})"
        )
    if args.greater_is_better is False:
        raise ConfigError(
            f"greater_is_better=False: the worst checkpoint by metric_for_best_model={args.metric_for_best_model} "
            "would be the best one; unset it"
        )


def _measured(samples: int) -> list[str]:
    """What `heldout.py` adds to an evaluation of so many samples per prompt, without transformers' "eval_"."""
    return [DEFAULT, *(f"heldout/pass_at_{2**i}" for i in range(samples.bit_length()))]


def _is_one(name: str, measured: list[str]) -> bool:
    given = name.removeprefix("eval_")
    return any(given == one or given.endswith(f"_{one}") for one in measured)
