"""The pages lead on, and the site that is built of them needs nobody else."""

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(```+|~~~+).*?^\1", flags=re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}


def text_of(page: Path) -> str:
    """A page without its code."""
    return re.sub(r"`[^`\n]+`", "", FENCE.sub("", page.read_text(encoding="utf-8")))


def anchors(page: Path) -> set[str]:
    """What links into a page may name."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text("utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(text_of(page)):
        parts = urlsplit(link)
        if parts.scheme:
            assert parts.scheme == "https", link
            assert re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.netloc), link
            continue
        target = (page.parent / parts.path).resolve() if parts.path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not parts.fragment or parts.fragment in anchors(target), link


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does it: a page that nothing names would end the build."""
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    out = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    return out


class Loaded(HTMLParser):
    """Collects what a browser fetches by itself with a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in LOADED and given.get("rel") not in {"next", "prev", "canonical"}:
            self.urls += filter(None, [given.get(LOADED[tag])])
        self.urls += re.findall(r"url\(([^)]+)\)", given.get("style") or "")


def outside(urls: list[str]) -> list[str]:
    """Those that are neither files of the site nor data."""
    cleaned = (url.strip("'\" ") for url in urls)
    return [url for url in cleaned if urlsplit(url).scheme not in {"", "data"} or url[:2] == "//"]


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(PAGES) - 2
    for page in pages:
        loaded = Loaded(page).urls
        assert any(url.endswith(".css") for url in loaded), page
        assert not outside(loaded), page
        assert 'class="mermaid"' not in page.read_text(encoding="utf-8"), "its script is on a CDN"
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        assert not outside(re.findall(r"url\(([^)]+)\)", text)), sheet
        assert "@import" not in text, sheet


def test_what_is_linked_outside_of_docs_is_in_the_site(site: Path) -> None:
    page = (site / "reference/params.html").read_text(encoding="utf-8")
    assert 'href="../repository/params.yaml.html"' in page
    assert "merge" in (site / "repository/params.yaml.html").read_text(encoding="utf-8")
    results = (site / "results.html").read_text(encoding="utf-8")
    assert 'href="repository/data/index.html"' in results


def test_marks_that_a_forge_reads_are_read_here_too(site: Path) -> None:
    """A list or a table that follows a line of text without a space would stay text."""
    for page in site.rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        text = re.sub(r"<(pre|code|script)\b.*?</\1>", "", html, flags=re.DOTALL)
        assert not re.search(r"\|---|```|<p>[^<]*\n- ", text), page


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name
        """Say nothing."""


@pytest.fixture(scope="module")
def served(site: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("Chromium is not installed (apt-get install chromium)")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=chromium)
        yield launched
        launched.close()


@pytest.mark.parametrize(
    ("width", "scheme", "named"), [(390, "dark", "slate"), (1366, "light", "default")]
)
def test_a_browser_is_content(
    browser: Any, served: str, width: int, scheme: str, named: str
) -> None:
    complaints: list[str] = []
    asked: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.set_default_timeout(120_000)
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    for name in ("index.html", "reference/params.html", "posterior.html"):
        page.goto(served + name)
        needed, there = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert needed <= there, name
        assert page.evaluate("document.body.dataset.mdColorScheme") == named
    page.evaluate("document.querySelector('.md-search__input').focus()")
    page.keyboard.type("ridge")
    page.wait_for_selector(".md-search-result__item")
    page.close()
    assert complaints == []
    assert [url for url in asked if not url.startswith((served, "data:", "blob:"))] == []
