"""How long `rlvr dashboard` takes to show many long runs, and how much memory it needs.

    python scripts/bench_dashboard.py [--runs 20] [--steps 10000] [--details] [--browser]

Writes runs into a temporary directory, starts the server on it as a user would, and asks it what the page asks when
it opens: the runs, then the series of the overview of all of them, six requests at a time as a browser does.
Lines are about 2 KB, with --details about 5 KB: dynamics, critic, histograms and means by position besides.
With --browser a real Chromium opens the page with all runs chosen, before the server has read them and after.
"""

import argparse
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from dashboard_cases import step_details, step_metrics  # noqa: E402

LEAN = frozenset({"mismatch"})
DETAILS = frozenset({"alerts", "controls", "critic", "dynamics", "histograms", "mismatch", "positions", "thermostat"})
OVERVIEW = (
    *("entropy/mean", "reward/mean", "time/step", "time/rollout", "time/update", "time/verify", "time/old_logps"),
    *("time/sync_weights", "time/rollout_tokens_per_s", "time/update_tokens_per_s", "rollout/completion_length"),
    *("rollout/truncated", "optim/grad_norm"),
)


def write_runs(folder: Path, runs: int, steps: int, features: frozenset[str]) -> int:
    """The same steps in every run, with another entropy. Returns the bytes written."""
    rng = np.random.default_rng(0)
    started = time.time() - 30 * steps
    lines = []
    for step in range(1, steps + 1):
        record = {"step": step, "time": started + 30 * step, "tokens": 60_000 * step}
        record |= {"metrics": {"entropy/mean": 0.0} | step_metrics(rng, step, steps, features)}
        details = step_details(rng, step, steps, features)
        details |= {"alerts": [asdict(alert) for alert in details["alerts"]]} if "alerts" in details else {}
        lines.append(json.dumps(record | details) + "\n")
    text = "".join(lines).encode()
    for number in range(runs):
        run_dir = folder / f"run-{number:02d}"
        run_dir.mkdir()
        (run_dir / "steps.jsonl").write_bytes(text)
        run = {"format": 1, "status": "finished", "started": started, "config": {"model": "tiny"}, "resumed": []}
        (run_dir / "run.json").write_text(json.dumps(run))
    return runs * len(text)


class Client:
    """Requests over connections that stay open, as a browser makes them."""

    def __init__(self, url: str) -> None:
        self._host = urlsplit(url).netloc
        self._free: list[http.client.HTTPConnection] = []

    def get(self, path: str, **parameters: str) -> Any:
        connection = self._free.pop() if self._free else http.client.HTTPConnection(self._host)
        address = f"/api/{path}?{urlencode(parameters)}"
        try:
            connection.request("GET", address)
            answer = connection.getresponse()
        except ConnectionError:  # idle for so long that the server has closed it
            connection.close()
            connection.request("GET", address)
            answer = connection.getresponse()
        found = json.loads(answer.read())
        self._free.append(connection)
        return found

    def first_view(self) -> list[dict[str, Any]]:
        runs = self.get("runs")["runs"]
        with ThreadPoolExecutor(6) as pool:
            ids = [run["id"] for run in runs]
            return list(pool.map(lambda id: self.get("series", run=id, names=",".join(OVERVIEW), points="600"), ids))


def paint(url: str, runs: int, when: str) -> None:
    """Milliseconds from the request to the painted overview of all runs, twice: with and without cached files."""
    from browser import Browser

    chosen = "&".join(f"run=run-{number:02d}" for number in range(runs))
    with tempfile.TemporaryDirectory() as profile:
        page = Browser(Path(profile))
        try:
            for cached in ("nothing cached", "scripts cached"):
                page.open(f"{url}#{chosen}")
                took = float(page.run("return document.documentElement.dataset.ready"))
                lines = page.run("return [...drawn][0].chart.getOption().series.length")
                print(
                    f"server {when}, {cached}: overview painted after {took:.0f} ms, {lines} lines in its first plot"
                )
        finally:
            page.close()


def memory(process: int, name: str) -> float:
    """MiB.   name: VmRSS now, VmHWM at most."""
    text = Path(f"/proc/{process}/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", text)[1]) / 1024  # type: ignore[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--details", action="store_true", help="longer lines")
    parser.add_argument("--browser", action="store_true", help="open the page in Chromium")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        size = write_runs(Path(folder), options.runs, options.steps, DETAILS if options.details else LEAN)
        lines = options.runs * options.steps
        print(f"{options.runs} runs of {options.steps} steps, {size / lines:.0f} bytes a line, {size / 1e6:.0f} MB")
        command = [sys.executable, "-m", "rlvr.cli", "dashboard", folder, "--port", "0"]
        server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        try:
            clock = Clock(server.pid)
            assert server.stdout is not None
            url = server.stdout.readline().split()[0]
            clock.say("start of the process to listening")
            if options.browser:
                paint(url, options.runs, "just started")
            clock.restart()
            client = Client(url)
            runs = client.get("runs")["runs"]
            clock.say(f"listening to {len(runs)} runs")
            views = client.first_view()
            clock.say(f"listening to the overview of {len(views)} runs, {len(views[0]['step'])} points each")
            while any(run["read"] < 1 for run in client.get("runs")["runs"]):
                time.sleep(0.5)
            clock.say("listening to all lines read")
            clock.restart()
            client.first_view()
            clock.say("the overview again, of all lines")
            if options.browser:
                paint(url, options.runs, "all read")
            clock.restart()
            law = client.get("law", run=runs[0]["id"])
            clock.say(f"the law of {law['fit']['num_points']} rollouts")
            print(f"memory {memory(server.pid, 'VmRSS'):.0f} MiB, at most {memory(server.pid, 'VmHWM'):.0f} MiB")
        finally:
            server.send_signal(signal.SIGINT)
            server.wait()


class Clock:
    """Time since `restart`, on the wall and of the server's CPU: they differ where other work shares the machine."""

    def __init__(self, process: int) -> None:
        self._process = process
        self.restart()

    def restart(self) -> None:
        self._wall, self._cpu = time.perf_counter(), cpu_seconds(self._process)

    def say(self, what: str) -> None:
        wall, cpu = time.perf_counter() - self._wall, cpu_seconds(self._process) - self._cpu
        print(f"{what:<66}{1000 * wall:7.0f} ms, CPU {1000 * cpu:7.0f} ms", flush=True)


def cpu_seconds(process: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
