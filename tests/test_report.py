"""The report: one file that holds all of a run, and gives nothing of it a chance to become more than text."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from dashboard_cases import HOSTILE, write_run

from rlvr.errors import ConfigError
from rlvr.monitor import METRICS, Recorder, read_tokens, write_report
from rlvr.monitor.dashboard.answers import answer
from rlvr.monitor.dashboard.catalog import Catalog
from rlvr.monitor.dashboard.page import SCRIPTS, STYLES, embedded, served_page, static_text
from rlvr.monitor.payloads.numbers import to_json
from rlvr.monitor.report import SAMPLE_BYTES, report_data


class Parts(HTMLParser):
    """The elements of a page, and what stands in its scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[int, str] = {}
        self._open = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._open = False

    def handle_data(self, data: str) -> None:
        if self._open:
            at = len(self.tags) - 1
            self.inside[at] = self.inside.get(at, "") + data

    def of(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attrs, self.inside.get(at, "")) for at, (name, attrs) in enumerate(self.tags) if name == tag]

    @property
    def data(self) -> dict[str, Any]:
        (text,) = [text for attrs, text in self.of("script") if attrs.get("type") == "application/json"]
        return json.loads(text)


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = write_run(tmp_path_factory.mktemp("reported") / "one", 24)
    assert write_report(run_dir) == run_dir / "report.html"
    return run_dir


@pytest.fixture(scope="module")
def page(reported: Path) -> str:
    return (reported / "report.html").read_text(encoding="utf-8")


def test_report_is_self_contained(page: str) -> None:
    parts = Parts(page)
    for tag, attrs in parts.tags:
        links = [value for name, value in attrs.items() if name in ("src", "href", "srcset", "action", "data")]
        assert tag not in ("iframe", "object", "embed", "base")
        assert all(value is not None and value.startswith(("data:", "#")) for value in links), (tag, attrs)
    assert len(parts.of("style")) == len(STYLES) and len(parts.of("script")) == len(SCRIPTS) + 1
    assert not re.search(r"@import|url\((?!['\"]?data:)", "".join(text for _, text in parts.of("style")))


