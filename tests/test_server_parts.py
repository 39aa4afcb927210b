"""Server mode without vLLM: how weights are handed over, how `rlvr serve` is started, many requests at once."""

import importlib.util
import os
import resource
import stat
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rlvr.cli import main
from rlvr.errors import RunError
from rlvr.rollout import weight_file
from rlvr.rollout.server_client import in_threads

# ------------------------------------------------------------------------------------------------ handing over weights


def test_parts_are_bounded_copies_of_everything() -> None:
    tensors = {"a": torch.rand(4, 4), "b": torch.rand(4, 4).T, "large": torch.rand(100), "c": torch.rand(3).bfloat16()}
    parts = list(weight_file.parts(tensors.items(), most=128))
    assert [list(part) for part in parts] == [["a", "b"], ["large"], ["c"]]  # of 64, 64, 400 and 6 bytes
    for name, copy in (item for part in parts for item in part.items()):
        assert torch.equal(copy, tensors[name]) and copy.dtype == tensors[name].dtype
        assert copy.is_contiguous() and copy.data_ptr() != tensors[name].data_ptr()


def test_a_part_is_read_as_it_was_written_and_is_private(tmp_path: Path) -> None:
    path, part = tmp_path / "weights", {"x": torch.rand(3, 2), "y": torch.rand(4).bfloat16()}
    weight_file.write(path, part)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    found = dict(weight_file.read(path))
    assert found.keys() == part.keys() and all(torch.equal(found[name], part[name]) for name in part)


def test_every_server_has_a_path_of_its_own_in_shared_memory() -> None:
    one, other = weight_file.new_path(), weight_file.new_path()
    assert one != other and one.parent == Path("/dev/shm") and not one.exists()


def test_only_a_plain_file_of_this_user_is_read(tmp_path: Path) -> None:
    weight_file.write(tmp_path / "real", {"x": torch.rand(2)})
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")  # opening it would block
    for name in ("link", "folder", "pipe"):
        with pytest.raises(ValueError, match="is not a plain file of this user"):
            list(weight_file.read(tmp_path / name))
    with pytest.raises(ValueError, match="must share a machine"):
        list(weight_file.read(tmp_path / "missing"))


def test_a_full_memory_is_said_with_its_size(tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limit[1]))
    try:
        with pytest.raises(RuntimeError, match=r"no room for 4 MiB of weights .*--shm-size"):
            weight_file.write(tmp_path / "weights", {"x": torch.zeros(2**20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


# ------------------------------------------------------------------------------------------------ rlvr serve


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """(argv, environment) of what `rlvr serve` became."""
    found: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execve", lambda path, argv, environment: found.append((argv, environment)))
    return found


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
def test_serve_becomes_vllm_on_this_machine_alone(started: list, capsys: pytest.CaptureFixture) -> None:
    main(["serve", "--model", "some/model", "--port", "8123", "--dtype", "bfloat16", "--max_model_len", "77"])
    [(argv, environment)] = started
    assert argv[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    assert {"--host=127.0.0.1", "--port=8123", "--dtype=bfloat16", "--max-model-len=77", "--enforce-eager"} <= {*argv}
    assert "--model=some/model" in argv and "--logprobs-mode=processed_logprobs" in argv
    assert environment["VLLM_SERVER_DEV_MODE"] == "1" and environment["RLVR_SERVER"] == str(os.getpid())
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
def test_serve_warns_of_another_host_in_one_line(started: list, capsys: pytest.CaptureFixture) -> None:
    main(["serve", "--model", "m", "--host", "0.0.0.0"])
    said = capsys.readouterr().err
    assert "--host=0.0.0.0" in started[0][0]
    assert said.count("\n") == 1 and "can run code" in said and "/collective_rpc" in said


@pytest.mark.parametrize(("flag", "value"), [("dtype", "float16"), ("block_size", "20"), ("port", "70000")])
def test_serve_refuses_bad_values_by_name(flag: str, value: str, started: list, capsys: Any) -> None:
    assert main(["serve", "--model", "m", f"--{flag}", value]) == 2
    assert f"{flag}=" in capsys.readouterr().err and started == []


# ------------------------------------------------------------------------------------------------ requests at once


def test_in_threads_keeps_order() -> None:
    assert in_threads(lambda x: x * x, range(50), 7, lambda: None, 1.0) == [x * x for x in range(50)]
    assert in_threads(str, [], 7, lambda: None, 1.0) == []


@pytest.mark.parametrize(("others", "least", "most"), [(0.3, 0.3, 2.0), (30.0, 1.0, 5.0)])
def test_in_threads_raises_the_first_error_once_the_others_have_ended(
    others: float, least: float, most: float
) -> None:
    """Or after a while: what is still at work keeps a server from new weights. What is not begun never is."""
    hang, begun = threading.Event(), []

    def work(x: int) -> None:
        begun.append(x)
        if x == 2:
            raise ValueError("two")
        hang.wait(others)

    start = time.monotonic()
    with pytest.raises(ValueError, match="two"):
        in_threads(work, range(9), 5, lambda: None, 1.0)
    assert least <= time.monotonic() - start < most
    assert len(begun) < 9
    hang.set()


def test_in_threads_asks_for_a_pulse_while_nothing_comes() -> None:
    hang = threading.Event()

    def pulse() -> None:
        raise RunError("no pulse")

    with pytest.raises(RunError, match="no pulse"):
        in_threads(lambda x: hang.wait(30), range(2), 2, pulse, 0.1)
    hang.set()
