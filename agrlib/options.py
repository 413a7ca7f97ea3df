# Exported from book/options.md: edit the chapter, not this file.
"""The options that every method takes, written once, and what shows them whole at each class.

Derived in the chapter "Options, written once".
"""

import contextlib
import difflib
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from inspect import Parameter, Signature
from types import FunctionType
from typing import Any, ParamSpec, get_args

import torch
from torch import Tensor
from typing_extensions import TypedDict, is_typeddict

P = ParamSpec("P")
ARGS = re.compile(r"^Args:\n((?:[ \t].*\n|\n)+)", re.M)  # in a docstring without common indent


def signature_of(function: Any) -> Signature | None:
    """Return the signature of a function, or None where Python cannot tell it."""
    for evaluate in (True, False):  # names that only a type checker imports have no value
        with contextlib.suppress(Exception):
            return inspect.signature(function, eval_str=evaluate)
    return None


def names_behind(parameter: Parameter) -> list[str]:
    """Return the names that ``**options: Unpack[Type]`` stands for; without a type, none."""
    types = get_args(parameter.annotation)
    if parameter.kind is Parameter.VAR_KEYWORD and len(types) == 1 and is_typeddict(types[0]):
        return list(types[0].__annotations__)
    return []


def expand(signature: Signature, parents: Sequence[Signature]) -> Signature:
    """Put the names behind ``**options`` in its place, with the defaults that the parents have."""
    parameters = list(signature.parameters.values())
    behind = names_behind(parameters[-1]) if parameters else []
    names = [name for name in behind if name not in signature.parameters]
    if not names:
        return signature
    *own, rest = parameters
    known = {n: p for parent in reversed(parents) for n, p in parent.parameters.items()}
    more = [known[n].replace(kind=Parameter.KEYWORD_ONLY) for n in names if n in known]
    missing = [rest] if len(more) < len(names) else []
    return signature.replace(parameters=[*own, *more, *missing])


def arguments(doc: str | None) -> dict[str, str]:
    """Return the entries in the Args of a docstring by their names."""
    found = ARGS.search(inspect.cleandoc(doc or "") + "\n")
    if found is None:
        return {}
    entries = re.split(r"\n(?=\S)", textwrap.dedent(found[1]).strip())
    return {re.sub(r"\W.*", "", e.lstrip("*"), flags=re.S): e.rstrip() for e in entries}


def complete_args(doc: str, names: Iterable[str], inherited: dict[str, str]) -> str:
    """Add to the Args of a docstring the names that it lacks, in the order of the names."""
    own = arguments(doc)
    entries = {name: own.get(name, inherited.get(name)) for name in (*names, *own)}
    block = textwrap.indent("\n".join(filter(None, entries.values())), "    ")
    text = inspect.cleandoc(doc) + "\n"
    return ARGS.sub(lambda _: f"Args:\n{block}\n\n", text, count=1).strip()


def complete(cls: type) -> None:
    """Show in the signature and the docstring of a class what it shares with its parents."""
    parents = [s for base in cls.__mro__[1:] if (s := signature_of(vars(base).get("__init__")))]
    init = vars(cls).get("__init__")
    if isinstance(init, FunctionType) and (own := signature_of(init)):
        whole = expand(own, parents)
        if whole is not own:
            init.__signature__ = whole  # type: ignore[attr-defined]
    taken = signature_of(cls.__init__)  # type: ignore[misc]
    if vars(cls).get("__doc__") and taken:
        inherited = {n: e for c in cls.__mro__[:0:-1] for n, e in arguments(c.__doc__).items()}
        cls.__doc__ = complete_args(cls.__doc__ or "", taken.parameters, inherited)


def keywords(cls: type) -> list[str]:
    """Return the names that a class takes, those included that it only passes on."""
    names: list[str] = []
    for base in cls.__mro__:
        if signature := signature_of(vars(base).get("__init__")):
            _, *parameters = signature.parameters.values()
            names += [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
    return list(dict.fromkeys(names))


def unexpected(cls: type, name: str) -> TypeError:
    """Return the error that says which name may have been meant."""
    known = keywords(cls)
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}"
    return TypeError(f"{cls.__name__}() got an unexpected keyword argument {name!r}: {hint}")


def refuse_unknown(init: Callable[P, None]) -> Callable[P, None]:
    """Let a constructor name the class that was called, and the name that may have been meant."""
    known = inspect.signature(init).parameters

    @functools.wraps(init)
    def checked(*args: P.args, **options: P.kwargs) -> None:
        for name in options:
            if name not in known:
                raise unexpected(type(args[0]), name)
        init(*args, **options)

    return checked


class Options(TypedDict, total=False):
    """The keywords that every method takes; `GradientMethod` says what they mean."""

    transforms: Iterable[Callable[[Tensor], Tensor]]
    maximize: bool
    foreach: bool | None
    fused: bool | None
    capturable: bool
    differentiable: bool
    state_dtype: torch.dtype | None
    stochastic_rounding: bool
