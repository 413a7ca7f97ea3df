"""The built book in headless Chromium, served from this machine and cut off from all others."""

import functools
import os
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import pytest
from source import HTML, ROOT, chapters

pytestmark = pytest.mark.browser

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
CHAPTER = "regularization"


class Quiet(SimpleHTTPRequestHandler):
    """Serve files without a log."""

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """The address at which the built book is served."""
    if not (HTML / "index.html").exists():
        pytest.fail("there is no _build/html/index.html: run `make book` first", pytrace=False)
    handler = functools.partial(Quiet, directory=str(HTML))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        reason = f"no browser: install one of {', '.join(NAMES)}"
        pytest.fail(reason, pytrace=False) if "CI" in os.environ else pytest.skip(reason)
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def tab(browser, site):
    """A page of which every request and every error is noted, and judged at the end of the test."""
    requests: list[str] = []
    errors: list[str] = []
    context = browser.new_context(base_url=site, viewport={"width": 1280, "height": 900})
    context.route(lambda url: urlsplit(url).hostname != "127.0.0.1", lambda route: route.abort())
    context.on("request", lambda request: requests.append(request.url))
    context.on("weberror", lambda error: errors.append(str(error.error)))
    context.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    context.on("response", lambda r: errors.append(f"{r.status} {r.url}") if r.status >= 400 else 0)
    context.set_default_timeout(30_000)
    yield context.new_page()
    context.close()
    away = [
        u for u in requests if urlsplit(u).scheme not in ("data", "blob") and not u.startswith(site)
    ]
    assert requests and away == [], "requests that leave the machine"
    assert errors == []


def open_page(tab, path: str):
    """Open a page and wait until its equations are typeset."""
    tab.goto(path)
    tab.wait_for_load_state("load")
    tab.evaluate("() => window.MathJax && MathJax.startup.promise.then(() => true)")
    return tab


def test_index_leads_to_every_chapter(tab):
    tab.goto("/index.html")
    tab.wait_for_url("**/book/index.html")  # to which it forwards
    assert tab.title().startswith("Adaptive Gradients, Regularized")
    for name in chapters():
        assert tab.locator(f"nav.bd-links a[href='{name}.html']").count() == 1
    tab.locator(f"nav.bd-links a[href$='{chapters()[0]}.html']").click()
    tab.wait_for_url(f"**/book/{chapters()[0]}.html")
    assert tab.locator("article h1").is_visible()


@pytest.mark.parametrize("name", chapters())
def test_chapter_is_typeset(tab, name):
    open_page(tab, f"/book/{name}.html")
    written = (ROOT / "book" / f"{name}.md").read_text().count("$") // 2  # some chapters need none
    assert tab.locator("article mjx-container").count() >= min(3, written)
    assert tab.locator("article mjx-merror, article [data-mjx-error]").count() == 0
    text = tab.locator("article").inner_text()
    assert not re.search(r"\\[(\[]|\\begin\{|\$\$|\(\?\?\?\)", text), "an equation is not typeset"
    for image in tab.locator("article img").all():
        image.scroll_into_view_if_needed()
        assert image.evaluate("e => e.decode().then(() => e.naturalWidth)") > 0


def test_search_finds_the_chapter(tab):
    tab.goto("/search.html?q=AGR")
    hit = tab.locator(f"#search-results a[href*='book/{CHAPTER}.html']").first
    hit.wait_for()
    hit.click()
    tab.wait_for_url(f"**/book/{CHAPTER}.html*")
    assert "daptive gradient regularization" in tab.locator("article h1").inner_text()


def test_search_button_opens_the_search(tab):
    open_page(tab, f"/book/{CHAPTER}.html")
    tab.locator(".search-button__button:visible").first.click()
    box = tab.locator("input[type=search]:visible").first
    box.fill("AGR")
    box.press("Enter")
    tab.wait_for_url("**/search.html?q=AGR*")
    tab.locator(f"#search-results a[href*='book/{CHAPTER}.html']").first.wait_for()


