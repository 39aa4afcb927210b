"""Train for an hour while everything goes wrong that can, at random from a seed; then count what was lost.

    python scripts/soak.py                                  an hour, rollouts by transformers
    python scripts/soak.py --minutes 10 --seed 3
    python scripts/soak.py --engine server                  rollouts by a vLLM server, which is killed as well

From outside: kill -9 of the training, of its verifiers and of the server, Ctrl-C, a full disk, a pause of seconds.
From inside: verifiers that hang, raise, return NaN, exit, flood memory and disk; NaN in gradients. A run that has
stopped is started again with resume_from_checkpoint: auto. With transformers' rollouts a second run, without faults
from outside, repeats the first steps at the end: the two must be the same, bit for bit.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from rlvr.monitor.records import read_run, read_steps, token_steps

SCRIPTS = Path(__file__).resolve().parent
REPEATED = 150  # optimizer steps of the second run
PATIENCE = 300.0  # seconds without a new record after which the run counts as hung
COMPLETIONS = 64  # of a rollout
PORT = 8017


class Training:
    """The process that trains, started again whenever it has stopped."""

    def __init__(self, out: Path, seed: int, steps: int, engine: str) -> None:
        self._command = [sys.executable, "-m", "soaking.training", str(out), str(seed), str(steps), engine]
        self._log = open(out.with_suffix(".log"), "ab")  # noqa: SIM115  as long as this object
        self.starts = 0
        self.process = self.start()

    def start(self) -> "subprocess.Popen[bytes]":
        self.starts += 1
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(SCRIPTS)}
        self.process = subprocess.Popen(
            self._command,
            stdout=self._log,
            stderr=self._log,
            cwd=SCRIPTS.parent,
            env=environment,
            start_new_session=True,
        )
        return self.process

    @property
    def memory_mib(self) -> float:
        """Resident, of the training process; 0 if it is gone."""
        try:
            return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
        except (OSError, IndexError):
            return 0.0


class Server:
    """The vLLM server, for runs that sample from one."""

    def __init__(self, log: Path) -> None:
        from lab.base import BaseSettings, base_model

        self._model, self._log = str(base_model(BaseSettings())), open(log, "ab")  # noqa: SIM115
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "rlvr.cli", "serve", "--model", self._model, "--port", str(PORT)]
        self.process = subprocess.Popen(
            [*command, "--max_model_len", "64"], stdout=self._log, stderr=self._log, start_new_session=True
        )

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def descendants(pid: int) -> list[int]:
    """Processes that a process has started, and those have, ..."""
    found, parents = [], [pid]
    while parents:
        parent = parents.pop()
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                children = [int(child) for child in task.read_text().split()]
            except OSError:
                continue
            found += children
            parents += children
    return found


def kill(training: Training) -> None:
    training.process.kill()


def interrupt(training: Training) -> None:
    training.process.send_signal(signal.SIGINT)


def fill_disk(training: Training) -> None:
    """No file of the run may grow any more: a real error of the kernel at the next write."""
    resource.prlimit(training.process.pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


def pause(training: Training) -> None:
    training.process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    training.process.send_signal(signal.SIGCONT)


def kill_verifier(training: Training) -> None:
    workers = descendants(training.process.pid)
    if workers:
        os.kill(random.choice(workers), signal.SIGKILL)


FAULTS = {
    "kill": kill,
    "interrupt": interrupt,
    "full disk": fill_disk,
    "pause": pause,
    "verifier killed": kill_verifier,
}


def soak(out: Path, minutes: float, seed: int, mean_seconds: float, engine: str) -> dict[str, Any]:
    """Train under faults until the time is up; what happened."""
    chance, faults = random.Random(seed), Counter[str]()
    kinds = dict(FAULTS)
    server = Server(out.with_suffix(".server.log")) if engine == "server" else None
    if server is not None:
        kinds["server killed"] = lambda _: (server.kill(), server.start())
    training = Training(out, seed, 10**6, f"http://127.0.0.1:{PORT}" if server else "transformers")
    began = last = time.monotonic()
    seen, redone, hung, memory = 0, 0, 0, []
    due = began + 30 + chance.expovariate(1 / mean_seconds)
    try:
        while time.monotonic() - began < 60 * minutes:
            time.sleep(1)
            steps = len(read_steps(out))
            if steps != seen:
                redone += max(0, seen - steps)
                seen, last = steps, time.monotonic()
            if training.process.poll() is not None:
                print(f"{elapsed(began)}  exit status {training.process.returncode}: started again", flush=True)
                training.start()
            elif time.monotonic() - last > PATIENCE:
                hung, last = hung + 1, time.monotonic()
                print(f"{elapsed(began)}  HUNG: no record for {PATIENCE:.0f} s", flush=True)
                kill(training)
            elif time.monotonic() >= due:
                due = time.monotonic() + chance.expovariate(1 / mean_seconds)
                name = chance.choice(sorted(kinds))
                memory.append(training.memory_mib)
                kinds[name](training)
                faults[name] += 1
                print(f"{elapsed(began)}  step {seen}: {name}", flush=True)
        interrupt(training)
        training.process.wait(PATIENCE)
    finally:
        training.process.kill()
        if server is not None:
            server.kill()
    return {"minutes": minutes, "seed": seed, "engine": engine, "faults": dict(faults), "starts": training.starts,
            "redone": redone, "hung": hung, "memory_mib": [round(m) for m in memory if m]}  # fmt: skip


def elapsed(began: float) -> str:
    seconds = int(time.monotonic() - began)
    return f"{seconds // 60:3d}:{seconds % 60:02d}"


def repeat(out: Path, seed: int, steps: int) -> int:
    """Run the first steps again without faults from outside; how many records differ."""
    again = out.with_name(f"{out.name}-again")
    shutil.rmtree(again, ignore_errors=True)
    training = Training(again, seed, steps, "transformers")
    training.process.wait()
    mine, theirs = (untimed(read_steps(path))[:steps] for path in (out, again))
    return sum(a != b for a, b in zip(mine, theirs, strict=True))


def untimed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kept = []
    for record in records:
        metrics = {name: x for name, x in record["metrics"].items() if not name.startswith("time/")}
        kept.append({**record, "time": None, "alerts": None, "metrics": metrics})
    return kept


def verdict(out: Path) -> dict[str, Any]:
    """What the records say: every step once, and what they counted."""
    records = read_steps(out)
    steps = [record["step"] for record in records]
    last = max(steps, default=0)
    rollouts = [record["metrics"] for record in records if record["metrics"]["time/rollout"] > 0]
    failures = {
        name: round(COMPLETIONS * sum(metrics[f"reward/{name}"] for metrics in rollouts))
        for name in ("verifier_errors", "verifier_timeouts")
    }
    return {
        "steps": last,
        "records_lost": last - len(set(steps)),
        "records_doubled": len(steps) - len(set(steps)),
        "token_files": len(token_steps(out)),
        "steps_skipped": int(sum(record["metrics"]["optim/skipped"] for record in records)),
        **failures,
        "resumed": len(read_run(out)["resumed"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mean_seconds", type=float, default=45.0, help="between two faults from outside")
    parser.add_argument("--engine", choices=["transformers", "server"], default="transformers")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/soak"))
    arguments = parser.parse_args()
    sys.path.insert(0, str(SCRIPTS))
    out = arguments.output_dir
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    found = soak(out, arguments.minutes, arguments.seed, arguments.mean_seconds, arguments.engine)
    found |= verdict(out)
    if arguments.engine == "transformers":
        steps = min(REPEATED, found["steps"])
        found |= {"repeated": steps, "records_that_differ": repeat(out, arguments.seed, steps)}
    print(json.dumps(found, indent=2))
    bad = ("records_lost", "records_doubled", "hung", "records_that_differ")
    sys.exit(1 if any(found.get(name) for name in bad) else 0)


if __name__ == "__main__":
    main()
