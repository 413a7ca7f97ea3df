"""The function that runs is the function that is compiled, wherever its source may come from.

Each case makes a transform, or a rule, whose source is or becomes another one, and says what the
function in memory computes. All ways must compute that, or say why they cannot.
"""

import functools
import gc
import importlib.util
import itertools
import linecache
import os
import py_compile
import types
import warnings
import weakref
import zipfile
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

import agrlib
from agrlib import arithmetic, compilers, precision, program

pytest.importorskip("numba", reason="numba has no wheel for this platform")
NUMBERS = itertools.count()
HALF = "def shrink(grad, factor):\n    return factor * grad\n"
OTHER = "def shrink(grad, factor):\n    return factor + grad\n"
GRAD = torch.linspace(-3, 3, 300 * 300).reshape(300, 300)
CHANGED = "is not that of the function in memory"


@pytest.fixture
def module(tmp_path):
    """A function that writes, imports and keeps a module."""

    def make(text: str, edited: str | None = None) -> types.ModuleType:
        path = tmp_path / f"module_{next(NUMBERS)}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        made = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made)
        if edited is not None:
            path.write_text(edited)
            os.utime(path, ns=(0, 0))  # for linecache, whatever the clock's resolution
        return made

    return make


@pytest.fixture(autouse=True)
def no_causes(monkeypatch):
    monkeypatch.setattr(compilers, "WARNED", set())


def halved(function: Any) -> agrlib.Transform:
    return agrlib.Transform(function, constants=(0.5,))


def sgd(transforms: list[Any], fused: bool | None, **options: Any) -> Any:
    weight = torch.nn.Parameter(torch.zeros(300, 300))
    return agrlib.SGD([weight], lr=1.0, transforms=transforms, fused=fused, **options)


def stepped(made: Any, grad: torch.Tensor = GRAD) -> torch.Tensor:
    """What a step takes away from a parameter of zeros."""
    [weight] = made.param_groups[0]["params"]
    with torch.no_grad():
        weight.zero_()
    weight.grad = grad.clone()
    made.step()
    return -weight.detach()


def assert_computes(function: Any, expected: torch.Tensor, refused: str = "") -> None:
    """All ways compute what is expected; with `refused`, only eager ones, for this reason."""
    [one] = chain = [function if isinstance(function, agrlib.Transform) else halved(function)]
    assert torch.equal(stepped(sgd(chain, False)), expected)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            made = sgd(chain, None)
            assert torch.equal(stepped(made), expected)
            assert made.__dict__["_plan"].recipes[0].compiled == (() if refused else (one,))
    told = [str(warning.message) for warning in caught]
    assert [CHANGED in text for text in told] == [True] * (refused == CHANGED), told
    if refused:
        with pytest.raises(RuntimeError, match=refused):
            stepped(sgd(chain, True))
    else:
        assert torch.equal(stepped(sgd(chain, True)), expected)


# --- the file -------------------------------------------------------------------------------------

EDITED = {
    "another formula": OTHER,
    "arguments in another order": HALF.replace("grad, factor", "factor, grad"),
    "another name called": HALF.replace("factor * grad", "abs(grad)"),
    "an argument more": HALF.replace("factor):", "factor, other):"),
    "another docstring": HALF.replace(":\n", ':\n    """Shrink."""\n', 1),
    "a line before": "def first(grad, factor):\n    return factor + grad\n\n\n" + HALF,
    "something else there": "x = 1\ny = 2\n",
    "no Python": "def shrink(grad, factor:\n    return (((\n",
    "no text": "\n",
}


@pytest.mark.parametrize("edited", EDITED.values(), ids=EDITED)
def test_a_file_edited_after_its_import(module, edited):
    assert_computes(module(HALF, edited).shrink, 0.5 * GRAD, CHANGED)


SAME = {
    "a comment": HALF.replace("grad\n", "grad  # half\n"),
    "spaces": HALF.replace("factor * grad", "(factor  *  grad)"),
    "an annotation": HALF.replace("factor)", "factor: float = 0.5) -> None"),
}


@pytest.mark.parametrize("edited", SAME.values(), ids=SAME)
def test_an_edit_that_changes_no_code(module, edited):
    assert_computes(module(HALF, edited).shrink, 0.5 * GRAD)