def test_dark_theme_toggles_and_stays(tab):
    open_page(tab, f"/book/{CHAPTER}.html")
    look = "() => getComputedStyle(document.body).backgroundColor"
    theme = "() => document.documentElement.dataset.theme"
    seen = {tab.evaluate(theme): tab.evaluate(look)}
    for _ in range(3):  # the button goes round: as the system, light, dark
        tab.locator("button.theme-switch-button:visible").first.click()
        seen[tab.evaluate(theme)] = tab.evaluate(look)
    assert set(seen) == {"light", "dark"} and len(set(seen.values())) == 2
    while tab.evaluate(theme) != "dark":
        tab.locator("button.theme-switch-button:visible").first.click()
    tab.reload()
    assert tab.evaluate(theme) == "dark"
    figure = tab.locator("article .cell_output img").first
    style = figure.evaluate(
        "e => [getComputedStyle(e).filter, getComputedStyle(e).backgroundColor]"
    )
    turned = "invert(1) hue-rotate(180deg) brightness(1.2)"
    assert style == [turned, "rgba(0, 0, 0, 0)"], "figures sit on the page, not on a light box"


def test_solution_opens(tab):
    open_page(tab, f"/book/{CHAPTER}.html")
    solution = tab.locator("article .solution.dropdown").first
    body = solution.locator("section, .section, p:not(.admonition-title)").last
    assert not body.is_visible()
    solution.locator("button.toggle-button").first.click()
    body.wait_for(state="visible")


def test_first_cell_is_folded_and_opens(tab):
    open_page(tab, f"/book/{CHAPTER}.html")
    cell = tab.locator("article .cell.tag_hide-cell").first
    assert not cell.locator(".cell_input").is_visible()
    cell.locator("summary, button").first.click()
    assert cell.locator(".cell_input").is_visible()


def test_launch_buttons_are_shown(tab):
    open_page(tab, f"/book/{CHAPTER}.html")
    tab.locator(".dropdown-launch-buttons button").first.click()
    for host in ("mybinder.org", "colab.research.google.com"):
        link = tab.locator(f".dropdown-launch-buttons a[href*='{host}']")
        assert link.is_visible()
        assert link.get_attribute("href").endswith(f"/book/{CHAPTER}.ipynb")


@pytest.mark.parametrize("path", ["book/index", "book/reading", "book/api", f"book/{CHAPTER}"])
def test_narrow_page_does_not_overflow(tab, path):
    tab.set_viewport_size({"width": 390, "height": 844})
    open_page(tab, f"/{path}.html")
    width = "() => Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)"
    assert tab.evaluate(width) <= 390


def test_panels_stand_side_by_side_or_under_each_other(tab):
    for width, stacked in ((1400, False), (390, True)):
        tab.set_viewport_size({"width": width, "height": 844})
        open_page(tab, "/book/sgd.html")
        first, second = tab.locator("article .panels").first.locator("img").all()[:2]
        first.scroll_into_view_if_needed()
        one, two = first.bounding_box(), second.bounding_box()
        assert (two["y"] >= one["y"] + one["height"]) is stacked
        assert stacked or two["x"] == pytest.approx(one["x"] + one["width"], abs=0.5)
        assert two["x"] + two["width"] <= width


@pytest.mark.parametrize("name", ["adagrad", "padam", "sgd"])
def test_no_formula_sticks_out_of_a_narrow_page(tab, name):
    tab.set_viewport_size({"width": 390, "height": 844})
    open_page(tab, f"/book/{name}.html")
    tab.evaluate(
        """() => {
            document.querySelectorAll("article details").forEach(part => part.open = true);
            document.querySelectorAll("article .toggle-hidden").forEach(
                part => part.classList.remove("toggle-hidden"));
        }"""
    )
    wide = tab.evaluate(
        """() => [...document.querySelectorAll("article mjx-container")]
            .filter(formula => formula.getBoundingClientRect().right > 391)
            .filter(formula => !formula.closest(".pst-scrollable-table-container"))
            .map(formula => formula.closest("p, li, div").textContent)"""
    )
    assert wide == []
