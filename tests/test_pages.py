"""The built pages in _build/html: complete, self-contained, and without traces of errors."""

import importlib.util
import json
import re
from copy import copy
from functools import cache
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import numpy as np
import pytest
from bs4 import BeautifulSoup
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from source import HTML, ROOT, chapters, code_cells, tags, toc, wrong_alts

import agrlib

pytestmark = pytest.mark.pages

FETCHES = {  # the attributes through which an element loads something when the page is opened
    "audio": ["src"],
    "embed": ["src"],
    "iframe": ["src", "srcdoc"],
    "image": ["href", "xlink:href"],
    "img": ["src", "srcset"],
    "input": ["src"],
    "link": ["href"],
    "object": ["data"],
    "script": ["src"],
    "source": ["src", "srcset"],
    "track": ["src"],
    "use": ["href", "xlink:href"],
    "video": ["src", "poster"],
}
INERT_LINKS = {"author", "canonical", "help", "index", "license", "next", "prev", "search"}
ELSEWHERE = re.compile(r"^\s*(?:[a-z][a-z0-9+.-]*:)?//", re.I)
CSS_LOADS = re.compile(r"url\(\s*['\"]?\s*([^'\")]+)|@import\s+['\"]([^'\"]+)", re.I)
SCRIPT_ADDRESS = re.compile(r"""['"`]\s*((?:(?:https?|wss?):)?//[\w.-]+\.\w+[^'"`\s]*)""", re.I)
JAVASCRIPT = {None, "", "module", "text/javascript", "application/javascript"}
LOGOS = {"Binder logo", "Colab logo"}  # the theme's own pictures in the launch buttons


@pytest.fixture(scope="module", autouse=True)
def built():
    if not (HTML / "index.html").exists():
        pytest.fail("there is no _build/html/index.html: run `make book` first", pytrace=False)


def built_pages() -> list[Path]:
    return [path for path in sorted(HTML.rglob("*.html")) if "_static" not in path.parts]


@cache
def soup(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(), "html.parser")


def page(name: str) -> BeautifulSoup:
    """Return a built page of the book."""
    path = HTML / "book" / f"{name}.html"
    assert path.exists(), f"book/{name}.md was not built: run `make book`"
    return soup(path)


def article(name: str) -> BeautifulSoup:
    found = page(name).find("article")
    assert found is not None
    return found


def css_loads(text: str) -> list[str]:
    return [one or other for one, other in CSS_LOADS.findall(text)]


def loads(html: BeautifulSoup) -> list[str]:
    """Return every address that a page loads from, relative ones included."""
    found: list[str] = []
    for element in html.find_all(True):
        if element.name == "link" and set(element.get("rel", [])) <= INERT_LINKS:
            continue
        for attribute in FETCHES.get(element.name, []):
            value = element.get(attribute)
            if value and attribute == "srcset":
                found += [part.split()[0] for part in value.split(",") if part.split()]
            elif value:
                found.append(value)
        found += css_loads(element.get("style", ""))
        if element.name == "style":
            found += css_loads(element.get_text())
        if element.name == "meta" and element.get("http-equiv", "").lower() == "refresh":
            found.append(element["content"].partition("url=")[2])
        # A script of another type is data that no browser runs.
        if element.name == "script" and element.get("type") in JAVASCRIPT:
            found += SCRIPT_ADDRESS.findall(element.get_text())
    return found


def test_the_scan_sees_each_way_to_load():
    ways = """<script src="//a.org/x.js"></script><link rel="preload" href="https://b.org/x.js">
        <p style="background: url('https://c.org/x.png')"></p><style>@import "//d.org/x"</style>
        <img src="x.png" srcset="y.png 1x, https://e.org/y.png 2x"><a href="https://no.org"></a>
        <script>const URL = "https://f.org/thebe.js"; let path = "//not-a-host";</script>
        <script type="application/json">"https://no.org/x"</script>
        <link rel="canonical" href="https://no.org/page"><iframe src="HTTP://g.org"></iframe>
        <meta http-equiv="refresh" content="0; url=https://h.org"><video poster="https://i.org/p">"""
    found = loads(BeautifulSoup(ways, "html.parser"))
    hosts = sorted(urlsplit(address).netloc for address in found if ELSEWHERE.match(address))
    assert hosts == [f"{letter}.org" for letter in "abcdefghi"]