def test_a_rule_in_an_edited_file(module):
    rule = "def descend(grad, param, lr):\n    return (param - lr * grad,)\n"
    function = module(rule, rule.replace("-", "+")).descend

    class Method(agrlib.SGD):
        def update_rule(self, group):
            return function, ()

        def scalars(self, group, lr, step):
            return (lr,)

    for fused in (False, None, True):
        made = Method([torch.nn.Parameter(torch.zeros(300, 300))], lr=1.0, fused=fused)
        told = pytest.warns(RuntimeWarning, match=CHANGED) if fused is None else nullcontext()
        failed = pytest.raises(RuntimeError, match=CHANGED) if fused else nullcontext()
        with told, failed:
            assert torch.equal(stepped(made), GRAD)


def test_an_upgrade_under_a_running_job(module, monkeypatch):
    """The library's own functions are held against their source as well."""
    text = "def decay_gradient(grad, param, weight_decay):\n    return grad - weight_decay\n"
    code = module(text, text.replace("-", "+")).decay_gradient.__code__
    monkeypatch.setattr(program.decay_gradient, "__code__", code)
    for fused in (False, None, True):
        told = pytest.warns(RuntimeWarning, match=CHANGED) if fused is None else nullcontext()
        failed = pytest.raises(RuntimeError, match=CHANGED) if fused else nullcontext()
        with told, failed:
            assert torch.equal(stepped(sgd([], fused, weight_decay=0.5)), GRAD - 0.5)


def test_what_is_no_arithmetic_in_memory_is_not_cut(module):
    """Large tensors are taken in parts, which only a function of numbers allows."""
    text = "def center(grad, half):\n    return grad - grad.mean()\n"
    grad = torch.arange(precision.PART + 1.0)
    for edited in (text, text.replace("grad.mean()", "half")):
        center = halved(module(text, edited).center)
        with torch.no_grad():
            assert torch.equal(center(grad), grad - grad.mean())


# --- the code -------------------------------------------------------------------------------------


def half(grad, factor):
    return factor * grad


def plus(grad, factor):
    return factor + grad


def with_code(function: Any, other: Any) -> Any:
    """A function that has been given the code of another one."""
    made = types.FunctionType(function.__code__, function.__globals__, function.__name__)
    made.__code__ = other.__code__
    return made


def bearing_the_name(function: Any) -> Any:
    def replaced(grad, factor):
        return factor + grad

    return functools.wraps(function)(replaced)


def wrapped(function: Any) -> Any:
    @functools.wraps(function)
    def call(*args):
        return function(*args)

    return call


def lying(function: Any) -> Any:
    def other(grad, factor):
        return factor + grad

    other.__name__, other.__qualname__, other.__wrapped__ = "half", "half", function
    return other


def executed(text: str, name: str = "<text>", lines: str | None = None, **names: Any) -> Any:
    """A function of a text, and what Python is told that the text is."""
    if lines is not None:
        linecache.cache[name] = (len(lines), None, lines.splitlines(keepends=True), name)
    exec(compile(text, name, "exec"), names)
    return next(value for value in names.values() if isinstance(value, types.FunctionType))


class Holder:
    @staticmethod
    def static(grad, factor):
        """Halve.

        The second line of a docstring is indented.
        """
        return factor * grad

    def method(self, grad, factor):
        return factor * grad

    @staticmethod
    def mangled(grad, __factor):
        return __factor * grad

    def __call__(self, grad, factor):
        return factor * grad


def positional(grad, /, factor: float) -> torch.Tensor:
    return factor * grad


def outside(grad, factor):
    return factor * torch.abs(grad)


CODES = {  # what makes the function, what it computes, why it is refused
    "itself": (lambda: half, 0.5 * GRAD, ""),
    "a decorator that returns the function": (lambda: functools.wraps(plus)(half), 0.5 * GRAD, ""),
    "wrapped with the name": (lambda: bearing_the_name(half), 0.5 + GRAD, ""),
    "wrapped for any arguments": (lambda: wrapped(half), 0.5 * GRAD, "more than plain arguments"),
    "another code": (lambda: with_code(half, plus), 0.5 + GRAD, ""),
    "another name": (lambda: lying(half), 0.5 + GRAD, ""),
    "without a source": (lambda: executed(HALF), 0.5 * GRAD, "cannot be read"),
    "in the name of a file": (lambda: executed(HALF, __file__), 0.5 * GRAD, CHANGED),
    "a cell run again": (lambda: executed(HALF, "<cell 1>", OTHER), 0.5 * GRAD, CHANGED),
    "a cell": (lambda: executed(HALF, "<cell 2>", HALF), 0.5 * GRAD, ""),
    "a future": (
        lambda: executed(
            "from __future__ import annotations\n" + HALF.replace("factor)", "factor: Unknown)"),
            "<cell 3>",
            "\n" + HALF.replace("factor)", "factor: Unknown)"),
        ),
        0.5 * GRAD,
        "",
    ),
    "a static method": (lambda: Holder.static, 0.5 * GRAD, ""),
    "a method": (lambda: Holder().method, 0.5 * GRAD, "no function written with def"),
    "an object": (Holder, 0.5 * GRAD, "no function written with def"),
    "a part": (lambda: functools.partial(half), 0.5 * GRAD, "no function written with def"),
    "no arithmetic": (lambda: outside, 0.5 * GRAD.abs(), "calls torch.abs"),
    "no arithmetic, wrapped": (
        lambda: torch._dynamo.disable(half),
        0.5 * GRAD,
        "more than plain arguments",
    ),
    "a private name": (lambda: Holder.mangled, 0.5 * GRAD, CHANGED),
    "by position only": (lambda: positional, 0.5 * GRAD, ""),
}


