# Exported from book/optimizer.md: edit the chapter, not this file.
"""The anatomy of an optimizer: one `step`, into which update rules and gradient transforms plug.

Derived in the chapter "The anatomy of an optimizer"; the interface is that of torch.optim.
"""

import contextlib
import functools
import inspect
import math
import sys
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from agrlib.options import complete, refuse_unknown

Group = dict[str, Any]
NUMBERS = (
    *("lr", "weight_decay", "eps", "momentum", "dampening", "alpha", "partial"),
    *("lr_decay", "initial_accumulator_value"),
)
WORTH_COMPILING = 2**16  # parameters; below, making a kernel takes longer than it saves
PART = 2**18  # entries; parts of this size, and what is computed from them, stay in a cache


def widen(tensor: Tensor) -> Tensor:
    """Return half-precision numbers as float32 and everything else as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def add_up(terms: Tensor, rows: bool = False) -> Tensor:
    """Sum over a tensor, or over each of its rows, in double precision where the device has it."""
    wide = torch.complex128 if terms.is_complex() else torch.float64
    dtype = terms.dtype if terms.device.type == "mps" else wide
    if rows:
        return terms.sum(dim=tuple(range(1, terms.dim())), keepdim=True, dtype=dtype)
    return terms.sum(dtype=dtype)


def is_arithmetic(function: Callable[..., Any]) -> bool:
    """Whether a function is one of numbers, so that it may be applied to parts of tensors."""
    from agrlib.kernels import Unsupported, read

    try:
        read(function)
    except Unsupported:
        return False
    return True


def parts_of(function: Callable[..., Any], *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Cut large tensors of the CPU, if a function of numbers is applied to them.

    The result of an operation on a large tensor needs new memory from the system; those on parts
    use the same memory, and the cache, again and again.
    """
    size = tensors[0].numel()
    recorded = torch.is_grad_enabled() or torch.compiler.is_compiling()
    if size <= PART or recorded or not is_arithmetic(function):
        return [tensors]
    for tensor in tensors:
        plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"
        if not plain or not tensor.is_contiguous() or tensor.shape != tensors[0].shape:
            return [tensors]
    return list(zip(*(t.view(-1).split(PART) for t in tensors), strict=True))


def gathered(total: Tensor) -> Tensor:
    """Return the sum of a tensor that lies on several processes as a plain tensor."""
    return total.full_tensor() if hasattr(total, "full_tensor") else total