def test_report_lets_a_browser_run_its_own_scripts_alone(page: str) -> None:
    parts = Parts(page)
    (policy,) = [a["content"] for a, _ in parts.of("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'" and rules["base-uri"] == rules["form-action"] == "'none'"
    assert "connect-src" not in rules  # then default-src stands: it asks nobody
    hashes = [
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for attrs, text in parts.of("script")
        if attrs.get("type") != "application/json"
    ]
    assert rules["script-src"].split() == hashes
    assert page.index("Content-Security-Policy") < page.index("<style") < page.index("<script")


def test_report_holds_model_output_as_text_alone(reported: Path, page: str) -> None:
    """A completion that closes the script element, opens others and reorders what stands around it."""
    assert "alert('x')</script>" not in page and "\u202e" not in page and "\0" not in page
    (data,) = [text for attrs, text in Parts(page).of("script") if attrs.get("id") == "embedded"]
    assert not set("<>&\u2028\u2029\u202e") & set(data)
    found = json.loads(data)
    rows = found["tokens?run=one&step=1"]["rows"]
    shown = next(row for row in rows if row["sequence"] == 0)
    assert shown["tokens"][:3] == [HOSTILE, "bad ? half", "nul \0"] == read_tokens(reported, 1)[0]["tokens"][:3]
    assert found["run?run=one"]["config"]["nested"]["prompt"] == HOSTILE
    assert HOSTILE in found["run?run=one"]["alerts"][0]["message"]


def test_embedded_is_json_that_no_script_element_notices() -> None:
    data = {"</script>": ["<!--", "]]>", "\u2028\u2029", "&lt;", "\ud83d", float("nan")]}
    text = embedded(data)
    assert not re.search("[<>&\u2028\u2029]", text)
    assert json.loads(text) == {"</script>": ["<!--", "]]>", "\u2028\u2029", "&lt;", "?", None]}


def test_report_holds_no_secret(page: str) -> None:
    assert "hf_abc" not in page and "<redacted>" in json.dumps(Parts(page).data)


def test_report_answers_what_a_server_would(reported: Path, page: str) -> None:
    """Whatever the page asks: the same names, and the same numbers, as from `rlvr dashboard`."""
    data = Parts(page).data
    catalog = Catalog(reported)
    assert data.keys() >= {"metrics", "runs"}
    for name in ("run", "series", "law", "agreement", "histograms", "positions", "router", "prompts"):
        assert data[f"{name}?run=one"] == json.loads(answer(catalog, name, {"run": "one"}))
    assert data["tokens?run=one"] == {"steps": [1, 13, 23], "recorded_steps": 3}
    for step in (1, 13, 23):
        assert data[f"forks?run=one&step={step}"] == json.loads(
            answer(catalog, "forks", {"run": "one", "step": str(step)})
        )
        rows = data[f"tokens?run=one&step={step}"]["rows"]
        assert len(rows) == 6 and [row["reward"] for row in rows] == [0, 0, 0, 1, 1, 1]
    (row,) = data["runs"]["runs"]
    assert row["id"] == "one" and row["status"] == "finished" and data["metrics"]["metrics"].keys() >= METRICS.keys()
    assert set(data["series?run=one"]["series"]) == set(data["run?run=one"]["metrics"])


def test_report_of_a_run_without_steps_is_a_page_too(tmp_path: Path) -> None:
    Recorder(tmp_path / "run")
    page = write_report(tmp_path / "run", tmp_path / "out" / "page.html")
    assert page == tmp_path / "out" / "page.html" and not (tmp_path / "run" / "report.html").exists()
    data = Parts(page.read_text()).data
    assert data["run?run=run"]["metrics"] == [] and data["series?run=run"]["step"] == []
    assert data["law?run=run"]["verdict_text"] == "not yet: there are no points" and data["tokens?run=run"] == {
        "steps": [],
        "recorded_steps": 0,
    }


@pytest.mark.parametrize("steps", [1, 2])
def test_report_of_few_steps_has_every_part(steps: int, tmp_path: Path) -> None:
    data = Parts(write_report(write_run(tmp_path / "run", steps)).read_text()).data
    assert data["series?run=run"]["per_point"] == 1 and len(data["series?run=run"]["step"]) == steps
    assert data["agreement?run=run"]["count"] == steps and data["prompts?run=run"]["total"] > 0


def test_report_holds_samples_of_five_steps_from_first_to_last(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    for step in range(1, 21):
        recorder.record_tokens(step, {"reward": [1.0], "tokens": [["a"]], "entropy": [[0.5]]})
    assert report_data(tmp_path)[f"tokens?run={tmp_path.name}"] == {
        "steps": [1, 6, 11, 15, 20],
        "recorded_steps": 20,
    }


def test_report_of_long_samples_stays_small(tmp_path: Path) -> None:
    """16 completions of 3000 tokens at each of six steps."""
    recorder = Recorder(tmp_path)
    row = [0.123456789 + n for n in range(3000)]
    columns = {name: [row] * 16 for name in ("entropy", "logps", "old_logps", "rollout_logps", "covariance", "weight")}
    columns |= {"tokens": [[" token"] * 3000] * 16, "reward": [n / 16 for n in range(16)], "prompt": ["p" * 9000] * 16}
    for step in range(1, 7):
        recorder.record_tokens(step, columns)
    found = {key: value for key, value in report_data(tmp_path).items() if key.startswith("tokens") and "step" in key}
    assert len(found) == 5 and len(to_json(found)) <= SAMPLE_BYTES
    for payload in found.values():
        rewards = [row["reward"] for row in payload["rows"]]
        assert (
            payload["recorded"] == 16
            and rewards[0] == 0
            and rewards[-1] == pytest.approx(15 / 16)
            and rewards == sorted(rewards)
        )
        assert all(row["omitted"] == 3000 - len(row["tokens"]) > 0 for row in payload["rows"])
        assert all(len(row["prompt"]) == 2002 for row in payload["rows"])


def test_report_of_a_damaged_run_names_the_line(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", 3, features={})
    (run_dir / "steps.jsonl").write_bytes(b"{\n" + (run_dir / "steps.jsonl").read_bytes())
    with pytest.raises(ConfigError, match="line 1 is damaged"):
        write_report(run_dir)
    with pytest.raises(ConfigError, match="holds no run"):
        write_report(tmp_path)


def test_report_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    Recorder(tmp_path / "run")
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for output in (tmp_path / "file" / "page.html", tmp_path / "folder"):
        with pytest.raises(ConfigError, match=r"cannot be written \(.*\); name another file with -o") as caught:
            write_report(tmp_path / "run", output)
        assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["run", "file", "folder"] or len(
        list(tmp_path.iterdir())
    ) == 3


# ------------------------------------------------------------------------------------------------------------ the page


def test_page_of_a_server_and_of_a_report_are_the_same_scripts(page: str) -> None:
    served = Parts(served_page())
    assert [attrs["src"] for attrs, _ in served.of("script")] == [f"static/{name}" for name in SCRIPTS]
    inline = [text for attrs, text in Parts(page).of("script") if attrs.get("type") != "application/json"]
    assert inline == [static_text(name) for name in SCRIPTS]


def test_page_names_metrics_that_exist() -> None:
    """A name in quotes that has the form of a metric is one, and asks for an area that there is."""
    areas = {name.partition("/")[0] for name in METRICS}
    for script in SCRIPTS[1:]:
        for name in re.findall(r"[\"'`]([a-z_]+/[a-z0-9_]+)[\"'`]", static_text(script)):
            assert name in METRICS or name.partition("/")[0] not in areas, f"{script} names {name}"