def test_every_page_of_the_contents_is_built():
    for name in toc():
        path = HTML / Path(name).with_suffix(".html")
        assert path.exists(), f"{name} was not built"
        assert soup(path).find("h1"), f"{name} has no title"
    assert "book/index.html" in (HTML / "index.html").read_text()


def test_no_page_loads_from_another_host():
    for path in built_pages():
        away = [address for address in loads(soup(path)) if ELSEWHERE.match(address)]
        assert away == [], f"{path.relative_to(HTML)} loads {away}"


def test_no_style_sheet_loads_from_another_host():
    for path in HTML.rglob("*.css"):
        away = [address for address in css_loads(path.read_text()) if ELSEWHERE.match(address)]
        assert away == [], f"{path.relative_to(HTML)} loads {away}"


def test_what_pages_load_is_there():
    for path in built_pages():
        base = f"file:///{path.relative_to(HTML).as_posix()}"
        for address in loads(soup(path)):
            if not address.startswith(("data:", "#")):
                target = HTML / urlsplit(urljoin(base, address)).path.lstrip("/")
                assert target.exists(), f"{path.relative_to(HTML)} loads {address}: no such file"


def test_tables_are_tables():
    for path in built_pages():
        lines = [line.get_text() for line in soup(path).select("article p")]
        raw = [text for text in lines if re.search(r"\|\s*:?[-–]+:?\s*\|", text)]
        assert raw == [], f"{path.relative_to(HTML)} shows the source of a table: {raw[0]}"


def test_every_image_has_alt_text_of_its_own():
    alts = []
    for path in built_pages():
        where = path.relative_to(HTML).as_posix()
        for image in soup(path).find_all("img"):
            if "panel" in image.get("class", []) and image.find_previous_sibling("img"):
                assert image.get("alt") == "", "the first panel's text describes the figure"
            elif image.find_parent("article"):
                alts.append((f"{where}: {image['src']}", image.get("alt")))
            elif "logo__image" in image.get("class", []):  # the same one, on every page
                assert wrong_alts([(where, image.get("alt"))]) == []
            else:
                assert image.get("alt") in LOGOS, f"{where}: {image}"
    assert alts
    assert wrong_alts(alts) == []


@pytest.mark.parametrize("name", chapters())
def test_launch_buttons_open_the_notebook(name):
    links = [a["href"] for a in page(name).find_all("a", href=True)]
    assert (ROOT / "book" / f"{name}.ipynb").exists()
    for host in ("https://mybinder.org/", "https://colab.research.google.com/"):
        (link,) = [link for link in links if link.startswith(host)]
        assert link.endswith(f"book/{name}.ipynb"), link


@pytest.mark.parametrize("name", chapters())
def test_exported_cells_say_where_they_go(name):
    exported = sum("export" in tags(cell) for cell in code_cells(name))
    cells = article(name).select(".cell.tag_export")
    assert len(cells) == exported
    for cell in cells:
        told = [line.get_text() for line in cell.select(".goes-to")]
        assert told == [f"goes to agrlib/{name}.py"], cell.get_text()[:200]
    assert len(article(name).select(".goes-to")) == exported, "a cell that is not exported says so"
    sheets = [link["href"] for link in page(name).find_all("link", rel="stylesheet")]
    assert any("_static/book.css" in sheet for sheet in sheets)


@pytest.mark.parametrize("name", chapters())
def test_exercises_and_proofs_are_boxes(name):
    html = article(name)
    assert len(html.select(".exercise")) >= 3
    assert len(html.select(".solution.dropdown")) == len(html.select(".exercise"))
    assert html.select(".proof")