def dense(grad: Tensor) -> Tensor:
    """Return the gradient, refusing a sparse one."""
    if grad.layout != torch.strided:
        raise RuntimeError(
            "agrlib does not support sparse gradients: build the embedding with sparse=False"
        )
    return grad


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
        summand: ``(grad) -> value``, elementwise.
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

    Source: chapter "The anatomy of an optimizer".
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
        values = [widen(dense(grad)) for grad in grads]
        covered = [value for value in values if self.covers(value)]
        extra = iter(self.totals(covered) if self.over else ())
        return [
            (
                self.apply_to(value, *(self.constants if self.over is None else (next(extra),)))
                if self.covers(grad)
                else grad
            ).to(grad.dtype)
            for value, grad in zip(values, grads, strict=True)
        ]

    def apply_to(self, value: Tensor, *extra: Any) -> Tensor:
        """Apply to one tensor; a total of each row belongs to the whole of it."""
        if value.is_complex():
            return self.apply_to_complex(value, *extra)
        parts = parts_of(self.apply, value) if self.over != "row" else []
        if len(parts) < 2:
            return self.apply(value, *extra)
        result = torch.empty_like(value)
        for (part,), target in zip(parts, result.view(-1).split(PART), strict=True):
            target.copy_(self.apply(part, *extra))
        return result

    def apply_to_complex(self, value: Tensor, *extra: Any) -> Tensor:
        """Apply to a complex tensor, or say that the transform has no meaning there."""
        try:
            return self.apply(value, *extra)
        except RuntimeError as error:  # torch: "not implemented for 'ComplexFloat'"
            raise TypeError(
                f"{self} compares numbers, which complex ones do not allow: "
                "put complex parameters into a group with other transforms"
            ) from error

    def covers(self, grad: Tensor) -> bool:
        """Whether a tensor of this shape is transformed at all."""
        return grad.numel() >= self.smallest and (self.over != "row" or grad.dim() > 1)

    def totals(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Return the finished totals that belong to the tensors, in their order."""
        assert self.summand is not None
        sums = [self.sum_of(value) for value in values]
        counts = [value.numel() for value in values]
        if self.over == "row":
            counts = [n // max(len(value), 1) for n, value in zip(counts, values, strict=True)]
        if self.over == "all" and sums:
            counts = [sum(counts)] * len(counts)
            whole = torch.stack([gathered(part).to(sums[0].device) for part in sums]).sum()
            sums = [whole.to(part.device) for part in sums]
        sums = [
            total.to(value.dtype if total.is_complex() else value.real.dtype)
            for total, value in zip(sums, values, strict=True)
        ]
        if self.finish is None:
            return sums
        return [self.finish(t, n, *self.constants) for t, n in zip(sums, counts, strict=True)]

    def sum_of(self, value: Tensor) -> Tensor:
        """Add up the summand over one tensor, or over each of its rows."""
        assert self.summand is not None
        if self.over == "row":
            return add_up(self.summand(value), rows=True)
        parts = parts_of(self.summand, value)
        sums = [add_up(self.summand(part)) for (part,) in parts]
        return torch.stack(sums).sum() if len(sums) > 1 else sums[0]

    def __repr__(self) -> str:
        return self.__name__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Transform) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[Any, ...]:
        functions = map(meaning, (self.apply, self.summand, self.finish))
        return (self.__name__, self.over, *functions, self.constants, self.smallest)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by name where it can be imported, else by its parts, whose names lead to it."""
        name = getattr(self, "__qualname__", "")
        known = found_at(self.__module__, name) is self
        if known and (self.__module__ != "__main__" or protocol < 4):  # such a name says no part
            return name
        for role in ("apply", "summand", "finish") if known else ():
            part = getattr(self, role)
            function = isinstance(part, types.FunctionType)
            if function and found_at(part.__module__, part.__qualname__) is not part:
                part.__qualname__ = f"{name}.{role}"
        return super().__reduce_ex__(protocol)


def transform(**declaration: Any) -> Callable[[Callable[..., Any]], Transform]:
    """Make a `Transform` of the function below it; takes the keywords of `Transform`."""
    return functools.partial(Transform, **declaration)


def described(value: Any) -> str:
    """Show a value with its type: some print like what would have been right."""
    return f"{value!r} of type {type(value).__name__}"


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
        heads = {f: None for chain in rest for f in chain[:1] if isinstance(f, Transform)}
        ready = [f for f in heads if all(f not in chain[1:] for chain in rest if chain[:1] != [f])]
        if heads and not ready:
            raise ValueError("transforms over all tensors stand in a different order in two groups")
        if ready:
            members = [i for i, chain in enumerate(rest) if chain[:1] == [ready[0]]]
            flat = iter(ready[0].map([grad for i in members for grad in values[i]]))
            for i in members:
                rest[i].pop(0)
                values[i] = [next(flat) for _ in values[i]]
    return values


def require(valid: bool, what: str, value: Any) -> None:
    """Raise torch.optim's ValueError for a hyperparameter that is out of range."""
    if not valid:
        raise ValueError(f"Invalid {what}: {value}")


def check_types(group: Group) -> None:
    """Refuse options of a kind that would fail in the middle of a step."""
    betas = group.get("betas", ())
    if not isinstance(betas, tuple | list):
        raise TypeError(f"betas must be a tuple of numbers, not {described(betas)}")
    numbers = [(name, group[name]) for name in NUMBERS if name in group]
    numbers += [(f"betas[{i}]", beta) for i, beta in enumerate(betas)]
    for name, value in numbers:
        if type(value) is not float and not isinstance(value, Real | Tensor):
            raise TypeError(f"{name} must be a number, not {described(value)}")
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element")
    dtype = group["state_dtype"]
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        what = described(dtype)
        raise ValueError(f"Invalid state_dtype: {what}; use None or a floating-point torch.dtype")


def as_number(value: Tensor) -> Any:
    """Return a one-element tensor as a number, or without axes where it must stay a tensor."""
    plain = type(value) in (Tensor, torch.nn.Parameter) and value.device.type == "cpu"
    if plain and not torch.is_grad_enabled():
        with contextlib.suppress(RuntimeError):  # under a mode that only follows shapes
            return value.item()
    return value.double().reshape(())


def with_numbers(group: Group, number: Callable[[Tensor], Any] = as_number) -> Group:
    """Return a group whose options are numbers where they were tensors of one element."""
    found = {name: number(value) for name, value in group.items() if isinstance(value, Tensor)}
    betas = group.get("betas", ())
    if any(isinstance(beta, Tensor) for beta in betas):
        found["betas"] = tuple(number(b) if isinstance(b, Tensor) else b for b in betas)
    return {**group, **found} if found else group


def check_options(group: Group) -> None:
    """Refuse what no method can work with; NaN fails every comparison below."""
    check_types(group)
    require(0.0 <= group["lr"] < math.inf, "learning rate", group["lr"])
    require(0.0 <= group["weight_decay"] < math.inf, "weight_decay value", group["weight_decay"])
    if "eps" in group:
        require(0.0 <= group["eps"] < math.inf, "epsilon value", group["eps"])
    for i, beta in enumerate(group.get("betas", ())):
        require(0.0 <= beta < 1.0, f"beta parameter at index {i}", beta)
    check_way(group)


def check_way(group: Group) -> None:
    """Refuse ways to run a step that do not exist."""
    if group["foreach"]:
        raise RuntimeError("foreach=True is not supported: leave it out")
    if group["fused"] and group["differentiable"]:
        raise RuntimeError("fused=True and differentiable=True exclude each other: leave out fused")


def as_real(tensor: Tensor) -> Tensor:
    """View complex numbers as pairs of reals and a single number as a vector.

    A rule sees real vectors only: between a single number and a double-precision scalar, torch
    would compute in double precision.
    """
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj())
    return tensor.reshape(1) if tensor.dim() == 0 else tensor


