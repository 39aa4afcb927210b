"""Runs that come, grow, break and go while somebody looks at them, and how they are found."""

import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from dashboard_cases import write_run
from dashboard_server import Server

from rlvr.errors import ConfigError
from rlvr.monitor import Recorder
from rlvr.monitor.dashboard.answers import BadQuestion, NotThere, answer
from rlvr.monitor.dashboard.catalog import Catalog, find_runs


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "lab" / "one", 20)
    write_run(folder / "two", 8, seed=1, features={"prompts"}, finish=False)
    return folder


# ------------------------------------------------------------------------------------------------------ while it runs


def until(server: Server, what: Any) -> Any:
    """The list of runs once `what` of it is true; folders are searched every two seconds."""
    for _ in range(200):
        found = server.api("runs").json
        if what(found):
            return found
        time.sleep(0.1)
    raise AssertionError(found)


def test_dashboard_follows_runs_that_come_grow_break_and_go(tmp_path: Path) -> None:
    one = Server(tmp_path)
    recorder = Recorder(tmp_path / "a", {"max_steps": 9})
    (row,) = until(one, lambda found: found["runs"])["runs"]
    assert (row["id"], row["steps"], row["status"], row["max_steps"]) == ("a", 0, "running", 9)
    for step in (1, 2):
        recorder.record_step(step, {"entropy/mean": 1 / step, "policy/tokens": 5})
        (grown,) = one.api("runs").json["runs"]  # at once: what is known is read at every question
        assert (grown["last_step"], grown["entropy"], grown["tokens"]) == (step, 1 / step, 5 * step)
        assert grown["version"] != row["version"]
    recorder.finish()
    assert one.api("runs").json["runs"][0]["status"] == "finished"
    write_run(tmp_path / "b", 4)
    until(one, lambda found: len(found["runs"]) == 2)
    whole = (tmp_path / "b" / "steps.jsonl").read_bytes()
    (tmp_path / "b" / "steps.jsonl").write_bytes(b"{" + whole)
    found = one.api("runs").json
    assert [run["id"] for run in found["runs"]] == ["a"]
    assert [problem["id"] for problem in found["problems"]] == ["b"] and "line 1 is damaged" in found["problems"][0][
        "error"
    ]
    broken = one.api("series", run="b")
    assert broken.status == 500 and "line 1 is damaged" in broken.json["error"]
    assert one.api("series", run="a").status == 200
    (tmp_path / "b" / "steps.jsonl").write_bytes(whole)
    assert [run["id"] for run in one.api("runs").json["runs"]] == ["a", "b"]
    shutil.rmtree(tmp_path / "a")
    until(one, lambda found: [run["id"] for run in found["runs"]] == ["b"])
    status, said = one.end()
    assert status == 0 and "Traceback" not in said


def test_dashboard_of_one_run_names_it_by_its_directory(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "mine", 2, features={})
    catalog = Catalog(run_dir)
    assert [run["id"] for run in json.loads(answer(catalog, "runs", {}))["runs"]] == ["mine"]
    assert json.loads(answer(catalog, "run", {"run": "mine"}))["name"] == "mine"


def test_an_answer_about_one_run_does_not_wait_for_another(runs_dir: Path) -> None:
    catalog = Catalog(runs_dir)
    answer(catalog, "runs", {})
    busy = catalog.run("two")
    with busy.history.lock:  # as while it is read
        got: list[bytes] = []
        asking = threading.Thread(target=lambda: got.append(answer(catalog, "series", {"run": "lab/one"})))
        asking.start()
        asking.join(30)
        assert len(got) == 1
        rows = json.loads(answer(catalog, "runs", {}))["runs"]  # the busy one as it was
        assert [row["id"] for row in rows] == ["lab/one", "two"]


