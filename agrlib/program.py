# Exported from book/program.md: edit the chapter, not this file.
"""What a step computes, as data: a rule, the stages of a chain, types, and how powers are taken.

Derived in the chapter "A step as data".
"""

import ast
import itertools
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from agrlib.arithmetic import Unsupported, exponents, read, text_of
from agrlib.checks import Group, Method, with_numbers
from agrlib.compilers import refuse
from agrlib.transforms import Chain, Transform


def decay_gradient(grad, param, weight_decay):
    return grad + weight_decay * param  # (opt-coupled): "coupled" decay, L2 regularization


def decay_parameter(param, rate):
    return param - rate * param  # (opt-decoupled): "decoupled" decay


DECAYS: dict[str, Callable[..., Any]] = {"gradient": decay_gradient, "parameter": decay_parameter}


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


def stage_of(transform: Transform) -> Stage:
    """Return what a kernel needs to know of a transform, or raise Unsupported."""
    for function in (transform.summand, transform.finish, transform.apply):
        if function is not None:
            read(function)
    count = len(transform.constants)
    return Stage(transform.over, transform.summand, transform.finish, transform.apply, count)


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


def update_lines(program: Program) -> list[str]:
    """Return the lines that turn entry x of the gradient and entry p of the parameter into new."""
    lines = []
    if program.decay == "gradient":
        lines.append("x = where(decays, decay(x, p, rate), x)")
    if program.decay == "parameter":
        lines.append("p = where(decays, decay(p, rate), p)")
    return lines


def indent(lines: Iterable[str], depth: int) -> str:
    return textwrap.indent("\n".join(lines), "    " * depth)


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


class Recipe(NamedTuple):
    """What a group asks of a kernel, apart from types: the rule and the end of the chain."""

    eager: Chain  # up to the last transform that has no kernel
    compiled: tuple[Transform, ...]
    rule: Callable[..., Any]
    state: tuple[str, ...]
    power: str


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


def recipe_of(method: Method, group: Group) -> Recipe:
    """Return what a kernel for the group computes, or raise Unsupported."""
    rule, keys = method.update_rule(group)
    read(rule)
    if method.weight_decay_acts_on in DECAYS:
        read(DECAYS[method.weight_decay_acts_on])
    power = power_of(rule, keys, method.scalars(with_numbers(group), 1.0, 1))
    chain = group["transforms"]
    reasons = [refusal(function) for function in chain]
    for reason in filter(None, reasons):
        refuse(group, reason, reason, "it runs on tensors, and so do all before it")
    cut = max((i + 1 for i, reason in enumerate(reasons) if reason), default=0)
    parts = [f for t in chain[cut:] for f in (t.summand, t.finish, t.apply) if f is not None]
    if any(map(exponents, parts)):
        power = "general"
    return Recipe(Chain(chain[:cut]), tuple(chain[cut:]), rule, keys, power)
