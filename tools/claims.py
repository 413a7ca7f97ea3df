"""Break each claim that a chapter checks, and see its cell fail.

A cell tagged `claim` computes what the text claims in variables whose names begin with `upper`,
`lower` or `exact`, and asserts something of them. In turn each of these is made false: an upper
bound is halved, a lower one doubled, an exact value multiplied by 1.01; each term and each factor
is left out; each exponent grows by a quarter; and where the cell needs a rule with a maximum, the
maximum is taken away. Only the cell and those that it needs are run, not the notebook. Which breaks
may pass, and why, stands in tools/survivors.toml.
"""

import argparse
import ast
import contextlib
import io
import multiprocessing
import os
import symtable
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jupytext
import tomllib

ROOT = Path(__file__).resolve().parent.parent
KINDS = {"upper": "0.5 * ({})", "lower": "2 * ({})", "exact": "1.01 * ({})"}


class Claim(NamedTuple):
    """A cell that checks a claim, and the cells that it needs."""

    chapter: str
    number: int  # among the claims of the chapter
    source: str
    needed: tuple[str, ...]


class Break(NamedTuple):
    """A claim whose cell, or whose method, was changed."""

    claim: Claim
    title: str
    source: str
    needed: tuple[str, ...]


def bound(source: str) -> set[str]:
    """Return the names that a cell binds for those that follow.

    Example:
        >>> sorted(bound("import a.b\\ndef f(x): return x + y"))
        ['a', 'f']
    """
    table = symtable.symtable(source, "<cell>", "exec")
    return {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}


def read(source: str) -> set[str]:
    """Return the names that a cell takes from those before it.

    Example:
        >>> sorted(read("z = 1\\ndef f(x): return x + y + z"))
        ['y']
    """
    tables, found = [symtable.symtable(source, "<cell>", "exec")], set()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        module = table.get_type() == "module"
        found |= {
            s.get_name()
            for s in table.get_symbols()
            if s.is_referenced() and (module or s.is_global())
        }
    return found - bound(source)


def needed_by(source: str, earlier: list[str]) -> tuple[str, ...]:
    """Return the earlier cells without which a cell does not run, in their order.

    Example:
        >>> needed_by("print(b)", ["a = 1", "b = a", "c = 2"])
        ('a = 1', 'b = a')
    """
    wanted, kept = read(source), []
    for cell in reversed(earlier):
        if bound(cell) & wanted:
            wanted = wanted - bound(cell) | read(cell)
            kept.append(cell)
    return tuple(reversed(kept))


def claims(page: Path) -> list[Claim]:
    """Return the claims of a chapter."""
    cells = [c for c in jupytext.read(page, fmt="md:myst").cells if c.cell_type == "code"]
    sources = [cell.source for cell in cells]
    found = [i for i, cell in enumerate(cells) if "claim" in cell.metadata.get("tags", [])]
    return [
        Claim(page.stem, number, sources[i], needed_by(sources[i], sources[:i]))
        for number, i in enumerate(found, start=1)
    ]


def is_root(node: ast.AST) -> bool:
    """Whether a node is a call of a square root."""
    called = node.func if isinstance(node, ast.Call) else None
    return getattr(called, "attr", getattr(called, "id", "")) == "sqrt"


