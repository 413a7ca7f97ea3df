"""Break each exported rule of each chapter in turn, and see the chapter's notebook fail.

A rule is a function in an exported cell whose first parameter is `grad`, `param` or `total` and
which has no annotations. It is broken by a sign, by a constant (1.01 times a value) and, if it has
them, by the loss of its maximum and of its exponent. The notebook test must then miss at least
three of the outputs that it compares; the cell that compares the rule's text with the module's does
not count.
"""

import argparse
import ast
import itertools
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import nbformat

ROOT = Path(__file__).resolve().parent.parent
ENOUGH = 3
UNCOMPARED = {"nbval-ignore-output", "nbval-skip"}


class Mutant(NamedTuple):
    """A chapter's notebook with one cell changed, or with none: the control."""

    chapter: Path
    cell: int
    source: str
    title: str


def rules(source: str) -> Iterator[ast.FunctionDef]:
    """Yield the rules in a cell.

    Example:
        >>> cell = "def rule(grad, lr): return -lr * grad\\ndef other(grad: int): return grad"
        >>> [rule.name for rule in rules(cell)]
        ['rule']
    """
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.args.args and node.returns is None:
            plain = not any(argument.annotation for argument in node.args.args)
            if plain and node.args.args[0].arg in ("grad", "param", "total"):
                yield node


def replace(source: str, node: ast.expr, text: str) -> str:
    """Put a text in the place of an expression."""
    lines = source.encode().splitlines(keepends=True)  # ast counts columns in bytes
    starts = [0, *itertools.accumulate(len(line) for line in lines)]
    assert node.end_lineno is not None and node.end_col_offset is not None
    start = starts[node.lineno - 1] + node.col_offset
    end = starts[node.end_lineno - 1] + node.end_col_offset
    whole = source.encode()
    return (whole[:start] + text.encode() + whole[end:]).decode()


def result(rule: ast.FunctionDef) -> ast.expr:
    """Return the first value that a rule assigns or, if it assigns none, returns."""
    for node in rule.body:
        if isinstance(node, ast.Assign | ast.Return) and node.value is not None:
            return node.value.elts[0] if isinstance(node.value, ast.Tuple) else node.value
    raise SystemExit(f"mutants: {rule.name} has no value to break")


def other_sign(source: str, rule: ast.FunctionDef) -> str:
    """Turn the rule's first + into - or the reverse; without either, negate its value.

    Example:
        >>> for cell in "def f(grad): return grad - (grad + 1)", "def f(grad): return abs(grad)":
        ...     print(other_sign(cell, next(rules(cell))))
        def f(grad): return (grad) + (grad + 1)
        def f(grad): return -(abs(grad))
    """
    sums = [
        node
        for node in ast.walk(rule)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub)
    ]
    if not sums:
        value = result(rule)
        return replace(source, value, f"-({ast.unparse(value)})")
    first = min(sums, key=lambda node: (node.left.end_lineno, node.left.end_col_offset))
    sign = "-" if isinstance(first.op, ast.Add) else "+"
    left, right = ast.unparse(first.left), ast.unparse(first.right)
    return replace(source, first, f"({left}) {sign} ({right})")


def other_constant(source: str, rule: ast.FunctionDef) -> str:
    """Multiply the first value that the rule assigns or returns by 1.01.

    Example:
        >>> cell = "def f(grad, lr): return (grad - lr,)"
        >>> other_constant(cell, next(rules(cell)))
        'def f(grad, lr): return (1.01 * (grad - lr),)'
    """
    value = result(rule)
    return replace(source, value, f"1.01 * ({ast.unparse(value)})")


def without(source: str, rule: ast.FunctionDef, name: str, kept: int) -> str | None:
    """Put one argument in the place of the first call of that name; None if there is no call.

    Example:
        >>> cell = "def f(grad, old): return maximum(old, grad)"
        >>> without(cell, next(rules(cell)), "maximum", 1)
        'def f(grad, old): return grad'
    """
    for node in ast.walk(rule):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
            return replace(source, node, f"{ast.unparse(node.args[kept])}")
    return None


