"""Where TRL's names become ours: keys of its batch dicts, arguments of its forward, keys of its metrics."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlvr.types import Coefficients, Reduce, Tokens, token_keys

# Extra inputs of the model that TRL carries in a batch (images and the like); passed through untouched.
FORWARD_KEYS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)
# TRL's metric -> ours. Both are means over the rollout that TRL has already reduced over ranks.
METRIC_NAMES = {
    "reward": "reward/mean",
    "reward_std": "reward/std",
    "completions/mean_length": "rollout/completion_length",
    "completions/max_length": "rollout/completion_length_max",
    "completions/clipped_ratio": "rollout/truncated",
}
# What the verifiers report through TRL's `log_metric`, which flushes it into its own metrics once per rollout.
VERIFIER_METRICS = ("reward/verifier_timeouts", "reward/verifier_errors")
# TRL's metrics that ours replace, by a definition that does not depend on micro-batches or logging intervals.
REPLACED_METRICS = (
    "frac_reward_zero_std",
    "sampling/importance_sampling_ratio/mean",
    "sampling/sampling_logp_difference/mean",
    "sampling/sampling_logp_difference/max",
    "step_time",
)
# Ours in TRL's batch, which it shuffles and splits with everything else: (B,), (B, T), or a scalar of the whole
# rollout.
SEQUENCE = "rlvr_sequence"
REWARD = "rlvr_reward"
NUM_TOKENS = "rlvr_num_tokens"
NUM_SEQUENCES = "rlvr_num_sequences"
NUM_VALUED = "rlvr_num_valued"
_VALUES, _RETURNS = "rlvr_values", "rlvr_returns"
_COEFFICIENT = "rlvr_coefficient_"
_MEASURED = "rlvr_measured_"
ROUTES = "rlvr_routes"  # which experts each sequence (B, K) was sent to by the policy that made the rollout


def forward_arguments(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `_get_per_token_logps_and_entropies`."""
    return {
        "input_ids": torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
        "attention_mask": torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
        "logits_to_keep": batch["completion_ids"].size(1),
        **{key: batch[key] for key in FORWARD_KEYS if key in batch},
    }


def trained_mask(batch: Mapping[str, Any]) -> Tensor:
    """(B, T) bool: response tokens that the policy produced; tool output and padding are not."""
    mask = batch["completion_mask"]
    return (mask * batch["tool_mask"] if "tool_mask" in batch else mask).bool()


def valued_mask(batch: Mapping[str, Any]) -> Tensor:
    """(B, T) bool: trained tokens of responses that could be scored, so that they have a return."""
    return trained_mask(batch) & ~batch[REWARD].isnan().unsqueeze(1)


def kept_mask(batch: Mapping[str, Any]) -> Tensor:
    """(B, T) bool: trained tokens that no control has taken out of the loss so far."""
    mask = trained_mask(batch)
    for key, value in batch.items():
        if key.startswith(_COEFFICIENT) and key.endswith("/keep"):
            mask = mask & value
    return mask


def number_sequences(batch: dict[str, Any], rank: int) -> None:
    """Give each sequence its number in the whole rollout, over all ranks, before TRL shuffles them."""
    rows = batch["completion_ids"].size(0)
    batch[SEQUENCE] = torch.arange(rank * rows, (rank + 1) * rows, device=batch["completion_ids"].device)


def tokens_of(batch: Mapping[str, Any], statistics: Mapping[str, Tensor | None], *, seed: int, step: int) -> Tokens:
    """The trained tokens of a batch.

    statistics: fields of Tokens that a model computed, each (B, T).   seed, step: of the run and of the rollout, for
    the tokens' random keys.
    """
    mask = trained_mask(batch)
    sequence = batch[SEQUENCE].unsqueeze(1).expand_as(mask)
    position = torch.arange(mask.size(1), device=mask.device).expand_as(mask)
    return Tokens.from_padded(
        mask,
        advantages=batch["advantages"],
        rollout_logps=batch.get("sampling_per_token_logps"),
        ref_logps=batch.get("ref_per_token_logps"),
        key=token_keys(seed, step, sequence, position),
        **statistics,
    )


def attach_measured(batch: dict[str, Any], statistics: Mapping[str, Tensor]) -> None:
    """Put the log-probs and entropy (B, T) of the policy that made the rollout into the batch."""
    for name in ("logps", "entropy"):
        batch[f"{_MEASURED}{name}"] = statistics[name]


def measured(batch: Mapping[str, Any], rows: Tensor) -> dict[str, Tensor] | None:
    """What `attach_measured` put into the rollout, of these rows of the batch; None if nothing was."""
    found = {key.removeprefix(_MEASURED): x[rows] for key, x in batch.items() if key.startswith(_MEASURED)}
    return found or None


def tell_advantages(logs: Mapping[str, Any], of_rollout: Tensor) -> None:
    """Put the advantages of a rollout's completions in place of those of groups in TRL's table of completions."""
    told = logs["advantages"]
    for _ in range(min(len(told), len(of_rollout))):
        told.pop()
    told.extend(of_rollout.tolist())


def rollout_prompts(logs: Mapping[str, Any], completions: int) -> list[Any]:
    """Of each of a rollout's completions, over all ranks, out of TRL's table of completions, which every rank has."""
    return list(logs["prompt"])[-completions:]


def attach_values(batch: dict[str, Any], values: Tensor, returns: Tensor, reduce: Reduce) -> None:
    """Put a critic's values and what they should have been, each (B, T), into the rollout."""
    batch[_VALUES], batch[_RETURNS] = values, returns
    batch[NUM_VALUED] = reduce.sum(valued_mask(batch).sum())