@pytest.mark.parametrize("case", CODES)
def test_the_code_decides(case):
    make, expected, refused = CODES[case]
    assert_computes(make(), expected, refused)


@pytest.mark.parametrize("name", ["<none>", __file__, "<kept cell>"])
def test_what_was_read_keeps_no_function_alive(name):
    function = executed(HALF, name, HALF if "kept" in name else None)
    code = weakref.ref(function.__code__)
    with nullcontext() if "kept" in name else pytest.raises(arithmetic.Unsupported):
        arithmetic.read(function)
    del function
    gc.collect()
    assert code() is None


@pytest.mark.parametrize(
    ("where", "refused"), [("zip", ""), ("zip edited", CHANGED), ("pyc", "cannot be read")]
)
def test_modules_without_a_file_of_their_own(tmp_path, monkeypatch, where, refused):
    name = f"packed_{next(NUMBERS)}"
    monkeypatch.syspath_prepend(str(tmp_path / "it.zip" if "zip" in where else tmp_path))

    def pack(text: str) -> None:
        with zipfile.ZipFile(tmp_path / "it.zip", "w") as archive:
            archive.writestr(f"{name}.py", text)

    if where == "pyc":
        (tmp_path / "text.py").write_text(HALF)
        py_compile.compile(str(tmp_path / "text.py"), str(tmp_path / f"{name}.pyc"))
        (tmp_path / "text.py").unlink()
    else:
        pack(HALF)
    shrink = importlib.import_module(name).shrink
    if where == "zip edited":
        pack(OTHER)
    assert_computes(shrink, 0.5 * GRAD, refused)


# --- default values -------------------------------------------------------------------------------

SCALE = 0.5


def named_default(grad, factor=SCALE):
    return factor * grad


def number_default(grad, factor=0.25):
    return factor * grad


def default_of_a_keyword(grad, *, factor=SCALE):
    return factor * grad


def any_number(grad, *factors):
    return grad


@pytest.mark.parametrize(
    ("function", "constants", "expected", "refused"),
    [
        (named_default, (), 0.5 * GRAD, "has default values: pass them as constants"),
        (number_default, (), 0.25 * GRAD, "has default values"),
        (number_default, (0.5,), 0.5 * GRAD, "has default values"),
        (default_of_a_keyword, (), 0.5 * GRAD, "more than plain arguments"),
        (any_number, (0.5, 2.0), GRAD, "more than plain arguments"),
    ],
)
def test_default_values(function, constants, expected, refused):
    assert_computes(agrlib.Transform(function, constants=constants), expected, refused)


def test_a_default_value_given_later():
    given = executed(HALF, "<cell 4>", HALF)
    given.__defaults__ = (0.25,)
    assert_computes(agrlib.Transform(given), 0.25 * GRAD, "has default values")


# --- what names stand for -------------------------------------------------------------------------


TEXT = "def larger(grad):\n    return maximum(abs(grad), grad + grad)\n"


def made_with(**names: Any) -> agrlib.Transform:
    return agrlib.Transform(executed(TEXT, "<larger>", TEXT, **names))


def enclosed(maximum: Any) -> agrlib.Transform:
    def larger(grad):
        return maximum(abs(grad), grad + grad)

    return agrlib.Transform(larger)


class Callable(np.ndarray):
    """Compares element by element, also with functions."""

    def __new__(cls):
        return np.ones(2).view(cls)

    def __call__(self, values):
        return values.abs()


