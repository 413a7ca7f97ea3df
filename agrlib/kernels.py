# Exported from book/kernels.md: edit the chapter, not this file.
"""The fast path: update rules and gradient transforms compiled from their own source.

Derived in the chapter "One rule, three compilers". `GradientMethod.step` comes here for the
parameters that a kernel can take: numba makes it for the CPU, Triton for the GPU.
"""

import __future__

import ast
import builtins
import collections
import contextlib
import copy
import ctypes
import errno
import functools
import hashlib
import importlib.util
import inspect
import itertools
import json
import linecache
import os
import queue
import stat
import sys
import textwrap
import threading
import time
import types
import uuid
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter, is_, itemgetter
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils.weak import WeakIdKeyDictionary

from agrlib.optimizer import (
    WORTH_COMPILING,
    Chain,
    GradientMethod,
    Group,
    Transform,
    decay_gradient,
    decay_parameter,
    noise_seed,
    part_number,
    state_dtype,
    with_numbers,
)


class Unsupported(RuntimeError):
    """Why a kernel cannot be made; the text completes a sentence that begins with "because"."""


class Changed(Unsupported):
    """The source at hand is not that of the function in memory."""


WARNED: set[str] = set()


def warn_once(cause: str) -> None:
    """Warn of a cause, once in a process."""
    if cause not in WARNED:
        WARNED.add(cause)
        warnings.warn(cause, RuntimeWarning, stacklevel=2)


def told(error: BaseException) -> str:
    """Return an error in one line, without the names of files, so that equal causes read alike."""
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}".removesuffix(": ")


PRIMITIVES: dict[str, tuple[Any, ...]] = {
    "sqrt": (torch.sqrt,),
    "abs": (builtins.abs, torch.abs),
    "maximum": (torch.maximum,),
    "where": (torch.where,),
    "power": (torch.pow,),
}
GRAMMAR = (
    ast.Assign | ast.Return | ast.Tuple | ast.BinOp | ast.UnaryOp | ast.Compare | ast.Call,
    ast.Name | ast.expr_context | ast.Add | ast.Sub | ast.Mult | ast.Div | ast.USub,
    ast.Lt | ast.LtE | ast.Gt | ast.GtE | ast.Eq | ast.NotEq,
)


CODE = attrgetter(
    *("co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars"),
    *("co_argcount", "co_posonlyargcount", "co_kwonlyargcount"),
)
VARIADIC = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS


def same_code(one: Any, other: Any) -> bool:
    """Whether two code objects, or two constants of theirs, compute the same."""
    if not isinstance(one, types.CodeType) or not isinstance(other, types.CodeType):
        return type(one) is type(other) and bool(one == other)
    return (
        CODE(one) == CODE(other)
        and one.co_flags & VARIADIC == other.co_flags & VARIADIC
        and len(one.co_consts) == len(other.co_consts)
        and all(map(same_code, one.co_consts, other.co_consts))
    )


def strip(node: Any) -> ast.FunctionDef:
    """Take off what is evaluated where a function is defined."""
    node.decorator_list, node.returns, node.type_params = [], None, []
    node.args.defaults, node.args.kw_defaults = [], [None] * len(node.args.kwonlyargs)
    for part in ast.walk(node.args):
        if isinstance(part, ast.arg):
            part.annotation = None
    return node


def compiled(node: ast.FunctionDef, code: types.CodeType) -> types.CodeType:
    """Compile a definition with the free variables and the future of the code it should give."""
    module: Any = ast.parse(f"def enclosing({', '.join(code.co_freevars)}): ...")
    module.body[0].body = [node]
    future = code.co_flags & __future__.annotations.compiler_flag
    made = compile(module, code.co_filename, "exec", future, dont_inherit=True)
    for _ in ("enclosing", node.name):
        [made] = [part for part in made.co_consts if isinstance(part, types.CodeType)]
    return made


def changed(function: types.FunctionType) -> Changed:
    """Return what is wrong with a function whose source gives another code."""
    code = function.__code__
    return Changed(
        f"the source of {function.__name__} is not that of the function in memory (was its file "
        f"edited?): {code.co_filename}, line {code.co_firstlineno}"
    )


def source_of(function: types.FunctionType) -> tuple[ast.FunctionDef, bool]:
    """Return the definition at the place of a function, and whether it gives the same code."""
    name, code = function.__name__, function.__code__
    if code.co_name == "<lambda>":
        raise Unsupported(f"{name} is no function written with def")
    plain = types.FunctionType(code, function.__globals__, None, None, function.__closure__)
    try:
        text = inspect.getsource(plain)  # without the marks that decorators leave
        tree: Any = ast.parse("if 1:\n" * text[0].isspace() + text)
        [node] = tree.body[0].body if text[0].isspace() else tree.body
        return strip(node), same_code(compiled(node, code), code)
    except Exception as error:  # what stands there now may be anything
        if len(linecache.cache.get(code.co_filename, ())) < 2:  # an entry has four parts
            raise Unsupported(f"the source of {name} cannot be read") from error
        raise changed(function) from error


def check_grammar(name: str, node: ast.FunctionDef) -> None:
    """Refuse all that is no arithmetic."""
    for part in itertools.chain.from_iterable(map(ast.walk, node.body)):
        if isinstance(part, ast.Constant):
            raise Unsupported(f"{name} holds the literal {part.value!r}: pass it as a scalar")
        if not isinstance(part, GRAMMAR[0] | GRAMMAR[1] | GRAMMAR[2]):
            shown = ast.unparse(part) or type(part).__name__
            raise Unsupported(f"{name} holds more than plain arithmetic: {shown}")
        if isinstance(part, ast.Call):
            called = getattr(part.func, "id", None)
            if part.keywords or called not in PRIMITIVES:
                raise Unsupported(f"{name} calls {ast.unparse(part.func)}, which has no kernel")


def check_names(name: str, node: ast.FunctionDef) -> None:
    """Refuse a rule that reads variables of its module, or returns before its end."""
    *body, last = node.body or [ast.Pass()]
    plain = all(isinstance(line, ast.Assign) and len(line.targets) == 1 for line in body)
    if not plain or not isinstance(last, ast.Return) or last.value is None:
        raise Unsupported(f"{name} must be assignments followed by one return")
    parts = list(ast.walk(ast.Module(node.body, [])))
    names = [part for part in parts if isinstance(part, ast.Name)]
    own = {argument.arg for argument in node.args.args}
    own |= {part.id for part in names if isinstance(part.ctx, ast.Store)}
    if taken := own & {*PRIMITIVES, "divide"}:
        raise Unsupported(f"{name} names a variable {taken.pop()}, like a function of the kernel")
    called = [part.func for part in parts if isinstance(part, ast.Call)]
    for part in names:
        if part.id not in own and part not in called:
            raise Unsupported(f"{name} reads {part.id}, which is none of its arguments")


