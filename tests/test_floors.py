"""The floors of the library: who may import whom, and how long a module, a cell, a class may be."""

import ast
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import median

import pytest
import tomllib
from packaging.requirements import Requirement
from source import ROOT
from test_export import chapter

from tools.export import exported_cells

# A module may import modules of lower floors, and those that stand before it in its own row.
FLOORS = (
    "arithmetic distributed precision options checks",
    "transforms",
    "clipping normalization centralization regularization compilers program layout glance batch",
    "threads cpu gpu",
    "plan eager",
    "checkpoint",
    "optimizer",
    "attachment sgd adagrad rmsprop adam amsgrad padam adan schedules",
    "__init__ experiment roofline bench",
)
MODULE_LINES = 600
CELL_LINES, CLASS_CELL_LINES, MEDIAN_CELL_LINES = 60, 90, 15
CLASS_LINES = 60
LONG_CLASSES = {
    "batch.Lookup": "the question where tensors lie, the quick way and the thorough one",
    "batch.Batch": "the tables of one kernel call, filled, checked and refilled in one place",
    "gpu.GPUBatch": "what a batch needs on a GPU: the launches of all phases of one call",
    "plan.Plan": "what holds from step to step, beside what makes it invalid",
}
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


def modules(root: Path) -> dict[str, ast.Module]:
    """Return the syntax of each module of the package."""
    return {
        path.stem: ast.parse(path.read_text()) for path in sorted((root / "agrlib").glob("*.py"))
    }


def imported(node: ast.AST, known: Mapping[str, ast.Module]) -> list[str]:
    """Return what a node imports by dotted names, with the module for a name that is one."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = ".".join(filter(None, ["agrlib" if node.level else None, node.module]))
        if base != "agrlib":
            return [base]
        return [f"agrlib.{a.name}" if a.name in known else "agrlib" for a in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = ast.unparse(node.func).rpartition(".")[2]
        return [str(node.args[0].value)] if called in ("import_module", "__import__") else []
    return []


def edges(tree: ast.AST, known: Mapping[str, ast.Module]) -> list[str]:
    """Return the modules of the package that a module imports, wherever it does."""
    names = [name for node in ast.walk(tree) for name in imported(node, known)]
    inside = [name.split(".") for name in names if name.split(".")[0] == "agrlib"]
    return [parts[1] if len(parts) > 1 else "__init__" for parts in inside]


def upward(root: Path, floors: Sequence[str] = FLOORS) -> list[str]:
    """Name each import that goes up, or later in its own row, and each module without a floor."""
    place = {name: at for at, name in enumerate(" ".join(floors).split())}
    known = modules(root)
    faults = [f"{name} has no floor" for name in known if name not in place]
    for name, tree in known.items():
        for other in sorted(set(edges(tree, known))):
            if name in place and place.get(other, len(place)) >= place[name]:
                faults.append(f"{name} imports {other}, which does not stand below it")
    return faults


def circles(root: Path) -> list[str]:
    """Name the circles of imports, each by a path that comes back."""
    known = modules(root)
    graph = {name: sorted(set(edges(tree, known)) & set(known)) for name, tree in known.items()}
    found: dict[frozenset[str], str] = {}
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            circle = path[path.index(name) :]
            found.setdefault(frozenset(circle), " -> ".join([*circle, name]))
        elif name not in done:
            for other in graph[name]:
                visit(other, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])
    return list(found.values())


def dependencies(root: Path) -> set[str]:
    """Return the packages that are always there."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    return {Requirement(text).name.replace("-", "_") for text in project["dependencies"]}


def hidden(root: Path) -> list[str]:
    """Name each import inside a function of what is always there."""
    known, always = modules(root), dependencies(root) | sys.stdlib_module_names | {"agrlib"}
    faults = []
    for name, tree in known.items():
        functions = [node for node in ast.walk(tree) if isinstance(node, FUNCTION)]
        inside = {node for function in functions for node in ast.walk(function)}
        for node in sorted(inside - set(functions), key=lambda node: getattr(node, "lineno", 0)):
            for what in imported(node, known):
                if what.split(".")[0] in always:
                    faults.append(f"{name}, line {node.lineno}: imports {what} inside a function")
    return faults


