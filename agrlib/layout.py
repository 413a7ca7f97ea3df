# Exported from book/layout.md: edit the chapter, not this file.
"""How tensors lie in memory, and which of them a kernel takes.

Derived in the chapter "Tensors that a kernel takes".
"""

from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from agrlib.compilers import missing_compiler
from agrlib.distributed import is_sharded, local, placements, why_not
from agrlib.transforms import Transform


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


TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


PLAIN = {Tensor, torch.nn.Parameter}  # a subclass may keep its numbers elsewhere


def form_obstacle(param: Tensor, tensor: Tensor, name: str) -> str | None:
    """Say why a tensor does not lie in memory as its parameter does, or None."""
    part, other = local(param), local(tensor)
    if type(other) not in PLAIN:
        return f"there is no kernel for the class {type(tensor).__name__} of {name}"
    if tensor.dtype not in TYPES:
        return f"there is no kernel for {tensor.dtype}, the type of {name}"
    if tensor.is_neg() or (other.numel() and not other.data_ptr()):
        return f"the numbers of {name} do not lie in memory as they are"
    if tensor.device != param.device:
        return f"{name} is on another device than its parameter: {tensor.device}"
    if tensor.shape != param.shape:
        return f"{name} has another shape than its parameter: {tuple(tensor.shape)}"
    if not same_layout(part.shape, other.stride(), part.stride()):
        return f"{name} has other strides than its parameter: {other.stride()}, not {part.stride()}"
    return None


def obstacle(param: Tensor, tensors: dict[str, Tensor], rows: bool) -> str | None:
    """Say why a parameter with this gradient and state cannot go through a kernel, or None."""
    if reason := missing_compiler(param.device):
        return reason
    if is_sharded(param) and (reason := why_not(param, list(tensors.values()), rows)):
        return reason
    if not dense_in(local(param), rows):
        which = "the rows of the parameter, which a transform sums, are" if rows else "it is"
        return f"{which} not contiguous: strides {local(param).stride()}"
    every = {"the parameter": param, **tensors}.items()
    return next(filter(None, (form_obstacle(param, t, name) for name, t in every)), None)


def like_param(grad: Tensor, param: Tensor) -> Tensor:
    """Return a gradient whose entries lie in memory as those of its parameter do."""
    if placements(grad) == placements(param) and local(grad).stride() == local(param).stride():
        return grad
    return torch.empty_like(param, dtype=grad.dtype).copy_(grad)


def is_aligned(part: Tensor, chain: Iterable[Transform]) -> bool:
    """Whether a tensor, and each of its rows if they matter, begins where 16 bytes begin."""
    rows = part.dim() > 1 and part.numel() > 0 and any(f.over == "row" for f in chain)
    return part.data_ptr() % 16 == 0 and not (rows and (part.numel() // part.shape[0]) % 16)


FORM = attrgetter("dtype", "device", "shape")


class Layout(NamedTuple):
    """How the tensors of a batch lie in memory, and what its kernel was made for."""

    params: list[Tensor]
    parts: list[Tensor]  # what this process holds of each
    shapes: list[torch.Size]  # of the parts
    strides: list[tuple[int, ...]]
    forms: list[list[Any]]  # by role: types, devices and shapes
    contiguous: bool
    sharded: bool
    device: torch.device

    @classmethod
    def of(cls, params: list[Tensor], dtypes: Iterable[torch.dtype]) -> "Layout":
        """Describe the parts of some parameters; `dtypes` has one for each role."""
        parts, device = list(map(local, params)), params[0].device
        shapes, strides = [p.shape for p in parts], [p.stride() for p in parts]
        forms = [[(dtype, device, shape) for shape in shapes] for dtype in dtypes]
        contiguous = all(part.is_contiguous() for part in parts)
        sharded = any(map(is_sharded, params))
        return cls(params, parts, shapes, strides, forms, contiguous, sharded, device)


def parts_in(layout: Layout, tensors: list[Tensor]) -> list[Tensor]:
    """Return the parts that this process holds."""
    return list(map(local, tensors)) if layout.sharded else tensors


def has_strides(layout: Layout, parts: list[Tensor]) -> bool:
    """Whether parts still place their entries as those that the kernel was made for."""
    if layout.contiguous and all(map(Tensor.is_contiguous, parts)):  # the quicker question
        return True
    strides = list(map(Tensor.stride, parts))
    alike = map(same_layout, layout.shapes, strides, layout.strides)
    return strides == layout.strides or all(alike)


def has_form(layout: Layout, role: int, tensors: list[Tensor]) -> bool:
    """Whether tensors still are of the type and layout that the kernel was made for."""
    if role == len(layout.forms):  # the numbers of the steps
        return all(t.dtype == torch.float32 and t.numel() == 1 for t in tensors)
    if layout.sharded and list(map(placements, tensors)) != list(map(placements, layout.params)):
        return False
    parts = parts_in(layout, tensors)
    if not set(map(type, parts)) <= PLAIN or list(map(FORM, parts)) != layout.forms[role]:
        return False
    if any(part.is_neg() for part in parts if part.numel() == 1):  # others have other strides
        return False
    return has_strides(layout, parts)
