"""Sphinx extension: the book serves all it needs itself, folds proofs, and fits narrow screens.

MathJax comes from the package sphinx-mathjax-offline, of which the pages need a small part. What
sphinx-thebe adds, and could load from another host, is left out: no page has a button that starts
it. Above each exported cell stands the module that the cell goes to. A figure with panels side by
side is cut between them, so that they stand under each other where the screen is narrow, and a
long formula in a line may break after a relation.
"""

import importlib.util
import itertools
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from docutils import nodes
from PIL import Image

KEEP = ("tex-chtml.js", "output/chtml/fonts", "input/tex/extensions")
TOKEN = re.compile(r"\\(?:[A-Za-z]+|.)|\s+|.", re.S)
OPEN = re.compile(r"[{(\[]|\\(?:\{|left|begin|langle|l(?:vert|Vert|floor|ceil))")
CLOSE = re.compile(r"[})\]]|\\(?:\}|right|end|rangle|r(?:vert|Vert|floor|ceil))")
RELATION = re.compile(
    r"[=<>:]|\\(?:le|ge|ll|gg|ne|in|to|approx|sim|propto|mapsto|leftarrow|preceq|succeq|equiv|iff|quad)"
)
SUM = re.compile(r"[+-]|\\(?:pm|cdot|odot)")
GUTTER = 5  # pixels; narrower white is a gap between letters


