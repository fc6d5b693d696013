"""The page in a real browser: what a reader sees, on a phone and on a desk, by day and by night."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip(
    "playwright.sync_api", reason="Playwright is not installed (pip install playwright)"
)
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)"
)
PHONE, DESK = {"width": 360, "height": 740}, {"width": 1280, "height": 900}
WIDTHS = """
() => [document.documentElement.scrollWidth, document.documentElement.clientWidth]
"""
PICTURES = """
() => [...document.images].map((img) => ({
  complete: img.complete, width: img.naturalWidth, alt: img.alt, source: img.currentSrc,
  dark: img.parentElement.querySelector("source").srcset, light: img.src,
  drawn: img.getBoundingClientRect().width,
}))
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM)
        yield launched
        launched.close()


@pytest.fixture
def visit(browser: Any, finished_run: Path) -> Iterator[Any]:
    """Opens the page; what the browser complained of or asked for must be nothing in the end."""
    complaints: list[str] = []
    asked: list[str] = []
    opened = []

    def open_page(viewport: dict[str, int], scheme: str = "light") -> Any:
        page = browser.new_page(viewport=viewport, color_scheme=scheme)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((finished_run / "artifacts/report/index.html").as_uri())
        page.wait_for_load_state("load")
        opened.append(page)
        return page

    yield open_page
    for page in opened:
        page.close()
    assert complaints == []
    assert {url.split(":")[0] for url in asked} <= {"file", "data"}
    assert sum(url.startswith("file:") for url in asked) == len(opened)


@pytest.mark.parametrize("viewport", [PHONE, DESK], ids=["phone", "desk"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_picture_is_there_and_nothing_runs_over(
    visit: Any, viewport: dict[str, int], scheme: str
) -> None:
    page = visit(viewport, scheme)
    pictures = page.evaluate(PICTURES)
    assert len(pictures) >= 6
    for picture in pictures:
        assert picture["complete"]
        assert picture["width"] > 600
        assert picture["source"] == picture[scheme]
        assert picture["dark"] != picture["light"]
        assert len(picture["alt"]) > 40
        assert 250 < picture["drawn"] <= viewport["width"]
    needed, there = page.evaluate(WIDTHS)
    assert needed <= there


def test_dark_is_dark(visit: Any) -> None:
    page = visit(DESK)
    shade = "() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    assert min(page.evaluate(shade)) > 200
    page.emulate_media(color_scheme="dark")
    assert max(page.evaluate(shade)) < 50
    ink = "() => getComputedStyle(document.body).color.match(/\\d+/g).map(Number)"
    assert min(page.evaluate(ink)) > 200


def test_it_is_titled_and_its_headings_are_in_order(visit: Any) -> None:
    page = visit(DESK)
    assert page.title() == "tiny · merge report"
    assert page.locator("html").get_attribute("lang") == "en"
    levels = page.evaluate("() => [...document.querySelectorAll('h1,h2,h3')].map((h) => h.tagName)")
    assert levels[0] == "H1"
    assert set(levels[1:]) == {"H2"}
    for link in page.locator("nav a").all():
        assert page.locator(link.get_attribute("href")).count() == 1
    assert page.locator("nav a").count() == page.locator("main section").count()


def column(page: Any, key: str, index: int) -> list[str | None]:
    rows = page.locator(f"#{key} table").first.locator("tbody tr").all()
    cells = [row.locator("th, td").nth(index) for row in rows]
    return [cell.get_attribute("data-value") or cell.inner_text() for cell in cells]


def test_numbers_are_sorted_as_numbers(visit: Any) -> None:
    page = visit(DESK)
    head = page.locator("#leaderboard table th[scope=col]").nth(1)
    before = column(page, "leaderboard", 1)
    assert head.get_attribute("aria-sort") is None
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    rising = [float(value) for value in column(page, "leaderboard", 1)]
    assert rising == sorted(map(float, before))
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert [float(v) for v in column(page, "leaderboard", 1)] == sorted(rising, reverse=True)


def test_words_are_sorted_from_the_keyboard(visit: Any) -> None:
    page = visit(DESK)
    heads = page.locator("#leaderboard table th[scope=col]")
    heads.nth(1).locator("button").click()
    heads.nth(0).locator("button").focus()
    page.keyboard.press("Enter")
    names = column(page, "leaderboard", 0)
    assert names == sorted(names)
    assert heads.nth(1).get_attribute("aria-sort") is None


def test_gaps_are_sorted_last(visit: Any) -> None:
    page = visit(DESK)
    table = page.locator("#leaderboard table")
    button = table.locator("th[scope=col]").nth(5).locator("button")
    for _ in range(2):
        button.click()
        assert column(page, "leaderboard", 5)[-1] == "–"


def test_nothing_can_be_loaded_or_run_from_elsewhere(browser: Any, finished_run: Path) -> None:
    page = browser.new_page()
    page.goto((finished_run / "artifacts/report/index.html").as_uri())
    refused = page.evaluate(
        """() => new Promise((resolve) => {
          const seen = [];
          document.addEventListener("securitypolicyviolation", (event) => {
            seen.push(event.effectiveDirective);
            if (seen.length === 2) resolve(seen.sort());
          });
          const picture = new Image();
          picture.src = "http://127.0.0.1:9/picture.png";
          const script = document.createElement("script");
          script.textContent = "window.ran = true";
          document.body.append(picture, script);
        })"""
    )
    assert refused == ["img-src", "script-src-elem"]
    assert page.evaluate("() => window.ran") is None
    page.close()
