"""What the tests of the book share: its pages, its chapters and their notebooks."""

import re
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
import yaml

from tools import notebooks

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "_build" / "html"
UNCOMPARED = {"nbval-ignore-output", "nbval-skip"}
ALT = "write one or two sentences that say what the figure shows"


@cache
def toc() -> tuple[str, ...]:
    """Return the pages of the table of contents, as paths from the root, in order."""
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text())
    parts = [entry["file"] for part in contents["parts"] for entry in part["chapters"] or []]
    return (contents["root"], *parts)


@cache
def chapters() -> tuple[str, ...]:
    """Return the names of the pages that hold code, in the order of the contents."""
    names = {page.stem for page in notebooks.chapters(ROOT, [])}
    listed = [Path(page).stem for page in toc()]
    return tuple(sorted(names, key=lambda name: listed.index(name) if name in listed else -1))


@cache
def code_cells(name: str) -> tuple[Any, ...]:
    """Return the code cells of a chapter's executed pair."""
    pair = ROOT / "book" / f"{name}.ipynb"
    assert pair.exists(), f"book/{name}.md has no pair: run `make notebooks`"
    return tuple(c for c in nbformat.read(pair, 4).cells if c.cell_type == "code")


def tags(cell: Any) -> set[str]:
    return set(cell.metadata.get("tags", []))


def is_compared(cell: Any) -> bool:
    """Return whether the notebook test compares some text that this cell put out."""
    texts = ("text" in o or "text/plain" in o.get("data", {}) for o in cell.outputs)
    return any(texts) and not tags(cell) & UNCOMPARED


def wrong_alts(alts: Iterable[tuple[str, str | None]]) -> list[str]:
    """Say what is wrong with each (place, alternative text) that is no text of its own.

    Example:
        >>> for line in wrong_alts([("a", "A line."), ("b", "Two lines."), ("c", " ")]):
        ...     print(line)
        c: no alt text: write one or two sentences that say what the figure shows
    """
    placed = [(place, " ".join((alt or "").split())) for place, alt in alts]
    count = Counter(alt for _, alt in placed)
    wrong = []
    for place, alt in placed:
        if not alt:
            wrong.append(f"{place}: no alt text: {ALT}")
        elif re.fullmatch(r"\S*[/\\.]\S*", alt):
            wrong.append(f"{place}: the alt text is a file's path, {alt!r}: {ALT}")
        elif count[alt] > 1:
            wrong.append(f"{place}: the same alt text stands at {count[alt]} figures, {alt!r}")
    return wrong