@pytest.mark.parametrize("name", agrlib.__all__)
def test_api_page_documents(name):
    entry = page("api").find(id=f"agrlib.{name}")
    assert entry is not None, f"book/api.md does not document agrlib.{name}"
    text = entry.find_parent("dl").find("dd").get_text()
    assert len(text.split()) > 10, f"agrlib.{name} has no docstring"


def test_search_index_knows_the_chapters():
    text = (HTML / "searchindex.js").read_text()
    index = json.loads(text.removeprefix("Search.setIndex(").removesuffix(")"))
    assert {f"book/{name}" for name in chapters()} <= set(index["docnames"])
    assert "agr" in index["terms"] or "agr" in index["titleterms"]


def test_no_page_shows_an_error():
    for path in built_pages():
        where = path.relative_to(HTML)
        html = soup(path)
        if where.parts[0] != "_modules":
            assert "Traceback (most recent call last)" not in html.get_text(), where
        assert html.select(".problematic, .system-message") == [], where
        for output in html.select(".cell_output .stderr, .output.error, .output.traceback"):
            raise AssertionError(f"{where} shows {output.get_text()[:200]}")
    assert list(HTML.glob("reports/*")) == [], "a chapter failed in the build"


@pytest.mark.parametrize("name", [Path(name).stem for name in toc()])
def test_no_reference_is_unresolved(name):
    html = copy(article(name))
    for code in html.find_all(["pre", "code"]):
        code.extract()
    text = html.get_text()
    assert "??" not in text
    assert not re.search(r"\{(?:ref|eq|cite\S*|prf:\w+|glue\S*|doc|numref|func|class)\}", text)
    assert html.select("a.internal[href=''], span.xref.std-ref") == []
    ids = {element["id"] for element in page(name).find_all(id=True)}  # code included
    dead = [a["href"] for a in html.select("a[href^='#']") if a["href"][1:] not in {"", *ids}]
    assert dead == []


@pytest.fixture(scope="module")
def own_pages():
    spec = importlib.util.spec_from_file_location("own_pages", ROOT / "book/_ext/own_pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "columns, shared, cuts", [(1, False, 0), (2, False, 1), (3, False, 2), (2, True, 0)]
)
def test_figures_are_cut_between_panels(own_pages, columns, shared, cuts):
    canvas = FigureCanvasAgg(Figure(figsize=(3 * columns, 3), dpi=120, layout="constrained"))
    for column, axes in enumerate(canvas.figure.subplots(1, columns, squeeze=False)[0]):
        axes.plot([0, 1], [1e-3, 1e3])
        axes.set(yscale="log", xlabel="steps", ylabel="loss", title=f"panel {column}")
    if shared:
        canvas.figure.suptitle("one title over both panels, which a cut would part")
    canvas.draw()
    picture = np.asarray(canvas.buffer_rgba())[..., :3].min(2)
    found = own_pages.gutters(picture)
    assert len(found) == cuts
    assert all((picture[:, cut] > 250).all() for cut in found)
    for number, cut in enumerate(found, 1):
        assert abs(cut / picture.shape[1] - number / columns) < 0.05


@pytest.mark.parametrize(
    "formula, cut",
    [
        (r"x_{t+1} = x_t - \eta g_t", [r"x_{t+1} = {}", r"x_t - \eta g_t"]),
        (r"\{x : f(x) \le c\}", [r"\{x : f(x) \le c\}"]),
        (r"\left( a = b \right) \le \sum_i x_i", [r"\left( a = b \right) \le {}", r"\sum_i x_i"]),
        (r"x_{=}", [r"x_{=}"]),
        (r"\lvert a = b \rvert", [r"\lvert a = b \rvert"]),
        (r"\frac{1}{2 \eta} \lVert x \rVert + y", [r"\frac{1}{2 \eta} \lVert x \rVert + {}", "y"]),
    ],
)  # fmt: skip
def test_formulas_are_cut_after_relations_only(own_pages, formula, cut):
    assert own_pages.pieces(formula) == cut
    assert re.sub(r"\s|\{\}", "", "".join(cut)) == re.sub(r"\s", "", formula)
