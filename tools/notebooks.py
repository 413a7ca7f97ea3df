"""Execute book/NAME.md into its pair book/NAME.ipynb, where the two differ.

A pair is fresh when every cell is the same, every code cell has run, and the agrlib modules that
the chapter uses are those it ran with. `--check` executes nothing and fails where a pair is not
fresh; `--seed` hands the stored outputs to the HTML build, so that nothing runs twice.
"""

import argparse
import ast
import hashlib
import multiprocessing
import os
import re
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import jupytext
import nbformat

ROOT = Path(__file__).resolve().parent.parent
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def chapters(root: Path, names: list[str]) -> list[Path]:
    """Return the pages that hold code, all of them or those named."""
    found = [
        page
        for page in sorted((root / "book").glob("*.md"))
        if "format_name: myst" in page.read_text().split("\n---", 1)[0]
    ]
    missing = set(names) - {page.stem for page in found}
    if missing:
        raise SystemExit(f"notebooks: no chapter named {', '.join(sorted(missing))}")
    return [page for page in found if not names or page.stem in names]


def imported(tree: ast.AST, exports: dict[str, str]) -> set[str]:
    """Return the agrlib modules that some code uses; `exports` maps public names to modules.

    Example:
        >>> tree = ast.parse("import agrlib\\nfrom agrlib.sgd import SGD\\nagrlib.Adam()")
        >>> sorted(imported(tree, {"Adam": "adam", "agr": "regularization"}))
        ['adam', 'sgd']
    """
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "agrlib":
            used |= {exports.get(alias.name, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("agrlib."):
            used.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            used |= {a.name.split(".")[1] for a in node.names if a.name.startswith("agrlib.")}
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "agrlib":
            used.add(exports.get(node.attr, node.attr))
    return used


def library_hash(root: Path, notebook: Any) -> dict[str, str]:
    """Return a hash for each agrlib module that a chapter uses, directly or through another."""
    init = ast.parse((root / "agrlib" / "__init__.py").read_text())
    exports = {
        alias.name: str(node.module).removeprefix("agrlib.")
        for node in init.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    code = "\n".join(c.source for c in notebook.cells if c.cell_type == "code")
    code = re.sub(r"^\s*[%!].*$", "", code, flags=re.M)
    todo, hashes = imported(ast.parse(code), exports), {}
    while todo:
        name = todo.pop()
        path = root / "agrlib" / f"{name}.py"
        if name in hashes or not path.exists():
            continue
        text = path.read_text()
        hashes[name] = hashlib.sha256(text.encode()).hexdigest()[:16]
        todo |= imported(ast.parse(text), exports)
    return dict(sorted(hashes.items()))


def cells(notebook: Any) -> list[tuple[Any, ...]]:
    """Return what a reader would see change: kind, source, tags and display options."""
    return [
        (c.cell_type, c.source, sorted(c.metadata.get("tags", [])), c.metadata.get("mystnb", {}))
        for c in notebook.cells
    ]


def difference(root: Path, page: Path) -> str | None:
    """Say in what a chapter's pair is not fresh, or None."""
    pair = page.with_suffix(".ipynb")
    if not pair.exists():
        return "has no pair"
    new, old = jupytext.read(page, fmt="md:myst"), nbformat.read(pair, 4)
    ours, theirs = cells(new), cells(old)
    for number, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            first = (a[1] or b[1]).strip().splitlines() or ["(empty)"]
            return f"differs from its pair in cell {number}: {first[0][:60]}"
    if len(ours) != len(theirs):
        return f"has {len(ours)} cells, its pair {len(theirs)}"
    for number, cell in enumerate(old.cells):
        if cell.cell_type == "code" and cell.source.strip() and not cell.execution_count:
            return f"has a pair whose cell {number} was never run"
    now, then = library_hash(root, new), old.metadata.get("agrlib", {})
    changed = sorted(name for name in {*now, *then} if now.get(name) != then.get(name))
    return f"ran with another agrlib: {', '.join(changed)} changed" if changed else None


def execute(root: Path, page: Path) -> float:
    """Run a chapter and write its pair in one piece; return the seconds it took."""
    from nbclient import NotebookClient

    start = time.monotonic()
    notebook = jupytext.read(page, fmt="md:myst")
    NotebookClient(
        notebook,
        timeout=600,
        record_timing=False,
        coalesce_streams=True,
        kernel_name="python3",
        extra_arguments=["--IPKernelApp.log_level=40"],
        resources={"metadata": {"path": str(page.parent)}},
    ).execute()
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"{page.stem}-{number:03d}"
    notebook.metadata = nbformat.from_dict(
        {
            "agrlib": library_hash(root, notebook),
            "kernelspec": notebook.metadata["kernelspec"],
            "language_info": {"name": "python"},
        }
    )
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    nbformat.validate(notebook)
    half = page.with_suffix(".ipynb.tmp")
    nbformat.write(notebook, half)
    os.replace(half, page.with_suffix(".ipynb"))
    return time.monotonic() - start


def execute_all(root: Path, pages: list[Path]) -> int:
    """Execute chapters side by side, one line each; return how many failed."""
    failed = 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
    with ProcessPoolExecutor(max_workers=min(len(pages), os.cpu_count() or 1)) as pool:
        runs = {pool.submit(execute, root, page): page for page in pages}
        try:
            for number, run in enumerate(as_completed(runs), start=1):
                name = f"notebooks: [{number}/{len(pages)}] book/{runs[run].name}"
                error = run.exception()
                if error is None:
                    print(f"{name} executed in {run.result():.0f} s", flush=True)
                else:
                    failed += 1
                    print(f"{name} FAILED\n{ANSI.sub('', str(error))}", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.kill()  # writes no pair; its kernel sees that it is alone, and ends
            raise SystemExit(
                "notebooks: interrupted; pairs not yet written are as before"
            ) from None
    return failed


def seed(root: Path, pages: list[Path]) -> None:
    """Put the stored outputs where the HTML build looks for them."""
    from jupyter_cache import get_cache
    from jupyter_cache.base import CacheBundleIn

    cache = get_cache(root / "_build" / ".jupyter_cache")
    for page in pages:
        notebook = nbformat.read(page.with_suffix(".ipynb"), 4)
        bundle = CacheBundleIn(notebook, str(page))
        cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="chapters, without the .md; all if none is named")
    parser.add_argument("--all", action="store_true", help="execute fresh pairs too")
    parser.add_argument("--check", action="store_true", help="fail where a pair is not fresh")
    parser.add_argument("--seed", action="store_true", help="hand the outputs to the HTML build")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository (for the tests)")
    options = parser.parse_args()
    pages = chapters(options.root, options.names)
    stale = {page: why for page in pages if (why := difference(options.root, page))}
    if options.check or options.seed:
        for page, why in stale.items():
            print(f"notebooks: book/{page.name} {why}: run `make notebooks`")
        if options.seed and not stale:
            seed(options.root, pages)
        return len(stale) > 0
    todo = pages if options.all else list(stale)
    return execute_all(options.root, todo) > 0 if todo else 0


if __name__ == "__main__":
    sys.exit(main())
