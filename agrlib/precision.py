# Exported from book/precision.md: edit the chapter, not this file.
"""In which types a step computes: double-precision sums, widening, and stochastic rounding.

Derived in the chapter "Numbers of finite length".
"""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from agrlib.arithmetic import is_arithmetic
from agrlib.distributed import is_sharded, map_part


def widen(tensor: Tensor) -> Tensor:
    """Return half-precision numbers as float32 and everything else as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def widened(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which a chain computes."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def add_up(terms: Tensor, rows: bool = False) -> Tensor:
    """Sum over a tensor, or over each of its rows, in double precision where the device has it."""
    wide = torch.complex128 if terms.is_complex() else torch.float64
    dtype = terms.dtype if terms.device.type == "mps" else wide
    if rows:
        return terms.sum(dim=tuple(range(1, terms.dim())), keepdim=True, dtype=dtype)
    return terms.sum(dtype=dtype)


PART = 2**18  # entries; parts of this size, and what is computed from them, stay in a cache


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


def state_dtype(group: dict[str, Any], param: Tensor) -> torch.dtype:
    """The type in which a parameter's state is kept."""
    dtype = group["state_dtype"] or param.dtype
    return dtype.to_complex() if param.is_complex() and not dtype.is_complex else dtype


def first_state(param: Tensor, dtype: torch.dtype, value: float) -> Tensor:
    """Make a state tensor; torch fills both parts of a complex one."""
    if value == 0:  # which more classes of tensors have
        return torch.zeros_like(param, dtype=dtype)
    filling = complex(value, value) if param.is_complex() else value
    return torch.full_like(param, filling, dtype=dtype)


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


def seed_rounding(group: dict[str, Any]) -> None:
    """Give a group that rounds stochastically a seed of its own, unless it has one."""
    if group["stochastic_rounding"] and "rounding_seed" not in group:
        seed = torch.initial_seed()
        seeded[seed] += 1
        group["rounding_seed"] = hash_words(seed, seed >> 32, seeded[seed])


def round_stochastically(value: Tensor, seed: Any, first: int = 0) -> Tensor:
    """Round float32 to bfloat16, up or down with the probabilities that keep the mean.

    Entry `first` of a larger tensor is entry 0 of this one.
    """
    if is_sharded(value):  # lies on several processes, each of which rounds its part
        return map_part(functools.partial(round_stochastically, seed=seed), value)
    place = torch.arange(first, first + value.numel(), device=value.device).reshape(value.shape)
    noise = (mix((place * (seed >> 32 | 1) + seed) & 0xFFFFFFFF) & 0xFFFF).to(torch.int32)
    rounded = ((value.contiguous().view(torch.int32) + noise) & -(2**16)).view(torch.float32)
    return torch.where(value.isfinite(), rounded, value).to(torch.bfloat16)
