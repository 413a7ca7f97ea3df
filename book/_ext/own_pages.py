"""Sphinx extension: the book serves all it needs itself, folds proofs, names exported cells.

MathJax comes from the package sphinx-mathjax-offline, of which the pages need a small part. What
sphinx-thebe adds, and could load from another host, is left out: no page has a button that starts
it. Above each exported cell stands the module that the cell goes to.
"""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

from docutils import nodes

KEEP = ("tex-chtml.js", "output/chtml/fonts", "input/tex/extensions")


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


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.config.mathjax_path = "mathjax/tex-chtml.js"
    app.add_css_file("book.css")
    app.config.html_context.setdefault("default_mode", "auto")  # else the theme logs an error
    leave_out_thebe(app)
    app.connect("doctree-read", name_module)
    app.connect("doctree-read", fold_proofs)
    app.connect("build-finished", copy_mathjax)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