def long_modules(root: Path, limit: int = MODULE_LINES) -> list[str]:
    """Name the modules that have too many lines."""
    counts = {p.stem: len(p.read_text().splitlines()) for p in (root / "agrlib").glob("*.py")}
    return [f"{name} has {n} lines" for name, n in sorted(counts.items()) if n > limit]


def lengths(root: Path) -> Iterator[tuple[str, int, int]]:
    """Yield the first line, the length and the limit of each exported cell of the book."""
    for page in sorted((root / "book").rglob("*.md")):
        for cell in exported_cells(page):
            lines = cell.splitlines()
            documented = any(
                isinstance(node, ast.ClassDef)
                and not node.name.startswith("_")
                and ast.get_docstring(node) is not None
                for node in ast.parse(cell).body
            )
            limit = CLASS_CELL_LINES if documented else CELL_LINES
            yield f"{page.stem}, cell {lines[0][:60]!r}", len(lines), limit


@cache
def cells(root: Path) -> tuple[tuple[str, int, int], ...]:
    return tuple(lengths(root))


def long_cells(root: Path) -> list[str]:
    """Name the exported cells that are too long."""
    return [f"{where}: {n} lines, at most {limit}" for where, n, limit in cells(root) if n > limit]


def long_median(root: Path) -> list[str]:
    """Say that the exported cells of the book are too long on the whole, if they are."""
    middle = median(n for _, n, _ in cells(root))
    wrong = middle > MEDIAN_CELL_LINES
    return [f"half of the exported cells have {middle} lines or more"] if wrong else []


def long_classes(root: Path, allowed: Mapping[str, str] = LONG_CLASSES) -> list[str]:
    """Name the classes that are too long without their docstring, and needless permissions."""
    found = {}
    for module, tree in modules(root).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                first = min([node.lineno, *(mark.lineno for mark in node.decorator_list)])
                lines = node.end_lineno - first + 1
                if ast.get_docstring(node) is not None:
                    lines -= node.body[0].end_lineno - node.body[0].lineno + 1
                found[f"{module}.{node.name}"] = lines
    long = {name: n for name, n in found.items() if n > CLASS_LINES}
    faults = [f"{name} has {n} lines" for name, n in long.items() if name not in allowed]
    return faults + [f"{name} needs no permission any more" for name in allowed if name not in long]


CHECKS = [upward, circles, hidden, long_modules, long_cells, long_median, long_classes]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_library_keeps_to_it(check):
    assert check(ROOT) == []


def test_each_permission_has_a_reason():
    assert all(len(reason.split()) > 3 for reason in LONG_CLASSES.values())


# --- each check, seen red on a small package ----------------------------------------------------


SMALL = ("low row", "high __init__")
PROJECT = '[project]\nname = "small"\ndependencies = ["torch>=2", "typing_extensions"]\n'


def package(root: Path, book: str = "", **texts: str) -> Path:
    """Write a package that has nothing wrong but what the texts say."""
    (root / "agrlib").mkdir()
    (root / "book").mkdir()
    (root / "pyproject.toml").write_text(PROJECT)
    fine = dict(low="import torch\n", row="from agrlib.low import f\n", high="import agrlib.row\n")
    for name, text in {**fine, "__init__": "from agrlib import high\n", **texts}.items():
        (root / "agrlib" / f"{name}.py").write_text(text)
    (root / "book" / "low.md").write_text(book or chapter('"""Low."""', "x = 1"))
    return root


def test_a_package_in_order_passes(tmp_path):
    root = package(tmp_path)
    assert upward(root, SMALL) == []
    assert [fault for check in CHECKS[1:-1] for fault in check(root)] == []
    assert long_classes(root, {}) == []


@pytest.mark.parametrize(
    ("texts", "fault"),
    [
        (dict(low="from agrlib.high import f\n"), "low imports high, which"),
        (dict(low="import agrlib.row as r\n"), "low imports row, which"),
        (dict(low="from agrlib import row\n"), "low imports row, which"),
        (dict(low="from . import row\n"), "low imports row, which"),
        (dict(low="from .row import f\n"), "low imports row, which"),
        (dict(low="from agrlib import SGD\n"), "low imports __init__, which"),
        (dict(low="import agrlib\n"), "low imports __init__, which"),
        (dict(low="def f():\n    from agrlib.high import g\n"), "low imports high, which"),
        (dict(low="from agrlib.low import f\n"), "low imports low, which"),
        (dict(low="import agrlib.attic\n"), "low imports attic, which"),
        (dict(attic="import torch\n"), "attic has no floor"),
    ],
)
def test_an_upward_import_is_red(tmp_path, texts, fault):
    [found] = upward(package(tmp_path, **texts), SMALL)
    assert found.startswith(fault)