def like(value: Tensor, target: Tensor) -> Tensor:
    """Undo `as_real` and `widen`: give the value the shape and the type of the target."""
    if target.is_complex():
        value = torch.view_as_complex(value.contiguous())
    return value.reshape(target.shape).to(target.dtype)


def mix(bits: Any) -> Any:
    """Scramble 32-bit integers, held in wider ones: equal inputs only give equal outputs."""
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return bits ^ (bits >> 16)


def hash_words(*words: Any) -> Any:
    """Hash 32-bit words, numbers or integer tensors, to 64 bits; each word changes all of them."""
    low = high = 0
    for word in words:
        low = mix(low ^ (word & 0xFFFFFFFF))
        high = mix((high + low) & 0xFFFFFFFF)
    return high << 32 | low


def noise_seed(seed: int, step: Any, index: Any) -> Any:
    """Return what the noise of one parameter at one step starts from."""
    return hash_words(seed, seed >> 32, step, index, index >> 32)


seeded: Counter[int] = Counter()  # for each seed of torch, how many groups have taken theirs


def seed_rounding(group: Group) -> None:
    """Give a group that rounds stochastically a seed of its own, unless it has one."""
    if group["stochastic_rounding"] and "rounding_seed" not in group:
        seed = torch.initial_seed()
        seeded[seed] += 1
        group["rounding_seed"] = hash_words(seed, seed >> 32, seeded[seed])


def part_number(tensor: Tensor) -> int:
    """Return a number of the part that this process holds, in the bits above those of indices."""
    if not hasattr(tensor, "to_local"):
        return 0
    from agrlib.distributed import shard_number

    return shard_number(tensor) << 32


def round_stochastically(value: Tensor, seed: Any, first: int = 0) -> Tensor:
    """Round float32 to bfloat16, up or down with the probabilities that keep the mean.

    Entry `first` of a larger tensor is entry 0 of this one.
    """
    if hasattr(value, "to_local"):  # lies on several processes, each of which rounds its part
        from agrlib.distributed import map_part

        return map_part(functools.partial(round_stochastically, seed=seed), value)
    place = torch.arange(first, first + value.numel(), device=value.device).reshape(value.shape)
    noise = (mix((place * (seed >> 32 | 1) + seed) & 0xFFFFFFFF) & 0xFFFF).to(torch.int32)
    rounded = ((value.contiguous().view(torch.int32) + noise) & -(2**16)).view(torch.float32)
    return torch.where(value.isfinite(), rounded, value).to(torch.bfloat16)


def decay_gradient(grad, param, weight_decay):
    return grad + weight_decay * param  # (opt-coupled): "coupled" decay, L2 regularization


def decay_parameter(param, rate):
    return param - rate * param  # (opt-decoupled): "decoupled" decay


def state_dtype(group: Group, param: Tensor) -> torch.dtype:
    """The type in which a parameter's state is kept."""
    dtype = group["state_dtype"] or param.dtype
    return dtype.to_complex() if param.is_complex() and not dtype.is_complex else dtype


