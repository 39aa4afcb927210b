"""The page under a reader's hands: chosen runs, axes, zoom, keys, hours of updates."""

from pathlib import Path
from typing import Any

import pytest
from browser import Browser, needs_browser
from dashboard_cases import write_run
from dashboard_server import served

pytestmark = [needs_browser, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "everything", 120)
    write_run(folder / "others" / "plain", 90, seed=1, features=("controls", "mismatch"))
    return folder


def test_several_runs_lie_one_over_the_other(browser: Browser, runs: Path) -> None:
    with served(runs) as address:
        browser.open(f"{address}#run=everything&run=others/plain")
        browser.drawn()
        names = browser.run("return [...new Set([...drawn][0].chart.getOption().series.map((one) => one.name))]")
        assert {"everything", "plain"} <= set(names)
        browser.run("choose(['others/plain'])")
        browser.until("return [...drawn].length && context.runs.length === 1")
        browser.drawn()
        names = browser.run("return [...new Set([...drawn][0].chart.getOption().series.map((one) => one.name))]")
        assert "everything" not in names
        assert browser.run("return new URLSearchParams(location.hash.slice(1)).getAll('run')") == ["others/plain"]


def test_axes_smoothing_and_logarithm_change_the_lines(browser: Browser, runs: Path) -> None:
    first = "return [...drawn][0].chart.getOption().series[0].data"
    with served(runs) as address:
        browser.open(f"{address}#run=everything")
        raw = browser.drawn() and browser.run(first)
        browser.run("return change({smooth: 25})")
        browser.until("return [...drawn][0].chart.getOption().series.length > arguments[0]", 3)
        smooth = browser.drawn() and browser.run(first)
        browser.run("change({axis: 'tokens', smooth: 1})")
        browser.until("return [...drawn][0].chart.getOption().xAxis.at(-1).name === 'tokens trained on'")
        tokens = browser.drawn() and browser.run(first)
        browser.run("change({axis: 'step', log: true})")
        browser.until("return [...drawn][0].chart.getOption().yAxis[0].type === 'log'")
    assert [x for x, _ in raw] == list(range(1, 121)) and tokens[-1][0] > 1e5
    spread = [max(y) - min(y) for y in ([v for _, v in part[60:]] for part in (raw, smooth))]
    assert spread[1] < spread[0]
    middle = [value for _, value in raw[60 - 12 : 60 + 13]]
    assert smooth[60][1] == pytest.approx(sum(middle) / 25, rel=1e-9)


def test_the_keyboard_reaches_everything(browser: Browser, runs: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    with served(runs) as address:
        browser.open(f"{address}#run=everything")
        view = "return document.querySelector('[role=tab][aria-selected=true]').textContent"
        ActionChains(browser.driver).send_keys("5").perform()
        browser.until(f"{view} === 'Tokens'")
        assert browser.run("return document.activeElement.id") == "tab-tokens"
        ActionChains(browser.driver).send_keys(Keys.ARROW_RIGHT).perform()
        browser.until(f"{view} === 'Positions'")
        ActionChains(browser.driver).send_keys("1").perform()
        browser.until(f"{view} === 'Overview' && [...drawn].length > 3")
        reached = set()
        for _ in range(60):
            ActionChains(browser.driver).send_keys(Keys.TAB).perform()
            reached.add(browser.run(_WHERE))
        assert {"INPUT checkbox", "SELECT", "SUMMARY What this shows", "BUTTON"} <= reached
        browser.view("tokens")
        browser.run("document.querySelector('#view .text[tabindex]').focus()")
        ActionChains(browser.driver).send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT).perform()
        assert "token 1" in browser.run("return document.querySelector('#view [aria-live]').textContent")


_WHERE = """
const one = document.activeElement;
return [one.tagName, one.type === 'checkbox' ? 'checkbox' : one.getAttribute('aria-label') || ''].join(' ').trim()
  .replace(/^BUTTON.*/, 'BUTTON');
"""