@pytest.mark.parametrize(
    ("texts", "circle"),
    [
        (dict(low="from agrlib.row import f\n"), {"low", "row"}),
        (dict(low="import agrlib.high\n"), {"high", "low", "row"}),
        (dict(row="import agrlib\n"), {"__init__", "high", "row"}),
        (dict(low="import agrlib.low\n"), {"low"}),
    ],
)
def test_a_circle_is_red(tmp_path, texts, circle):
    [found] = circles(package(tmp_path, **texts))
    path = found.split(" -> ")
    assert (set(path), path[0], len(path)) == (circle, path[-1], len(circle) + 1)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("import agrlib.low", "agrlib.low"),
        ("from agrlib import low", "agrlib.low"),
        ("from .low import f", "agrlib.low"),
        ("importlib.import_module('agrlib.low')", "agrlib.low"),
        ("import torch.nn", "torch.nn"),
        ("from typing_extensions import Self", "typing_extensions"),
        ("import math", "math"),
        ("from numba import njit", None),
        ("importlib.import_module('numba')", None),
        ("importlib.import_module(name)", None),
    ],
)
@pytest.mark.parametrize(
    "frame", ["def f():\n    {}\n", "class A:\n    async def f(self):\n        {}\n"]
)
def test_a_hidden_import_is_red(tmp_path, line, what, frame):
    found = hidden(package(tmp_path, high=frame.format(line)))
    at = len(frame.splitlines())
    assert found == ([f"high, line {at}: imports {what} inside a function"] if what else [])


def test_an_import_that_may_fail_at_the_top_is_not_hidden(tmp_path):
    text = "try:\n    import math\nexcept ImportError:\n    import cmath as math\n"
    assert hidden(package(tmp_path, high=text)) == []


@pytest.mark.parametrize("lines", [600, 601])
def test_a_long_module_is_red(tmp_path, lines):
    found = long_modules(package(tmp_path, high="x = 1\n" * lines))
    assert found == (["high has 601 lines"] if lines > 600 else [])


@pytest.mark.parametrize(
    ("head", "limit"),
    [
        ("def f():\n", 60),
        ("class A:\n", 60),
        ('class _A:\n    """Hidden."""\n', 60),
        ('class A:\n    """Public."""\n', 90),
    ],
)
@pytest.mark.parametrize("more", [0, 1])
def test_a_long_cell_is_red(tmp_path, head, limit, more):
    cell = head + "    x = 1\n" * (limit + more - head.count("\n"))
    found = long_cells(package(tmp_path, chapter('"""Low."""', cell)))
    assert len(found) == more
    assert all(f"{limit + 1} lines, at most {limit}" in fault for fault in found)


@pytest.mark.parametrize("lines", [15, 16])
def test_cells_that_are_long_on_the_whole_are_red(tmp_path, lines):
    sizes = [1, lines, 40]
    book = chapter('"""Low."""', *("x = 1\n" * n for n in sizes[1:]))
    assert len(long_median(package(tmp_path, book))) == (lines > 15)


@pytest.mark.parametrize("more", [0, 1])
def test_a_long_class_is_red(tmp_path, more):
    text = 'class A:\n    """One.\n\n    Two.\n    """\n' + "    x = 1\n" * (59 + more)
    root = package(tmp_path, high=text)
    assert long_classes(root, {}) == ["high.A has 61 lines"] * more
    permission = {"high.A": "for a reason that is given here"}
    unused = ["high.A needs no permission any more"]
    assert long_classes(root, permission) == ([] if more else unused)


def test_the_page_for_contributors_shows_these_floors():
    """Chapters named by the first and last, as `sgd` ... `schedules`, stand for those between."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| (\d| ) +\| ((?:`\w+`[, .]*)+) \|", page, re.M)
    shown: list[set[str]] = []
    for number, names in rows:
        found = re.findall(r"`(\w+)`", names)
        if "..." in names:
            row = FLOORS[len(shown)].split()
            found += row[row.index(found[-2]) : row.index(found[-1])]
        if number.strip():
            shown.append(set())
        shown[-1] |= set(found)
    assert shown == [set(row.split()) for row in FLOORS]
