"""Rows of a reasoning-gym task, the same in every process that asks for them.

Some generators iterate over sets, so what they produce depends on Python's hash seed: every rank, and every resumed
run, would get prompts of its own. Rows are therefore generated in a child process with a fixed hash seed.
"""

import os
import random
import subprocess
from typing import Any

from rlvr.child_process import child_command, pack, read_message, take_standard_streams, unpack, write_message
from rlvr.errors import ConfigError
from rlvr.tasks.rows import Row
from rlvr.verifiers import encode_entry

CHUNK = 256  # rows per dataset object: fixed, because some tasks draw differently for another size
PATIENCE = 300  # give up after max(PATIENCE, 8 x rows found) draws in a row that bring nothing new


def generate(task: str, task_kwargs: dict[str, Any], seed: int, count: int) -> list[Row]:
    """Up to `count` rows with distinct questions, fewer when the task's space seems used up. A prefix of what a larger
    `count` gives. `entry` in a row's columns is the whole reasoning-gym entry, encoded for the verifier.

    Raises: ConfigError with reasoning-gym's message when it fails.
    """
    request = pack({"task": task, "task_kwargs": task_kwargs, "seed": seed, "count": count})
    done = subprocess.run(
        child_command("rlvr.tasks.gym:child"),
        input=request,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONHASHSEED": "0"},
        check=False,
    )
    reply = unpack(bytearray(done.stdout))
    if reply is None:
        raise RuntimeError(f"generating task {task!r} ended with exit code {done.returncode}; its output is above")
    if "error" in reply:
        raise ConfigError(f"task={task!r} with task_kwargs={task_kwargs!r} cannot be generated: {reply['error']}")
    return [Row(question=r["question"], answer=r["answer"], columns={"entry": r["entry"]}) for r in reply["rows"]]


def child() -> None:
    """The child's side: one request in, one reply out."""
    requests, replies = take_standard_streams()
    request = read_message(requests)
    if request is None:
        return
    try:
        write_message(replies, {"rows": _distinct(**request)})
    except Exception as error:
        write_message(replies, {"error": f"{type(error).__name__}: {error}"})


def _distinct(task: str, task_kwargs: dict[str, Any], seed: int, count: int) -> list[dict[str, str]]:
    import reasoning_gym

    # Tasks seed row i with seed + i: far apart, or the rows of neighboring task seeds would be the same ones.
    base = random.Random(f"{task}/{seed}").getrandbits(31)
    random.seed(base)
    found: dict[str, dict[str, str]] = {}
    misses = chunk = 0
    while len(found) < count and misses < max(PATIENCE, 8 * len(found)):
        dataset = reasoning_gym.create_dataset(task, seed=base + chunk * CHUNK, size=CHUNK, **task_kwargs)
        for index in range(CHUNK):
            try:
                entry = dataset[index]
            except IndexError:  # a task that has run out of rows before its stated size
                misses += CHUNK - index
                break
            question, answer = entry["question"], entry["answer"]
            misses += 1
            if question not in found:
                misses = 0
                whole = {"question": question, "answer": answer, "metadata": entry["metadata"]}
                found[question] = {"question": question, "answer": answer or "", "entry": encode_entry(whole)}
            if len(found) == count:
                break
        chunk += 1
    return list(found.values())
