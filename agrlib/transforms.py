# Exported from book/transforms.md: edit the chapter, not this file.
"""Gradient transforms that declare what they sum, and chains of them.

Derived in the chapter "Gradient transforms".
"""

import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from agrlib.checks import Group, dense, described
from agrlib.distributed import gathered
from agrlib.precision import add_up, parts_of, widen


def sum_of(transform: "Transform", value: Tensor) -> Tensor:
    """Add up the summand over one tensor, or over each of its rows."""
    assert transform.summand is not None
    if transform.over == "row":
        return add_up(transform.summand(value), rows=True)
    parts = parts_of(transform.summand, value)
    sums = [add_up(transform.summand(part)) for (part,) in parts]
    return torch.stack(sums).sum() if len(sums) > 1 else sums[0]


def keep_real(transform: "Transform", made: Tensor, grad: Tensor) -> Tensor:
    """Return what was made of a gradient, where storing it loses no imaginary part."""
    if made.is_complex() and not grad.is_complex():
        raise TypeError(
            f"{transform} makes complex numbers of a real gradient: let its sum be real, and put "
            "two transforms into the chain where it takes two sums"
        )
    return made


def totals_of(transform: "Transform", values: Sequence[Tensor]) -> list[Tensor]:
    """Return the finished totals that belong to the tensors, in their order."""
    sums = [sum_of(transform, value) for value in values]
    counts = [value.numel() for value in values]
    if transform.over == "row":
        counts = [n // max(len(value), 1) for n, value in zip(counts, values, strict=True)]
    if transform.over == "all" and sums:
        counts = [sum(counts)] * len(counts)
        whole = torch.stack([gathered(part).to(sums[0].device) for part in sums]).sum()
        sums = [whole.to(part.device) for part in sums]
    sums = [
        keep_real(transform, total, value).to(
            value.dtype if total.is_complex() else value.real.dtype
        )
        for total, value in zip(sums, values, strict=True)
    ]
    if transform.finish is None:
        return sums
    pairs = zip(sums, counts, strict=True)
    return [transform.finish(total, n, *transform.constants) for total, n in pairs]


def apply_to_complex(transform: "Transform", value: Tensor, *extra: Any) -> Tensor:
    """Apply to a complex tensor, or say that the transform has no meaning there."""
    try:
        return transform.apply(value, *extra)
    except RuntimeError as error:  # torch: "not implemented for 'ComplexFloat'"
        raise TypeError(
            f"{transform} compares numbers, which complex ones do not allow: "
            "put complex parameters into a group with other transforms"
        ) from error


def apply_to(transform: "Transform", value: Tensor, *extra: Any) -> Tensor:
    """Apply to one tensor; a total of each row belongs to the whole of it."""
    if value.is_complex():
        return apply_to_complex(transform, value, *extra)
    parts = parts_of(transform.apply, value) if transform.over != "row" else []
    if len(parts) < 2:
        return transform.apply(value, *extra)
    result = torch.empty_like(value)
    for (part,), target in zip(parts, result.view(-1).split(parts[0][0].numel()), strict=True):
        target.copy_(transform.apply(part, *extra))
    return result


def map_grads(transform: "Transform", grads: Sequence[Tensor]) -> list[Tensor]:
    """Transform several gradients; what is summed over all tensors is summed over these."""
    values = [widen(dense(grad)) for grad in grads]
    covered = [value for value in values if transform.covers(value)]
    extra = iter(totals_of(transform, covered) if transform.over else ())
    results = list(grads)
    for i, (value, grad) in enumerate(zip(values, grads, strict=True)):
        if transform.covers(grad):
            given = transform.constants if transform.over is None else (next(extra),)
            result = apply_to(transform, value, *given)
            results[i] = keep_real(transform, result, value).to(grad.dtype)
    return results


def found_at(module: str, path: str) -> Any:
    """Return what a dotted name stands for in a module that is loaded, or None."""
    place: Any = sys.modules.get(module)
    for name in path.split("."):
        place = getattr(place, name, None)
    return place


def meaning(function: Any) -> Any:
    """Return what is equal for a function and for a copy of it from another process."""
    plain = isinstance(function, types.FunctionType)
    if plain and not (function.__closure__ or function.__defaults__ or function.__kwdefaults__):
        return function.__module__, function.__code__
    return function


def by_name(transform: "Transform", protocol: Any) -> str | None:
    """Return the name by which a transform is pickled, or None: then its parts are named."""
    name = getattr(transform, "__qualname__", "")
    known = found_at(transform.__module__, name) is transform
    if known and (transform.__module__ != "__main__" or protocol < 4):  # such a name says no part
        return name
    for role in ("apply", "summand", "finish") if known else ():
        part = getattr(transform, role)
        function = isinstance(part, types.FunctionType)
        if function and found_at(part.__module__, part.__qualname__) is not part:
            part.__qualname__ = f"{name}.{role}"
    return None


FIELDS = ("apply", "over", "summand", "finish", "constants", "smallest")


class Transform:
    """A gradient transform that declares what it sums, so that it can be compiled.

    With the total of ``summand(grad)`` over a row, a tensor or all tensors, and the count of
    elements behind that total, the transform is::

        grad -> apply(grad, finish(total, count, *constants))

    and without a sum ``grad -> apply(grad, *constants)``. The three functions hold plain arithmetic
    (sums, products, quotients, sqrt, abs, maximum, where) and no number literals. A total covers
    the tensors that the optimizer holds: whole ones under DDP and FSDP2, but only what one process
    has under FSDP1, DeepSpeed's ZeRO and in a pipeline.

    Args:
        apply: ``(grad, total) -> grad``, elementwise; without a sum ``(grad, *constants) -> grad``.
        over: what one total covers: ``"row"`` (all axes but the first), ``"tensor"``, ``"all"``
            (every tensor of the optimizer whose chain holds the transform), or None.
        summand: ``(grad) -> value``, elementwise, real for a real gradient.
        finish: ``(total, count, *constants) -> total``; left out, the plain total is used.
        constants: numbers that the functions take as arguments.
        smallest: a tensor with fewer elements is returned as it is.
        name: what checkpoints and `repr` call it; the name of `apply` unless given.

    Raises:
        ValueError: `over` is none of the above, or is given without `summand`.

    Example:
        >>> def shrink(grad, factor):
        ...     return factor * grad
        >>> halve = Transform(shrink, constants=(0.5,), name="halve")
        >>> halve(torch.tensor([2.0, -4.0]))
        tensor([ 1., -2.])

    Source: chapter "Gradient transforms".
    """

    def __init__(
        self,
        apply: Callable[..., Any],
        *,
        over: str | None = None,
        summand: Callable[..., Any] | None = None,
        finish: Callable[..., Any] | None = None,
        constants: tuple[float, ...] = (),
        smallest: int = 1,
        name: str | None = None,
    ) -> None:
        if over not in (None, "row", "tensor", "all"):
            raise ValueError(f"over must be None, 'row', 'tensor' or 'all', not {over!r}")
        if (over is None) != (summand is None):
            raise ValueError("give `over` and `summand` together, or neither")
        own = getattr(apply, "__name__", type(apply).__name__)  # functools.partial has no name
        functools.update_wrapper(self, apply)  # help(), doctest and pickle see a function
        self.__signature__ = inspect.signature(self.__call__)
        self.__name__ = name or own
        self.apply, self.over, self.summand, self.finish = apply, over, summand, finish
        self.constants, self.smallest = tuple(constants), smallest

    def __call__(self, grad: Tensor) -> Tensor:
        return self.map([grad])[0]

    def map(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """Transform several gradients; what is summed over all tensors is summed over these."""
        return map_grads(self, grads)

    def covers(self, grad: Tensor) -> bool:
        """Whether a tensor of this shape is transformed at all."""
        return grad.numel() >= self.smallest and (self.over != "row" or grad.dim() > 1)

    def __repr__(self) -> str:
        return self.__name__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Transform) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[Any, ...]:
        return (self.__name__, *(meaning(getattr(self, field)) for field in FIELDS))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return by_name(self, protocol) or super().__reduce_ex__(protocol)


def transform(**declaration: Any) -> Callable[[Callable[..., Any]], Transform]:
    """Make a `Transform` of the function below it; takes the keywords of `Transform`."""
    return functools.partial(Transform, **declaration)


class Chain(tuple[Callable[[Tensor], Tensor], ...]):
    """The transforms of one parameter group, applied left to right; prints as their names."""

    __slots__ = ()

    @classmethod
    def of(cls, transforms: Iterable[Callable[[Tensor], Tensor]]) -> "Chain":
        """Check the transforms that a user gave."""
        wrong = callable(transforms) or isinstance(transforms, str | set | dict)
        if wrong or not isinstance(transforms, Iterable):
            what = described(transforms)
            raise TypeError(f"transforms takes a list of functions, like [agr], not {what}")
        chain = cls(transforms)
        for function in chain:
            if not callable(function):
                raise TypeError(f"a transform must be callable, not {type(function).__name__}")
        return chain

    def __repr__(self) -> str:
        return ", ".join(getattr(f, "__name__", type(f).__name__) for f in self)

    def __getnewargs__(self) -> tuple[Any, ...]:
        return (tuple(self),)


def call_function(function: Callable[[Tensor], Tensor], grad: Tensor) -> Tensor:
    """Apply one transform to one gradient; a user's function gets a copy that it may overwrite."""
    if isinstance(function, Transform):
        return function(grad)
    result = function(grad.clone())
    name = getattr(function, "__name__", type(function).__name__)
    if not isinstance(result, Tensor):
        raise TypeError(f"transform {name} must return a tensor, not {type(result).__name__}")
    if result.is_complex() and not grad.is_complex():
        raise TypeError(f"transform {name} turned a real gradient into a complex one")
    if result.shape != grad.shape:
        raise ValueError(
            f"transform {name} turned a gradient of shape {tuple(grad.shape)} "
            f"into one of shape {tuple(result.shape)}: keep the shape"
        )
    return result.to(grad.dtype)


def head_of(rest: Sequence[list[Any]]) -> Transform | None:
    """Return the transform over all tensors that every chain which holds it has come to."""
    heads = {f: None for chain in rest for f in chain[:1] if isinstance(f, Transform)}
    ready = [f for f in heads if all(f not in chain[1:] for chain in rest if chain[:1] != [f])]
    if heads and not ready:
        raise ValueError("transforms over all tensors stand in a different order in two groups")
    return ready[0] if ready else None


def run_chains(chains: Sequence[Chain], grads: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """Send the gradients of each group through that group's chain.

    A transform that sums over all tensors waits until every chain that holds it has come to it.
    """
    values = [
        [widen(grad) for grad in group] if chain else list(group)
        for group, chain in zip(grads, chains, strict=True)
    ]
    rest = [list(chain) for chain in chains]
    while any(rest):
        for group, chain in zip(values, rest, strict=True):
            while chain and getattr(chain[0], "over", None) != "all":
                function = chain.pop(0)
                for i, grad in enumerate(group):  # one by one, so that each old one is freed
                    group[i] = call_function(function, grad)
        if (head := head_of(rest)) is not None:
            members = [i for i, chain in enumerate(rest) if chain[:1] == [head]]
            flat = iter(head.map([grad for i in members for grad in values[i]]))
            for i in members:
                rest[i].pop(0)
                values[i] = [next(flat) for _ in values[i]]
    return values


Part = tuple[Group, Chain, list[int]]  # a group, a chain, and the parameters that go through it


def parts_of_groups(groups: Sequence[Group], grads: Sequence[Tensor | None]) -> list[Part]:
    """Return each group with its chain and the numbers of its parameters with a gradient."""
    parts, first = [], 0
    for group in groups:
        stop = first + len(group["params"])
        ready = [i for i in range(first, stop) if grads[i] is not None]
        parts.append((group, group["transforms"], ready))
        first = stop
    return parts


def over_all(chain: Iterable[Any]) -> set[Transform]:
    """Return the transforms of a chain that sum over all tensors."""
    return {f for f in chain if isinstance(f, Transform) and f.over == "all"}


def check_reach(chain: Chain, by_zero: bool) -> None:
    """Refuse totals over all tensors where other processes hold some of them."""
    reaching = [f for f in chain if getattr(f, "over", None) == "all"]
    if by_zero and reaching:
        raise RuntimeError(
            f"{reaching[0]} sums over all tensors, of which ZeroRedundancyOptimizer gives each "
            "process some: leave transforms out and call agrlib.attach(optimizer, transforms) "
            "on the ZeroRedundancyOptimizer"
        )
