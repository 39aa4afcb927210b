"""What a run keeps of its rollouts: a few sequences, with what the loss saw of each of their tokens, and what each
group earned.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlvr.controls.covariance import products
from rlvr.controls.steer import CHANGED
from rlvr.monitor.groups import Groups, prompt_text
from rlvr.theory import ESTIMATORS, TokenStatistics
from rlvr.trainers import trl_bridge as bridge
from rlvr.trainers.dynamics import Loss, pushes
from rlvr.trainers.steering import combined
from rlvr.types import Coefficients, Tokens

if TYPE_CHECKING:
    from rlvr.trainers.policy import PolicyTrainer


@dataclass(frozen=True, slots=True)
class Row:
    """A sampled sequence.   columns: what is known before the step is closed.   logps, advantages: its tokens' [n]."""

    columns: Mapping[str, Any]
    logps: Tensor
    advantages: Tensor

    def closed(self, means: Tensor | None) -> dict[str, Any]:
        """All its columns.   means: of log-prob and advantage over the step's tokens, as `token_means` has them."""
        if means is None:
            return {**self.columns}
        return {**self.columns, "covariance": products(self.logps, self.advantages, means).float().tolist()}


class TokenSampler:
    """Keeps the first sequences of each rollout, the first time that they are trained on."""

    def __init__(self, trainer: "PolicyTrainer") -> None:
        self._trainer = trainer
        self.clear()

    def clear(self) -> None:
        """What an interrupted call has left is of no use."""
        self._seen: set[int] = set()
        self._sampled_step = -1
        self._rows: list[Row] = []

    @property
    def sampled(self) -> list[int]:
        """The sequences of the rollout at hand whose tokens have been recorded."""
        return sorted(self._seen)

    @sampled.setter
    def sampled(self, sequences: list[int]) -> None:
        self._seen, self._sampled_step = set(sequences), self._trainer._rollout_step

    def start_rollout(self, step: int) -> None:
        """Sample anew; of several rollouts in one step only the first is sampled, so that sequence numbers are
        unique.
        """
        if step != self._sampled_step:
            self._sampled_step = step
            self._seen.clear()

    def add(
        self, inputs: Mapping[str, Any], tokens: Tokens, by_control: Mapping[str, Coefficients], loss: Loss
    ) -> None:
        """One micro-batch.

        by_control: the coefficients of its tokens.   loss: of tokens and coefficients, scaled as the one that is
        trained on.
        """
        limit, numbers = self._trainer.args.record_sequences, inputs[bridge.SEQUENCE].tolist()
        chosen = {row: n for row, n in enumerate(numbers) if n < limit and n not in self._seen}
        if not chosen:
            return
        self._seen.update(chosen.values())
        names = dict.fromkeys((*self._trainer.steering.controls, *by_control))
        touched = {f"control:{name}": _touched(by_control.get(name, Coefficients()), tokens) for name in names}
        coefficients = combined(by_control)
        estimator, predicted = self._predicted(tokens, coefficients, loss)
        for row, number in chosen.items():
            mine = tokens.sequence == row
            columns = {
                **self._columns(inputs, tokens, coefficients, row, number),
                "predicted": _numbers(predicted[mine]),
                "estimator": estimator,
                **{name: x[mine].tolist() for name, x in touched.items()},
            }
            logps = tokens.logps[mine].detach()
            self._rows.append(Row(columns, logps, tokens.advantages[mine].to(logps.dtype)))

    def take(self, means: Tensor | None) -> list[dict[str, Any]]:
        """The rows of the step, which is closed now, all of the same columns.   means: as in `Row.closed`."""
        rows = [row.closed(means) for row in self._rows]
        self._rows = []
        names = dict.fromkeys(name for row in rows for name in row)
        return [{name: row.get(name) for name in names} for row in rows]

    def _predicted(self, tokens: Tokens, coefficients: Coefficients, loss: Loss) -> tuple[str, Tensor]:
        """The estimator's name, and the entropy change of each token by this step, nats [N].

        To first order, of an SGD step; what an entropy bonus adds by itself is not in it.
        """
        assert tokens.entropy is not None
        estimator = "single_logit" if tokens.mean_discriminator is None else "discriminator"
        known = TokenStatistics(
            logps=tokens.logps.detach(),
            entropy=tokens.entropy.detach(),
            step=self._scale * pushes(loss, tokens, coefficients)[0].double(),
            mean_discriminator=tokens.mean_discriminator,
        )
        return estimator, ESTIMATORS[estimator](known)

    @property
    def _scale(self) -> float:
        """By which a rank's gradient moves the weights."""
        return self._trainer.learning_rate / self._trainer.accelerator.num_processes

    def _columns(
        self, inputs: Mapping[str, Any], tokens: Tokens, coefficients: Coefficients, row: int, number: int
    ) -> dict[str, Any]:
        tokenizer = self._trainer._tokenizer
        mine = tokens.sequence == row
        mask = bridge.trained_mask(inputs)[row]
        ids = inputs["completion_ids"][row][mask].tolist()
        prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()]
        measured = ("entropy", "logps", "old_logps", "rollout_logps")
        present = coefficients.present()
        return {
            "sequence": number,
            "prompt_index": number // self._trainer.num_generations,
            "prompt": tokenizer.decode(prompt, skip_special_tokens=True),
            "completion": tokenizer.decode(ids),
            "reward": float(inputs[bridge.REWARD][row]),
            "advantage": float(tokens.advantages[mine].float().mean()) if len(ids) else 0.0,
            "token_ids": ids,
            "tokens": [tokenizer.decode([i]) for i in ids],
            **{name: None if (x := getattr(tokens, name)) is None else _numbers(x[mine]) for name in measured},
            **{name: _numbers(present[name][mine]) for name in ("weight", "drift") if name in present},
            **({} if coefficients.keep is None else {"keep": coefficients.keep[mine].tolist()}),
            **_of_critic(inputs, row, mask),
        }


def groups_of(prompts: Sequence[Any], rewards: Tensor, size: int, pass_reward: float) -> Groups:
    """The groups of a rollout.

    prompts, rewards: of each completion, those of a group together; a reward of NaN is none.   size: of a group.
    pass_reward: the least reward of a completion that counts as correct.
    """
    of_group = rewards.view(-1, size)
    return Groups(
        prompts=[prompt_text(prompt) for prompt in prompts[::size]],
        passed=(of_group >= pass_reward).sum(1).tolist(),
        scored=(~of_group.isnan()).sum(1).tolist(),
        reward=of_group.double().nanmean(1).tolist(),
    )


def _numbers(x: Tensor) -> list[float]:
    numbers: list[float] = x.detach().float().tolist()
    return numbers


def _touched(coefficients: Coefficients, tokens: Tokens) -> Tensor:
    """Which tokens [N] have a coefficient that is not neutral; a weight that is CHANGED from 1 at most, is."""
    touched = torch.zeros_like(tokens.logps, dtype=torch.bool)
    for name, x in coefficients.present().items():
        touched |= ~x if name == "keep" else (x - 1).abs() > CHANGED if name == "weight" else x != 0
    return touched


def _of_critic(inputs: Mapping[str, Any], row: int, mask: Tensor) -> dict[str, list[float]]:
    """Columns that only a run with a critic has: of each token of a row's mask [T]."""
    if inputs["advantages"].dim() == 1:
        return {}
    columns = {"advantages": inputs["advantages"], "values": bridge.values_of(inputs)[0]}
    return {name: _numbers(x[row][mask]) for name, x in columns.items()}
