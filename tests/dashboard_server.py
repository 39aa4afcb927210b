"""`rlvr dashboard` in a process of its own, and questions to it."""

import http.client
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode, urlsplit

ROOT = Path(__file__).resolve().parents[1]


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Server:
    """`rlvr dashboard` in a process of its own."""

    def __init__(self, runs_dir: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "rlvr.cli", "dashboard", str(runs_dir), "--port", "0", *arguments]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        assert self.line, self.process.communicate()[1]
        self.port = urlsplit(self.line.split()[0]).port

    def ask(self, target: str, method: str = "GET", host: str | None = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.putrequest(method, target, skip_host=host is not None, skip_accept_encoding=True)
        for name, value in ({} if host is None else {"Host": host}).items():
            connection.putheader(name, value)
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders()
        found = connection.getresponse()
        answer = Answer(found.status, found.headers, found.read())
        connection.close()
        return answer

    def api(self, name: str, **parameters: object) -> Answer:
        return self.ask(f"/api/{name}?{urlencode(parameters)}")

    def end(self) -> tuple[int, str]:
        """Ctrl-C. Returns: exit status, and what was said of it."""
        self.process.send_signal(signal.SIGINT)
        _, said = self.process.communicate(timeout=30)
        return self.process.returncode, said


@contextmanager
def served(runs_dir: Path) -> Iterator[str]:
    """The address of `rlvr dashboard` on the runs."""
    server = Server(runs_dir)
    try:
        yield f"http://127.0.0.1:{server.port}/"
    finally:
        assert server.end()[0] == 0