def copy_mathjax(app: Any, error: Exception | None) -> None:
    """Copy the needed files into the built book."""
    spec = importlib.util.find_spec("sphinx-mathjax-offline")
    if error or app.builder.format != "html":
        return
    if spec is None or spec.origin is None:
        raise RuntimeError("sphinx-mathjax-offline is missing: run `make setup`")
    source = Path(spec.origin).parent / "static" / "mathjax"
    for name in KEEP:
        target = Path(app.outdir, "_static", "mathjax", name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if (source / name).is_dir():
            shutil.copytree(source / name, target, dirs_exist_ok=True)
        else:
            shutil.copy2(source / name, target)


def leave_out_thebe(app: Any) -> None:
    """Take back the scripts of sphinx-thebe, which would load from unpkg.com."""
    scripts = {"init_thebe_core", "update_thebe_context"}
    for listeners in app.events.listeners.values():
        for listener in list(listeners):
            if getattr(listener.handler, "__name__", "") in scripts:
                app.disconnect(listener.id)


def name_module(app: Any, doctree: nodes.document) -> None:
    """Write above each exported cell which module it goes to."""
    module = f"agrlib/{Path(app.env.docname).name}.py"
    for cell in list(doctree.findall(nodes.container)):
        if "tag_export" in cell["classes"]:
            label = nodes.paragraph("", "goes to ", classes=["goes-to"])
            label += nodes.literal("", module)
            folded = {"tag_hide-input", "tag_hide-cell"} & set(cell["classes"])
            (cell.children[0] if folded else cell).insert(0, label)


def is_folded(node: Any) -> bool:
    """Whether a node, or what it stands in, is folded already."""
    while node is not None:
        if isinstance(node, nodes.admonition) and "dropdown" in node["classes"]:
            return True
        node = node.parent
    return False


def fold_proofs(app: Any, doctree: nodes.document) -> None:
    """Fold each proof under its statement."""
    for proof in list(doctree.findall(nodes.admonition)):
        if "proof" in proof["classes"] and not is_folded(proof):
            first = next(proof.findall(nodes.Text), None)
            if first is not None and first.startswith("Proof. "):
                first.parent.replace(first, nodes.Text(first.removeprefix("Proof. ")))
            proof["classes"].append("dropdown")
            proof["ids"] = []  # all are called "proof", and one would open for all
            proof.insert(0, nodes.title("", "Proof"))


def pieces(formula: str) -> list[str]:
    r"""Cut a formula where a line may end: after a relation, in a long side after a sum's sign.

    Example:
        >>> pieces(r"\frac{a = b}{c} \le f(x = y) < d")
        ['\\frac{a = b}{c} \\le {}', 'f(x = y) < {}', 'd']
    """
    depth, found = 0, [""]
    rest = len(formula)
    for match in TOKEN.finditer(formula):
        token = match[0]
        depth += bool(OPEN.fullmatch(token)) - bool(CLOSE.fullmatch(token))
        found[-1] += token
        rest -= len(token)
        scripts = formula[match.end() :].lstrip()[:1] in ("_", "^", "'")
        ends = RELATION.fullmatch(token) or (SUM.fullmatch(token) and len(found[-1]) > 25)
        if depth == 0 and ends and rest > 1 and not scripts and len(found[-1].strip()) > 2:
            found[-1] += " {}"
            found.append("")
    return [piece.strip() for piece in found]


def break_formulas(app: Any, doctree: nodes.document) -> None:
    """Let the lines of a text end within a formula, as TeX does."""
    for formula in list(doctree.findall(nodes.math)):
        text = formula.astext()
        if len(text) > 20 and len(pieces(text)) > 1:
            parts = [nodes.math(piece, piece, classes=formula["classes"]) for piece in pieces(text)]
            formula.parent.replace(formula, parts)


def runs(marks: Any) -> list[tuple[int, int]]:
    """Return where marks begin and end, one pair for each stretch of them."""
    steps = np.diff(np.concatenate(([0], marks.astype(int), [0])))
    return list(zip(np.flatnonzero(steps == 1), np.flatnonzero(steps == -1), strict=True))


def gutters(picture: Any) -> list[int]:
    """Return where a figure, as an array of height and width, is cut between its panels.

    A panel begins at its vertical axis, a dark line of at least a tenth of the height. To the left
    of it stand its numbers and its label, and before these is white, from top to bottom. What is
    narrower than a fifth of the figure, such as a scale of colors, stays with its neighbor.
    """
    dark = (picture < 100).astype(int)
    tall = np.zeros(picture.shape[1], int)
    height = tall.copy()
    for row in dark:
        height = (height + 1) * row
        tall = np.maximum(tall, height)
    lines = [begin for begin, _ in runs(tall >= picture.shape[0] / 10)]
    white = [run for run in runs((picture > 250).all(0)) if run[1] - run[0] >= GUTTER]
    between = [
        [(begin + end) // 2 for begin, end in white if left < begin and end < right]
        for left, right in itertools.pairwise(lines)
    ]
    cuts, fifth = [0], picture.shape[1] / 5
    for cut in [found[0] for found in between if found]:
        if min(cut - cuts[-1], picture.shape[1] - cut) >= fifth:
            cuts.append(int(cut))
    return cuts[1:]


def part_panels(app: Any, doctree: nodes.document) -> None:
    """Cut each figure that a cell draws between its panels."""
    for image in list(doctree.findall(nodes.image)):
        path = Path(app.srcdir, image["uri"].lstrip("/"))
        if "jupyter_execute" not in path.parts or path.suffix != ".png":
            continue
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
        ends = [0, *gutters(np.asarray(picture.convert("L"))), picture.width]
        if len(ends) == 2:
            continue
        panels = nodes.container(classes=["panels"])
        for number, (left, right) in enumerate(itertools.pairwise(ends)):
            name = f"{path.stem}-{number}.png"
            picture.crop((left, 0, right, picture.height)).save(path.with_name(name))
            part = image.deepcopy()
            part["uri"] = image["uri"].replace(path.name, name)
            part["classes"] = [*image["classes"], "panel"]
            if number:
                part["alt"] = ""  # the first one's text describes the whole figure
            panels += part
        image.parent.replace(image, panels)


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.config.mathjax_path = "mathjax/tex-chtml.js"
    app.add_css_file("book.css")
    app.config.html_context.setdefault("default_mode", "auto")  # else the theme logs an error
    leave_out_thebe(app)
    app.connect("doctree-read", name_module)
    app.connect("doctree-read", fold_proofs)
    app.connect("doctree-read", break_formulas)
    app.connect("doctree-read", part_panels, priority=400)  # before Sphinx collects the images
    app.connect("build-finished", copy_mathjax)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