def remembered(look: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Keep what is found in a function's code, as long as that code exists."""
    known = WeakIdKeyDictionary()

    @functools.wraps(look)
    def recall(function: Any) -> Any:
        code = function.__code__
        if code not in known:
            known[code] = look(function)
        return known[code]

    return recall


@remembered
def syntax_of(function: types.FunctionType) -> ast.FunctionDef | Unsupported:
    """Return the syntax of a function, without all that does not compute, or what is wrong."""
    name = function.__name__
    try:
        node, same = source_of(function)
        if node.args.vararg or node.args.kwarg or node.args.kwonlyargs:
            raise Unsupported(f"{name} takes more than plain arguments: give each its place")
        node.args.args[:0], node.args.posonlyargs = node.args.posonlyargs, []
        if ast.get_docstring(node) is not None:
            del node.body[0]
        check_grammar(name, node)
        check_names(name, node)
    except Unsupported as error:
        return type(error)(*error.args)  # without the frames, which hold the function
    return node if same else changed(function)


def meaning(function: Any, name: str) -> Any:
    """Return what a name that a function does not define stands for, now."""
    free = function.__code__.co_freevars
    if name not in free:
        return function.__globals__.get(name, function.__builtins__.get(name))
    try:
        return function.__closure__[free.index(name)].cell_contents
    except ValueError:  # nothing, so far
        return None


def meanings(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    """Return all names that a function does not define, and what they stand for, now."""
    code = function.__code__
    return [(name, meaning(function, name)) for name in (*code.co_names, *code.co_freevars)]


def read(function: Callable[..., Any]) -> ast.FunctionDef:
    """Return the syntax of a function in rule arithmetic, without all that does not compute.

    Args:
        function: assignments and one return of ``+ - * /``, comparisons and the primitives.

    Raises:
        Unsupported: the function is written in something else, or its source is not to be had or
            no longer that of the function in memory.

    Example:
        >>> from agrlib.sgd import descend
        >>> print(ast.unparse(read(descend)))
        def descend(grad, param, lr):
            return (param - lr * grad,)

    Source: chapter "One rule, three compilers".
    """
    name = getattr(function, "__name__", repr(function))
    if not isinstance(function, types.FunctionType):
        raise Unsupported(f"{name} is no function written with def")
    found = syntax_of(function)
    if isinstance(found, Unsupported):
        raise type(found)(*found.args)
    if function.__defaults__ or function.__kwdefaults__:
        raise Unsupported(f"{name} has default values: pass them as constants")
    for called, known in meanings(function):
        if not any(known is primitive for primitive in PRIMITIVES.get(called, ())):
            raise Unsupported(f"{name} calls {called}, which has no kernel")
    return found


class Stage(NamedTuple):
    """A transform of a chain as a kernel sees it: functions and the number of its constants."""

    over: str | None
    summand: Callable[..., Any] | None
    finish: Callable[..., Any] | None
    apply: Callable[..., Any]
    constants: int


class Program(NamedTuple):
    """All that decides the text of a kernel; two parameters of one program share a launch."""

    rule: Callable[..., Any]
    state: tuple[str, ...]
    stages: tuple[Stage, ...]
    decay: str
    power: str
    dtypes: tuple[torch.dtype, ...]  # of the parameter, its gradient and each state tensor
    stochastic: bool

    @property
    def wide(self) -> str:
        """The type in which the rule computes."""
        return "float64" if self.dtypes[0] == torch.float64 else "float32"

    @property
    def whole(self) -> list[int]:
        """The stages whose totals go beyond a row, and so need a pass over the gradient."""
        return [j for j, stage in enumerate(self.stages) if stage.over in ("tensor", "all")]

    @property
    def scalars(self) -> list[str]:
        """The names of the rule's scalars, marked: a kernel has names of its own."""
        names = [a.arg for a in read(self.rule).args.args][2 + len(self.state) :]
        return [f"the_{name}" for name in names]


def text_of(function: Callable[..., Any], name: str, decorator: str, exact_division: bool) -> str:
    """Return a rule's text under another name, for one of the compilers."""
    node = copy.deepcopy(read(function))
    node.name = name
    if exact_division:
        node = Division().visit(node)
    return f"{decorator}\n{ast.unparse(ast.fix_missing_locations(node))}"


class Division(ast.NodeTransformer):
    """``a / b`` becomes ``divide(a, b)``: Triton's own division of float32 is approximate."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.op, ast.Div):
            return node
        return ast.Call(ast.Name("divide", ast.Load()), [node.left, node.right], [])


DECAYS: dict[str, Callable[..., Any]] = {"gradient": decay_gradient, "parameter": decay_parameter}


def named(program: Program) -> dict[str, Callable[..., Any]]:
    """Return the rule and all functions of the chain, by their names in the kernel."""
    found = {"rule": program.rule}
    if program.decay in DECAYS:
        found["decay"] = DECAYS[program.decay]
    for j, stage in enumerate(program.stages):
        for role in ("summand", "finish", "apply"):
            if (function := getattr(stage, role)) is not None:
                found[f"{role}_{j}"] = function
    return found


def functions(program: Program, decorator: str, exact_division: bool) -> list[str]:
    """Return the texts of the rule and of all functions of the chain."""
    found = named(program).items()
    return [text_of(f, name, decorator, exact_division) for name, f in found]


def constants_of(program: Program, j: int) -> list[str]:
    """Return the names under which a kernel holds the constants of stage j."""
    return [f"constant_{j}_{i}" for i in range(program.stages[j].constants)]


def shape(program: Program, upto: int) -> list[str]:
    """Return the lines that take x, one entry of the gradient, through the stages before `upto`."""
    lines = []
    for j, stage in enumerate(program.stages[:upto]):
        extra = [f"total_{j}"] if stage.over else constants_of(program, j)
        lines.append(f"x = where(covers_{j}, apply_{j}({', '.join(['x', *extra])}), x)")
    return lines


def finished(program: Program, j: int, total: str, count: str) -> str:
    """Return the expression of a finished total."""
    if program.stages[j].finish is None:
        return total
    return f"finish_{j}({', '.join([total, count, *constants_of(program, j)])})"


def context(program: Program, upto: int, rows: bool = True) -> list[str]:
    """Return the names of what the stages before `upto` need: coverage, totals and constants."""
    names = []
    for j, stage in enumerate(program.stages[:upto]):
        names.append(f"covers_{j}")
        if stage.over in ("tensor", "all") or (rows and stage.over == "row"):
            names.append(f"total_{j}")
    names += itertools.chain.from_iterable(
        constants_of(program, j) for j in range(len(program.stages))
    )
    return names


def indent(lines: Iterable[str], depth: int) -> str:
    return textwrap.indent("\n".join(lines), "    " * depth)


CPU_HEADER = """
import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

INNER = dict(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
EXACT = dict(**INNER, forceinline=True)  # IEEE: a quotient by zero is no exception


@intrinsic
def pointer(typing, address, like):
    def build(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(address, like), build


@intrinsic
def add(typing, total, term):  # in any order, so that several are added at once
    def build(context, builder, signature, arguments):
        return builder.fadd(*arguments, flags=("reassoc",))

    return types.float64(types.float64, types.float64), build


@intrinsic
def take(typing, counter):  # the number at an address, which goes up by one for all threads
    def build(context, builder, signature, arguments):
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, ir.IntType(64)(1), "seq_cst")

    return types.int64(types.int64), build


@intrinsic
def read(typing, counter):
    def build(context, builder, signature, arguments):
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(place, "seq_cst", 8)

    return types.int64(types.int64), build


@intrinsic
def let_others(typing, function):  # a C function, by its address
    def build(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.IntType(32), ()).as_pointer()
        builder.call(builder.inttoptr(arguments[0], kind), ())
        return context.get_dummy_value()

    return types.void(types.int64), build


@njit(**EXACT)
def sqrt(x):
    return np.sqrt(x)


@njit(**EXACT)
def maximum(x, y):
    return x if x >= y or x != x else y


@njit(**EXACT)
def where(condition, x, y):
    return x if condition else y
"""


CPU_TYPES = {
    torch.float32: ("np.float32", "{}", "{}"),
    torch.float64: ("np.float64", "F({})", "{}"),
    torch.bfloat16: ("np.uint16", "from_bfloat16({})", "to_bfloat16({})"),
    torch.float16: ("np.uint16", "from_float16({})", "to_float16({})"),
}
CPU_BFLOAT16 = """
@njit(**EXACT)
def from_bfloat16(x):
    return np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)


@njit(**EXACT)
def to_bfloat16(x):
    bits = np.float32(x).view(np.uint32)
    even = np.uint32(bits >> np.uint32(16)) & np.uint32(1)  # a tie goes to the even neighbor
    rounded = np.uint16(np.uint32(bits + np.uint32(0x7FFF) + even) >> np.uint32(16))
    return np.uint16(0x7FC0) if x != x else rounded


@njit(**EXACT)
def mix(h):
    h = np.uint32(np.uint32(h ^ np.uint32(h >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    h = np.uint32(np.uint32(h ^ np.uint32(h >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    return np.uint32(h ^ np.uint32(h >> np.uint32(16)))


@njit(**EXACT)
def to_bfloat16_stochastically(x, seed, i):
    place = np.uint32(i) * np.uint32(seed >> 32 | 1) + np.uint32(seed)
    noise = mix(np.uint32(place)) & np.uint32(0xFFFF)
    bits = np.float32(x).view(np.uint32)
    rounded = np.uint16(np.uint32(bits + noise) >> np.uint32(16))
    return rounded if abs(x) < np.float32(np.inf) else to_bfloat16(x)
"""
CPU_FLOAT16 = """
@intrinsic
def from_float16(typing, x):
    def build(context, builder, signature, arguments):
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), build


@intrinsic
def to_float16(typing, x):
    def build(context, builder, signature, arguments):
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), build
"""


CPU_POWER = """
@njit(**EXACT)
def power(x, y):  # x >= 0, y > 0, through the logarithm in double precision
    z = np.float64(x)
    bits = z.view(np.int64)
    exponent = (bits >> 52) - 1023
    m = np.int64((bits & 0xFFFFFFFFFFFFF) | 0x3FF0000000000000).view(np.float64)  # in [1, 2)
    large = m > 1.4142135623730951
    m = 0.5 * m if large else m
    s = (m - 1.0) / (m + 1.0)  # log m = 2 atanh s, |s| < 0.172
    q = s * s
    series = 1 / 9 + q * (1 / 11 + q * (1 / 13 + q / 15))
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * series)))
    log2 = np.float64(exponent + large) + 2.8853900817779268 * s * series
    product = np.float64(y) * log2
    product = max(min(product, 1000.0), -1000.0)
    whole = np.floor(product + 0.5)
    r = 0.6931471805599453 * (product - whole)  # |r| < 0.347
    e = 1 / 120 + r * (1 / 720 + r * (1 / 5040 + r * (1 / 40320 + r / 362880)))
    e = 1.0 + r * (1.0 + r * (1 / 2 + r * (1 / 6 + r * (1 / 24 + r * e))))
    scale = np.int64((np.int64(whole) + 1023) << 52).view(np.float64)
    result = F(e * scale)
    result = F(0) if x == F(0) else result
    return result if x < F(np.inf) else x
"""


def power_text(program: Program, decorator: str, general: str) -> str:
    """Return the text of `power` for the exponents 1, 1/2, 1/4, ..., for 0, and for all others."""
    if program.power in ("", "general"):
        return general if program.power else ""
    if program.power == "one":
        one = "F(1)" if "njit" in decorator else "where(x == x, y, y) + 1"
        return f"{decorator}\ndef power(x, y):  # y = 0\n    return {one}"
    value = "x"
    for _ in range(int(program.power)):
        value = f"sqrt({value})"
    return f"{decorator}\ndef power(x, y):  # y = 1/{2 ** int(program.power)}\n    return {value}"


def cpu_source(program: Program) -> str:
    """Return the text of a CPU kernel: numba compiles it, all cores run it.

    Args:
        program: what the kernel computes.

    Example:
        >>> from agrlib.sgd import descend
        >>> dtypes = (torch.float32, torch.float32)
        >>> text = cpu_source(Program(descend, (), (), "rule", "", dtypes, False))
        >>> print(text[text.index("        x = ") : text.index("a0[i] =")].rstrip())
                x = sign * (scale * a1[i])
                p = a0[i]
                p, = rule(x, p, the_lr)

    Source: chapter "One rule, three compilers".
    """
    parts = [CPU_HEADER.strip("\n"), f"F = np.{program.wide}"]
    if torch.bfloat16 in program.dtypes:
        parts.append(CPU_BFLOAT16.strip("\n"))
    if torch.float16 in program.dtypes:
        parts.append(CPU_FLOAT16.strip("\n"))
    scalar_power = "@njit(**EXACT)\ndef power(x, y):\n    return x**y"
    general = CPU_POWER.strip("\n") if program.wide == "float32" else scalar_power
    if text := power_text(program, "@njit(**EXACT)", general):
        parts.append(text)
    parts += functions(program, "@njit(**EXACT)", exact_division=False)
    parts += [cpu_sum(program, j) for j, stage in enumerate(program.stages) if stage.over]
    parts += [cpu_reduce(program, j) for j in program.whole]
    parts += [cpu_row(program), cpu_update(program), cpu_work(program), CPU_RUN.strip("\n")]
    return "\n\n\n".join(parts) + "\n"


def cpu_load(program: Program, role: int) -> str:
    """Return the expression of entry i of the parameter (0), the gradient (1) or a state tensor."""
    dtype = program.dtypes[role]
    if dtype == torch.float32 and program.wide == "float64":
        return f"F(a{role}[i])"
    return CPU_TYPES[dtype][1].format(f"a{role}[i]")


def cpu_array(program: Program, role: int, address: str) -> str:
    return f"a{role} = carray(pointer({address}, {CPU_TYPES[program.dtypes[role]][0]}(0)), (n,))"


def cpu_sum(program: Program, j: int) -> str:
    """Return the function that adds up the summand of stage j over n entries."""
    arguments = ", ".join(["at", "n", "scale", *context(program, j)])
    body = [
        f"x = scale * {cpu_load(program, 1)}",
        *shape(program, j),
        f"total = add(total, np.float64(summand_{j}(x)))",
    ]
    return (
        f"@njit(**INNER)\ndef sum_{j}({arguments}):\n"
        f"    {cpu_array(program, 1, 'at')}\n    total = 0.0\n    for i in range(n):\n"
        f"{indent(body, 2)}\n    return total"
    )


def row_totals(program: Program, upto: int, call: str) -> list[str]:
    """Return the lines that compute the totals of the row at hand."""
    lines = []
    for j, stage in enumerate(program.stages[:upto]):
        if stage.over == "row":
            total = f"F({call.format(j=j, context=', '.join(context(program, j)))})"
            lines.append(f"total_{j} = F(0)")
            lines += [
                f"if covers_{j}:",
                f"    total_{j} = {finished(program, j, total, 'F(cols)')}",
            ]
    return lines


def cpu_reduce(program: Program, j: int) -> str:
    """Return the function that adds up the summand of stage j over some rows."""
    arguments = ", ".join(["grad", "rows", "cols", "scale", *context(program, j, rows=False)])
    size = program.dtypes[1].itemsize
    rest = ", ".join(["scale", *context(program, j)])
    body = [
        f"at = grad + {size} * r * cols",
        *row_totals(program, j, "sum_{j}(at, cols, scale, {context})"),
        f"total += sum_{j}(at, cols, {rest})",
    ]
    return (
        f"@njit(**INNER)\ndef reduce_{j}({arguments}):\n"
        f"    total = 0.0\n    for r in range(rows):\n{indent(body, 2)}\n    return total"
    )


def update_lines(program: Program) -> list[str]:
    """Return the lines that turn entry x of the gradient and entry p of the parameter into new."""
    lines = []
    if program.decay == "gradient":
        lines.append("x = where(decays, decay(x, p, rate), x)")
    if program.decay == "parameter":
        lines.append("p = where(decays, decay(p, rate), p)")
    return lines


def cpu_row(program: Program) -> str:
    """Return the function that updates n entries in a row."""
    stages, roles = len(program.stages), range(len(program.dtypes))
    addresses = [f"at_{role}" for role in roles]
    results = ["p", *(f"s{role}" for role in roles[2:])]
    start = "x = sign * ({})" if not stages else "x = {}"
    inputs = ["x", "p", *(cpu_load(program, role) for role in roles[2:]), *program.scalars]
    stores = [CPU_TYPES[program.dtypes[r]][2] for r in (0, *roles[2:])]
    if program.stochastic:
        stores[0] = "to_bfloat16_stochastically({}, seed, first + i)"
    body = [
        start.format(f"scale * {cpu_load(program, 1)}"),
        *shape(program, stages),
        *(["x = sign * x"] if stages else []),
        f"p = {cpu_load(program, 0)}",
        *update_lines(program),
        f"{', '.join(results)}{',' if len(results) == 1 else ''} = rule({', '.join(inputs)})",
        *(
            f"a{role}[i] = {store.format(result)}"
            for role, store, result in zip((0, *roles[2:]), stores, results, strict=True)
        ),
    ]
    numbers = ["sign", "decays", "rate", *program.scalars]
    arguments = [*addresses, "n", "scale", "seed", "first", *context(program, stages), "numbers"]
    unpacked = [f"{name} = numbers[{i}]" for i, name in enumerate(numbers)]
    unpacked[1] = "decays = numbers[1] != F(0)"
    arrays = [cpu_array(program, role, f"at_{role}") for role in roles]
    return (
        f"@njit(**INNER)\ndef update_row({', '.join(arguments)}):\n"
        f"{indent([*arrays, *unpacked], 1)}\n    for i in range(n):\n{indent(body, 2)}"
    )


def cpu_update(program: Program) -> str:
    """Return the function that updates some rows."""
    stages, roles = len(program.stages), range(len(program.dtypes))
    arguments = ["table", "t", "first", "rows", "cols", "scale", "seed"]
    arguments += [*context(program, stages, rows=False), "numbers"]
    tables = [f"table_{r} = table[{r}, t]" for r in roles]
    addresses = [f"table_{r} + {program.dtypes[r].itemsize} * begin" for r in roles]
    call = [*addresses, "cols", "scale", "seed", "begin", *context(program, stages), "numbers"]
    body = [
        "begin = first + r * cols",
        *row_totals(program, stages, f"sum_{{j}}({addresses[1]}, cols, scale, {{context}})"),
        f"update_row({', '.join(call)})",
    ]
    lines = [*tables, "for r in range(rows):"]
    return (
        f"@njit(**INNER)\ndef update({', '.join(arguments)}):\n"
        f"{indent(lines, 1)}\n{indent(body, 2)}"
    )


def cpu_work(program: Program) -> str:
    """Return the function that does one item of work: one phase of one part of one tensor."""
    stages = range(len(program.stages))
    lines = ["t, first, rows, cols = items[k, 0], items[k, 1], items[k, 2], items[k, 3]"]
    lines += [f"covers_{j} = flags[{j}, t]" for j in stages]
    names = itertools.chain.from_iterable(constants_of(program, j) for j in stages)
    lines += [f"{name} = constants[{i}]" for i, name in enumerate(names)]
    for q, j in enumerate(program.whole):
        size = program.dtypes[1].itemsize
        call = [f"table[1, t] + {size} * first", "rows", "cols", "scale"]
        call += context(program, j, rows=False)
        total = finished(program, j, f"F(totals[{q}, t])", f"F(counts[{q}, t])")
        lines += [
            f"if phase == {q}:",
            f"    partial[k] = reduce_{j}({', '.join(call)}) if covers_{j} else 0.0",
            "    return",
            f"if phase == WHOLE and covers_{j}:",
            f"    totals[{q}, t] = reduce_{j}({', '.join(call)})",
            f"total_{j} = {total}",
        ]
    call = ["table", "t", "first", "rows", "cols", "scale", "seeds[t]"]
    call += [*context(program, len(stages), rows=False), "numbers[classes[t]]"]
    lines.append(f"update({', '.join(call)})")
    sums = len(program.whole)
    return (
        f"SUMS = {sums}  # the phases before the update; a small tensor goes through all at once\n"
        f"WHOLE = {sums + 1}\n\n\n@njit(**INNER)\ndef work(phase, k, items, table, "
        "flags, classes, numbers, totals, counts, constants, scale, seeds, partial):\n"
        + indent(lines, 1)
    )


CPU_RUN = """
@njit(nogil=True, error_model="numpy", cache=True)
def run(board, rest, waves, claims, order, steps, items, table, flags, classes, numbers, totals,
        counts, constants, scale, seeds, partial):
    at = board.ctypes.data
    for w in range(len(waves)):
        phase, first, count = waves[w, 0], waves[w, 1], waves[w, 2]
        next, done, gate = at + 24 * w, at + 24 * w + 8, at + 24 * w + 16
        claim = take(next)
        while claim < count:
            for k in range(claims[first + claim], claims[first + claim + 1]):
                work(phase, order[k], items, table, flags, classes, numbers, totals, counts,
                     constants, scale, seeds, partial)
            if take(done) == count - 1:
                if phase < 0:
                    for i in range(len(steps)):
                        number = carray(pointer(steps[i], np.float32(0)), (1,))
                        number[0] += np.float32(1)
                elif phase < SUMS:  # in the order of the items, whoever has summed them
                    for k in range(claims[first], claims[first + count]):
                        totals[phase, items[order[k], 0]] += partial[order[k]]
                take(gate)
            claim = take(next)
        while read(gate) == 0:
            let_others(rest)
"""


CPU_STEPS = """
import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic


@intrinsic
def pointer(typing, address, like):
    def build(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(address, like), build


@njit(cache=True)
def read_steps(addresses, values):
    alike = True
    for i in range(len(addresses)):
        values[i] = carray(pointer(addresses[i], np.float32(0)), (1,))[0]
        alike = alike and values[i] == values[0]
    return alike


def calling(result):  # C functions of two words, by their addresses
    @intrinsic
    def call(typing, function, one, two):
        def build(context, builder, signature, arguments):
            word = ir.IntType(64)
            kind = ir.FunctionType(ir.IntType(result.bitwidth), (word, word)).as_pointer()
            return builder.call(builder.inttoptr(arguments[0], kind), arguments[1:])

        return result(types.int64, types.int64, types.int64), build

    return call


ask, find = calling(types.int32), calling(types.int64)


@intrinsic
def tell(typing, function):
    def build(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.VoidType(), ()).as_pointer()
        builder.call(builder.inttoptr(arguments[0], kind), ())
        return context.get_dummy_value()

    return types.void(types.int64), build


@njit(cache=True)
def look(describe, lookup, forget, params, grads, states, keys, values, device, dtypes, steps,
         forms, old, addresses, answer):
    moved = 0
    grads = carray(pointer(grads, np.int64(0)), (len(params),))
    for role in range(len(addresses)):
        for t in range(len(forms)):
            tensor = params[t] if role == 0 else grads[t]
            if role >= 2:
                tensor = find(lookup, states[t], keys[role - 2])
            if role >= 2 and tensor != values[role - 2, t] or (
                ask(describe, tensor, answer.ctypes.data) != 0
            ):
                tell(forget)  # a Python error, if there is one
                return -1
            axes = answer[2] & 0xFFFFFFFF
            if answer[0] == 0 or answer[1] != device or answer[2] >> 32 != dtypes[role]:
                return -1
            shape = carray(pointer(answer[3], np.int64(0)), (axes,))
            strides = carray(pointer(answer[4], np.int64(0)), (axes,))
            if role == steps:
                for a in range(axes):
                    if shape[a] != 1:
                        return -1
            elif axes != forms[t, 0]:
                return -1
            else:
                for a in range(axes):
                    size, stride = forms[t, 1 + 2 * a], forms[t, 2 + 2 * a]
                    if shape[a] != size or (size != 1 and strides[a] != stride):
                        return -1
            addresses[role, t] = answer[0] + answer[5]
            if addresses[role, t] != old[role, t]:
                moved = 1
    return moved
"""


HOUR = 3600.0  # seconds; no file takes as long to write


def is_own(path: Path) -> bool:
    """Whether only this user and root can write to a file or folder."""
    if not hasattr(os, "geteuid"):
        return True
    status = path.lstat()
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & 0o022


def close(path: Path) -> Path:
    """Let nobody else write to a file or folder of this user; raise OSError if it is another's."""
    if not is_own(path):
        if path.lstat().st_uid == os.geteuid():
            path.chmod(stat.S_IMODE(path.stat().st_mode) & ~0o022)
        if not is_own(path):
            raise PermissionError(errno.EPERM, "it belongs to others, or they may write to it")
    return path


def cache_folder() -> Path:
    """Return the folder of generated sources; OSError or RuntimeError if there can be none."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(home if os.path.isabs(home) else Path.home() / ".cache", "agrlib")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return close(folder.resolve())


def write(path: Path, content: bytes) -> None:
    """Write a file that other processes see whole or not at all."""
    half = path.with_name(f"{path.name}.tmp.{uuid.uuid4().hex}")
    try:
        half.write_bytes(content)
        os.replace(close(half), path)
    finally:
        half.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what processes that were killed have left half-written."""
    for half in folder.glob("*.tmp.*"):
        with contextlib.suppress(OSError):
            if time.time() - half.lstat().st_mtime > HOUR:
                half.unlink()


def files_of(function: Any) -> tuple[Path, list[Path]]:
    """Return the file of a compiled function's checksums, and those that numba keeps of it."""
    folder = Path(function.stats.cache_path)
    name = f"{Path(inspect.getfile(function.py_func)).stem}.{function.__name__}"
    kept = [path for path in folder.iterdir() if path.name.startswith(f"{name}-")]
    return folder / f"{name}.sums", sorted(p for p in kept if p.suffix in (".nbi", ".nbc"))


def checksums(files: Iterable[Path]) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def is_intact(function: Any) -> bool:
    """Whether numba's files of a function are those that were written down, by nobody else."""
    record, files = files_of(function)
    try:
        own = all(map(is_own, (record, *files)))
        return own and json.loads(record.read_bytes()) == checksums(files)
    except (OSError, ValueError):
        return False


def discard(function: Any) -> None:
    """Remove what is kept of a function, so that it is compiled anew."""
    record, files = files_of(function)
    for path in (record, *files):
        path.unlink(missing_ok=True)


def write_down(function: Any) -> None:
    """Keep the checksums of what numba has just written."""
    for _ in range(3):
        record, files = files_of(function)
        write(record, json.dumps(checksums(map(close, files))).encode())
        if is_intact(function):
            return


def warn_of_cache(error: Exception) -> None:
    """Say that nothing can be kept; what fails after that in the same place has the same cause."""
    place = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    what = f"kernels are compiled anew in every process, because {place}/agrlib cannot be used"
    if not any(cause.startswith(what) for cause in WARNED):
        remedy = "set XDG_CACHE_HOME to a folder that you, and only you, can write to"
        warn_once(f"{what} ({told(error)}): {remedy}")


def execute(text: str, name: str, path: str) -> types.ModuleType:
    """Run a generated source as a module; tracebacks and Triton find its lines without a file."""
    module = types.ModuleType(f"_agrlib_{name}")
    linecache.cache[path] = len(text), None, text.splitlines(keepends=True), path
    sys.modules[module.__name__] = module  # numba finds the functions of a cached kernel by this
    exec(compile(text, path, "exec"), module.__dict__)
    return module


def load_kept(text: str, stem: str) -> types.ModuleType:
    """Run a source from a file beside which numba keeps what it compiles."""
    versions = [importlib.import_module(name).__version__ for name in ("numba", "llvmlite")]
    processor = importlib.import_module("llvmlite.binding").get_host_cpu_name()
    made_by = "\n".join((text, *versions, processor, sys.version))
    name = f"{stem}_{hashlib.sha256(made_by.encode()).hexdigest()[:16]}"
    folder = cache_folder()
    path = folder / f"{name}.py"
    if not path.exists() or path.read_bytes() != text.encode():
        write(path, text.encode())
    sweep(folder)
    module = execute(text, name, str(path))
    for function in vars(module).values():
        if hasattr(function, "py_func") and function.stats.cache_path is not None:
            sweep(close(Path(function.stats.cache_path)))
            if not is_intact(function):
                discard(function)
    return module


@functools.cache
def load(text: str, stem: str) -> types.ModuleType:
    """Return a generated source as a module; where the disk refuses, one that keeps nothing."""
    refusal = None
    if "cache=True" in text:
        try:
            return load_kept(text, stem)
        except Exception as error:  # no home, a folder of others, a full disk, a path too long
            refusal = error
    name = f"{stem}_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    module = execute(text.replace("cache=True", "cache=False"), name, f"<agrlib {name}>")
    if refusal is not None:  # by the disk: without it all is well
        warn_of_cache(refusal)
    return module


FAILED: dict[Any, str] = {}  # functions that cannot be compiled; a second attempt would be as slow


def first_call(function: Any, call: Callable[[], Any]) -> None:
    """Compile a kernel by a call with nothing to do, or load what an earlier process compiled."""
    if function in FAILED:
        raise Unsupported(FAILED[function])
    try:
        if hasattr(function, "py_func"):
            compile_numba(function, call)
        else:
            call()
    except Exception as error:
        FAILED[function] = f"a kernel cannot be compiled ({told(error)})"
        raise Unsupported(FAILED[function]) from error


def compile_numba(function: Any, call: Callable[[], Any]) -> None:
    """Make the first call of numba's function, if need be again without what is on the disk."""
    if function.signatures:
        return
    kept = function.stats.cache_path is not None
    try:
        call()
    except Exception as error:  # of a file; or the disk is full, and the function is there
        if not kept:
            raise
        with contextlib.suppress(OSError):
            discard(function)
        call()
        if isinstance(error, OSError):
            return warn_of_cache(error)
    if kept and function.stats.cache_misses:
        try:
            write_down(function)
        except OSError as error:
            warn_of_cache(error)


GPU_HEADER = """
import triton
import triton.language as tl


@triton.jit
def maximum(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def where(condition, x, y):
    return tl.where(condition, x, y)


@triton.jit
def abs(x):
    return tl.abs(x)


@triton.jit
def sqrt(x):
    return {sqrt}


@triton.jit
def divide(x, y):
    return {divide}


@triton.jit
def at(table, role, tensors, t, like: tl.constexpr, ALIGNED: tl.constexpr):
    address = tl.load(table + role * tensors + t).to(tl.pointer_type(like))
    if ALIGNED:  # or else no load is wider than one entry
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def collect(partial, firsts, totals, BLOCK: tl.constexpr):
    t = tl.program_id(0)
    stop = tl.load(firsts + t + 1)
    sums = tl.zeros((BLOCK,), tl.float64)
    for k in range(tl.load(firsts + t), stop, BLOCK):
        i = k + tl.arange(0, BLOCK)
        sums += tl.load(partial + i, mask=i < stop, other=0.0)
    tl.store(totals + t, tl.sum(sums))
"""


GPU_FLOAT32 = dict(sqrt="tl.sqrt_rn(x)", divide="tl.div_rn(x, y)")  # IEEE, as in eager steps
GPU_FLOAT64 = dict(sqrt="tl.sqrt(x)", divide="x / y")
GPU_TYPES = {
    torch.float32: "tl.float32",
    torch.float64: "tl.float64",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
}


GPU_BFLOAT16 = """
@triton.jit
def to_bfloat16(x):
    bits = x.to(tl.uint32, bitcast=True)
    even = (bits >> 16) & 1  # a tie goes to the even neighbor
    rounded = ((bits + 0x7FFF + even) >> 16).to(tl.uint16)
    return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def mix(h):
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def to_bfloat16_stochastically(x, seed, i):
    bits = x.to(tl.uint32, bitcast=True)
    place = i.to(tl.uint32) * (seed >> 32 | 1).to(tl.uint32) + seed.to(tl.uint32)
    noise = mix(place) & 0xFFFF
    rounded = ((bits + noise) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.where(tl.abs(x) < float("inf"), rounded, to_bfloat16(x))
"""


GPU_POWER = """
@triton.jit
def two_to(n):
    return ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def power(x, y):  # x >= 0, y > 0
    subnormal = x < 1.1754944e-38
    bits = tl.where(subnormal, x * 16777216.0, x).to(tl.int32, bitcast=True)
    exponent = ((bits >> 23) - 127).to(tl.float32) - tl.where(subnormal, 24.0, 0.0)
    m = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)  # in [1, 2)
    large = m > 1.4142135
    exponent = tl.where(large, exponent + 1, exponent)
    m = tl.where(large, 0.5 * m, m)
    product = y * exponent  # and what its rounding has lost:
    lost = tl.fma(exponent, y + tl.zeros_like(exponent), -product)
    whole = tl.floor(product + 0.5)
    whole = tl.where(whole < -252, -252.0, tl.where(whole > 254, 254.0, whole))
    half = tl.floor(0.5 * whole)
    result = tl.exp2((product - whole) + lost + y * tl.log2(m)) * two_to(half)
    return tl.where(x > 0, tl.where(x < float("inf"), result * two_to(whole - half), x), x)
"""
GPU_POWER_FLOAT64 = """
@triton.jit
def power(x, y):  # x >= 0, y > 0
    return tl.where(x > 0, tl.exp2(y * tl.log2(x)), x)
"""


def gpu_source(program: Program) -> str:
    """Return the text of the GPU kernels: one per phase, for all tensors of a batch.

    Args:
        program: what the kernels compute.

    Example:
        >>> from agrlib.sgd import descend
        >>> dtypes = (torch.float32, torch.float32)
        >>> text = gpu_source(Program(descend, (), (), "rule", "", dtypes, False))
        >>> print(text[text.index("@triton.jit\\ndef rule") : text.index("@triton.jit\\ndef up")])
        @triton.jit
        def rule(grad, param, lr):
            return (param - lr * grad,)
        <BLANKLINE>
        <BLANKLINE>

    Source: chapter "One rule, three compilers".
    """
    exact = GPU_FLOAT64 if program.wide == "float64" else GPU_FLOAT32
    parts = [GPU_HEADER.strip("\n").format(**exact)]
    if torch.bfloat16 in program.dtypes:
        parts.append(GPU_BFLOAT16.strip("\n"))
    general = GPU_POWER_FLOAT64 if program.wide == "float64" else GPU_POWER
    if text := power_text(program, "@triton.jit", general.strip("\n")):
        parts.append(text)
    parts += functions(program, "@triton.jit", exact_division=True)
    parts += [gpu_sum(program, j) for j, stage in enumerate(program.stages) if stage.over]
    parts += [gpu_reduce(program, j) for j in program.whole]
    parts.append(gpu_update(program))
    return "\n\n\n".join(parts) + "\n"


def gpu_load(program: Program, role: int, address: str, mask: str) -> str:
    """Return the expression of a block of a tensor, in the type of the arithmetic."""
    masked = f", mask={mask}, other=0.0" if mask else ""
    return f"tl.load({address} + i{masked}).to(tl.{program.wide})"


def blocks(body: Callable[[str], list[str]]) -> list[str]:
    """Return a loop over full blocks, whose loads are wide, and a masked block for what is left."""
    return [
        "full = n // BLOCK * BLOCK",
        "for k in range(0, full, BLOCK):",
        "    i = k + tl.arange(0, BLOCK)",
        *(f"    {line}" for line in body("")),
        "if full < n:",
        "    i = full + tl.arange(0, BLOCK)",
        *(f"    {line}" for line in body("i < n")),
    ]


def gpu_sum(program: Program, j: int) -> str:
    """Return the function that adds up the summand of stage j over n entries."""
    arguments = ["grad", "n", "scale", *context(program, j), "BLOCK: tl.constexpr"]

    def body(mask: str) -> list[str]:
        term = f"summand_{j}(x).to(tl.float64)"
        return [
            f"x = scale * {gpu_load(program, 1, 'grad', mask)}",
            *shape(program, j),
            f"sums += {f'tl.where({mask}, {term}, 0.0)' if mask else term}",
        ]

    lines = ["sums = tl.zeros((BLOCK,), tl.float64)", *blocks(body)]
    return (
        f"@triton.jit\ndef sum_{j}({', '.join(arguments)}):\n{indent(lines, 1)}\n"
        "    return tl.sum(sums)"
    )


def gpu_start(program: Program, upto: int) -> list[str]:
    """Return the first lines of every kernel: its item, and the finished totals of its tensor."""
    lines = [
        "t = tl.load(items + 4 * item)",
        "first = tl.load(items + 4 * item + 1)",
        "rows = tl.load(items + 4 * item + 2)",
        "cols = tl.load(items + 4 * item + 3)",
        "if ALIGNED:",
        "    first = tl.multiple_of(first, 16)",
        "    cols = tl.multiple_of(cols, 16)",
        "scale = tl.load(scales)",
        "rows = tl.where(tl.load(found_inf) == 0, rows, 0)  # or else nothing is written",
    ]
    names = itertools.chain.from_iterable(
        constants_of(program, j) for j in range(len(program.stages))
    )
    lines += [f"{name} = tl.load(constants + {i})" for i, name in enumerate(names)]
    for j, stage in enumerate(program.stages[:upto]):
        lines.append(f"covers_{j} = tl.load(flags + {j} * tensors + t) != 0")
        if stage.over in ("tensor", "all"):
            q, wide = program.whole.index(j), f"to(tl.{program.wide})"
            sums, counts = (
                f"tl.load({a} + {q} * tensors + t).{wide}" for a in ("totals", "counts")
            )
            lines.append(f"total_{j} = {finished(program, j, sums, counts)}")
    return lines


GPU_ARGUMENTS = (
    "items, table, flags, totals, counts, constants, scales, found_inf, partial, classes, "
    "numbers, seeds, tensors, length, ALIGNED: tl.constexpr, BLOCK: tl.constexpr"
)


def gpu_rows(program: Program, upto: int) -> list[str]:
    """Return the lines that compute the totals of the row at hand."""
    lines = []
    for j, stage in enumerate(program.stages[:upto]):
        if stage.over == "row":
            call = ", ".join(["row", "cols", "scale", *context(program, j), "BLOCK"])
            count = f"cols.to(tl.{program.wide})"
            total = f"sum_{j}({call}).to(tl.{program.wide})"
            lines.append(f"total_{j} = {finished(program, j, total, count)}")
    return lines


def gpu_reduce(program: Program, j: int) -> str:
    """Return the kernel that adds up the summand of stage j over one item."""
    call = ["row", "cols", "scale", *context(program, j), "BLOCK"]
    lines = [
        "item = tl.program_id(0)",
        *gpu_start(program, j),
        f"rows = tl.where(tl.load(flags + {j} * tensors + t) != 0, rows, 0)",
        f"grad = at(table, 1, tensors, t, {GPU_TYPES[program.dtypes[1]]}, ALIGNED) + first",
        "total = tl.zeros((), tl.float64)",
        "for r in range(rows):",
        "    row = grad + r * cols",
        *(f"    {line}" for line in gpu_rows(program, j)),
        f"    total += sum_{j}({', '.join(call)})",
        "tl.store(partial + item, total)",
    ]
    return f"@triton.jit\ndef reduce_{j}({GPU_ARGUMENTS}):\n{indent(lines, 1)}"


def gpu_update(program: Program) -> str:
    """Return the kernel that updates one item."""
    stages, roles = len(program.stages), range(len(program.dtypes))
    results = ["p", *(f"s{role}" for role in roles[2:])]
    conversions = [f"{{}}.to({GPU_TYPES[program.dtypes[r]]})" for r in (0, *roles[2:])]
    for slot, role in enumerate((0, *roles[2:])):
        if program.dtypes[role] == torch.bfloat16:
            conversions[slot] = "to_bfloat16({})"
    if program.stochastic:
        conversions[0] = "to_bfloat16_stochastically({}, seed, begin + i)"

    def body(mask: str) -> list[str]:
        loads = [gpu_load(program, role, f"b{role}", mask) for role in roles]
        inputs = ["x", "p", *loads[2:], *program.scalars]
        return [
            f"x = scale * {loads[1]}",
            *shape(program, stages),
            "x = sign * x",
            f"p = {loads[0]}",
            *update_lines(program),
            f"{', '.join(results)}{',' if len(results) == 1 else ''} = rule({', '.join(inputs)})",
            *(
                f"tl.store(b{role} + i, {form.format(name)}{f', mask={mask}' if mask else ''})"
                for role, form, name in zip((0, *roles[2:]), conversions, results, strict=True)
            ),
        ]

    numbers = ["sign", "decays", "rate", *program.scalars]
    values = [f"{name} = tl.load(numbers + place + {i})" for i, name in enumerate(numbers)]
    values[1] = "decays = tl.load(numbers + place + 1) != 0"
    lines = [
        "item = tl.num_programs(0) - 1 - tl.program_id(0)  # what was summed last comes first",
        *gpu_start(program, stages),
        "seed = tl.load(seeds + t)",
        "place = tl.load(classes + t) * length",
        *values,
        *(
            f"a{r} = at(table, {r}, tensors, t, {GPU_TYPES[program.dtypes[r]]}, ALIGNED)"
            for r in roles
        ),
        "n = cols",
        "for r in range(rows):",
        "    begin = first + r * cols",
        "    row = a1 + begin",
        *(f"    {line}" for line in gpu_rows(program, stages)),
        *(f"    b{r} = a{r} + begin" for r in roles),
        *(f"    {line}" for line in blocks(body)),
    ]
    return f"@triton.jit\ndef update({GPU_ARGUMENTS}):\n{indent(lines, 1)}"


FORM = attrgetter("dtype", "device", "shape")
PLAIN = {Tensor, torch.nn.Parameter}  # a subclass may keep its numbers elsewhere


CHUNK = 16384  # entries of an item on the CPU; four times as many in large batches
SMALL = 131072  # a tensor up to this size is summed and updated by one core, from its cache
TOGETHER = 2**19  # per core, entries of larger tensors that are summed, and then updated
ROLES = ("parameter", "gradient")


def interpreting() -> bool:
    """Whether Triton's interpreter stands in for a GPU, as in the tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def takes_triton(device: torch.device) -> bool:
    """Whether the kernels for a device are Triton's."""
    return device.type == "cuda" or interpreting()


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, whose parts lie on several processes."""
    return hasattr(type(tensor), "to_local")


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def placements(tensor: Tensor) -> Any:
    """Return how a tensor is spread over processes; None for a plain one."""
    return getattr(tensor, "placements", None)


@functools.cache
def import_error(name: str) -> Exception | None:
    """Return what keeps an optional package from being imported: any error, if it is broken."""
    try:
        importlib.import_module(name)
    except Exception as error:
        return error.with_traceback(None)
    return None


def can_import(name: str) -> bool:
    """Whether an optional package is there and works."""
    return import_error(name) is None


def compiler_for(device: torch.device) -> str:
    """Return the name of the package that makes kernels for a device."""
    return "triton" if takes_triton(device) else "numba"


def broken_compiler(device: torch.device) -> str | None:
    """Say why a compiler that is installed makes no kernels, or None."""
    name = compiler_for(device)
    error = import_error(name)
    if error is None:
        idle = name == "numba" and importlib.import_module("numba").config.DISABLE_JIT
        return "NUMBA_DISABLE_JIT is set, so that numba compiles nothing" if idle else None
    absent = isinstance(error, ModuleNotFoundError) and error.name == name
    return None if absent else f"{name} cannot be imported ({told(error)})"


def missing_compiler(device: torch.device) -> str | None:
    """Say why no kernel can be made for a device, or None."""
    if device.type != "cpu" and not takes_triton(device):
        return f"there are kernels for CPU and CUDA tensors, not for {device.type} tensors"
    if reason := broken_compiler(device):
        return reason
    if takes_triton(device):
        return None if can_import("triton") else "Triton is not installed: pip install triton"
    if not can_import("numba"):
        return "numba is not installed: pip install 'agrlib[cpu]'"
    return None


def refuse_devices(params: Iterable[Tensor]) -> None:
    """Raise RuntimeError where no kernel can be made for a parameter, whatever its gradient."""
    for device in dict.fromkeys(param.device for param in params):
        if reason := missing_compiler(device):
            raise RuntimeError(f"fused=True: {reason}") from import_error(compiler_for(device))


def dense_in(tensor: Tensor, rows: bool) -> bool:
    """Whether the entries fill a stretch of memory, each row its own part of it."""
    if tensor.is_contiguous():
        return True
    pairs = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    size = 1
    for stride, extent in pairs:
        if extent != 1 and stride != size:
            return False
        size *= extent
    return not rows or len(tensor) == 1 or tensor.stride(0) * len(tensor) == tensor.numel()


def same_layout(shape: Sequence[int], first: Sequence[int], second: Sequence[int]) -> bool:
    """Whether strides place all entries alike; that of an axis of length 1 says nothing."""
    return all(a == b or n == 1 for n, a, b in zip(shape, first, second, strict=True))


def obstacle(param: Tensor, tensors: Sequence[Tensor], rows: bool) -> str | None:
    """Say why a parameter with this gradient and state cannot go through a kernel, or None."""
    if reason := missing_compiler(param.device):
        return reason
    kinds = GPU_TYPES if takes_triton(param.device) else CPU_TYPES
    part = local(param)
    if is_sharded(param):
        from agrlib.distributed import why_not

        if reason := why_not(param, tensors, rows):
            return reason
    if not dense_in(part, rows):
        return "a parameter is not contiguous"
    for tensor in (param, *tensors):
        if type(local(tensor)) not in PLAIN:
            return f"there is no kernel for tensors of the class {type(tensor).__name__}"
        if tensor.dtype not in kinds:
            return f"there is no kernel for {tensor.dtype}"
        if tensor.is_neg() or (local(tensor).numel() and not local(tensor).data_ptr()):
            return "a tensor's numbers do not lie in memory as they are"
        if tensor.device != param.device:
            return "a gradient or state is on another device than its parameter"
        if tensor.shape != param.shape:
            return "a gradient or state has another shape than its parameter"
        if not same_layout(part.shape, local(tensor).stride(), part.stride()):
            return "a gradient or state has other strides than its parameter"
    return None


class Recipe(NamedTuple):
    """What a group asks of a kernel, apart from types: the rule and the end of the chain."""

    eager: Chain  # up to the last transform that has no kernel
    compiled: tuple[Transform, ...]
    rule: Callable[..., Any]
    state: tuple[str, ...]
    power: str


def stage_of(transform: Transform) -> Stage:
    """Return what a kernel needs to know of a transform, or raise Unsupported."""
    for function in (transform.summand, transform.finish, transform.apply):
        if function is not None:
            read(function)
    count = len(transform.constants)
    return Stage(transform.over, transform.summand, transform.finish, transform.apply, count)


def refusal(function: Callable[..., Any]) -> Unsupported | None:
    """Say why a transform has no kernel, or None."""
    name = getattr(function, "__name__", type(function).__name__)
    if not isinstance(function, Transform):
        plain = f"{name} is a plain function; agrlib.transform would declare what it sums"
        return Unsupported(plain)
    if type(function) is not Transform:
        return Unsupported(f"{name} is of a class of its own, which may do something else")
    try:
        stage_of(function)
    except Unsupported as error:
        return error
    return None


@remembered
def exponents(rule: Callable[..., Any]) -> tuple[str, ...]:
    """Return to what a rule, or a function of a transform, raises something."""
    calls = [node for node in ast.walk(read(rule)) if isinstance(node, ast.Call)]
    return tuple(ast.unparse(c.args[1]) for c in calls if getattr(c.func, "id", "") == "power")


def power_of(rule: Callable[..., Any], keys: tuple[str, ...], scalars: Sequence[Any]) -> str:
    """Return how `power` is computed: "2" for two roots, "one", "general", or "" without any."""
    if not (raised := exponents(rule)):
        return ""
    names = [a.arg for a in read(rule).args.args][2 + len(keys) :]
    known = dict(zip(names, scalars, strict=True))
    for node in ast.walk(read(rule)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            known.pop(node.id, None)  # the rule itself changes it
    values: set[Any] = {known.get(name) for name in raised}
    roots = {0.0: "one"} | {0.5**k: str(k) for k in range(5)}
    return roots.get(values.pop(), "general") if len(values) == 1 else "general"


def recipe_of(optimizer: GradientMethod, group: Group) -> Recipe:
    """Return what a kernel for the group computes, or raise Unsupported."""
    rule, keys = optimizer.update_rule(group)
    read(rule)
    if optimizer.weight_decay_acts_on in DECAYS:
        read(DECAYS[optimizer.weight_decay_acts_on])
    power = power_of(rule, keys, optimizer.scalars(with_numbers(group), 1.0, 1))
    chain = group["transforms"]
    reasons = [refusal(function) for function in chain]
    for reason in filter(None, reasons):
        refuse(group, reason)
    cut = max((i + 1 for i, reason in enumerate(reasons) if reason), default=0)
    parts = [f for t in chain[cut:] for f in (t.summand, t.finish, t.apply) if f is not None]
    if any(map(exponents, parts)):
        power = "general"
    return Recipe(Chain(chain[:cut]), tuple(chain[cut:]), rule, keys, power)


class Member(NamedTuple):
    """A parameter on the fast path."""

    param: Tensor
    group: int
    number: int  # among all parameters of the optimizer
    new: bool  # without state so far
    noise: int  # tells the rounding noise of its part from that of all others


def items_of(
    parts: Sequence[Tensor], by_row: Sequence[bool], chunks: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Cut tensors into items (tensor, first entry, rows, columns); also say where each begins."""
    items: list[tuple[int, int, int, int]] = []
    firsts = [0]
    for t, (part, rowwise, chunk) in enumerate(zip(parts, by_row, chunks, strict=True)):
        size = part.numel()
        if rowwise and size:
            count, cols = part.shape[0], size // part.shape[0]
            rows = max(1, chunk // cols)
            items += [(t, r * cols, min(rows, count - r), cols) for r in range(0, count, rows)]
        else:
            items += [(t, i, 1, min(chunk, size - i)) for i in range(0, size, max(chunk, 1))]
        firsts.append(len(items))
    return np.array(items, np.int64).reshape(-1, 4), np.array(firsts, np.int64)


class Waves(NamedTuple):
    """Work for all threads, wave after wave."""

    phases: np.ndarray  # for each wave its phase, its first claim, and how many there are
    claims: np.ndarray  # where in `order` each claim begins, and the last one ends
    order: np.ndarray  # the items
    entries: int

    @classmethod
    def of(cls, wanted: Iterable[tuple[int, np.ndarray]], sizes: np.ndarray) -> "Waves":
        """Bundle the items of each phase; a phase of -1 has none, but one claim."""
        waves, starts, order, begin = [], [0], [np.zeros(0, np.int64)], 0
        for phase, items in wanted:
            if len(items) == 0 and phase >= 0:
                continue
            full = (np.cumsum(sizes[items]) - 1) // CHUNK
            ends = [*(1 + np.flatnonzero(np.diff(full))), len(items)]
            waves.append((phase, len(starts) - 1, len(ends)))
            starts += [begin + int(end) for end in ends]
            order.append(items)
            begin += len(items)
        every = np.concatenate(order)
        table = np.array(waves, np.int64).reshape(-1, 3)
        return cls(table, np.array(starts, np.int64), every, int(sizes[every].sum()))


ALONE = 2**16  # entries for which no thread is woken


class Crew:
    """Threads of this process that help with kernels."""

    crews: ClassVar[dict[int, "Crew"]] = {}  # by process: a forked one has no threads yet

    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self.size = 0

    @classmethod
    def offer(cls, count: int, job: tuple[Any, ...]) -> None:
        """Ask `count` threads to call a kernel: ``job`` is the kernel and its arguments."""
        crew = cls.crews.get(os.getpid()) or cls.crews.setdefault(os.getpid(), Crew())
        try:
            while crew.size < count:
                threading.Thread(target=crew.work, name="agrlib", daemon=True).start()
                crew.size += 1
        except RuntimeError:  # the system gives no more threads, or the interpreter is ending
            count = min(count, crew.size)
        with contextlib.suppress(queue.Empty):
            while True:  # what nobody has taken up by now, its caller has done
                crew.jobs.get_nowait()
        for _ in range(count):
            crew.jobs.put(job)

    def work(self) -> None:
        while True:
            kernel, *arguments = self.jobs.get()
            kernel(*arguments)
            del kernel, arguments


@functools.cache
def guard_forks() -> None:
    """Let forks wait until nothing is compiled: a child would wait for the compiler for ever."""
    lock = importlib.import_module("numba.core.compiler_lock").global_compiler_lock
    if hasattr(os, "register_at_fork"):
        release = dict.fromkeys(("after_in_parent", "after_in_child"), lock.release)
        os.register_at_fork(before=lock.acquire, **release)


@functools.cache
def yielding() -> int:
    """Return the address of the C function by which a thread that waits lets others run."""
    posix = os.name == "posix"
    function = ctypes.CDLL(None).sched_yield if posix else ctypes.cdll.kernel32.SwitchToThread
    return ctypes.cast(function, ctypes.c_void_p).value or 0


MANY = 32  # tensors of a batch from which on a glance is worth its own compilation


class ExchangeAPI(ctypes.Structure):
    """DLPack's table of C functions, version 1."""

    names = ("previous", "allocate", "lend", "borrow", "describe", "stream")
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        *((name, ctypes.c_void_p) for name in names),
    )


@functools.cache
def description() -> tuple[int, ...] | None:
    """Return where three functions lie: torch's that describes a tensor, and two of Python's."""
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None or not can_import("numba"):
        return None
    kind = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    try:
        place = kind(("PyCapsule_GetPointer", ctypes.pythonapi))(capsule, b"dlpack_exchange_api")
    except ValueError:  # a capsule of another kind
        return None
    api = ExchangeAPI.from_address(place)
    if api.major != 1 or not api.describe:
        return None
    others = ctypes.pythonapi.PyDict_GetItemWithError, ctypes.pythonapi.PyErr_Clear
    return api.describe, *(ctypes.cast(other, ctypes.c_void_p).value or 0 for other in others)


class Glance:
    """A quick look at all tensors of a batch, after one that took its time.

    Args:
        batch: has just inspected its tensors.
        states: the state of each parameter.

    Source: chapter "One rule, three compilers".
    """

    DTYPES: ClassVar = {  # as DLPack numbers them: 2 for floating point, 4 for bfloat16, then bits
        torch.float16: 2 | 16 << 8 | 1 << 16,
        torch.float32: 2 | 32 << 8 | 1 << 16,
        torch.float64: 2 | 64 << 8 | 1 << 16,
        torch.bfloat16: 4 | 16 << 8 | 1 << 16,
    }

    def __init__(self, batch: "Batch", states: list[dict[str, Tensor]]) -> None:
        found = description()
        assert found is not None
        self.functions, self.batch, self.states = found, weakref.proxy(batch), states
        self.run = load(CPU_STEPS, "steps").look
        self.single = [i for i, shape in enumerate(batch.shapes) if shape.numel() == 1]
        self.values = [[state[key] for state in states] for key in batch.keys]
        objects: list[Sequence[Any]] = [batch.params, states, batch.keys, *self.values]
        self.params, self.dicts, self.keys, *known = (  # in CPython, an id is an address
            np.array([*map(id, those)], np.int64) for those in objects
        )
        self.known = np.array(known, np.int64).reshape(len(batch.keys), len(states))
        kind, number = batch.params[0].__dlpack_device__()
        self.device = int(kind) | number << 32
        dtypes = [*batch.program.dtypes, *[torch.float32] * batch.counts_steps]
        self.dtypes = np.array([self.DTYPES[dtype] for dtype in dtypes], np.int64)
        self.steps = len(dtypes) - 1 if batch.counts_steps else -1
        axes = max(map(len, batch.shapes))
        self.forms = np.zeros((len(states), 1 + 2 * axes), np.int64)
        for form, shape, strides in zip(self.forms, batch.shapes, batch.strides, strict=True):
            form[0] = len(shape)
            form[1 : 1 + 2 * len(shape)] = np.stack((shape, strides), axis=1).ravel()
        self.answer = np.zeros(6, np.int64)
        first_call(self.run, self.compile)

    def compile(self) -> None:
        """Look at no tensors."""
        none, grads = np.zeros(0, np.int64), np.zeros(0, object)
        known = none, grads.__array_interface__["data"][0], none, self.keys, self.known[:, :0]
        forms = self.device, self.dtypes, self.steps, self.forms[:0]
        addresses = np.zeros((len(self.dtypes), 0), np.int64)
        self.run(*self.functions, *known, *forms, addresses, addresses, self.answer)

    @classmethod
    def at(cls, batch: "Batch", states: list[dict[str, Tensor]]) -> "Glance | None":
        """Return a glance at a batch, or None where it cannot or need not be had."""
        few = len(batch.params) < MANY or batch.sharded or any(0 in s for s in batch.shapes)
        if few or broken_compiler(torch.device("cpu")) or description() is None:
            return None
        try:
            return cls(batch, states)
        except Unsupported as error:  # then every tensor is asked
            warn_once(f"steps take longer, because {error}")
            return None

    def look(self, states: list[dict[str, Tensor]], grads: list[Tensor]) -> np.ndarray | None:
        """Return the addresses of all tensors, the same array if none moved; None if in doubt."""
        if states is not self.states or not set(map(type, grads)) <= PLAIN:
            return None
        if any(grads[i].is_neg() for i in self.single):
            return None
        objects = np.fromiter(grads, object, len(grads))
        gradients, old = objects.__array_interface__["data"][0], self.batch.addresses
        known = self.params, gradients, self.dicts, self.keys, self.known
        forms = self.device, self.dtypes, self.steps, self.forms
        addresses = np.empty_like(old)
        found = self.run(*self.functions, *known, *forms, old, addresses, self.answer)
        if found > 0:
            rows = self.batch.params, grads, *self.values
            moved = np.argwhere(addresses[:, self.single] != old[:, self.single]).tolist()
            if any(rows[role][self.single[k]].is_neg() for role, k in moved):
                return None
        return None if found < 0 else addresses if found else old


class Batch:
    """Parameters that one kernel updates, and the tables that the kernel reads."""

    def __init__(
        self,
        optimizer: GradientMethod,
        program: Program,
        chain: tuple[Transform, ...],
        members: list[Member],
    ) -> None:
        self.optimizer, self.program, self.chain, self.members = optimizer, program, chain, members
        self.params = [member.param for member in members]
        self.parts = [local(param) for param in self.params]
        self.strides = [part.stride() for part in self.parts]
        self.contiguous = all(part.is_contiguous() for part in self.parts)
        self.shapes = [part.shape for part in self.parts]
        self.sharded = any(map(is_sharded, self.params))
        self.device = self.params[0].device
        self.forms = [[(d, self.device, shape) for shape in self.shapes] for d in program.dtypes]
        self.whole = [chain[j] for j in program.whole]
        covers = [[f.covers(p) for p in self.params] for f in chain]
        self.covers = np.array(covers, np.bool_).reshape(len(chain), len(members))
        by_row = [f for f in chain if f.over == "row"]
        self.by_row = [any(f.covers(p) for f in by_row) for p in self.params]
        self.entries = np.array([float(p.numel()) for p in self.params])
        self.filled = np.array([part.numel() > 0 for part in self.parts])
        self.counts = torch.from_numpy(np.tile(self.entries, (len(self.whole), 1)))
        self.totals = torch.zeros_like(self.counts)
        groups = [member.group for member in members]
        spans = [(g, groups.index(g), groups.count(g)) for g in dict.fromkeys(groups)]
        self.spans = [(g, slice(first, first + count)) for g, first, count in spans]
        rounds = optimizer.param_groups[members[0].group]["stochastic_rounding"]
        self.counts_steps = optimizer.counts_steps or bool(rounds)
        self.keys = [*program.state, *(["step"] if self.counts_steps else [])]
        self.new = np.array([member.new for member in members], np.bool_)
        self.tensors: list[list[Tensor]] = []
        self.addresses = np.zeros((2 + len(self.keys), len(members)), np.int64)
        self.glance: Glance | None = None
        self.every: list[dict[str, Tensor]] = []
        self.states: list[dict[str, Tensor]] = []

    def has_form(self, role: int, tensors: list[Tensor]) -> bool:
        """Whether tensors still are of the type and layout that the kernel was made for."""
        if role == len(self.program.dtypes):  # the numbers of the steps
            return all(t.dtype == torch.float32 and t.numel() == 1 for t in tensors)
        if self.sharded and list(map(placements, tensors)) != list(map(placements, self.params)):
            return False
        parts = self.parts_of(tensors)
        if not set(map(type, parts)) <= PLAIN or list(map(FORM, parts)) != self.forms[role]:
            return False
        if any(part.is_neg() for part in parts if part.numel() == 1):  # others have other strides
            return False
        if self.contiguous and all(map(Tensor.is_contiguous, parts)):  # the quicker question
            return True
        strides = list(map(Tensor.stride, parts))
        alike = map(same_layout, self.shapes, strides, self.strides)
        return strides == self.strides or all(alike)

    def parts_of(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return the parts that this process holds."""
        return list(map(local, tensors)) if self.sharded else tensors

    def own(self, values: list[Any]) -> list[Any]:
        """Return what belongs to the batch, of one value for each parameter of the optimizer."""
        if len(values) == len(self.params):
            return values
        return [values[member.number] for member in self.members]

    def find_states(self) -> list[dict[str, Tensor]]:
        """Return each parameter's state; looked up again only if the optimizer's has changed."""
        every = [*self.optimizer.state, *self.optimizer.state.values()]
        same = len(every) == len(self.every) and all(map(is_, every, self.every))
        if not (same and self.states):
            self.states = [self.optimizer.state.get(p, {}) for p in self.params]
            self.every = every
        return self.states

    def point(self, grads: list[Tensor]) -> bool:
        """Look up all tensors again; return whether they still fit the kernel."""
        states = self.find_states()
        found = None if self.glance is None else self.glance.look(states, grads)
        if found is None:
            return self.inspect(states, grads)
        if found is not self.addresses:
            self.place(found)
        self.tensors[1] = grads  # a user's function may have made them; the kernel is still to run
        return True

    def inspect(self, states: list[dict[str, Tensor]], grads: list[Tensor]) -> bool:
        """Look up all tensors again, one question after the other."""
        try:
            rows = [self.params, grads, *(list(map(itemgetter(k), states)) for k in self.keys)]
            known = self.tensors or [[] for _ in rows]
            pairs = zip(rows, known, strict=True)
            seen = [bool(old) and all(map(is_, row, old)) for row, old in pairs]
            if not all(same or self.has_form(role, rows[role]) for role, same in enumerate(seen)):
                return False
            found = [list(map(Tensor.data_ptr, self.parts_of(row))) for row in rows]
        except (KeyError, RuntimeError):  # a state was removed, or a gradient is sparse
            return False
        addresses = np.array(found, np.int64)
        if not addresses[:, self.filled].all():  # a tensor without memory
            return False
        moved = (addresses != self.addresses).any(axis=1).tolist()
        for role, (same, elsewhere) in enumerate(zip(seen, moved, strict=True)):
            if same and elsewhere and not self.has_form(role, rows[role]):
                return False
        self.tensors = rows
        if any(moved):
            self.place(addresses)
        self.glance = Glance.at(self, states)
        return True

    def written(self) -> None:
        """Tell autograd what a kernel has written, and let go of the gradients."""
        try:
            increment_version(self.params)
        except (TypeError, RuntimeError):  # before torch 2.5, one by one
            for param in self.params:
                increment_version(param)
        self.tensors[1] = []
        self.new[:] = False

    def count_of(self, q: int) -> float:
        """Return over how many entries the q-th whole stage sums in this batch."""
        return float(self.entries[self.covers[self.program.whole[q]]].sum())

    def place(self, addresses: np.ndarray) -> None:
        """Hand the addresses to the kernel, where they have changed."""
        raise NotImplementedError

    def count(self, scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Hand over what is new in this step: the gradient scale and the scalars of the rule."""
        raise NotImplementedError

    def reduce(self, q: int) -> None:
        """Sum this process's parts for the q-th whole stage into `totals[q]`."""
        raise NotImplementedError

    def run(self, alone: bool) -> None:
        """Update; `alone` says that the totals are still to be computed."""
        raise NotImplementedError

    def numbers_of(self, group: Group, lr: Any, step: Any) -> list[Any]:
        """Return a row of the kernel's table: sign, decay, and the scalars of the rule."""
        decay = group["weight_decay"]
        rate = lr * decay if self.program.decay == "parameter" else decay
        sign, decays = -1.0 if group["maximize"] else 1.0, (decay != 0) * 1.0
        return [sign, decays, rate, *self.optimizer.scalars(group, lr, step)]

    def seeds_of(self, group: Group, members: slice, steps: Any) -> Tensor:
        """Return what the noise of each tensor starts from."""
        index = torch.tensor([m.noise for m in self.members[members]], device=self.device)
        count = steps if isinstance(steps, Tensor) else torch.from_numpy(steps)
        return noise_seed(group["rounding_seed"], count.long(), index)


class CPUBatch(Batch):
    """A batch whose kernel numba compiles."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        guard_forks()
        self.wide = np.dtype(self.program.wide).type
        self.kernel = load(cpu_source(self.program), self.program.rule.__name__).run
        self.read_steps = load(CPU_STEPS, "steps").read_steps
        size = len(self.params)
        self.seeds, self.classes = np.zeros(size, np.int64), np.zeros(size, np.int64)
        self.numbers = np.zeros((1, 3 + len(self.program.scalars)), self.wide)
        self.constants = np.array([c for f in self.chain for c in f.constants], self.wide)
        self.scale = self.wide(1)
        self.step_addresses = np.zeros(size * self.counts_steps, np.int64)
        self.steps = np.zeros(size * self.counts_steps, np.float32)
        self.cores = 0
        self.arrange()
        none = self.step_addresses[:0], self.steps[:0]
        first_call(self.kernel, lambda: self.call(Waves.of([], self.sizes)))
        first_call(self.read_steps, lambda: self.read_steps(*none))

    def arrange(self) -> None:
        """Cut the work into items, and say in which waves they are done."""
        cores = torch.get_num_threads()
        if cores == self.cores:
            return
        self.cores, last = cores, len(self.whole)
        small = [last > 0 and part.numel() <= SMALL for part in self.parts]
        entries = sum(part.numel() for part in self.parts)
        chunk = min(max(CHUNK, entries // 64), 4 * CHUNK)  # not by cores: sums depend on it
        chunks = [SMALL if s else chunk for s in small]
        self.items, firsts = items_of(self.parts, self.by_row, chunks)
        self.sizes, self.partial = self.items[:, 2] * self.items[:, 3], np.zeros(len(self.items))
        each = [np.arange(*firsts[t : t + 2]) for t in range(len(small))]
        everything = np.arange(len(self.items))
        alone = [(last, everything)]
        if last:
            alone = [(last + 1, everything[np.repeat(small, np.diff(firsts))])]
            large = np.flatnonzero(~np.array(small, np.bool_)).tolist()
            ends = np.cumsum([self.parts[t].numel() for t in large])
            turns = dict(zip(large, ends // (TOGETHER * cores), strict=True))
            for _, group in itertools.groupby(large, turns.get):
                items = np.concatenate([each[t] for t in group])
                alone += [(phase, items) for phase in range(last + 1)]
        end = (-1, everything[:0])
        phases = [[(phase, everything)] for phase in range(last)]
        ways = ([*alone, end], *phases, [(last, everything), end])
        self.alone, *self.together = (Waves.of(wanted, self.sizes) for wanted in ways)

    def place(self, addresses: np.ndarray) -> None:
        self.addresses = addresses
        self.step_addresses = addresses[-1] if self.counts_steps else addresses[0, :0]

    def count(self, scale: Tensor | None, found_inf: Tensor | None) -> None:
        self.arrange()
        self.scale = self.wide(1 if scale is None else 1 / scale.item())
        alike = self.read_steps(self.step_addresses, self.steps)
        rows: list[list[Any]] = []
        for g, members in self.spans:
            group = with_numbers(self.optimizer.param_groups[g], float)
            lr = float(group["lr"])
            steps = self.steps[members] + 1 if self.counts_steps else np.zeros(0, np.float32)
            if self.program.stochastic:
                self.seeds[members] = self.seeds_of(group, members, steps)
            if not self.optimizer.counts_steps:
                steps = np.where(self.new[members], 1, 2)
                alike = not self.new.any()
            known, place = (steps[:1], 0) if alike else np.unique(steps, return_inverse=True)
            self.classes[members] = len(rows) + place
            rows += [self.numbers_of(group, lr, step) for step in known.tolist()]
        self.numbers = np.array(rows, self.wide)

    def call(self, waves: Waves) -> None:
        """Do the work together with others, where there is enough of it."""
        arguments = (
            np.zeros(3 * len(waves.phases), np.int64),
            yielding(),
            *waves[:3],
            self.step_addresses,
            self.items,
            self.addresses,
            self.covers,
            self.classes,
            self.numbers,
            self.totals.numpy(),
            self.counts.numpy(),
            self.constants,
            self.scale,
            self.seeds,
            self.partial,
        )
        others = min(self.cores - 1, waves.entries // ALONE)
        if others > 0:
            Crew.offer(others, (self.kernel, *arguments))
        self.kernel(*arguments)

    def reduce(self, q: int) -> None:
        self.totals[q] = 0
        self.call(self.together[q])

    def run(self, alone: bool) -> None:
        if alone:
            self.totals.zero_()
        self.call(self.alone if alone else self.together[-1])
        self.written()


class GPUBatch(Batch):
    """A batch whose kernels Triton compiles."""

    BLOCK = 1024  # entries at once: with 128 threads, two loads of 16 bytes each for float32

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.kernels = load(gpu_source(self.program), f"{self.program.rule.__name__}_gpu")
        self.wide = getattr(torch, self.program.wide)
        size, processors = len(self.params), 1
        if self.device.type == "cuda":
            processors = torch.cuda.get_device_properties(self.device).multi_processor_count
        entries = sum(part.numel() for part in self.parts)
        chunk = 1 << (entries // (8 * processors)).bit_length()  # several items per processor
        chunk = min(max(chunk, 4 * self.BLOCK), 64 * self.BLOCK)
        items, firsts = items_of(self.parts, self.by_row, [chunk] * size)
        self.length = len(items)
        self.items, self.firsts = self.on_device(items), self.on_device(firsts)
        self.covers_there = self.on_device(self.covers.astype(np.int8))
        self.classes = self.on_device(np.arange(size))
        self.counts, self.totals = self.on_device(self.counts), self.on_device(self.totals)
        constants = [c for f in self.chain for c in f.constants]
        self.constants = self.on_device(constants or [0.0], self.wide)
        self.one = self.on_device([1.0], self.wide)
        self.zero = self.on_device([0.0], torch.float32)
        self.scale, self.found_inf = self.one, self.zero
        self.partial = torch.zeros(self.length, dtype=torch.float64, device=self.device)
        self.seeds = self.on_device(np.zeros(size, np.int64))
        columns = 3 + len(self.program.scalars)
        self.numbers = torch.zeros(size, columns, dtype=self.wide, device=self.device)
        self.known: list[list[Any]] = [[None] * columns for _ in self.spans]
        self.aligned = self.placed = False
        self.spare: Tensor | None = None
        self.recorded: list[Tensor] = []
        if self.device.type == "cuda" or interpreting():
            first_call(self.kernels, self.compile)

    def compile(self) -> None:
        """Launch all kernels as in a step that a gradient scaler calls off: nothing is written."""
        nowhere = np.zeros((len(self.program.dtypes), len(self.params)), np.int64)
        self.table = self.on_device(nowhere)
        self.aligned = all(is_aligned(part, self.chain) for part in self.parts)
        self.found_inf = self.zero + 1
        for q in range(len(self.whole)):
            self.reduce(q)
        self.call(self.kernels.update)
        self.found_inf = self.zero

    def on_device(self, values: Any, dtype: torch.dtype | None = None) -> Tensor:
        """Copy numbers to the device without waiting for it."""
        there = values if isinstance(values, Tensor) else torch.from_numpy(np.asarray(values))
        there = there.to(dtype or there.dtype)
        if self.device.type == "cuda" and there.device.type == "cpu":
            there = there.pin_memory()
        return there.to(self.device, non_blocking=True)

    def place(self, addresses: np.ndarray) -> None:
        if self.placed and np.array_equal(addresses, self.addresses):
            return
        self.addresses, self.placed = addresses, True
        table = torch.from_numpy(addresses[: len(self.program.dtypes)])
        columns = (part.numel() // part.shape[0] for part in self.row_parts())
        self.aligned = not (table % 16).any() and all(cols % 16 == 0 for cols in columns)
        if not self.capturing:
            self.table = self.on_device(table)
        elif self.spare is not None:  # every replay copies it again, so it must stay as it is
            self.table = torch.empty_like(table, device=self.device)
            self.table.copy_(self.spare.copy_(table), non_blocking=True)
            self.recorded.append(self.spare)
            self.spare = None
        else:
            raise RuntimeError("take one step outside of a CUDA graph before recording another")

    @property
    def capturing(self) -> bool:
        """Whether a CUDA graph is being recorded; memory of the host cannot be pinned then."""
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def row_parts(self) -> list[Tensor]:
        return [p for p, row in zip(self.parts, self.by_row, strict=True) if row and p.numel()]

    def count(self, scale: Tensor | None, found_inf: Tensor | None) -> None:
        if self.spare is None and not self.capturing:
            form = len(self.program.dtypes), len(self.params)
            self.spare = torch.empty(form, dtype=torch.int64, device="cpu")
            self.spare = self.spare.pin_memory() if self.device.type == "cuda" else self.spare
        self.scale, self.found_inf = self.one, self.zero
        if scale is not None:
            self.scale = scale.double().reciprocal().to(self.device, self.wide)
        if found_inf is not None:
            self.found_inf = found_inf.to(self.device, torch.float32)
        if self.counts_steps:
            steps = torch.stack(self.tensors[-1]).double().reshape(-1) + 1
        for (g, members), known in zip(self.spans, self.known, strict=True):
            group = with_numbers(self.optimizer.param_groups[g])
            lr = group["lr"]
            if self.program.stochastic:
                self.seeds[members] = self.seeds_of(group, members, steps[members].long())
            if self.optimizer.counts_steps:
                step: Any = steps[members]
            else:
                new = self.new[members]
                step = 1 if new.all() else 2
                if new.any() and not new.all():
                    step = self.on_device(np.where(new, 1.0, 2.0))
            for column, value in enumerate(self.numbers_of(group, lr, step)):
                if isinstance(value, Tensor) or known[column] != value:
                    self.numbers[members, column] = value
                known[column] = None if isinstance(value, Tensor) else value

    def call(self, kernel: Any) -> None:
        if self.length == 0:
            return
        arguments = (
            self.items,
            self.table,
            self.covers_there,
            self.totals,
            self.counts,
            self.constants,
            self.scale,
            self.found_inf,
            self.partial,
            self.classes,
            self.numbers,
            self.seeds,
            len(self.params),
            self.numbers.shape[1],
        )
        with on_its_device(self.device):
            kernel[(self.length,)](
                *arguments,
                ALIGNED=self.aligned,
                BLOCK=self.BLOCK,
                num_warps=4,
                enable_fp_fusion=False,  # one rounding per operation, as in eager steps
            )

    def reduce(self, q: int) -> None:
        self.call(getattr(self.kernels, f"reduce_{self.program.whole[q]}"))
        with on_its_device(self.device):
            grid = (len(self.params),)
            self.kernels.collect[grid](self.partial, self.firsts, self.totals[q], BLOCK=self.BLOCK)

    def run(self, alone: bool) -> None:
        if alone:
            for q in range(len(self.whole)):
                self.reduce(q)
        self.call(self.kernels.update)
        if self.counts_steps:
            torch._foreach_add_(self.tensors[-1], 1)
            if self.found_inf is not self.zero:
                found = self.found_inf.reshape(self.tensors[-1][0].shape)
                torch._foreach_sub_(self.tensors[-1], [found] * len(self.params))
        self.written()


def on_its_device(device: torch.device) -> Any:
    """Return a context in which kernels are launched on a device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def is_aligned(part: Tensor, chain: Iterable[Transform]) -> bool:
    """Whether a tensor, and each of its rows if they matter, begins where 16 bytes begin."""
    rows = part.dim() > 1 and part.numel() > 0 and any(f.over == "row" for f in chain)
    return part.data_ptr() % 16 == 0 and not (rows and (part.numel() // part.shape[0]) % 16)


def widened(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which a chain computes."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def over_all(chain: Iterable[Any]) -> set[Transform]:
    """Return the transforms of a chain that sum over all tensors."""
    return {f for f in chain if isinstance(f, Transform) and f.over == "all"}


def refuse(group: Group, reason: str | Unsupported, cause: Exception | None = None) -> None:
    """Raise where a group demands what a kernel cannot do."""
    if group["fused"]:
        raise RuntimeError(
            f"fused=True: {reason}. With fused=None such parameters go the eager way"
        ) from cause
    if group["fused"] is None and isinstance(reason, Changed):
        warn_once(f"{reason}. It goes the eager way")


def signature_of(optimizer: GradientMethod) -> list[tuple[Any, ...]]:
    """Return the options that decide what is compiled."""
    found: list[tuple[Any, ...]] = []
    for group in optimizer.param_groups:
        rule, keys = optimizer.update_rule(group)
        kinds = group["fused"], group["state_dtype"], group["stochastic_rounding"]
        found.append((group["transforms"], rule, keys, *kinds, len(group["params"])))
    return found


def rounds_of(batches: Iterable["Batch"]) -> list[list[tuple["Batch", int]]]:
    """Return which totals are summed together: all that need no other total that is to come."""
    rest = [(batch, list(range(len(batch.whole)))) for batch in batches]
    rounds = []
    while any(waiting for _, waiting in rest):
        ready = []
        for batch, waiting in rest:
            if waiting:
                head = batch.whole[waiting[0]]
                later = (head in [b.whole[q] for q in w] and b.whole[w[0]] != head for b, w in rest)
                if head.over != "all" or not any(later):
                    ready.append((batch, waiting[0]))
        if not ready:
            raise ValueError("transforms over all tensors stand in a different order in two groups")
        for batch, waiting in rest:
            if any(batch is b for b, _ in ready):
                waiting.pop(0)
        rounds.append(ready)
    return rounds


DECLARED = attrgetter("apply", "over", "summand", "finish", "constants", "smallest")


class Plan:
    """How a step of an optimizer is split: batches for kernels, and parts for the eager way.

    Args:
        optimizer: the optimizer whose step it is.
        grads: the gradient of each of its parameters, or None.

    Raises:
        RuntimeError: a group with ``fused=True`` cannot go through a kernel.

    Source: chapter "One rule, three compilers".
    """

    def __init__(
        self, optimizer: GradientMethod, params: list[Tensor], grads: list[Tensor | None]
    ) -> None:
        self.optimizer: Any = weakref.proxy(optimizer)  # which holds the plan: no circle
        self.params = params
        self.signature = signature_of(optimizer)
        self.missing = [grad is None for grad in grads]
        self.absent = [i for i, missing in enumerate(self.missing) if missing]
        self.groups = [g for g, group in enumerate(optimizer.param_groups) for _ in group["params"]]
        for group, _, members in optimizer._parts(grads):
            optimizer._check_params(group, [params[i] for i in members])
        self.recipes, self.fast = self.sort(grads)
        self.pending: list[tuple[Tensor, str, Tensor]] = []
        self.batches = self.make_batches(grads)
        self.sources = [f for batch in self.batches for f in named(batch.program).values()]
        self.codes = list(map(attrgetter("__code__"), self.sources))
        self.names = [(f, name, known) for f in self.sources for name, known in meanings(f)]
        self.chained = [f for batch in self.batches for f in batch.chain]
        self.declared = list(map(DECLARED, self.chained))
        together = [batch for batch in self.batches if batch.whole and needs_others(batch)]
        self.alone = [batch for batch in self.batches if batch not in together]
        self.rounds = rounds_of(together)
        self.places: list[dict[Any, Any]] = [{} for _ in self.rounds]
        if any(is_sharded(param) for batch in together for param in batch.params):
            from agrlib.distributed import places_of

            found = [[m for b, _ in ready for m in b.members] for ready in self.rounds]
            self.places = [places_of([(m.number, m.param) for m in ms]) for ms in found]
        self.compiled = set(self.fast)
        self.on_gpu = all(isinstance(batch, GPUBatch) for batch in self.batches)
        self.rest = self.find_rest()
        self.eager = {i for _, _, members in self.rest for i in members}  # others: see `has_form`
        for ready in self.rounds:
            for places in groups_over_all(ready).values():
                count = sum(b.count_of(q) for b, q in places)
                for batch, q in places:
                    batch.counts[q] = count

    def sort(self, grads: list[Tensor | None]) -> tuple[list[Recipe | None], list[int]]:
        """Return each group's recipe, and the parameters that go through kernels."""
        groups = self.optimizer.param_groups
        recipes: list[Recipe | None] = []
        ready = {g for g, missing in zip(self.groups, self.missing, strict=True) if not missing}
        for g, group in enumerate(groups):
            recipes.append(None)
            try:
                recipes[g] = recipe_of(self.optimizer, group) if g in ready else None
            except Unsupported as error:
                refuse(group, error, error)
        fast, large = [], 0
        often = collections.Counter(map(id, self.params))
        for i, (param, grad, g) in enumerate(zip(self.params, grads, self.groups, strict=True)):
            recipe = recipes[g]
            if grad is None or recipe is None or groups[g]["fused"] is False:
                continue
            reason = self.reason(groups[g], param, grad, recipe)
            if often[id(param)] > 1:
                reason = "a parameter was given twice, and all are updated at once"
            if reason:
                refuse(groups[g], reason)
                if broken := broken_compiler(param.device):
                    warn_once(f"steps go the eager way, because {broken}")
                continue
            fast.append(i)
            large += param.numel()
        if large < WORTH_COMPILING:
            fast = [i for i in fast if groups[self.groups[i]]["fused"]]
        return recipes, self.without_conflicts(recipes, fast, grads)

    def reason(self, group: Group, param: Tensor, grad: Tensor, recipe: Recipe) -> str | None:
        """Say why a parameter cannot go through a kernel, or None."""
        state = self.optimizer.state.get(param, {})
        tensors = [state[key] for key in recipe.state if state.get(key) is not None]
        rows = any(f.over == "row" for f in recipe.compiled)
        return obstacle(param, [*([] if recipe.eager else [grad]), *tensors], rows)

    def without_conflicts(
        self, recipes: list[Recipe | None], fast: list[int], grads: list[Tensor | None]
    ) -> list[int]:
        """Take out groups that share a total over all tensors with parameters on the eager way."""
        while True:
            chosen, eager = set(fast), set()
            for i, g in enumerate(self.groups):
                recipe, chain = recipes[g], self.optimizer.param_groups[g]["transforms"]
                if grads[i] is not None:
                    eager |= over_all(recipe.eager if recipe and i in chosen else chain)
            kept = []
            for i in fast:
                recipe = recipes[self.groups[i]]
                assert recipe is not None
                if shared := over_all(recipe.compiled) & eager:
                    reason = f"{shared.pop()} also covers tensors that no kernel takes"
                    refuse(self.optimizer.param_groups[self.groups[i]], reason)
                else:
                    kept.append(i)
            if kept == fast:
                return fast
            fast = kept

    def make_batches(self, grads: list[Tensor | None]) -> list[Batch]:
        """Make the kernels; parameters for which that fails go the eager way."""
        while True:
            batches: list[Batch] = []
            failed: set[int] = set()
            for (program, chain, _, device, *_), members in self.sort_members(grads).items():
                kind = GPUBatch if takes_triton(device) else CPUBatch
                try:
                    batches.append(kind(self.optimizer, program, chain, members))
                except Exception as error:  # of a compiler, a disk, a device
                    self.give_up(members, error)
                    failed |= {member.number for member in members}
            if not failed:
                return batches
            left = [i for i in self.fast if i not in failed]
            self.fast = self.without_conflicts(self.recipes, left, grads)

    def give_up(self, members: list[Member], error: Exception) -> None:
        """Say why there is no kernel for some parameters."""
        reason = str(error) if isinstance(error, Unsupported) else told(error)
        for g in dict.fromkeys(member.group for member in members):
            refuse(self.optimizer.param_groups[g], reason, error)
        warn_once(f"steps go the eager way, because {reason}")

    def sort_members(self, grads: list[Tensor | None]) -> dict[Any, list[Member]]:
        """Put together what one kernel can update, and make the state that is missing."""
        self.pending = []
        sorted_members: dict[Any, list[Member]] = {}
        for i in self.fast:
            param, grad, g = self.params[i], grads[i], self.groups[i]
            group, recipe = self.optimizer.param_groups[g], self.recipes[g]
            assert recipe is not None and grad is not None
            state, new = self.optimizer.state.get(param, {}), False
            kinds = [param.dtype, widened(grad.dtype) if recipe.eager else grad.dtype]
            for key in recipe.state:
                if state.get(key) is None:
                    new = True
                    made = self.optimizer._first_state(group, param, key)
                    self.pending.append((param, key, made))
                made = state.get(key)
                kinds.append(state_dtype(group, param) if made is None else made.dtype)
            self.add_step(group, param, state)
            stochastic = bool(group["stochastic_rounding"]) and param.dtype == torch.bfloat16
            stages = tuple(map(stage_of, recipe.compiled))
            program = Program(
                recipe.rule,
                recipe.state,
                stages,
                self.optimizer.weight_decay_acts_on,
                recipe.power,
                tuple(kinds),
                stochastic,
            )
            aligned = not takes_triton(param.device) or is_aligned(local(param), recipe.compiled)
            counts = bool(group["stochastic_rounding"])  # of any type, as the eager way does
            place = (program, recipe.compiled, bool(recipe.eager), param.device, aligned, counts)
            member = Member(param, g, i, new, i + part_number(param))
            sorted_members.setdefault(place, []).append(member)
        return sorted_members

    def add_step(self, group: Group, param: Tensor, state: dict[str, Tensor]) -> None:
        """Give a parameter the number of its steps, on its own device if a GPU kernel counts."""
        if not (self.optimizer.counts_steps or group["stochastic_rounding"]):
            return
        home = param.device if takes_triton(param.device) else torch.device("cpu")
        step = state.get("step")
        if step is None or (step.dtype, step.device) != (torch.float32, home):
            zero = torch.zeros((), dtype=torch.float32, device=home)  # whatever the default
            made = zero if step is None else step.to(home, torch.float32)
            self.pending.append((param, "step", made))

    def fits(self, params: list[Tensor], grads: list[Tensor | None]) -> bool:
        """Whether the plan still is that of the optimizer; looks up all tensors again."""
        return (
            len(params) == len(self.params)
            and all(map(is_, params, self.params))
            and all(grads[i] is None for i in self.absent)
            and all(grads[i] is not None for i in self.eager)
            and signature_of(self.optimizer) == self.signature
            and self.means_the_same()
            and all(map(self.has_power, self.optimizer.param_groups, self.recipes))
            and all(
                batch.point(batch.own(grads)) for batch in self.batches if not self.waits(batch)
            )
        )

    def means_the_same(self) -> bool:
        """Whether the functions that the kernels were made from still are what they were."""
        return (
            all(map(is_, map(attrgetter("__code__"), self.sources), self.codes))
            and all(meaning(function, name) is known for function, name, known in self.names)
            and list(map(DECLARED, self.chained)) == self.declared
        )

    def has_power(self, group: Group, recipe: Recipe | None) -> bool:
        """Whether a kernel still raises to the exponents that the group asks for."""
        if recipe is None or recipe.power in ("", "general"):
            return True
        scalars = self.optimizer.scalars(with_numbers(group), 1.0, 1)
        return recipe.power == power_of(recipe.rule, recipe.state, scalars)

    def waits(self, batch: Batch) -> bool:
        """Whether users' functions come before the kernel of a batch."""
        recipe = self.recipes[batch.members[0].group]
        return recipe is not None and bool(recipe.eager)

    def run(self, grads: list[Any], shaped: dict[int, Tensor]) -> None:
        """Run the kernels.

        Args:
            grads: the gradient of each parameter, in the order of the groups.
            shaped: what users' functions made of some of them, by number.
        """
        for param, key, tensor in self.pending:
            self.optimizer.state[param][key] = tensor
        self.pending = []
        scale = getattr(self.optimizer, "grad_scale", None)
        found_inf = getattr(self.optimizer, "found_inf", None)
        for batch in self.batches:
            waits = self.waits(batch)
            if shaped or not batch.tensors:  # users' functions may have moved anything
                given = [
                    like_param(shaped[m.number], m.param) if waits else grads[m.number]
                    for m in batch.members
                ]
                fits = batch.point(given)
                assert fits, "a kernel was made for tensors of another form"
            batch.count(None if waits else scale, found_inf)  # eager transforms unscaled already
        for ready, places in zip(self.rounds, self.places, strict=True):
            for batch, q in ready:
                batch.reduce(q)
            if places:
                from agrlib.distributed import add_totals

                add_totals(places, [batch.totals[q] for batch, q in ready])
            for shared in groups_over_all(ready).values():
                home = shared[0][0].device
                total = torch.stack([b.totals[q].sum().to(home) for b, q in shared]).sum()
                for batch, q in shared:
                    batch.totals[q] = total.to(batch.device)
        for batch in self.batches:
            batch.run(alone=batch in self.alone)

    def find_rest(self) -> list[tuple[Group, Chain, list[int]]]:
        """What goes the eager way: a group, a chain, and the parameters that go through it."""
        found = []
        for g, group in enumerate(self.optimizer.param_groups):
            ready = [i for i, h in enumerate(self.groups) if h == g and not self.missing[i]]
            recipe = self.recipes[g]
            found.append((group, group["transforms"], [i for i in ready if i not in self.compiled]))
            if recipe is not None and recipe.eager:
                found.append((group, recipe.eager, [i for i in ready if i in self.compiled]))
        return [part for part in found if part[2]]


def like_param(grad: Tensor, param: Tensor) -> Tensor:
    """Return a gradient whose entries lie in memory as those of its parameter do."""
    placed = getattr(grad, "placements", None) == getattr(param, "placements", None)
    if placed and local(grad).stride() == local(param).stride():
        return grad
    return torch.empty_like(param, dtype=grad.dtype).copy_(grad)


def needs_others(batch: Batch) -> bool:
    """Whether a total of the batch depends on other batches or on other processes."""
    return any(f.over == "all" for f in batch.whole) or any(map(is_sharded, batch.params))


def groups_over_all(ready: list[tuple[Batch, int]]) -> dict[Transform, list[tuple[Batch, int]]]:
    """Return, for each transform over all tensors, where its total is needed."""
    found: dict[Transform, list[tuple[Batch, int]]] = {}
    for batch, q in ready:
        if batch.whole[q].over == "all":
            found.setdefault(batch.whole[q], []).append((batch, q))
    return found


def plan_for(
    optimizer: GradientMethod, params: list[Tensor], grads: list[Tensor | None]
) -> Plan | None:
    """Return the plan of a step, the last one if it still fits; None if no kernel has a part."""
    plan = optimizer.__dict__.pop("_plan", None)
    if plan is None or not plan.fits(params, grads):
        plan = Plan(optimizer, params, grads)
    optimizer.__dict__["_plan"] = plan
    return plan if plan.batches else None
