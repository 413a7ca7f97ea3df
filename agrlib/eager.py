# Exported from book/eager.md: edit the chapter, not this file.
"""The eager way of a step: the rule on tensors, the reference for every kernel.

Derived in the chapter "The rule on tensors".
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from agrlib.checks import Group, Method, as_number, check_tensors, with_numbers
from agrlib.distributed import part_number
from agrlib.precision import (
    as_real,
    first_state,
    like,
    noise_seed,
    parts_of,
    round_stochastically,
    state_dtype,
    widen,
)
from agrlib.program import decay_gradient, decay_parameter
from agrlib.transforms import Part, run_chains


def unscaled(grads: Sequence[Any], inverse: Tensor) -> list[Any]:
    """Undo a gradient scaler's factor, in new tensors; half precision becomes float32."""
    return [widen(grad) * inverse.to(grad.device, torch.float32) for grad in grads]


def shape_gradients(
    method: Method,
    parts: Sequence[Part],
    params: Sequence[Tensor],
    grads: Sequence[Any],
    scale: Tensor | None,
) -> dict[int, Tensor]:
    """Return the transformed gradients; everything that can be refused is refused before."""
    for group, _, members in parts:
        check_tensors(method, group, [params[i] for i in members])
    raw = [[grads[i] for i in members] for _, _, members in parts]
    if scale is not None:
        inverse = scale.double().reciprocal()
        raw = [unscaled(gs, inverse) for gs in raw]
    shaped = run_chains([chain for _, chain, _ in parts], raw)
    pairs = zip(parts, shaped, strict=True)
    return {i: g for (_, _, ms), gs in pairs for i, g in zip(ms, gs, strict=True)}


def next_step(
    method: Method, group: Group, param: Tensor, state: Group, keys: Sequence[str]
) -> tuple[Tensor | None, Any]:
    """Return the "step" to be stored and the step's number as a scalar for the rule."""
    count = None
    if method.counts_steps or group["stochastic_rounding"]:
        home = param.device if group["capturable"] else torch.device("cpu")
        first = torch.zeros((), dtype=torch.float32, device=home)  # whatever the default
        count = state.get("step", first) + 1
    if count is None or not method.counts_steps:  # torch's SGD: the first step has no buffer
        return count, 1 if any(state.get(key) is None for key in keys) else 2
    return count, count.double() if group["capturable"] else as_number(count)


def decayed(acts_on: str, group: Group, grad: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Let a parameter decay: through its gradient, by itself, or within the rule."""
    decay = group["weight_decay"]
    if acts_on == "gradient" and decay != 0:
        return decay_gradient(grad, value, decay), value
    if acts_on == "parameter" and decay != 0:
        return grad, decay_parameter(value, group["lr"] * decay)
    return grad, value


def check_result(rule: Callable[..., Any], keys: Sequence[str], result: Any) -> None:
    """Refuse what a rule must not return."""
    if not isinstance(result, tuple) or len(result) != 1 + len(keys):
        names = ", ".join(("param", *keys))
        raise TypeError(f"rule {rule.__name__} must return the tuple ({names})")


def apply_rule(
    method: Method,
    group: Group,
    param: Tensor,
    grad: Tensor,
    inputs: Sequence[Tensor],
    scalars: Sequence[Any],
) -> tuple[Tensor, ...]:
    """Decay and run the rule on one parameter or a part of it."""
    rule, keys = method.update_rule(group)
    value = as_real(widen(param))
    if method.defaults["differentiable"]:
        value = value.clone()  # autograd may need it after the parameter is overwritten
    grad = as_real(widen(-grad if group["maximize"] else grad))
    grad, value = decayed(method.weight_decay_acts_on, group, grad, value)
    given = [value, *(as_real(x).to(value.dtype) for x in inputs)]
    result = rule(grad, *given, *scalars)
    check_result(rule, keys, result)
    return tuple(  # what goes elsewhere must not be overwritten before
        new.clone() if any(new is tensor for j, tensor in enumerate(given) if j != i) else new
        for i, new in enumerate(result)
    )


def state_of(
    method: Method, group: Group, param: Tensor, keys: Sequence[str], state: Group
) -> list[Tensor]:
    """Return a parameter's state tensors, made where they are missing."""
    return [
        first_state(param, state_dtype(group, param), float(method.initial_value(group, key)))
        if state.get(key) is None
        else state[key]
        for key in keys
    ]


def rounding_seed(group: Group, param: Tensor, count: Tensor | None, index: int) -> Any:
    """Return what the noise of a parameter starts from, the same after resuming; None without."""
    if not group["stochastic_rounding"] or param.dtype != torch.bfloat16:
        return None
    assert count is not None
    seed = noise_seed(group["rounding_seed"], count.long(), index + part_number(param))
    return seed.to(param.device)


def update(method: Method, group: Group, param: Tensor, grad: Tensor, index: int) -> None:
    """Run the rule on one parameter and store what it returns."""
    rule, keys = method.update_rule(group)
    state = method.state.get(param, {})
    old = state_of(method, group, param, keys, state)
    count, step = next_step(method, group, param, state, keys)
    scalars, first = method.scalars(group, group["lr"], step), 0
    seed = rounding_seed(group, param, count, index)
    for value, part, *inputs in parts_of(rule, param, grad, *old):
        result, *outputs = apply_rule(method, group, value, part, inputs, scalars)
        if seed is not None:
            result = round_stochastically(result, seed, first)
        result = like(result, value)
        new = [like(output, tensor) for output, tensor in zip(outputs, inputs, strict=True)]
        if method.defaults["differentiable"]:
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
        method.state[param] = state


def update_all(
    method: Method,
    parts: Sequence[Part],
    params: Sequence[Tensor],
    shaped: dict[int, Tensor],
    compiled: set[int],
) -> None:
    """Run the rule on every parameter that no kernel updates."""
    for group, _, members in parts:
        options = with_numbers(group)
        for i in members:
            if i not in compiled:
                update(method, options, params[i], shaped[i], i)
