"""`rlvr watch` as the real command, in a real terminal and into a pipe."""

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlvr.monitor import Recorder

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "-m", "rlvr.cli", "watch", "--interval", "0.1"]


def until(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


class Terminal:
    """The command in a terminal of 24 lines and 80 columns, and all that it has written there."""

    def __init__(self, run_dir: Path) -> None:
        main_end, end = pty.openpty()
        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
        self.process = subprocess.Popen(
            [*COMMAND, str(run_dir)],
            stdin=end,
            stdout=end,
            stderr=end,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        os.close(end)
        self.written = b""
        self._end = main_end
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._end, 65536)
            except OSError:  # the command has closed its end
                return
            if not data:
                return
            self.written += data

    def close(self) -> int:
        status = self.process.wait(30)
        self._thread.join(5)
        os.close(self._end)
        return status

    @property
    def text(self) -> str:
        return self.written.decode(errors="replace")

    @property
    def after_screen(self) -> str:
        """What stays when the other screen is left."""
        return re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", self.text.rpartition("\x1b[?1049l")[2])


def test_watch_follows_a_run_in_a_terminal_to_its_end(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, {"max_steps": 3})
    terminal = Terminal(tmp_path)
    until(lambda: "waiting for the first record" in terminal.text)
    for step in range(1, 4):
        recorder.record_step(step, {"entropy/mean": 1 / step, "reward/mean": 0.5, "time/step": 1.0})
        until(lambda step=step: f"step {step} of 3" in terminal.text)
    assert terminal.process.poll() is None
    recorder.finish()
    assert terminal.close() == 0
    assert "\x1b[?1049h" in terminal.text and "finished" in terminal.after_screen
    assert terminal.after_screen.count("step 3 of 3") == 1 and "Traceback" not in terminal.text


def test_watch_ends_on_ctrl_c_with_the_last_frame(tmp_path: Path) -> None:
    Recorder(tmp_path).record_step(1, {"entropy/mean": 0.5})
    terminal = Terminal(tmp_path)
    until(lambda: "0.500 nats" in terminal.text)
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.close() == 0
    assert "0.500 nats" in terminal.after_screen and "Traceback" not in terminal.text
    assert terminal.text.count("\x1b[?25l") <= terminal.text.count("\x1b[?25h")  # the cursor is back


def test_watch_into_a_pipe_prints_a_frame_for_everything_new(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    process = subprocess.Popen(
        [*COMMAND, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "COLUMNS": "80"}
    )
    assert process.stdout is not None
    seen = [process.stdout.readline(), process.stdout.readline()]
    assert seen[1].startswith("waiting for the first record")
    recorder.record_step(1, {"entropy/mean": 0.5})
    while not seen[-1].startswith("last record"):
        seen.append(process.stdout.readline())
    time.sleep(0.5)  # several looks at nothing new
    recorder.finish()
    rest, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert sum("step 1 ·" in line for line in seen) == 1 and rest.count("step 1 ·") == 1
    assert "finished" in rest and "\x1b" not in "".join(seen) + rest