WAYS: dict[str, Callable[[str, ast.FunctionDef], str | None]] = {
    "sign": other_sign,
    "constant": other_constant,
    "no maximum": partial(without, name="maximum", kept=1),
    "no exponent": partial(without, name="power", kept=0),
}


def mutants(pair: Path) -> list[Mutant]:
    """Return the mutants of a chapter, the control first; none if it exports no rule."""
    found = []
    for number, cell in enumerate(nbformat.read(pair, 4).cells):
        if cell.cell_type == "code" and "export" in cell.metadata.get("tags", []):
            for rule in rules(cell.source):
                for way, mutate in WAYS.items():
                    if (broken := mutate(cell.source, rule)) is not None:
                        title = f"{pair.stem}.{rule.name}, {way}"
                        found.append(Mutant(pair, number, broken, title))
    control = Mutant(pair, -1, "", f"{pair.stem}, nothing changed")
    return [control, *found] if found else []


def counts(cell: Any) -> bool:
    """Return whether a cell's output is compared, and not only because it shows the text."""
    texts = ("text" in o or "text/plain" in o.get("data", {}) for o in cell.outputs)
    ignored = UNCOMPARED & set(cell.metadata.get("tags", []))
    return any(texts) and not ignored and "getsource" not in cell.source


def failures(mutant: Mutant) -> tuple[int, int]:
    """Run the notebook test; return how many cells failed, and how many compared outputs."""
    notebook = nbformat.read(mutant.chapter, 4)
    if mutant.cell >= 0:
        notebook.cells[mutant.cell].source = mutant.source
    with tempfile.TemporaryDirectory() as folder:
        copy, report = Path(folder, mutant.chapter.name), Path(folder, "report.xml")
        nbformat.write(notebook, copy)
        command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", str(copy)]
        options = ["-q", f"--junit-xml={report}", "-p", "no:cacheprovider", f"--rootdir={folder}"]
        sanitizer = f"--nbval-sanitize-with={ROOT / 'tests' / 'sanitize.cfg'}"
        run = subprocess.run([*command, *options, sanitizer], capture_output=True, text=True)
        if run.returncode not in (0, 1):
            raise SystemExit(f"mutants: {mutant.title}: pytest broke down\n{run.stdout[-2000:]}")
        cases = list(ElementTree.parse(report).iter("testcase"))
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    failed = [
        cells[int(case.attrib["name"].split()[-1])]
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return len(failed), sum(counts(cell) for cell in failed)


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="chapters; all if none is named")
    parser.add_argument("--workers", type=int, default=2, help="notebooks run side by side")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository (for the tests)")
    options = parser.parse_args()
    pairs = sorted((options.root / "book").glob("*.ipynb"))
    if missing := set(options.names) - {pair.stem for pair in pairs}:
        raise SystemExit(f"mutants: no notebook named {', '.join(sorted(missing))}")
    todo = [m for p in pairs if not options.names or p.stem in options.names for m in mutants(p)]
    print(f"mutants: {len(todo)} runs of a notebook", flush=True)
    start, wrong = time.monotonic(), 0
    with ThreadPoolExecutor(options.workers) as pool:
        for mutant, (cells, compared) in zip(todo, pool.map(failures, todo), strict=True):
            if mutant.cell < 0:
                good = cells == 0
                verdict = "passes" if good else f"FAILS ({cells} cells) before anything is broken"
            else:
                good = compared >= ENOUGH
                verdict = f"{'killed' if good else 'SURVIVED'} ({cells} cells, {compared} compared)"
            wrong += not good
            print(f"mutants: {mutant.title}: {verdict}", flush=True)
    seconds = time.monotonic() - start
    print(f"mutants: {wrong} of {len(todo)} runs are not as they must be ({seconds:.0f} s)")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