def test_long_runs_are_sketched_at_once_and_read_in_the_background(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, 40, features={})
    catalog = Catalog(tmp_path, eager=2000)
    first = json.loads(answer(catalog, "runs", {}))["runs"]
    assert [row["read"] < 1 for row in first] == [True, True] and [row["steps"] for row in first] == [40, 40]
    catalog.start()
    for _ in range(600):
        rows = json.loads(answer(catalog, "runs", {}))["runs"]
        if all(row["read"] == 1 for row in rows):
            break
        time.sleep(0.05)
    assert [row["steps"] for row in rows] == [40, 40]
    assert all(row["version"] != before["version"] for row, before in zip(rows, first, strict=True))
    catalog.stop()


def test_a_long_run_that_is_damaged_does_not_stop_the_reading_of_others(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_run(tmp_path / name, 40, features={})
    lines = (tmp_path / "b" / "steps.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "b" / "steps.jsonl").write_bytes(b"".join([*lines[:20], b"{torn\n", *lines[20:]]))
    catalog = Catalog(tmp_path, eager=2000)
    catalog.start()
    for _ in range(600):
        found = json.loads(answer(catalog, "runs", {}))
        if found["problems"] and all(row["read"] == 1 for row in found["runs"]):
            break
        time.sleep(0.05)
    assert [row["id"] for row in found["runs"]] == ["a", "c"] and "line 21 is damaged" in found["problems"][0]["error"]
    catalog.stop()


@pytest.mark.parametrize("text", ["[]", "7", '{"config": 3}', '{"resumed": 5}', '{"config": {"controls": 5}}', "{"])
def test_a_run_whose_settings_are_no_settings_is_a_problem_of_its_own(text: str, tmp_path: Path) -> None:
    write_run(tmp_path / "good", 2, features={})
    write_run(tmp_path / "odd", 2, features={})
    (tmp_path / "odd" / "run.json").write_text(text)
    found = json.loads(answer(Catalog(tmp_path), "runs", {}))
    assert [row["id"] for row in found["runs"]] == ["good"]
    assert [problem["id"] for problem in found["problems"]] == ["odd"] and "\n" not in found["problems"][0]["error"]


def test_answer_raises_what_a_person_can_read(runs_dir: Path) -> None:
    catalog = Catalog(runs_dir)
    with pytest.raises(NotThere, match="there is no run 'x' here"):
        answer(catalog, "law", {"run": "x"})
    with pytest.raises(BadQuestion, match="points='many': must be a number"):
        answer(catalog, "series", {"run": "two", "points": "many"})
    with pytest.raises(ConfigError, match="is no directory"):
        Catalog(runs_dir / "two" / "run.json")


# ------------------------------------------------------------------------------------------------------------- finding


def test_find_runs_looks_four_folders_deep_and_into_no_run(tmp_path: Path) -> None:
    for name in ("a", "x/b", "x/y/c", "x/y/z/d", "x/y/z/w/e", ".hidden/f", "a/inner"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "run.json").write_text("{}")
    (tmp_path / "only-steps").mkdir()
    (tmp_path / "only-steps" / "steps.jsonl").touch()
    (tmp_path / "no-run" / "checkpoint-1").mkdir(parents=True)
    assert [id for id, _ in find_runs(tmp_path)] == ["a", "only-steps", "x/b", "x/y/c", "x/y/z/d"]


def test_a_run_whose_folder_name_is_not_utf8_is_a_problem(tmp_path: Path) -> None:
    write_run(tmp_path / "good", 2, features={})
    os.rename(write_run(tmp_path / "odd", 2, features={}), os.fsencode(tmp_path) + b"/odd-\xff")
    found = json.loads(answer(Catalog(tmp_path), "runs", {}))
    assert [row["id"] for row in found["runs"]] == ["good"]
    said = "the folder name 'odd-?' is not UTF-8, so no address can name it; rename it"
    assert found["problems"] == [{"id": "odd-?", "error": said}]


def test_find_runs_is_not_caught_in_links(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "run.json").write_text("{}")
    os.symlink(tmp_path, tmp_path / "again")
    os.symlink(tmp_path / "a", tmp_path / "same")
    os.symlink(tmp_path / "nowhere", tmp_path / "broken")
    assert [id for id, _ in find_runs(tmp_path)] == ["a"]
