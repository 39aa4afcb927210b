"""What `rlvr serve` adds to vLLM's worker: new weights from shared memory, and an end together with the server.

vLLM imports this module by name in its worker, before the model is loaded. It must not be imported anywhere else.
"""

import atexit
import contextlib
import os
import select
import signal
import threading
import time
from typing import Any

from rlvr.rollout import weight_file
from rlvr.rollout.cpu_weights import finish, load_some, require_loadable, weights_kept
from rlvr.rollout.serve import SERVER

_GRACE = 5.0  # seconds that the engine has to end by itself
_KEPT = weights_kept()
_KEPT.__enter__()  # for as long as this process lives
_PATH = weight_file.new_path()
atexit.register(_PATH.unlink, missing_ok=True)


def _end_with(server: int, engine: int) -> None:
    """Wait for the server's end and end what it would leave behind if it was killed: the engine, and this worker."""
    with contextlib.suppress(ProcessLookupError):
        try:
            watched = select.poll()
            watched.register(os.pidfd_open(server), select.POLLIN)
            watched.poll()
        except ProcessLookupError:
            raise
        except OSError:  # an old kernel
            while os.path.exists(f"/proc/{server}"):
                time.sleep(1.0)
    _PATH.unlink(missing_ok=True)
    for how in (signal.SIGTERM, signal.SIGKILL):
        if os.getppid() == engine:
            os.kill(engine, how)
            time.sleep(_GRACE)
    os._exit(1)


if SERVER in os.environ:
    threading.Thread(target=_end_with, args=(int(os.environ[SERVER]), os.getppid()), daemon=True).start()


class ServerWorker:
    """Mixed into the worker by --worker-extension-cls; its methods are called by POST /collective_rpc.

    What trying again would not change is returned as an error in one line: vLLM would answer an exception as it
    answers the death of its engine.
    """

    rlvr_loaded: set[str]
    rlvr_version: str

    def rlvr_state(self) -> dict[str, Any]:
        """What a client must know; a server that was started again has another path."""
        worker: Any = self
        config = worker.model_config
        return {
            "path": str(_PATH),
            "model": str(config.model),
            "dtype": str(config.dtype).removeprefix("torch."),
            "max_model_len": config.max_model_len,
            "logprobs_mode": str(config.logprobs_mode),
            "config": config.hf_text_config.to_dict(),
        }

    def rlvr_load(self, path: str, first: bool, version: str = "") -> dict[str, Any]:
        """Load a part of new weights. path: where it is, which must be where this worker said."""
        return self._rlvr_answer(path, lambda model: self._rlvr_load(model, first, version))

    def rlvr_finish(self, path: str, version: str = "") -> dict[str, Any]:
        """After the last part: every weight must have been reached."""
        return self._rlvr_answer(path, lambda model: self._rlvr_finish(model, version))

    def _rlvr_load(self, model: Any, first: bool, version: str) -> None:
        if first:
            require_loadable(model)
            self.rlvr_loaded, self.rlvr_version = set(), version
        self._rlvr_require(version)
        self.rlvr_loaded |= load_some(model, weight_file.read(_PATH, version))

    def _rlvr_finish(self, model: Any, version: str) -> None:
        self._rlvr_require(version)
        finish(model, self.rlvr_loaded)

    def _rlvr_require(self, version: str) -> None:
        if version != self.rlvr_version:
            raise ValueError("another run sends weights to this server: start one server for each run")

    def _rlvr_answer(self, path: str, work: Any) -> dict[str, Any]:
        worker: Any = self
        if path != str(_PATH):
            return {"error": f"{path} is not where this server takes weights", "another": True}
        try:
            work(worker.model_runner.get_model())
        except Exception as error:
            return {"error": " ".join(f"{type(error).__name__}: {error}".split()), "another": False}
        finally:
            _PATH.unlink(missing_ok=True)
        return {"error": None}
