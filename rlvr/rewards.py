"""The reward function a trainer calls: text out of completions, verdicts from the pool, failures counted.

A completion that could not be judged gets None, which TRL treats as "no reward": it is left out of its group's
baseline and has no advantage. It never gets 0, which would teach the policy that the answer was wrong.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from rlvr.verifier_pool import Verdict, VerifierPool

logger = logging.getLogger(__name__)

Message = dict[str, Any]
_SHOWN = 300  # characters of a completion in a warning


def completion_text(completion: str | Sequence[Message]) -> str:
    """The text of a completion: itself, or the content of its last assistant message that has any ("" if none)."""
    if isinstance(completion, str):
        return completion
    for message in reversed(completion):
        content = message.get("content")
        if message.get("role", "assistant") != "assistant" or not content:
            continue
        return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    return ""


class VerifierReward:
    """A reward function with TRL's signature over a VerifierPool.

    columns: dataset columns sent to the verifier besides the completion ("answer" must be one of them).
    stop: where a completion is cut before it is judged. A plain few-shot prompt makes a model go on with an example of
    its own; what it says there is not its answer.
    Metrics, at every call and on every rank: reward/verifier_timeouts and reward/verifier_errors (fraction of the
    completions), time/verify (seconds).
    """

    def __init__(self, pool: VerifierPool, columns: Sequence[str] = ("answer",), stop: str | None = None):
        self.pool, self.columns, self.stop = pool, tuple(columns), stop
        self.__name__ = pool.verify.rpartition(":")[2]
        self._warned: set[str] = set()

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str | Sequence[Message]],
        completion_ids: Sequence[Any] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """One reward per completion, None where the verifier failed. `columns` are the dataset's, one value per row.

        Raises: KeyError for a column that is missing; ConfigError when the verifier cannot start at all.
        """
        missing = [name for name in self.columns if name not in columns]
        if missing:
            raise KeyError(
                f"reward {self.__name__!r} needs the dataset columns {missing}; it was given {sorted(columns)}"
            )
        start = time.perf_counter()
        verdicts = self.pool.score(
            [
                {"completion": self._judged_part(completion), **{name: columns[name][i] for name in self.columns}}
                for i, completion in enumerate(completions)
            ]
        )
        self._warn(completions, verdicts)
        if log_metric is not None:
            total = max(1, len(verdicts))
            log_metric("reward/verifier_timeouts", sum(v.failure == "timeout" for v in verdicts) / total)
            log_metric("reward/verifier_errors", sum(v.failure == "error" for v in verdicts) / total)
            log_metric("time/verify", time.perf_counter() - start)
        return [verdict.value for verdict in verdicts]

    def _judged_part(self, completion: str | Sequence[Message]) -> str:
        text = completion_text(completion)
        return text.split(self.stop, 1)[0] if self.stop else text

    def _warn(self, completions: Sequence[str | Sequence[Message]], verdicts: list[Verdict]) -> None:
        """Log the first failure of each kind (timeout, and each exception type) with its completion."""
        for completion, verdict in zip(completions, verdicts, strict=True):
            kind = verdict.message.partition(":")[0]
            if verdict.failure is None or kind in self._warned:
                continue
            self._warned.add(kind)
            logger.warning(
                "verifier %r: %s (%s) on completion %.*s; such completions get no reward and are counted in "
                "reward/verifier_%ss; further ones like it are not logged",
                self.__name__,
                verdict.failure,
                verdict.message,
                _SHOWN,
                repr(completion_text(completion)),
                verdict.failure,
            )
