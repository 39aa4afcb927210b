"""The page in a real browser: it draws, follows, explains itself, and a completion is never more than text."""

from pathlib import Path

import pytest
from browser import Browser, needs_browser
from dashboard_cases import HOSTILE, heldout, step_details, step_metrics, token_columns, write_run
from dashboard_server import served

from rlvr.monitor import Recorder, write_report

pytestmark = [needs_browser, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

VIEWS = ("overview", "law", "dynamics", "controls", "tokens", "positions", "prompts", "engine", "router", "run")
RECORDED = Path(__file__).parent / "data" / "recorded"  # runs of real trainings, see its README
ATTACK = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'><b>bold</b>{{7*7}}"


def check_drawn(page: Browser, view: str) -> list[str]:
    """Titles of the cards that the view shows; each has a picture with something in it."""
    page.view(view)
    assert page.run("return document.querySelector('.complaint')?.textContent") is None
    cards = page.drawn()
    for card in cards:
        if card["shown"]:
            assert card["painted"] > 500 and card["series"], card
    assert page.run("return document.documentElement.scrollWidth <= innerWidth"), f"{view} is wider than the window"
    return [card["title"] for card in cards if card["shown"]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "everything", 120)
    write_run(folder / "others" / "plain", 90, seed=1, features=("controls", "mismatch"))
    return folder


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_view_draws_a_run_that_records_everything(browser: Browser, runs: Path, theme: str) -> None:
    with served(runs) as address:
        browser.open(f"{address}#run=everything")
        if browser.run("return document.documentElement.dataset.theme") != theme:
            browser.run("document.getElementById('theme').click()")
        shown = {view: check_drawn(browser, view) for view in VIEWS}
        assert browser.run("return document.documentElement.dataset.theme") == theme
        assert browser.complaints() == []  # while there is a server to be asked
    assert "Entropy and reward" in shown["overview"]
    assert {"Reward against exp(entropy)", "What the fit leaves over"} <= set(shown["law"])
    assert {"Covariance of log-prob and advantage", "Measured against predicted, by step"} <= set(shown["dynamics"])
    assert {"Tokens that controls changed", "Thermostat", "Weights on the tokens"} <= set(shown["controls"])
    assert "Mismatch of engine and trainer by position" in shown["positions"]
    assert shown["prompts"] == ["Groups of a rollout"]
    assert {"KL from the sampler to the trainer", "Mismatch of the tokens"} <= set(shown["engine"])
    assert {"Entropy by layer", "Load by layer and expert, at the last step"} <= set(shown["router"])


@pytest.mark.parametrize("name", ["grpo", "mixture"])
def test_every_view_draws_what_a_real_training_recorded(browser: Browser, name: str) -> None:
    with served(RECORDED) as address:
        browser.open(f"{address}#run={name}")
        for view in VIEWS:
            check_drawn(browser, view)
        assert browser.complaints() == []


def test_band_alerts_and_the_alarms_limit_are_marked(browser: Browser) -> None:
    with served(RECORDED) as address:
        browser.open(f"{address}#run=grpo")
        browser.drawn()
        line = browser.run("return [...drawn][0].chart.getOption().series.find((one) => one.markLine && one.markArea)")
    assert [end.get("yAxis") for end in line["markArea"]["data"][0]] == [0.5, 0.8]
    assert [mark["xAxis"] for mark in line["markLine"]["data"] if "xAxis" in mark] == [30, 36, 46]
    assert [[end["coord"] for end in mark] for mark in line["markLine"]["data"] if isinstance(mark, list)] == [
        [[0, 0.5], [48, 0.5]]
    ]


def test_a_report_is_the_same_page_without_a_server(browser: Browser, runs: Path, tmp_path: Path) -> None:
    page = write_report(runs / "everything", tmp_path / "report.html")
    browser.open(page.as_uri())
    for view in VIEWS:
        assert check_drawn(browser, view) or view in ("tokens", "run")
    assert browser.run("return performance.getEntriesByType('resource').map((one) => one.name)") == []
    assert browser.complaints() == []


def test_steps_that_arrive_are_drawn(browser: Browser, tmp_path: Path) -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    recorder = Recorder(tmp_path / "growing", {"model": "tiny", "max_steps": 40})
    features = ("controls",)
    last_x = "return [...drawn][0].chart?.getOption().series[0].data.at(-1)[0]"
    with served(tmp_path) as address:
        browser.open(address)
        assert "No optimizer step" in browser.run("return document.getElementById('view').textContent")
        for step in range(1, 21):
            recorder.record_step(step, step_metrics(rng, step, 40, features), **step_details(rng, step, 40, features))
        browser.until(f"{last_x} === 20")
        assert "running" in browser.run("return document.getElementById('runs').textContent")
        for step in range(21, 41):
            recorder.record_step(step, step_metrics(rng, step, 40, features), **step_details(rng, step, 40, features))
        recorder.record_eval(40, heldout(0.5))
        recorder.finish()
        browser.until(f"{last_x} === 40")
        browser.until("return document.getElementById('status').textContent.includes('finished')")
        assert browser.complaints() == []


def test_a_run_that_begins_while_the_page_is_open_is_shown(browser: Browser, tmp_path: Path) -> None:
    with served(tmp_path) as address:
        browser.open(address)
        assert "Waiting for a run" in browser.run("return document.getElementById('view').textContent")
        write_run(tmp_path / "late", 12, features=("controls",))
        browser.until("return document.getElementById('runs').textContent.includes('late')")
        browser.until("return [...drawn].some((card) => card.chart)")


def test_a_hostile_run_is_text(browser: Browser, tmp_path: Path) -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    run_dir = tmp_path / "runs" / "<img src=x onerror=window.hacked=1>"
    recorder = Recorder(run_dir, {"model": ATTACK, "max_steps": 2, "controls": [ATTACK], ATTACK: ATTACK})
    for step in (1, 2):
        recorder.record_step(step, step_metrics(rng, step, 2, ()), **step_details(rng, step, 2, ()))
    columns = token_columns(rng, features=("tokens",))
    size = len(columns["tokens"])
    columns |= {"prompt": [ATTACK] * size, "completion": [ATTACK] * size}
    columns["tokens"] = [[ATTACK, *row[1:]] for row in columns["tokens"]]
    recorder.record_tokens(1, columns)
    recorder.finish("failed", ATTACK)
    report = write_report(run_dir, tmp_path / "report.html")

    def check(address: str) -> None:
        browser.open(address)
        for view in VIEWS:
            browser.view(view)
            browser.drawn()
            assert browser.run("return window.hacked") is None
            assert browser.run("return document.querySelectorAll('#view img, #view b b, #view script').length") == 0
        browser.view("tokens")
        assert ATTACK in browser.run("return document.getElementById('view').textContent")
        browser.view("run")
        assert ATTACK in browser.run("return document.getElementById('view').textContent")
        assert [text for text in browser.complaints() if "onerror" in text or "hacked" in text] == []

    with served(tmp_path / "runs") as address:
        check(address)
    check(report.as_uri())
    assert HOSTILE  # the runs of every other test carry it in prompts, completions and settings


def test_every_metric_that_is_shown_explains_itself(browser: Browser, runs: Path) -> None:
    with served(runs) as address:
        browser.open(f"{address}#run=everything")
        browser.run("document.querySelector('#view > details.fold').open = true")
        browser.until("return [...drawn].length > 40")
        names = browser.run("return [...document.querySelectorAll('#view .info dt')].map((one) => one.textContent)")
        told = browser.run("return [...document.querySelectorAll('#view .info dd')].map((one) => one.textContent)")
    assert len(names) > 60 and "entropy/mean" in names
    assert all(len(text) > 10 for text in told)
    assert "nats" in told[names.index("entropy/mean")] and "0.2 to 1.0" in told[names.index("entropy/mean")]


def test_a_damaged_run_is_named_and_the_others_are_drawn(browser: Browser, tmp_path: Path) -> None:
    write_run(tmp_path / "good", 20, features=())
    write_run(tmp_path / "bad", 20, features=())
    lines = (tmp_path / "bad" / "steps.jsonl").read_bytes().splitlines()
    lines[7] = b'{"step": 8, "met'
    (tmp_path / "bad" / "steps.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    with served(tmp_path) as address:
        browser.open(address)
        browser.until("return document.getElementById('problems').textContent.includes('line 8 is damaged')")
        check_drawn(browser, "overview")