def variants(node: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    """Yield a name and a replacement for each way to break one operation."""
    text = ast.unparse(node)
    if isinstance(node, ast.BinOp):
        left, right = node.left, node.right
        if isinstance(node.op, ast.Add | ast.Sub):
            sign = ast.USub() if isinstance(node.op, ast.Sub) else ast.UAdd()
            yield f"{text!r} without its first term", ast.UnaryOp(sign, right)
            yield f"{text!r} without its second term", left
        if isinstance(node.op, ast.Mult):
            yield f"{text!r} without its first factor", right
        if isinstance(node.op, ast.Mult | ast.Div):
            yield f"{text!r} without its second factor", left
        if isinstance(node.op, ast.Pow):
            power = ast.BinOp(ast.Constant(1.25), ast.Mult(), right)
            yield f"{text!r} with another exponent", ast.BinOp(left, ast.Pow(), power)
    if isinstance(node, ast.Call) and is_root(node):
        method = isinstance(node.func, ast.Attribute) and not node.args
        inside = (
            node.func.value if method and isinstance(node.func, ast.Attribute) else node.args[0]
        )
        yield f"{text!r} with another exponent", ast.BinOp(inside, ast.Pow(), ast.Constant(0.625))


class Replace(ast.NodeTransformer):
    """Puts another expression in the place of one node."""

    def __init__(self, old: ast.AST, new: ast.expr) -> None:
        self.old, self.new = old, new

    def visit(self, node: Any) -> Any:
        return self.new if node is self.old else super().visit(node)


def arithmetic(value: ast.expr) -> Iterator[ast.expr]:
    """Yield the operations of a value, without those that only say where an entry lies.

    Example:
        >>> tree = ast.parse("a[i - 1] + sum(b * c)", mode="eval").body
        >>> [ast.unparse(node) for node in arithmetic(tree) if isinstance(node, ast.BinOp)]
        ['a[i - 1] + sum(b * c)', 'b * c']
    """
    yield value
    skipped = isinstance(value, ast.Call) and getattr(value.func, "attr", "") in ("arange", "zeros")
    for child in ast.iter_child_nodes(value):
        inside = child if isinstance(child, ast.expr) and not skipped else None
        if isinstance(value, ast.Subscript):
            inside = value.value if child is value.value else None
        if inside is not None:
            yield from arithmetic(inside)


def kind_of(target: ast.expr) -> str | None:
    """Return "upper", "lower" or "exact" where a variable holds a claim."""
    name = target.id if isinstance(target, ast.Name) else ""
    return next((kind for kind in KINDS if name.startswith(kind)), None)


def ways(tree: ast.AST) -> Iterator[tuple[str, ast.Assign, ast.expr, ast.expr]]:
    """Yield for each way to break a claim its title, the assignment, the old and the new part."""
    for place in ast.walk(tree):
        if not isinstance(place, ast.Assign) or (kind := kind_of(place.targets[0])) is None:
            continue
        name, value = ast.unparse(place.targets[0]), place.value
        other = ast.parse(KINDS[kind].format(ast.unparse(value)), mode="eval").body
        yield f"{name}, its constant", place, value, other
        for node in arithmetic(value):
            for title, new in variants(node):
                yield f"{name}, {title}", place, node, new


def broken(source: str) -> Iterator[tuple[str, str]]:
    """Yield a title and the text of the cell for each way to make one of its claims false.

    Example:
        >>> for title, text in broken("upper = a + b**2"):
        ...     print(f"{title:45} {text}")
        upper, its constant                           upper = 0.5 * (a + b ** 2)
        upper, 'a + b ** 2' without its first term    upper = +b ** 2
        upper, 'a + b ** 2' without its second term   upper = a
        upper, 'b ** 2' with another exponent         upper = a + b ** (1.25 * 2)
    """
    for number in range(sum(1 for _ in ways(ast.parse(source)))):
        tree = ast.parse(source)
        title, place, old, new = list(ways(tree))[number]
        place.value = Replace(old, new).visit(place.value)
        yield title, ast.unparse(ast.fix_missing_locations(tree))


def without_maximum(source: str) -> str | None:
    """Return a cell whose functions take no maximum, or None where they take none.

    Example:
        >>> without_maximum("def rule(v, w):\\n    return maximum(v, w)")
        'def rule(v, w):\\n    return w'
    """
    tree, found = ast.parse(source), False
    for function in tree.body:
        for node in ast.walk(function) if isinstance(function, ast.FunctionDef) else ():
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            if node.func.id == "maximum":
                Replace(node, node.args[1]).visit(function)
                found = True
    return ast.unparse(tree) if found else None


def breaks(claim: Claim) -> list[Break]:
    """Return every way to break a claim, the unbroken one first."""
    where = f"{claim.chapter}, claim {claim.number}"
    found = [Break(claim, f"{where}: nothing", claim.source, claim.needed)]
    for title, source in broken(claim.source):
        found.append(Break(claim, f"{where}: {title}", source, claim.needed))
    bare = tuple(without_maximum(cell) or cell for cell in claim.needed)
    if bare != claim.needed:
        found.append(Break(claim, f"{where}: the method without its maximum", claim.source, bare))
    return found


def run(cells: tuple[str, ...], names: dict[str, Any]) -> None:
    """Run cells in one after the other; what they print is not shown."""
    with contextlib.redirect_stdout(io.StringIO()):
        for cell in cells:
            exec(compile(cell, "<claim>", "exec"), names)


def fails(job: tuple[tuple[str, ...], str]) -> str:
    """Run the needed cells and a claim's, in a process of its own; return its error, or ""."""
    needed, source = job
    names: dict[str, Any] = {"__name__": "__main__"}
    try:
        run((*needed, source), names)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return ""


def survivors(root: Path) -> dict[str, str]:
    """Return the breaks that may pass, and the reasons."""
    path = root / "tools" / "survivors.toml"
    return tomllib.loads(path.read_text())["survivors"] if path.exists() else {}


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chapters", nargs="*", help="chapters; all if none is named")
    parser.add_argument("--workers", type=int, default=2, help="claims run side by side")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository (for the tests)")
    options = parser.parse_args()
    os.environ["MPLBACKEND"], os.environ["OMP_NUM_THREADS"] = "agg", "1"
    pages = sorted((options.root / "book").glob("*.md"))
    if missing := set(options.chapters) - {page.stem for page in pages}:
        raise SystemExit(f"claims: no chapter named {', '.join(sorted(missing))}")
    pages = [page for page in pages if page.stem in options.chapters or not options.chapters]
    todo = [b for page in pages for claim in claims(page) for b in breaks(claim)]
    known, start, wrong = survivors(options.root), time.monotonic(), 0
    print(f"claims: {len(todo)} runs of a cell", flush=True)
    jobs = [(b.needed, b.source) for b in todo]
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        for found, error in zip(todo, pool.imap(fails, jobs), strict=True):
            if found.title.endswith(": nothing"):
                good = not error
                verdict = "passes" if good else f"FAILS before anything is broken: {error}"
            elif error:
                good = found.title not in known
                verdict = "killed" if good else "killed, though tools/survivors.toml expects it"
            else:
                good = found.title in known
                verdict = f"passes: {known[found.title]}" if good else "SURVIVED"
            wrong += not good
            if not good or found.title.endswith(": nothing"):
                print(f"claims: {found.title}: {verdict}", flush=True)
    seconds = time.monotonic() - start
    print(f"claims: {wrong} of {len(todo)} are not as they must be ({seconds:.0f} s)")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