def test_a_zoom_asks_for_the_steps_in_it(browser: Browser, tmp_path: Path) -> None:
    write_run(tmp_path / "long", 1500, features=())
    with served(tmp_path) as address:
        browser.open(f"{address}#run=long")
        browser.drawn()
        assert browser.run("return [...drawn][0].chart.getOption().series[0].data.length") < 700
        browser.run("context.zoom([200, 300])")
        browser.until("return [...drawn][0].chart.getOption().series[0].data.length === 101")
        x: Any = browser.run("return [...drawn][0].chart.getOption().series[0].data.map((point) => point[0])")
        assert x == list(range(200, 301))
        browser.run("context.zoom(null)")
        browser.until("return [...drawn][0].chart.getOption().series[0].data[0][0] < 10")


def test_a_drag_over_a_plot_zooms_once_to_what_it_covers(browser: Browser, tmp_path: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    write_run(tmp_path / "long", 400, features=())
    with served(tmp_path) as address:
        browser.open(f"{address}#run=long")
        browser.run("const zoom = context.zoom; window.zooms = []; context.zoom = (r) => { zooms.push(r); zoom(r); }")
        browser.driver.execute_async_script(
            "const done = arguments[0]; (async () => { for (let i = 0; i < 4; i++) await redraw(); done(); })()"
        )
        wanted = browser.run(
            "const chart = [...drawn][0].chart; return [100, 300].map((x) => chart.convertToPixel({xAxisIndex: 0}, x))"
        )
        box = browser.driver.find_element(By.CSS_SELECTOR, "#view .chart")
        left = -box.size["width"] / 2
        drag = ActionChains(browser.driver).move_to_element_with_offset(box, left + wanted[0], -60).click_and_hold()
        drag.move_by_offset((wanted[1] - wanted[0]) / 2, 5).move_by_offset((wanted[1] - wanted[0]) / 2, 5)
        drag.release().perform()
        browser.until("return state.range")
        assert browser.run("return zooms.length") == 1
        assert browser.run("return state.range") == pytest.approx([100, 300], abs=3)
        browser.until("return document.getElementById('tools').textContent.includes('reset zoom')")
        assert browser.complaints() == []


def test_an_explanation_stays_open_while_it_is_read(browser: Browser, runs: Path) -> None:
    from selenium.webdriver.common.by import By

    with served(runs) as address:
        browser.open(f"{address}#run=everything")
        browser.driver.find_element(By.CSS_SELECTOR, "#view .info > summary").click()
        browser.driver.find_element(By.CSS_SELECTOR, "#view .info[open] dd").click()
        assert browser.run("return document.querySelector('#view .info').open")
        browser.driver.find_element(By.CSS_SELECTOR, "#tools select").click()
        assert not browser.run("return document.querySelector('#view .info').open")


def test_the_focus_stays_where_it_was(browser: Browser, runs: Path) -> None:
    from selenium.webdriver.common.by import By

    with served(runs) as address:
        browser.open(f"{address}#run=everything")
        for selector in ("#tools input[type=checkbox]", "#theme", "#tab-law"):
            browser.driver.find_element(By.CSS_SELECTOR, selector).click()
            browser.until("return document.activeElement.matches(arguments[0])", selector)


def test_hours_of_updates_do_not_fill_the_memory(browser: Browser, runs: Path) -> None:
    heap = "return performance.memory.usedJSHeapSize / 1e6"
    again = """
        const done = arguments[1];
        (async () => { for (let i = 0; i < arguments[0]; i++) await redraw(); done(); })();
    """
    with served(runs) as address:
        browser.open(f"{address}#run=everything&run=others/plain")
        browser.driver.execute_async_script(again, 20)
        browser.driver.execute_cdp_cmd("HeapProfiler.collectGarbage", {})
        before = browser.run(heap)
        browser.driver.execute_async_script(again, 200)
        browser.driver.execute_cdp_cmd("HeapProfiler.collectGarbage", {})
        assert browser.run(heap) - before < 15, "MB in 200 updates"


def test_a_link_pasted_into_the_open_page_is_followed(browser: Browser, runs: Path) -> None:
    with served(runs) as address:
        browser.open(f"{address}#run=everything")
        browser.run("location.hash = '#view=law&axis=toString&smooth=7&run=others/plain'")
        browser.until("return state.view === 'law' && context.focus?.id === 'others/plain'")
        assert browser.run("return [state.axis, state.smooth]") == ["step", 1]
        assert browser.run("return document.querySelector('.complaint')") is None
