"""A real browser, without a screen: Debian's Chromium, driven through its own driver."""

import shutil
from pathlib import Path
from typing import Any

import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium and chromium-driver are not installed (apt install them)"
)
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # a container's root has no sandbox
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
WAIT = 60  # seconds; the machine may be busy


class Browser:
    """One window of 1366 x 850 pixels, a laptop's."""

    def __init__(self, profile: Path) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for flag in (*FLAGS, "--window-size=1366,850", f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(service=Service(str(DRIVER)), options=options)
        self.driver.set_script_timeout(WAIT)

    def close(self) -> None:
        self.driver.quit()

    def open(self, address: str) -> None:
        """Load a page anew and wait until it has drawn its first view."""
        self.driver.get("about:blank")
        self.complaints()
        self.driver.get(address)
        self.until("return document.documentElement.dataset.ready !== undefined")

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def until(self, script: str, *arguments: Any) -> Any:
        """Wait for a script to return something true, and return that."""
        from selenium.webdriver.support.ui import WebDriverWait

        def found(driver: Any) -> Any:
            return driver.execute_script(script, *arguments)

        return WebDriverWait(self.driver, WAIT, poll_frequency=0.1).until(found, f"never true: {script}")

    def view(self, name: str) -> None:
        """Switch to a view and wait until it is drawn."""
        self.run("window.arrived = false; go(arguments[0]).then(() => { window.arrived = true; })", name)
        self.until("return window.arrived")

    def complaints(self) -> list[str]:
        """What the console was told since the last call, warnings and errors."""
        return [
            entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("WARNING", "SEVERE")
        ]

    def drawn(self) -> list[dict[str, Any]]:
        """The cards of the view: title, whether shown, how many pixels of its canvas are not blank, what it says."""
        return self.driver.execute_async_script(_CARDS)

    def screenshot(self, path: Path) -> None:
        """The whole page, however long."""
        height = self.run("return Math.max(document.documentElement.scrollHeight, 850)")
        self.driver.set_window_size(1366, min(int(height) + 150, 6000))
        self.driver.save_screenshot(str(path))
        self.driver.set_window_size(1366, 850)


_CARDS = """
const done = arguments[0];
const look = (card) => {
  const canvas = card.box.querySelector("canvas");
  let painted = 0;
  if (canvas && canvas.width && canvas.height) {
    const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    for (let i = 3; i < pixels.length; i += 4) painted += pixels[i] > 0;
  }
  return { title: card.title, shown: !card.element.hidden && !card.box.hidden, painted,
           says: card.message.hidden ? "" : card.message.textContent,
           series: card.chart ? card.chart.getOption().series.length : 0 };
};
(async () => {
  for (const card of drawn) {
    card.visible = true;
    await card.load();
  }
  await drawing; // cards that came into sight meanwhile
  for (const card of drawn) card.flush();
  done([...drawn].map(look));
})();
"""
