"""The book's sources: what every chapter must have, and what must agree across files."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
import tomllib
import yaml
from packaging.requirements import Requirement
from source import ROOT, chapters, code_cells, is_compared, tags, toc, wrong_alts

import agrlib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ADDRESS = PROJECT["urls"]["Repository"]
REQUIRED = [
    Requirement(text)
    for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for text in group
]
TEXT = {".bib", ".cff", ".cfg", ".css", ".ipynb", ".md", ".py", ".svg", ".toml", ".txt", ".yml", ""}
SKIPPED = {"_build", "__pycache__", "node_modules"}
KNOWN_TAGS = {"export", "hide-cell", "hide-input", "hide-output", "remove-input", "remove-output"}
KNOWN_TAGS |= {"claim", "nbval-ignore-output", "nbval-skip", "raises-exception", "remove-cell"}

each_chapter = pytest.mark.parametrize("name", chapters())


def text_of(name: str) -> str:
    return (ROOT / "book" / f"{name}.md").read_text()


def first_line(cell) -> str:
    return next((line for line in cell.source.splitlines() if line.strip()), "")[:60]


def test_every_page_is_in_the_table_of_contents_and_every_entry_is_a_page():
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "book").rglob("*.md")}
    assert set(toc()) == pages
    assert len(toc()) == len(set(toc()))


def test_every_chapter_is_in_a_numbered_part():
    parts = yaml.safe_load((ROOT / "_toc.yml").read_text())["parts"]
    numbered = {e["file"] for part in parts if part.get("numbered") for e in part["chapters"] or []}
    assert numbered == {f"book/{name}.md" for name in chapters()}


def test_first_code_cells_are_identical():
    firsts = {name: code_cells(name)[0] for name in chapters()}
    model = firsts[chapters()[0]]
    for name, cell in firsts.items():
        assert cell.source == model.source, f"book/{name}.md: another first cell"
        assert tags(cell) == tags(model) >= {"nbval-ignore-output"}, f"book/{name}.md: other tags"


def test_every_figure_has_alt_text_of_its_own():
    alts = [
        (f"book/{name}.md, cell {first_line(cell)!r}", image.get("alt"))
        for name in chapters()
        for cell in code_cells(name)
        if any(kind.startswith("image/") for o in cell.outputs for kind in o.get("data", {}))
        for image in [cell.metadata.get("mystnb", {}).get("image", {})]
    ]
    assert alts
    assert wrong_alts(alts) == []


@each_chapter
def test_cell_makes_at_most_one_figure(name):  # its alt text stands for all of them
    for cell in code_cells(name):
        figures = [o for o in cell.outputs if "image/png" in o.get("data", {})]
        assert len(figures) <= 1, f"cell {first_line(cell)!r} makes {len(figures)} figures"


@each_chapter
def test_chapter_has_three_compared_outputs(name):
    compared = [first_line(cell) for cell in code_cells(name)[1:] if is_compared(cell)]
    assert len(compared) >= 3, f"the notebook test of {name} compares only {compared}"


@each_chapter
def test_outputs_are_clean(name):
    for cell in code_cells(name):
        where = f"book/{name}.md, cell {first_line(cell)!r}"
        for output in cell.outputs:
            assert output.get("name") != "stderr", f"{where} writes to stderr: {output.text[:200]}"
            if output.output_type == "error":
                assert "raises-exception" in tags(cell), f"{where} raised {output.evalue}"
            text = str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
            assert not re.search(rf"{re.escape(str(ROOT))}|/tmp/|/home/|/root/", text), where


@each_chapter
def test_bars_that_vanish_are_not_compared(name):
    for cell in code_cells(name):
        if any("text/html" in output.get("data", {}) for output in cell.outputs):
            assert "nbval-ignore-output" in tags(cell), f"{first_line(cell)!r} shows a bar"


@each_chapter
def test_output_is_ignored_by_tag_only(name):
    for cell in code_cells(name):
        where = f"book/{name}.md, cell {first_line(cell)!r}"
        assert tags(cell) <= KNOWN_TAGS, f"{where} has unknown tags"
        assert not re.search(r"#.*\b(NBVAL|PYTEST_VALIDATE)_", cell.source), where


@each_chapter
def test_exercises_have_executed_solutions(name):
    text = text_of(name)
    labels = re.findall(r"^`{3,}\{exercise\}.*\n:label: (\S+)", text, re.M)
    assert len(labels) == len(re.findall(r"^`{3,}\{exercise\}", text, re.M)), "one has no label"
    assert len(labels) >= 3, f"{name} has {len(labels)} exercises"
    block = r"^`{3,}\{solution-start\} (\S+)\n(.*?)^`{3,}\{solution-end\}"
    solutions = dict(re.findall(block, text, re.M | re.S))
    assert sorted(solutions) == sorted(labels), "an exercise without solution, or the reverse"
    for label, solution in solutions.items():
        assert ":class: dropdown" in solution, f"the solution of {label} is no dropdown"
    executed = [label for label in labels if "{code-cell}" in solutions[label]]
    assert len(executed) >= 3, f"only {executed} have a solution that runs"


def test_labels_are_unique():
    found: dict[str, str] = {}
    for page in toc():
        text = (ROOT / page).read_text()
        for label in re.findall(r"^:label: (\S+)|^\((\S+)\)=$|^\$\$ \((\S+)\)$", text, re.M):
            key = "".join(label)
            assert key not in found, f"{page} and {found[key]} both define {key}"
            found[key] = page


@each_chapter
def test_chapter_proves_something(name):
    boxes = re.findall(r"^[`:]{3,}\{prf:(\w+)\}", text_of(name), re.M)
    claims = {"theorem", "proposition", "lemma", "corollary"}
    assert any(a in claims and b == "proof" for a, b in pairwise(boxes)), f"{name} has {boxes}"


@each_chapter
def test_chapter_cites_and_its_citations_exist(name):
    defined = re.findall(r"^@\w+\{([^,\s]+),", (ROOT / "book" / "references.bib").read_text(), re.M)
    assert len(defined) == len(set(defined)), "references.bib defines a key twice"
    roles = re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", text_of(name))
    cited = {key.strip() for keys in roles for key in keys.split(",")}
    assert cited, f"{name} cites nothing"
    assert cited <= set(defined), f"{name} cites {cited - set(defined)}: not in references.bib"


def test_repository_address_is_the_same_everywhere():
    assert yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"] == ADDRESS
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["repository-code"] == ADDRESS
    for name in chapters():
        assert f'"git+{ADDRESS}"' in code_cells(name)[0].source, f"book/{name}.md, first cell"
    assert ADDRESS in (ROOT / "README.md").read_text()


def test_no_other_address_of_the_repository():
    owner, name = ADDRESS.split("/")[-2:]
    host = r"(?:github\.com|mybinder\.org/v2/gh|colab\.research\.google\.com/github|/github)"
    ours = re.compile(rf"{host}/([\w.-]*agrlib[\w.-]*/[\w.-]+|[\w.-]+/[\w.-]*agrlib[\w.-]*)")
    page = re.compile(r"([\w-]*agrlib[\w-]*)\.github\.io(?:/([\w-]+))?")
    for path in ROOT.rglob("*"):
        inside = path.relative_to(ROOT).parts
        hidden = [part for part in inside if part[0] == "." and part not in (".github", ".ci")]
        if hidden or SKIPPED & set(inside) or path.suffix not in TEXT or not path.is_file():
            continue
        text = path.read_text().replace("api.github.com/repos/", "github.com/")
        found = {m.removesuffix(".git").rstrip(".") for m in ours.findall(text)}
        assert found <= {f"{owner}/{name}"}, f"{Path(*inside)} says {found}, pyproject {ADDRESS}"
        sites = {(a, b or name) for a, b in page.findall(text)}
        assert sites <= {(owner, name)}, f"{Path(*inside)}: pages of {sites}"


def test_authors_are_the_same_everywhere():
    (author,) = (entry["name"] for entry in PROJECT["authors"])
    assert yaml.safe_load((ROOT / "_config.yml").read_text())["author"] == author
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["authors"]
    assert [entry["name"] for entry in cited] == [author]
    assert author in (ROOT / "LICENSE").read_text()


def test_every_exported_name_is_on_the_api_page():
    page = (ROOT / "book" / "api.md").read_text()
    documented = re.findall(r"^\.\. auto\w+:: agrlib\.(\w+)$", page, re.M)
    assert sorted(set(agrlib.__all__) - set(documented)) == []
    assert sorted(agrlib.__all__) == sorted(set(agrlib.__all__), key=str)


def test_pyproject_pins_nothing_tightly():
    for requirement in REQUIRED:
        exact = [s for s in requirement.specifier if s.operator in ("==", "===", "~=")]
        assert not exact, f"pyproject.toml pins {requirement}: pins belong in constraints.txt"
    for requirement in map(Requirement, PROJECT["dependencies"]):
        operators = {s.operator for s in requirement.specifier}
        assert operators <= {">="}, f"{requirement}: Colab's own version must survive the install"


def test_constraints_pin_what_the_book_depends_on():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {r.name.lower(): r for r in map(Requirement, lines)}
    loose = [r for r in pins.values() if [s.operator for s in r.specifier] != ["=="]]
    assert loose == []
    apart = {Requirement(text).name for text in PROJECT["optional-dependencies"]["frameworks"]}
    missing = {r.name for r in REQUIRED} - {"agrlib"} - apart - set(pins)
    assert missing == set(), f"constraints.txt does not pin {missing}"


def test_environment_leaves_versions_open():
    text = (ROOT / "environment.yml").read_text()
    assert not re.search(r"^\s*- *(torch|pytorch|numpy)\s*=", text, re.M)
