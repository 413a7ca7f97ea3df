"""Write agrlib/NAME.py from the cells tagged `export` of book/NAME.md.

One way only: the chapter is the source. `--check` writes nothing and fails, with a diff, where a
module is stale, edited by hand or orphaned, or where two chapters claim the same module.
"""

import argparse
import ast
import difflib
import sys
from pathlib import Path

import jupytext

ROOT = Path(__file__).resolve().parent.parent
ADVICE = "edit the chapter, then run `make export`"


def exported_cells(chapter: Path) -> list[str]:
    """Return the sources of a chapter's exported cells, in order."""
    notebook = jupytext.read(chapter, fmt="md:myst")
    return [
        cell.source.strip("\n")
        for cell in notebook.cells
        if cell.cell_type == "code" and "export" in cell.metadata.get("tags", [])
    ]


def module_text(chapter: Path, cells: list[str]) -> str:
    """Join the cells to a module, refusing what only a notebook can run."""
    for cell in cells:
        for line in cell.splitlines():
            if line.startswith(("%", "!")):
                raise SystemExit(f"{chapter.name}: an exported cell holds a magic: {line!r}")
    text = "\n\n\n".join(cells) + "\n"
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise SystemExit(f"{chapter.name}: the exported cells are no module: {error}") from error
    if ast.get_docstring(tree) is None:
        raise SystemExit(f"{chapter.name}: the first exported cell must begin with a docstring")
    return f"# Exported from book/{chapter.name}: edit the chapter, not this file.\n{text}"


def modules(root: Path) -> dict[Path, str]:
    """Return the text of every module that the chapters under `root`/book export."""
    made: dict[Path, str] = {}
    source: dict[Path, Path] = {}
    for chapter in sorted((root / "book").rglob("*.md")):
        cells = exported_cells(chapter)
        if not cells:
            continue
        target = root / "agrlib" / f"{chapter.stem}.py"
        if target in made:
            raise SystemExit(f"{source[target]} and {chapter} both claim {target.name}")
        made[target], source[target] = module_text(chapter, cells), chapter
    return made


def check(root: Path) -> int:
    """Print what differs between the chapters and agrlib; return how many modules do."""
    made = modules(root)
    wrong = 0
    for target, text in made.items():
        old = target.read_text() if target.exists() else ""
        if old != text:
            wrong += 1
            name = target.relative_to(root).as_posix()
            lines = difflib.unified_diff(
                old.splitlines(True), text.splitlines(True), name, f"{name} as book/ has it"
            )
            sys.stdout.writelines(lines)
            print(f"export: {name} differs from book/{target.stem}.md: {ADVICE}")
    for path in sorted((root / "agrlib").rglob("*.py")):
        if path not in made and path.name != "__init__.py":
            wrong += 1
            print(f"export: {path.relative_to(root)} is exported by no chapter: remove it")
    return wrong


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail where a module differs")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository (for the tests)")
    options = parser.parse_args()
    if options.check:
        return check(options.root) > 0
    for target, text in modules(options.root).items():
        if not target.exists() or target.read_text() != text:
            target.write_text(text)
            print(f"export: wrote {target.relative_to(options.root)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