def values_of(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The values and returns (B, T) that `attach_values` put into the rollout."""
    return batch[_VALUES], batch[_RETURNS]


def take(batch: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
    """Some rows of a batch; what belongs to the whole of it stays."""
    return {key: x[rows] if isinstance(x, Tensor) and x.dim() > 0 else x for key, x in batch.items()}


def padded_mask(lists: Sequence[Sequence[int]], like: Tensor) -> Tensor:
    """Masks of different lengths as bool, in the shape (B, T) of `like`; false where they have ended."""
    padded = torch.zeros_like(like, dtype=torch.bool)
    for row, values in enumerate(lists):
        padded[row, : len(values)] = torch.tensor(values, dtype=torch.bool)
    return padded


def attach(batch: dict[str, Any], by_control: Mapping[str, Coefficients]) -> None:
    """Put each control's coefficients [N] into the batch as (B, T) tensors."""
    mask = trained_mask(batch)
    for control, coefficients in by_control.items():
        for name, value in coefficients.present().items():
            padded = torch.zeros(mask.shape, dtype=value.dtype, device=mask.device)
            padded[mask] = value
            batch[f"{_COEFFICIENT}{control}/{name}"] = padded


def attached(batch: Mapping[str, Any]) -> dict[str, Coefficients]:
    """The coefficients [N] that `attach` put into the rollout, by control, for the tokens of this micro-batch."""
    mask = trained_mask(batch)
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in batch.items():
        if key.startswith(_COEFFICIENT):
            control, _, name = key.removeprefix(_COEFFICIENT).partition("/")
            found.setdefault(control, {})[name] = value[mask]
    return {control: Coefficients(**values) for control, values in found.items()}


def attach_step(batches: Sequence[dict[str, Any]], control: str, keep: Tensor) -> None:
    """Put which of `step_tokens` [N] a control keeps into the step's micro-batches."""
    masks = [kept_mask(batch) for batch in batches]
    for batch, mask, part in zip(batches, masks, keep.split([int(m.sum()) for m in masks]), strict=True):
        batch[f"{_COEFFICIENT}{control}/keep"] = torch.zeros_like(mask).masked_scatter(mask, part)


def step_tokens(batches: Sequence[Mapping[str, Any]], *, seed: int, step: int) -> Tokens:
    """The tokens of an optimizer step's micro-batches that controls have kept so far; only their places are known."""
    mask = [kept_mask(batch) for batch in batches]
    rows = torch.cat([batch[SEQUENCE] for batch in batches])
    sequence = torch.arange(len(rows), device=rows.device)
    per_batch = sequence.split([len(m) for m in mask])
    sequence = torch.cat([s.unsqueeze(1).expand_as(m)[m] for s, m in zip(per_batch, mask, strict=True)])
    position = torch.cat([torch.arange(m.size(1), device=m.device).expand_as(m)[m] for m in mask])
    unknown = torch.zeros(len(sequence), device=sequence.device)
    return Tokens(
        logps=unknown,
        old_logps=unknown,
        advantages=unknown,
        sequence=sequence,
        num_sequences=len(rows),
        position=position,
        key=token_keys(seed, step, rows[sequence], position),
    )


def engine_correction(batch: Mapping[str, Any]) -> dict[str, Coefficients]:
    """TRL's engine/trainer importance correction, (B, T) or (B, 1), as the weight of one more control, if it is on."""
    ratio = batch.get("importance_sampling_ratio")
    if ratio is None:
        return {}
    mask = trained_mask(batch)
    return {"engine_correction": Coefficients(weight=ratio.expand_as(mask)[mask])}


def count_trained(batch: dict[str, Any], reduce: Reduce) -> dict[str, float]:
    """Set the rollout's global denominators in the batch; returns its sizes as metrics.

    A token that a control took out (`keep`) counts nowhere; a sequence without tokens is no part of a mean.
    """
    mask = kept_mask(batch)
    counts = torch.stack(
        [
            mask.sum(),
            mask.any(dim=1).sum(),
            batch["completion_mask"].sum(),
            batch["prompt_mask"].sum(),
            torch.tensor(mask.size(0), device=mask.device),
            batch[REWARD].isnan().sum(),
        ]
    )
    counts = reduce.sum(counts)
    batch[NUM_TOKENS], batch[NUM_SEQUENCES] = counts[0], counts[1]
    _, _, completion, prompt, rows, unscored = counts.tolist()
    return {
        "rollout/tokens": completion,
        "rollout/prompt_length": prompt / rows,
        "reward/unscored": unscored / rows,
    }


def take_rollout_metrics(trl_metrics: dict[str, list[float]]) -> dict[str, float]:
    """The rollout's metrics under our names; those already under our names leave TRL's table, which is logged too."""
    found = {ours: trl_metrics[theirs][-1] for theirs, ours in METRIC_NAMES.items() if trl_metrics.get(theirs)}
    found |= {name: trl_metrics[name][-1] for name in VERIFIER_METRICS if trl_metrics.get(name)}
    for name in (*VERIFIER_METRICS, "time/verify"):
        trl_metrics.pop(name, None)
    return found


def rename_metrics(trl_metrics: dict[str, list[float]]) -> None:
    """Log ours instead of TRL's where both measure the same; what only TRL measures stays under TRL's name."""
    for name in (*METRIC_NAMES, *REPLACED_METRICS):
        trl_metrics.pop(name, None)
