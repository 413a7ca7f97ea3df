# Exported from book/arithmetic.md: edit the chapter, not this file.
"""A rule is data: plain arithmetic, read from the source of a function.

Derived in the chapter "A rule is data".
"""

import __future__

import ast
import builtins
import copy
import functools
import inspect
import itertools
import linecache
import types
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary


class Unsupported(RuntimeError):
    """Why a kernel cannot be made; the text completes a sentence that begins with "because"."""


class Changed(Unsupported):
    """The source at hand is not that of the function in memory."""


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

    Source: chapter "A rule is data".
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


@remembered
def exponents(rule: Callable[..., Any]) -> tuple[str, ...]:
    """Return to what a rule, or a function of a transform, raises something."""
    calls = [node for node in ast.walk(read(rule)) if isinstance(node, ast.Call)]
    return tuple(ast.unparse(c.args[1]) for c in calls if getattr(c.func, "id", "") == "power")


def is_arithmetic(function: Callable[..., Any]) -> bool:
    """Whether a function is one of numbers, so that it may be applied to parts of tensors."""
    try:
        read(function)
    except Unsupported:
        return False
    return True


class Division(ast.NodeTransformer):
    """``a / b`` becomes ``divide(a, b)``: Triton's own division of float32 is approximate."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.op, ast.Div):
            return node
        return ast.Call(ast.Name("divide", ast.Load()), [node.left, node.right], [])


def text_of(function: Callable[..., Any], name: str, decorator: str, exact_division: bool) -> str:
    """Return a rule's text under another name, for one of the compilers."""
    node = copy.deepcopy(read(function))
    node.name = name
    if exact_division:
        node = Division().visit(node)
    return f"{decorator}\n{ast.unparse(ast.fix_missing_locations(node))}"
