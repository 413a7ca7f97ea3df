# Exported from book/checks.md: edit the chapter, not this file.
"""What a parameter group may hold, and every check of it, of parameters and of gradients.

Derived in the chapter "Checks before the first write".
"""

import contextlib
import math
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any, Protocol

import torch
from torch import Tensor

from agrlib.options import signature_of

Group = dict[str, Any]


COMMON = ("lr", "weight_decay", "eps")


def numbers_of(cls: type) -> tuple[str, ...]:
    """Return the names of the options of a class that must be numbers."""
    signature = signature_of(cls.__init__)  # type: ignore[misc]
    known = signature.parameters.values() if signature else ()
    defaults = {p.name: p.default for p in known if not isinstance(p.default, bool)}
    numeric = (name for name, value in defaults.items() if isinstance(value, Real))
    return tuple(dict.fromkeys((*COMMON, *numeric)))


class Method(Protocol):
    """What the modules below `optimizer` know of an optimizer."""

    param_groups: list[Group]
    defaults: Group
    state: Any
    counts_steps: bool
    weight_decay_acts_on: str

    def update_rule(self, group: Group) -> tuple[Callable[..., Any], tuple[str, ...]]: ...

    def scalars(self, group: Group, lr: Any, step: Any) -> tuple[Any, ...]: ...

    def initial_value(self, group: Group, key: str) -> float: ...


def require(valid: bool, what: str, value: Any) -> None:
    """Raise torch.optim's ValueError for a hyperparameter that is out of range."""
    if not valid:
        raise ValueError(f"Invalid {what}: {value}")


def described(value: Any) -> str:
    """Show a value with its type: some print like what would have been right."""
    return f"{value!r} of type {type(value).__name__}"


def check_numbers(group: Group, names: Iterable[str] = COMMON) -> None:
    """Refuse numbers of a kind that would fail in the middle of a step."""
    betas = group.get("betas", ())
    if not isinstance(betas, tuple | list):
        raise TypeError(f"betas must be a tuple of numbers, not {described(betas)}")
    numbers = [(name, group[name]) for name in names if name in group]
    numbers += [(f"betas[{i}]", beta) for i, beta in enumerate(betas)]
    for name, value in numbers:
        if type(value) is not float and not isinstance(value, Real | Tensor):
            raise TypeError(f"{name} must be a number, not {described(value)}")
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element")


def check_types(group: Group, numbers: Iterable[str] = COMMON) -> None:
    """Refuse options of a kind that would fail in the middle of a step."""
    check_numbers(group, numbers)
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


def check_betas(group: Group, count: int) -> None:
    """Refuse another number of betas than the method has."""
    if "betas" in group:
        require(len(group["betas"]) == count, f"betas, give {count} of them", group["betas"])


def check_decay(acts_on: str) -> None:
    """Refuse a method whose weight decay acts on nothing that there is."""
    if acts_on not in ("gradient", "parameter", "rule"):
        raise ValueError(f"Invalid weight_decay_acts_on: {acts_on!r}")


def check_way(group: Group) -> None:
    """Refuse ways to run a step that do not exist."""
    if group["foreach"]:
        raise RuntimeError("foreach=True is not supported: leave it out")
    if group["fused"] and group["differentiable"]:
        raise RuntimeError("fused=True and differentiable=True exclude each other: leave out fused")


def check_options(group: Group, numbers: Iterable[str] = COMMON) -> None:
    """Refuse what no method can work with; NaN fails every comparison below."""
    check_types(group, numbers)
    require(0.0 <= group["lr"] < math.inf, "learning rate", group["lr"])
    require(0.0 <= group["weight_decay"] < math.inf, "weight_decay value", group["weight_decay"])
    if "eps" in group:
        require(0.0 <= group["eps"] < math.inf, "epsilon value", group["eps"])
    for i, beta in enumerate(group.get("betas", ())):
        require(0.0 <= beta < 1.0, f"beta parameter at index {i}", beta)
    check_way(group)


def try_options(method: Method, group: Group) -> None:
    """Let the method's own options fail before anything is written."""
    method.update_rule(group)
    try:
        method.scalars(group, 1.0, 1)
    except ZeroDivisionError as error:
        betas = group.get("betas", ())
        if 1 not in betas:
            raise
        raise ZeroDivisionError(f"a beta of 1 has no bias correction: betas={betas}") from error


def dense(grad: Tensor) -> Tensor:
    """Return the gradient, refusing a sparse one."""
    if grad.layout != torch.strided:
        raise RuntimeError(
            "agrlib does not support sparse gradients: build the embedding with sparse=False"
        )
    return grad


def check_params(params: Iterable[Tensor], differentiable: bool) -> None:
    """Refuse, before anything is written, parameters and gradients of a wrong kind."""
    for param in params:
        dense(param.grad)  # type: ignore[arg-type]
        if not (param.is_floating_point() or param.is_complex()):
            raise RuntimeError(f"parameters of type {param.dtype} cannot be optimized")
        if differentiable and param.is_leaf and param.requires_grad:
            raise RuntimeError(
                "differentiable=True cannot overwrite a leaf that requires grad: "
                "optimize a clone of it, so that autograd can record the step"
            )


def check_state(param: Tensor, state: Group, keys: Iterable[str]) -> None:
    """Refuse state that does not belong to its parameter; what is missing will be made."""
    for key in (*keys, "step"):
        value, one = state.get(key), key == "step"
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"state {key!r} must be a tensor, not {described(value)}")
        if value is None or (value.numel() == 1 if one else value.shape == param.shape):
            continue
        asked = () if one else tuple(param.shape)
        wrong = f"state {key!r} has shape {tuple(value.shape)}, not {asked}"
        raise RuntimeError(f"{wrong}: is it that of another model?")


def check_tensors(method: Method, group: Group, params: list[Tensor]) -> None:
    """Refuse, before anything is written, parameters, gradients and state of a wrong kind."""
    check_params(params, method.defaults["differentiable"])
    _, keys = method.update_rule(group)
    for param in params:
        check_state(param, method.state.get(param, {}), keys)
