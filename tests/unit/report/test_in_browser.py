"""The page in a real, headless Chromium: it loads alone, fits, can be read, and folds open.

Needs Debian's `chromium` and `chromium-driver` (or their like) on the path; without them the tests
are skipped.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from babyllama_ds.report.collect import collect_report
from babyllama_ds.report.html import render_html, view_of
from babyllama_ds.report.metrics import collect_curves
from babyllama_ds.report.write import write_report

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None,
        reason="no Chromium with its driver here: apt-get install chromium chromium-driver",
    ),
]

PHONE, DESK = 390, 1280
SCHEMES = ("light", "dark")

# Every visible text with the contrast that it has (WCAG 2.2) with what lies behind it.
CONTRASTS = """
const part = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const bright = ([r, g, b]) => 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
const read = text => {
  const found = text.match(/[\\d.]+/g).map(Number);
  return [found.slice(0, 3), found.length > 3 ? found[3] : 1];
};
const over = (top, alpha, below) => top.map((c, k) => alpha * c + (1 - alpha) * below[k]);
const behind = element => {
  if (!element) return matchMedia('(prefers-color-scheme: dark)').matches ? [0,0,0] : [255,255,255];
  const [colour, alpha] = read(getComputedStyle(element).backgroundColor);
  return alpha === 1 ? colour : over(colour, alpha, behind(element.parentElement));
};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
const found = [];
for (let node; node = walker.nextNode();) {
  const element = node.parentElement, style = getComputedStyle(element);
  const box = element.getBoundingClientRect();
  if (!node.data.trim() || !box.width || style.visibility === 'hidden') continue;
  const [colour, alpha] = read(element instanceof SVGElement ? style.fill : style.color);
  const ground = behind(element);
  const levels = [bright(over(colour, alpha, ground)), bright(ground)].sort((a, b) => b - a);
  found.push([node.data.trim().slice(0, 40), (levels[0] + 0.05) / (levels[1] + 0.05)]);
}
return found;
"""

# Texts of figures: what they say, and where they lie on the screen beside their figure.
TEXTS = """
return [...document.querySelectorAll('figure svg')].map(svg => {
  const box = element => {
    const {left, top, right, bottom} = element.getBoundingClientRect();
    return [left, top, right, bottom];
  };
  return {
    svg: box(svg),
    texts: [...svg.querySelectorAll('text')].filter(t => t.textContent.trim())
      .map(t => ({said: t.textContent, box: box(t), upright: box(t)[2] - box(t)[0] > 0,
                  size: parseFloat(getComputedStyle(t).fontSize)
                        * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width})),
  };
});
"""


class Browser:
    """One window of a headless Chromium."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, page: Path, *, width: int = DESK, scheme: str = "light") -> None:
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.command("Emulation.setEmulatedMedia", features=[feature])
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)  # what was logged before
        self.driver.get(page.as_uri())

    def command(self, name: str, **parameters: object) -> Any:
        return self.driver.execute_cdp_cmd(name, parameters)

    def run(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def said(self) -> list[str]:
        """What stands on the console."""
        return [line["message"] for line in self.driver.get_log("browser")]

    def asked_for(self) -> list[str]:
        """Every address that was asked for since `open`."""
        messages = [json.loads(x["message"])["message"] for x in self.driver.get_log("performance")]
        return [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=DRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield Browser(driver)
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def page(
    make_run_in: Callable[..., Path],
    domains: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A report with everything that there can be."""
    run = make_run_in(tmp_path_factory.mktemp("whole"))
    report = {**write_report(run), "domains": domains}
    view = view_of(report, collect_curves(run / "metrics.jsonl", report["models"]))
    path = run / "report" / "report.html"
    path.write_text(render_html(view))
    return path


def unfold(browser: Browser) -> None:
    browser.run("document.querySelectorAll('details').forEach(one => one.open = true)")


def test_it_loads_alone_and_says_nothing(browser: Browser, page: Path) -> None:
    browser.open(page)
    unfold(browser)
    assert browser.said() == []
    asked_for = browser.asked_for()
    assert page.as_uri() in asked_for
    assert [url for url in asked_for if not url.startswith(("file://", "data:"))] == []
    assert browser.driver.title == "demo-11 – report"


def test_a_page_that_asks_for_more_would_be_noticed(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text('<img src="http://127.0.0.1:9/x.png"><script>console.error("no")</script>')
    browser.open(page)
    assert "http://127.0.0.1:9/x.png" in browser.asked_for()
    assert any("no" in line for line in browser.said())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_every_text_can_be_read(browser: Browser, page: Path, scheme: str, width: int) -> None:
    browser.open(page, scheme=scheme, width=width)
    unfold(browser)
    contrasts = browser.run(CONTRASTS)
    assert len(contrasts) > 200
    assert [found for found in contrasts if found[1] < 4.5] == []


def test_light_and_dark_differ(browser: Browser, page: Path) -> None:
    colours = []
    for scheme in SCHEMES:
        browser.open(page, scheme=scheme)
        shown = "[getComputedStyle(document.body).backgroundColor, "
        shown += "getComputedStyle(document.querySelector('figure svg text')).fill]"
        colours.append(browser.run(f"return {shown}"))
    assert colours[0][0] != colours[1][0]
    assert colours[0][1] != colours[1][1]


@pytest.mark.parametrize("width", [320, PHONE, 768, DESK])
def test_the_page_is_never_wider_than_its_window(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width=width)
    unfold(browser)
    assert browser.run("return innerWidth") == width
    assert browser.run("return document.documentElement.scrollWidth") <= width
    boxes = "[...document.querySelectorAll('section, .wide, figure, pre, .box, nav')]"
    outside = browser.run(
        f"return {boxes}.filter(e => e.getBoundingClientRect().right > innerWidth).length"
    )
    assert outside == 0


def test_wide_tables_scroll_in_their_box(browser: Browser, page: Path) -> None:
    browser.open(page, width=PHONE)
    wide, shown = browser.run(
        "const box = document.querySelector('.wide');"
        "box.scrollLeft = 9999; return [box.scrollWidth - box.clientWidth, box.scrollLeft]"
    )
    assert wide > 100
    assert shown == pytest.approx(wide, abs=1)


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_figures_are_there_and_their_texts_lie_inside_and_apart(
    browser: Browser, page: Path, width: int
) -> None:
    browser.open(page, width=width)
    figures = browser.run(TEXTS)
    assert len(figures) == 11
    for figure in figures:
        left, top, right, bottom = figure["svg"]
        assert min(right - left, bottom - top) > 150
        for text in figure["texts"]:
            x0, y0, x1, y1 = text["box"]
            inside = left - 1 <= x0 and x1 <= right + 1 and top - 1 <= y0 and y1 <= bottom + 1
            assert inside, text
            assert text["size"] > 8, text
        for number, one in enumerate(figure["texts"]):
            for other in figure["texts"][number + 1 :]:
                assert not covers(one["box"], other["box"]), (one, other)


def covers(one: list[float], other: list[float]) -> bool:
    """Whether two boxes overlap by more than the empty rim of a line of text."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return width > 1 and height > 4


def test_details_fold_open(browser: Browser, page: Path) -> None:
    from selenium.webdriver.common.by import By

    browser.open(page)
    folded = browser.driver.find_elements(By.CSS_SELECTOR, "details:not([open])")
    assert len(folded) >= 5
    for details in folded:
        before = details.size["height"]
        details.find_element(By.TAG_NAME, "summary").click()
        assert details.get_property("open")
        assert details.size["height"] > before + 20


def test_figures_stand_alone(browser: Browser, page: Path) -> None:
    for path in sorted(page.parent.glob("*.svg")):
        browser.open(path, scheme="dark")
        assert browser.said() == []
        box = browser.run(
            "const {width, height} = document.documentElement.getBoundingClientRect();"
            "return [width, height]"
        )
        assert min(box) > 150


@pytest.mark.parametrize("missing", ["evaluation", "metrics.jsonl", "environment.json"])
def test_pages_of_runs_that_are_not_whole(
    browser: Browser, make_run: Callable[..., Path], missing: str
) -> None:
    run = make_run(missing, state={"status": "failed", "error": "out of memory " * 20})
    report = collect_report(run)
    path = run / "page.html"
    path.write_text(
        render_html(view_of(report, collect_curves(run / "metrics.jsonl", report["models"])))
    )
    browser.open(path, width=PHONE)
    unfold(browser)
    assert browser.said() == []
    assert browser.run("return document.documentElement.scrollWidth") <= PHONE
    assert [found for found in browser.run(CONTRASTS) if found[1] < 4.5] == []
