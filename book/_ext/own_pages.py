"""Sphinx extension: serve MathJax from the book itself, and nothing from another host.

The package sphinx-mathjax-offline ships MathJax 3; the pages need a small part of it.
"""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

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


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.config.mathjax_path = "mathjax/tex-chtml.js"
    app.connect("build-finished", copy_mathjax)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
