"""What watches a run from beside it, on the process that records it: heartbeat, stalls, messages to a chat."""

from collections.abc import Callable, Iterable
from pathlib import Path

from rlvr.alarm import Alert
from rlvr.monitor.heartbeat import EVERY, Doing, Heartbeat, unknown
from rlvr.monitor.webhook import Webhook


class Lookout:
    """No thread runs before `start`, and none after `stop`; a run that goes on may start it again.

    run_dir, stall_after, doing, every: as of Heartbeat.   webhook: an address, None for no messages.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        stall_after: float = 600.0,
        webhook: str | None = None,
        doing: Callable[[], Doing] = unknown,
        every: float = EVERY,
    ) -> None:
        self._run_dir, self._stall_after, self._doing, self._every = Path(run_dir), stall_after, doing, every
        self._webhook = None if webhook is None else Webhook(webhook, self._run_dir.resolve().name)
        self._heartbeat: Heartbeat | None = None

    def start(self, step: int, seconds: Iterable[float] = ()) -> None:
        """step: the last one that was completed.   seconds: as of Heartbeat. Does nothing while it runs."""
        if self._heartbeat is None:
            self._heartbeat = Heartbeat(
                self._run_dir,
                step=step,
                stall_after=self._stall_after,
                seconds=seconds,
                doing=self._doing,
                tell=self.tell,
                every=self._every,
            )

    def tell(self, step: int, alert: Alert) -> None:
        """Send an alert of a step to the webhook."""
        if self._webhook is not None:
            self._webhook.send(step, alert.kind, alert.message)

    def step_done(self, step: int) -> list[Alert]:
        """An optimizer step is completed. Returns what is to stand in its record beside the trainer's own alerts."""
        return [] if self._heartbeat is None else self._heartbeat.step_done(step)

    def stop(self, step: int, failure: str | None = None) -> None:
        """The run has ended.   failure: what stopped it, which is sent to the webhook, too."""
        if self._heartbeat is not None:
            self._heartbeat.close()
            self._heartbeat = None
        if self._webhook is not None:
            if failure is not None:
                self._webhook.send(step, "failed", f"the run failed: {failure}")
            self._webhook.close()
