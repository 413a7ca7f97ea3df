"""The three depths of a method's chapter: a path of 15 minutes, the proofs, what goes further."""

import re

import jupytext
import pytest
import yaml
from source import ROOT, chapters

# the chapters that are written so
IN_THREE_DEPTHS = (
    *("sgd", "adagrad", "rmsprop", "adam", "amsgrad", "padam", "adan", "schedules"),
    *("clipping", "normalization", "centralization", "regularization"),
)
WORDS_TO_THE_METHOD = 800
WORDS_OF_THE_PATH = 2000
LINES_OF_THE_PATH = 120  # of code that is not folded
LINES_OF_THE_CHAPTER = 200
WORDS_OF_THE_ENGINE = 3200  # of a chapter before its exercises
LINES_OF_THE_ENGINE = 720  # its modules stand open, so they count
FOLDED = {"hide-input", "hide-cell", "remove-cell", "remove-input"}
STATEMENT = r"^`{3,}\{prf:(?:theorem|proposition|lemma|corollary)\}.*\n:label: (\S+)"

PARTS = yaml.safe_load((ROOT / "_toc.yml").read_text())["parts"]
ENGINE = [
    entry["file"].removeprefix("book/").removesuffix(".md")
    for part in PARTS
    if part["caption"].startswith("IV.")
    for entry in part["chapters"]
]
in_three_depths = pytest.mark.parametrize("name", IN_THREE_DEPTHS)


def cells_of(text):
    return jupytext.reads(text, fmt="md:myst").cells


def words(text):
    """Count the words that are read, an inline formula as one; not code, displays and labels."""
    prose = "\n".join(c.source for c in cells_of(text) if c.cell_type == "markdown")
    prose = re.sub(r"^ *\$\$\n.*?^ *\$\$.*?$", "", prose, flags=re.M | re.S)
    prose = re.sub(r"^(?::\w+:.*|\(\S+\)=|`{3,}.*|\|.*)$", "", prose, flags=re.M)
    prose = re.sub(r"(?<![\\$])\$(?=\S)[^$\n]*(?:\n[^$\n]+)*?\$", "x", prose)
    return len(re.findall(r"[\w'’-]+", re.sub(r"\{[\w:]+\}`[^`]*`", "x", prose)))


def open_lines(text):
    """Count the lines of code that stand open on the page."""
    codes = [c for c in cells_of(text) if c.cell_type == "code"]
    shown = [c for c in codes if not FOLDED & set(c.metadata.get("tags", []))]
    return sum(len([x for x in c.source.splitlines() if x.strip()]) for c in shown)


def upto(text, heading):
    """Return a chapter up to a heading or a box."""
    assert text.count(f"\n{heading}") == 1, f"{heading!r} stands {text.count(heading)} times"
    return text[: text.index(f"\n{heading}")]


def page(name):
    return (ROOT / "book" / f"{name}.md").read_text()


@in_three_depths
def test_the_depths_come_in_their_order(name):
    headings = re.findall(r"^## (.+)$", page(name), re.M)
    assert headings == [
        *("The problem", "The idea", "The method", "What it gives", "In use"),
        *("When to use it, and what was seen here", "Summary", "Proofs", "Further"),
    ]


@in_three_depths
def test_the_method_comes_soon(name):
    assert words(upto(page(name), "```{prf:algorithm}")) <= WORDS_TO_THE_METHOD


@in_three_depths
def test_the_path_is_short(name):
    path = upto(page(name), "## Proofs")
    assert words(path) <= WORDS_OF_THE_PATH
    assert open_lines(path) <= LINES_OF_THE_PATH
    assert open_lines(page(name)) <= LINES_OF_THE_CHAPTER


@in_three_depths
def test_what_is_folded_says_what_it_shows(name):
    for cell in cells_of(page(name))[2:]:
        tags = set(cell.metadata.get("tags", []))
        if cell.cell_type == "code" and FOLDED & tags and "import matplotlib" not in cell.source:
            prompt = cell.metadata.get("mystnb", {}).get("code_prompt_show", "")
            assert len(prompt) > 10 or "importlib" in cell.source, cell.source[:60]


@pytest.mark.parametrize("name", chapters())
def test_every_figure_has_a_number_and_says_what_to_see(name):
    for cell in cells_of(page(name)):
        if "image" in cell.metadata.get("mystnb", {}):
            figure = cell.metadata["mystnb"].get("figure", {})
            assert figure.get("name", "").startswith(f"fig-{name}-"), cell.source[:60]
            assert len(figure.get("caption", "")) > 60


@in_three_depths
def test_every_statement_is_checked_by_a_cell_that_a_break_turns_red(name):
    """`make mutants` breaks each of them."""
    text = page(name)
    places = [m.start() for m in re.finditer(STATEMENT, text, re.M)]
    labels = re.findall(STATEMENT, text, re.M)
    claims = [m.start() for m in re.finditer(r"^(?::tags:|tags:) \[claim", text, re.M)]
    assert len(claims) >= len(places), f"{labels} have {len(claims)} claims"


@in_three_depths
def test_every_proof_has_an_idea_and_every_exercise_a_hint(name):
    text = page(name)
    proofs = text[text.index("\n## Proofs") : text.index("\n## Further")]
    assert proofs.count("```{prf:proof}") <= len(re.findall(r"\bIdea: ", proofs))
    exercises = re.findall(r"^`{3,}\{exercise\}", text, re.M)
    assert text.count("{admonition} Hint\n:class: dropdown") == len(exercises) > 0


@pytest.mark.parametrize("name", ENGINE)
def test_the_chapters_of_the_engine_have_limits_of_their_own(name):
    before = upto(page(name), "## Exercises")
    assert words(before) <= WORDS_OF_THE_ENGINE
    assert open_lines(before) <= LINES_OF_THE_ENGINE


LENT = ("c", "p", "M", "P", "S", r"\gamma")  # what they mean, a chapter decides


def formulas(text):
    """Return the mathematics of a text, without its code and the words in it."""
    text = re.sub(r"^`{3,}\{code-cell\}.*?^`{3,}$", "", text, flags=re.M | re.S)
    found = re.findall(r"\$\$.*?\$\$|(?<![\\$])\$[^$]+\$", text, flags=re.S)
    return [re.sub(r"\\(?:text|operatorname|mathrm|begin|end)\{[^}]*\}", "", one) for one in found]


def test_letters_mean_what_the_notation_says():
    rows = re.findall(r"^\| \$(\S+)\$ \| \{ref\}`ch-(\w+)` \|", page("notation"), re.M)
    assert len(rows) == len(set(rows)) > 20
    methods = [*IN_THREE_DEPTHS, "transforms"]
    used = {
        (letter, name)
        for name in methods
        for letter in LENT
        for one in formulas(page(name))
        if re.search(rf"(?<![A-Za-z\\]){re.escape(letter)}(?![A-Za-z])", one)
    }
    assert used - set(rows) == set(), "a letter that the notation does not explain"
    assert set(rows) - used == set(), "a letter that its chapter does not use"


def test_words_are_counted_as_they_are_read():
    head = "---\nkernelspec: {name: python3, display_name: Python 3}\n---\n\n"
    text = head + "A step $x - y$ of {ref}`ch-sgd`.\n\n"
    assert words(text + "$$\na = b\n$$ (a-label)\n\n| a | b |\n") == 5