LARGER, SMALLER = (f(GRAD.abs(), 2 * GRAD) for f in (torch.maximum, torch.minimum))
NAMES = {
    "the module's": (lambda: made_with(maximum=torch.maximum), LARGER, ""),
    "an enclosing function's": (lambda: enclosed(torch.maximum), LARGER, ""),
    "one among Python's": (
        lambda: made_with(__builtins__=dict(abs=abs, maximum=torch.maximum)),
        LARGER,
        "",
    ),
    "another of the module": (lambda: made_with(maximum=torch.minimum), SMALLER, "calls maximum"),
    "another of an enclosing function": (lambda: enclosed(torch.minimum), SMALLER, "calls maximum"),
    "another than Python's": (
        lambda: made_with(maximum=torch.maximum, abs=torch.relu),
        torch.maximum(GRAD.relu(), 2 * GRAD),
        "calls abs",
    ),
    "another among Python's": (
        lambda: made_with(maximum=torch.maximum, __builtins__=dict(abs=torch.relu)),
        torch.maximum(GRAD.relu(), 2 * GRAD),
        "calls abs",
    ),
    "an array": (lambda: made_with(maximum=torch.maximum, abs=Callable()), LARGER, "calls abs"),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_mean_what_a_call_would_find(case):
    make, expected, refused = NAMES[case]
    assert_computes(make(), expected, refused)


def test_a_name_without_a_value():
    def larger(grad):
        return maximum(grad, grad)

    with pytest.raises(arithmetic.Unsupported, match="calls maximum, which has no kernel"):
        arithmetic.read(larger)
    maximum = torch.maximum
    arithmetic.read(larger)


def test_a_name_that_is_not_called():
    text = "def scaled(grad):\n    return power * grad\n"
    scaled = agrlib.Transform(executed(text, "<scaled>", text, power=0.5))
    assert_computes(scaled, 0.5 * GRAD, "reads power, which is none of its arguments")


# --- what changes between two steps ---------------------------------------------------------------


def assert_follows(
    transform: agrlib.Transform, change: Any, expected: torch.Tensor, refused: str = ""
) -> None:
    """The next step of every way computes what is expected after a change."""
    ways = [sgd([transform], fused) for fused in (False, None, True)]
    first = [stepped(made) for made in ways]
    assert all(torch.equal(value, first[0]) for value in first)
    assert not torch.equal(first[0], expected)
    change()
    for made in ways[: 2 if refused else 3]:
        assert torch.equal(stepped(made), expected)
    if refused:
        with pytest.raises(RuntimeError, match=refused):
            stepped(ways[2])


@pytest.mark.parametrize("source", [OTHER, None], ids=["with a source", "without"])
def test_a_function_gets_another_code(source):
    """As reloading does it."""
    shrink = executed(HALF, "<cell 5>", HALF)
    code = executed(OTHER, f"<cell 6 {source}>", source).__code__
    refused = "" if source else "the source of shrink cannot be read"
    assert_follows(halved(shrink), lambda: setattr(shrink, "__code__", code), 0.5 + GRAD, refused)


@pytest.mark.parametrize(
    ("where", "changed", "expected"),
    [
        ("module", dict(maximum=torch.minimum), SMALLER),
        ("module", dict(abs=torch.relu), torch.maximum(GRAD.relu(), 2 * GRAD)),
        ("builtins", dict(abs=torch.relu), torch.maximum(GRAD.relu(), 2 * GRAD)),
        ("builtins", dict(maximum=torch.minimum), SMALLER),
    ],
)
def test_a_name_gets_another_value(where, changed, expected):
    own = dict(abs=abs, maximum=torch.maximum)
    larger = (
        made_with(__builtins__=own) if where == "builtins" else made_with(maximum=torch.maximum)
    )
    names = own if where == "builtins" else larger.apply.__globals__
    before = dict(names)
    assert_follows(larger, lambda: names.update(changed), expected, f"calls {min(changed)}")
    names.clear()
    names.update(before)
    assert_computes(larger, LARGER)


def test_an_enclosing_function_assigns_again():
    larger = enclosed(torch.maximum)
    [cell] = larger.apply.__closure__
    assert_follows(
        larger, lambda: setattr(cell, "cell_contents", torch.minimum), SMALLER, "calls maximum"
    )


def test_a_transform_changes():
    given = halved(half)
    assert_follows(given, lambda: setattr(given, "constants", (2.0,)), 2.0 * GRAD)
    assert_follows(given, lambda: setattr(given, "apply", plus), 2.0 + GRAD)


def test_a_list_of_constants_is_copied():
    constants = [0.5]
    given = agrlib.Transform(half, constants=constants)
    constants[0] = 2.0
    assert_computes(given, 0.5 * GRAD)


def test_a_transform_of_a_class_of_its_own():
    class Negative(agrlib.Transform):
        def map(self, grads):
            return [-grad for grad in super().map(grads)]

    assert_computes(Negative(half, constants=(0.5,)), -0.5 * GRAD, "of a class of its own")