def name_transforms(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Write the names of the transforms where torch has packed the functions."""
    for group in state_dict["param_groups"]:
        group["transforms"] = str(Chain.of(group["transforms"]))
        acts_on = getattr(optimizer, "weight_decay_acts_on", None)
        if "betas" in group and acts_on in ("gradient", "parameter"):  # torch's mark for Adam
            group["decoupled_weight_decay"] = acts_on == "parameter"


def refuse_other_decay(acts_on: str, saved: Group) -> None:
    """Raise where a checkpoint was made with the other kind of weight decay."""
    decoupled = saved.get("decoupled_weight_decay")  # None in checkpoints that have no such mark
    if saved.get("weight_decay") and (acts_on, decoupled) == ("gradient", True):
        raise ValueError("the checkpoint was made with decoupled weight decay: load it into AdamW")
    if saved.get("weight_decay") and (acts_on, decoupled) == ("parameter", False):
        raise ValueError("the checkpoint was made with coupled weight decay: load it into Adam")


def refuse_mismatch(i: int, group: Group, saved: Group, state: dict[int, Any]) -> None:
    """Raise where a saved group was made by another method, with other transforms or tensors."""
    numbers = [key for key, value in group.items() if isinstance(value, float | tuple)]
    missing = [key for key in numbers if key not in saved and key != "transforms"]
    if missing:
        raise ValueError(f"the checkpoint is of another method: it has no {', '.join(missing)}")
    chain = str(Chain.of(group["transforms"]))
    record = saved.get("transforms", chain)  # torch.optim keeps none
    if chain != record:
        raise ValueError(
            f"the checkpoint was made with transforms [{record}], this optimizer has [{chain}] in "
            f"group {i}. To load it on purpose, first set "
            f"state_dict['param_groups'][{i}]['transforms'] = {chain!r}"
        )
    for param, index in zip(group["params"], saved["params"], strict=False):
        for key, value in state.get(index, {}).items():
            if isinstance(value, Tensor) and key != "step" and value.shape != param.shape:
                raise ValueError(
                    f"the checkpoint's {key} has shape {tuple(value.shape)}, its parameter "
                    f"{tuple(param.shape)}: load it into the model it was saved with"
                )


def warn_of_no_record(groups: list[Group], loaded: list[Group]) -> None:
    """Warn, once, that the run which made a checkpoint may not have had these transforms."""
    chains = [
        str(Chain.of(group["transforms"]))
        for group, saved in zip(groups, loaded, strict=True)
        if group["transforms"] and "transforms" not in saved
    ]
    if chains:
        warnings.warn(
            "the checkpoint has no record of transforms, as torch.optim saves it: "
            f"this optimizer goes on from it with [{chains[0]}]",
            stacklevel=3,
        )


def outside_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that torch.compile calls as it is."""
    outside = torch.compiler.disable(function)
    vars(outside).pop("_torchdynamo_orig_callable", None)  # old torch looks there past wrappers
    outside.outside_graphs = True
    return outside


def keep_step_outside_graphs(cls: type[Optimizer]) -> None:
    """Let torch.compile call the step of a class, with torch's hooks around it, as it is."""
    if not hasattr(cls.step, "outside_graphs"):
        cls.step = outside_graphs(cls.step)  # type: ignore[method-assign]


class RecordedOptimizer(Optimizer):
    """A torch optimizer whose checkpoints record the gradient transforms of each group."""

    weight_decay_acts_on: str
    HOW_TO_RUN = ("foreach", "fused", "capturable", "differentiable")  # never from a checkpoint

    def check(self, group: Group) -> None:
        """Raise for options that the method cannot work with."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch does, with each group's transforms as one string."""
        handle = self.register_state_dict_post_hook(name_transforms, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class, or of its namesake in torch.optim.

        AMSGrad takes those of torch's Adam with ``amsgrad=True``. A checkpoint of torch.optim has
        no record of transforms: an optimizer that has transforms loads it with one warning.

        Args:
            state_dict: what `state_dict()` returned; the optimizer copies its tensors.

        Raises:
            ValueError: groups, shapes, options or transforms do not fit this optimizer. Nothing has
                been loaded then.
        """
        loaded: dict[str, Any] = {}

        def check(optimizer: Optimizer, final: dict[str, Any]) -> None:
            groups = zip(self.param_groups, final["param_groups"], strict=False)
            for i, (group, saved) in enumerate(groups):
                refuse_mismatch(i, group, saved, final["state"])
                refuse_other_decay(self.weight_decay_acts_on, saved)
                kept = {key: group[key] for key in ("transforms", *self.HOW_TO_RUN)}
                self.check({**group, **saved, **kept})
            loaded.update(final)

        def copy_state(optimizer: Optimizer) -> None:
            for group, saved in zip(self.param_groups, loaded["param_groups"], strict=True):
                for param, index in zip(group["params"], saved["params"], strict=True):
                    for key, value in loaded["state"].get(index, {}).items():
                        if isinstance(value, Tensor) and key != "step":  # torch rounded it
                            dtype = state_dtype(group, param)
                            self.state[param][key] = value.to(param.device, dtype, copy=True)

        handles = [  # after the user's hooks that change the checkpoint, before those that follow
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(copy_state, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()
        warn_of_no_record(self.param_groups, loaded["param_groups"])

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = self.__dict__.get("param_groups", state["param_groups"])
        super().__setstate__(state)
        keep_step_outside_graphs(type(self))
        for group, old in zip(self.param_groups, own, strict=True):
            group.pop("decoupled_weight_decay", None)  # the class says it
            for key, value in {**self.defaults, **old}.items():
                if key in ("transforms", *self.HOW_TO_RUN):
                    group[key] = value
                group.setdefault(key, value)  # torch.optim and older versions lack some keys
            for param in group["params"]:
                if "step" in self.state.get(param, {}):
                    step, home = self.state[param]["step"], "cpu"
                    if not isinstance(step, Tensor):
                        step = torch.tensor(step, device=home)
                    home = param.device if group["capturable"] else home
                    self.state[param]["step"] = step.to(home, torch.float32, copy=True)


class GradientMethod(RecordedOptimizer):
    """An optimizer made of gradient transforms and one update rule; `step` is written here only.

    A subclass says which rule updates a group, with which state, and what the rule's scalars are:
    `update_rule` and `scalars`. A rule is a pure function in plain arithmetic without number
    literals, ``(grad, param, *state, *scalars) -> (param, *state)``. It sees real tensors of one or
    more dimensions, float32 for half-precision parameters; its state starts at zero, or where
    `initial_value` says.

    Three class attributes say the rest: `counts_steps`, whether the state holds torch's "step"
    (True); `number_of_betas`, how many `betas` has if the method has any (2); and
    `weight_decay_acts_on`, "gradient" for coupled decay, "parameter" for decoupled decay, "rule" if
    the rule decays the parameter itself ("gradient"). A constructor takes `transforms` and what
    follows it below as ``**options: Unpack[Options]``; signature and Args are completed from here.

    Args:
        params: parameters, named parameters or parameter groups, as torch.optim takes them. A group
            may hold its own value of every option, `transforms` included.
        defaults: the method's own options; "lr" and "weight_decay" must be among them. Each number
            may be a tensor of one element, which is read anew at every step.
        transforms: gradient transforms, applied left to right before the rule. Checkpoints record
            their names, so give different functions different names.
        maximize: ascend instead of descend.
        foreach: accepted for compatibility with torch.optim; None or False.
        fused: None takes the compiled fast path where it pays, from 65,536 parameters on, and True
            always, or raises the reason why it cannot; False runs the rule on tensors. Under
            `torch.amp.GradScaler`, True also does the unscaling, or the skipping, within the step,
            as torch's fused optimizers do: `p.grad` stays scaled.
        capturable: keep `step` on the parameter's device, so that a step never waits for it.
        differentiable: let autograd record the step.
        state_dtype: floating-point type of the state; None takes the parameter's.
        stochastic_rounding: round bfloat16 parameters stochastically, reproducibly from torch's
            seed at construction, the number of groups seeded from it before, the parameter's step
            and its index. A group may hold a `rounding_seed` of its own.

    Raises:
        ValueError: a hyperparameter is negative, NaN, infinite or out of range.
        TypeError: a transform is not callable, or `transforms` is not a list.
        RuntimeError: `foreach=True` is asked for, or `fused=True` where no kernel can be made, or a
            transform over all tensors within a ZeroRedundancyOptimizer.

    Example:
        >>> class SignDescent(GradientMethod):
        ...     counts_steps = False
        ...
        ...     def update_rule(self, group):
        ...         return (lambda grad, param, lr: (param - lr * torch.sign(grad),)), ()
        ...
        ...     def scalars(self, group, lr, step):
        ...         return (lr,)
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> weight.grad = torch.tensor([0.3, -0.1])
        >>> SignDescent([weight], dict(lr=0.5, weight_decay=0.0)).step()
        >>> weight.data
        tensor([ 0.5000, -1.5000])

    Source: chapter "The anatomy of an optimizer".
    """

    counts_steps = True
    number_of_betas = 2
    weight_decay_acts_on = "gradient"
    _made_by_zero = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        complete(cls)

    @refuse_unknown
    def __init__(
        self,
        params: ParamsT,
        defaults: Group,
        *,
        transforms: Iterable[Callable[[Tensor], Tensor]] = (),
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
    ) -> None:
        shared = dict(
            transforms=Chain.of(transforms),
            maximize=maximize,
            foreach=foreach,
            fused=fused,
            capturable=capturable,
            differentiable=differentiable,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
        )
        if self.weight_decay_acts_on not in ("gradient", "parameter", "rule"):
            raise ValueError(f"Invalid weight_decay_acts_on: {self.weight_decay_acts_on!r}")
        if "torch.distributed.optim.zero_redundancy_optimizer" in sys.modules:
            from agrlib.distributed import made_by_zero

            self._made_by_zero = made_by_zero()
        super().__init__(params, {**defaults, **shared})
        keep_step_outside_graphs(type(self))

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether torch.amp.GradScaler leaves the unscaling, and an overflow, to the step."""
        return any(group["fused"] for group in self.param_groups)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters; its options are checked as the constructor's are.

        As in torch.optim, the dictionary becomes the group: what it lacks is filled in. One that is
        refused stays as it was.
        """
        given, before = param_group, len(self.param_groups)
        kept = dict(given) if isinstance(given, dict) else {}
        try:
            if isinstance(given, dict):
                group = {**self.defaults, **given}
                given["transforms"] = group["transforms"] = Chain.of(group["transforms"])
                self._check_reach(group["transforms"])
                self.check(group)
            super().add_param_group(given)
            if given["fused"]:
                from agrlib.kernels import refuse_devices

                refuse_devices(given["params"])
        except BaseException:
            del self.param_groups[before:]
            if isinstance(given, dict):
                given.clear()
                given.update(kept)
            raise
        seed_rounding(given)  # now, whatever is drawn before a step

    def check(self, group: Group) -> None:
        """Raise ValueError or RuntimeError for options that this method cannot work with."""
        check_options(group)
        if "betas" in group:
            count = self.number_of_betas
            require(len(group["betas"]) == count, f"betas, give {count} of them", group["betas"])

    def update_rule(self, group: Group) -> tuple[Callable[..., Any], tuple[str, ...]]:
        """Return the rule and the names of the state tensors that it reads and writes."""
        raise NotImplementedError

    def scalars(self, group: Group, lr: Any, step: Any) -> tuple[Any, ...]:
        """Return the rule's scalars for the given step, counted from 1, in double precision."""
        raise NotImplementedError

    def initial_value(self, group: Group, key: str) -> float:
        """Return the number that a state tensor is filled with before the first step."""
        return 0.0

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the model again, calls backward and returns the loss.

        Raises:
            RuntimeError: a gradient is sparse.
            TypeError, ValueError: a transform returned no tensor, or one of another shape.

        Everything is checked and all transforms have run before the first write: after any of these
        errors, parameters and state are as they were.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            for group in self.param_groups:
                self._check_group(group)
            params = [p for group in self.param_groups for p in group["params"]]
            grads = [p.grad for p in params]
            plan = self._plan_step(params, grads)
            rest = self._parts(grads) if plan is None else plan.rest
            if (plan is None or not plan.on_gpu or rest) and self._overflowed():
                return loss
            shaped = self._shape(rest, params, grads)
            if plan is not None:
                plan.run(grads, shaped)
            for group, _, members in rest:
                options = with_numbers(group)
                for i in members:
                    if plan is None or i not in plan.compiled:
                        self._update(options, params[i], shaped[i], i)
        return loss

    def _check_reach(self, chain: Chain) -> None:
        """Refuse totals over all tensors where other processes hold some of them."""
        reaching = [f for f in chain if getattr(f, "over", None) == "all"]
        if self._made_by_zero and reaching:
            raise RuntimeError(
                f"{reaching[0]} sums over all tensors, of which ZeroRedundancyOptimizer gives each "
                "process some: leave transforms out and call agrlib.attach(optimizer, transforms) "
                "on the ZeroRedundancyOptimizer"
            )

    def _check_group(self, group: Group) -> None:
        """Refuse options that were spoiled since they were given."""
        group["transforms"] = Chain.of(group["transforms"])  # a plain list may have been put there
        self._check_reach(group["transforms"])
        check_way(group)
        check_types(group)
        if any(param.grad is not None for param in group["params"]):
            self._try_options(with_numbers(group))
        seed_rounding(group)

    def _try_options(self, group: Group) -> None:
        """Let the method's own options fail before anything is written."""
        self.update_rule(group)
        try:
            self.scalars(group, 1.0, 1)
        except ZeroDivisionError as error:
            betas = group.get("betas", ())
            if 1 not in betas:
                raise
            raise ZeroDivisionError(f"a beta of 1 has no bias correction: betas={betas}") from error

    def _plan_step(self, params: list[Tensor], grads: list[Tensor | None]) -> Any:
        """Return the part of compiled kernels in this step; None leaves all to the eager way."""
        ways = {group["fused"] for group in self.param_groups}
        if ways <= {False} or self.defaults["differentiable"]:
            return None
        planned = "_plan" in self.__dict__
        small = not planned and sum(p.numel() for p in params) < WORTH_COMPILING
        if small and True not in ways:
            return None
        from agrlib.kernels import plan_for

        return plan_for(self, params, grads)

    def _parts(self, grads: list[Tensor | None]) -> list[tuple[Group, Chain, list[int]]]:
        """Return each group with its chain and the numbers of its parameters with a gradient."""
        parts, first = [], 0
        for group in self.param_groups:
            stop = first + len(group["params"])
            ready = [i for i in range(first, stop) if grads[i] is not None]
            parts.append((group, group["transforms"], ready))
            first = stop
        return parts

    def _overflowed(self) -> bool:
        """Whether a gradient scaler has found a number that is not finite."""
        found = getattr(self, "found_inf", None)
        return found is not None and bool(found)

    def _shape(
        self,
        parts: list[tuple[Group, Chain, list[int]]],
        params: list[Tensor],
        grads: list[Tensor | None],
    ) -> dict[int, Tensor]:
        """Return the transformed gradients; everything that can be refused is refused before."""
        for group, _, members in parts:
            self._check_params(group, [params[i] for i in members])
        scale = getattr(self, "grad_scale", None)
        inverse = None if scale is None else scale.double().reciprocal()
        raw: list[list[Any]] = [[grads[i] for i in members] for _, _, members in parts]
        if inverse is not None:
            raw = [[widen(g) * inverse.to(g.device, torch.float32) for g in gs] for gs in raw]
        shaped = run_chains([chain for _, chain, _ in parts], raw)
        pairs = zip(parts, shaped, strict=True)
        return {i: g for (_, _, ms), gs in pairs for i, g in zip(ms, gs, strict=True)}

    def _check_params(self, group: Group, params: list[Tensor]) -> None:
        """Refuse, before anything is written, parameters and gradients of a wrong kind."""
        for param in params:
            dense(param.grad)  # type: ignore[arg-type]
            if not (param.is_floating_point() or param.is_complex()):
                raise RuntimeError(f"parameters of type {param.dtype} cannot be optimized")
            if self.defaults["differentiable"] and param.is_leaf and param.requires_grad:
                raise RuntimeError(
                    "differentiable=True cannot overwrite a leaf that requires grad: "
                    "optimize a clone of it, so that autograd can record the step"
                )

    def _update(self, group: Group, param: Tensor, grad: Tensor, index: int) -> None:
        """Run the rule on one parameter and store what it returns."""
        rule, keys = self.update_rule(group)
        state = self.state.get(param, {})
        old = [
            self._first_state(group, param, key) if state.get(key) is None else state[key]
            for key in keys
        ]
        count, step = self._next_step(group, param, state, keys)
        lr = group["lr"]
        scalars, seed, first = self.scalars(group, lr, step), None, 0
        if group["stochastic_rounding"] and param.dtype == torch.bfloat16:
            assert count is not None
            number = index + part_number(param)
            seed = noise_seed(group["rounding_seed"], count.long(), number)  # again after resuming
        for value, part, *inputs in parts_of(rule, param, grad, *old):
            result, *outputs = self._apply_rule(group, value, part, inputs, lr, scalars)
            if seed is not None:
                result = round_stochastically(result, seed.to(param.device), first)
            result = like(result, value)
            new = [like(output, tensor) for output, tensor in zip(outputs, inputs, strict=True)]
            if self.defaults["differentiable"]:
                old = new
            else:
                for tensor, output in zip(inputs, new, strict=True):
                    tensor.copy_(output)
            value.copy_(result)
            first += value.numel()
        state.update(zip(keys, old, strict=True))
        if count is not None:
            state["step"] = state["step"].copy_(count) if "step" in state else count
        if state:
            self.state[param] = state

    def _apply_rule(
        self,
        group: Group,
        param: Tensor,
        grad: Tensor,
        inputs: Sequence[Tensor],
        lr: Any,
        scalars: tuple[Any, ...],
    ) -> tuple[Tensor, ...]:
        """Decay, run the rule on one parameter or a part of it, and check what it returns."""
        rule, keys = self.update_rule(group)
        value = as_real(widen(param))
        if self.defaults["differentiable"]:
            value = value.clone()  # autograd may need it after the parameter is overwritten
        grad = as_real(widen(-grad if group["maximize"] else grad))
        if self.weight_decay_acts_on == "gradient" and group["weight_decay"] != 0:
            grad = decay_gradient(grad, value, group["weight_decay"])
        if self.weight_decay_acts_on == "parameter" and group["weight_decay"] != 0:
            value = decay_parameter(value, lr * group["weight_decay"])
        given = [value, *(as_real(x).to(value.dtype) for x in inputs)]
        result = rule(grad, *given, *scalars)
        if not isinstance(result, tuple) or len(result) != 1 + len(keys):
            names = ", ".join(("param", *keys))
            raise TypeError(f"rule {rule.__name__} must return the tuple ({names})")
        return tuple(  # what goes elsewhere must not be overwritten before
            new.clone() if any(new is tensor for j, tensor in enumerate(given) if j != i) else new
            for i, new in enumerate(result)
        )

    def _first_state(self, group: Group, param: Tensor, key: str) -> Tensor:
        """Make a state tensor; torch fills both parts of a complex one."""
        value, dtype = float(self.initial_value(group, key)), state_dtype(group, param)
        if value == 0:  # which more classes of tensors have
            return torch.zeros_like(param, dtype=dtype)
        filling = complex(value, value) if param.is_complex() else value
        return torch.full_like(param, filling, dtype=dtype)

    def _next_step(
        self, group: Group, param: Tensor, state: Group, keys: tuple[str, ...]
    ) -> tuple[Tensor | None, Any]:
        """Return the "step" to be stored and the step's number as a scalar for the rule."""
        count = None
        if self.counts_steps or group["stochastic_rounding"]:
            home = param.device if group["capturable"] else torch.device("cpu")
            first = torch.zeros((), dtype=torch.float32, device=home)  # whatever the default
            count = state.get("step", first) + 1
        if count is None or not self.counts_steps:  # torch's SGD: the first step has no buffer
            return count, 1 if any(state.get(key) is None for key in keys) else 2
        return count, count.double() if group["capturable"] else as_number(count)


class Attachment:
    """The handle that `attach` returns: `remove()` ends the attachment."""

    def __init__(self, optimizer: Optimizer, transforms: Iterable[Callable[[Tensor], Tensor]]):
        if not hasattr(optimizer, "param_groups"):  # a class, a scheduler, a module
            raise TypeError(f"attach takes an optimizer, not {optimizer!r}")
        present = getattr(optimizer.step, "attachment", None)
        if present is not None and present.active:
            raise RuntimeError("this optimizer has transforms attached: remove() them first")
        self.chain, self.optimizer, self.active = Chain.of(transforms), optimizer, True
        self._raw: list[tuple[Tensor, Tensor, Tensor]] = []
        inner = optimizer.step

        @functools.wraps(inner)  # keeps the marks that learning-rate schedulers look for
        def step(optimizer: Optimizer, closure: Any = None, *args: Any, **kwargs: Any) -> Any:
            if not self.active:
                return inner(*(() if closure is None else (closure,)), *args, **kwargs)
            return self._step(inner, closure, *args, **kwargs)

        step.attachment = self  # type: ignore[attr-defined]
        self._before = optimizer.__dict__.get("step")
        outside = outside_graphs(step)
        self._step_method = types.MethodType(outside, optimizer)  # schedulers wrap bound methods
        optimizer.step = self._step_method  # type: ignore[method-assign]

    def remove(self) -> None:
        """Give the optimizer its own step back; a second call does nothing."""
        if self.active and self.optimizer.__dict__.get("step") is self._step_method:
            del self.optimizer.step
            if self._before is not None:
                self.optimizer.step = self._before  # type: ignore[method-assign]
        self.active = False

    def _step(self, inner: Any, closure: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self.optimizer, "grad_scale", None) is not None:
            raise RuntimeError(
                "the fused step would unscale the gradients after the transforms: "
                "call scaler.unscale_(optimizer) before scaler.step(optimizer)"
            )
        try:
            if closure is None:
                self._swap_in()
                return inner(*args, **kwargs)

            def shaped_closure() -> Any:
                self._restore()  # the closure accumulates into the raw gradients
                loss = closure()
                self._swap_in()
                return loss

            return inner(shaped_closure, *args, **kwargs)
        finally:
            self._restore()

    def _swap_in(self) -> None:
        """Put the transformed gradients in place of the raw ones."""
        params = [p for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None]
        raw = [dense(p.grad) for p in params]
        with torch.set_grad_enabled(bool(self.optimizer.defaults.get("differentiable"))):
            [shaped] = run_chains([self.chain], [raw])
            shaped = [
                grad.clone() if grad is old else grad.to(old.dtype)  # the step may write to it
                for grad, old in zip(shaped, raw, strict=True)
            ]
        self._raw = list(zip(params, raw, shaped, strict=True))
        for param, _, grad in self._raw:
            param.grad = grad

    def _restore(self) -> None:
        for param, raw, shaped in self._raw:
            if param.grad is shaped:  # or else a hook of the step has dropped it: zero_grad
                param.grad = raw
        self._raw = []


def attach(optimizer: Optimizer, transforms: Iterable[Callable[[Tensor], Tensor]]) -> Attachment:
    """Let any torch optimizer see transformed gradients.

    Around every `step`, each `p.grad` is replaced by chain(p.grad) and put back afterwards, also
    when the step raises and when the step takes a closure. Hooks of the step see the transformed
    gradients. A copy or a pickle of the optimizer does not carry the attachment, nor does its
    checkpoint.

    Args:
        optimizer: a torch.optim.Optimizer, whether or not a scheduler was made for it already.
        transforms: gradient transforms, applied left to right.

    Returns:
        A handle; `handle.remove()` ends it.

    Raises:
        TypeError: a transform is not callable, or `transforms` is not a list.
        RuntimeError: the optimizer has an attachment; in `step`, a gradient is sparse, or a
            gradient scaler left the unscaling to a fused step.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> handle = attach(optimizer, [torch.sign])
        >>> weight.grad = torch.tensor([0.3, -0.1])
        >>> optimizer.step()
        >>> weight.data, weight.grad
        (tensor([0., 2.]), tensor([ 0.3000, -0.1000]))
        >>> handle.remove()

    Source: chapter "The anatomy of an optimizer".
    """
    return Attachment(optimizer, transforms)
