# Exported from book/distributed.md: edit the chapter, not this file.
"""Totals of tensors whose parts lie on several processes: FSDP2, tensor parallel, HSDP.

Derived in the chapter "Sums over shards".
"""

import inspect
import sys
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

try:
    from torch.distributed.tensor import DTensor
except ImportError:  # torch 2.4
    from torch.distributed._tensor import DTensor  # type: ignore[attr-defined]


def split_over(tensor: Tensor) -> list[ProcessGroup]:
    """Return the groups of processes that hold different parts of a tensor, one per mesh dimension.

    Along all other dimensions they hold copies, and adding copies up would count them twice.

    Args:
        tensor: a plain tensor, which has none, or a DTensor.

    Raises:
        RuntimeError: the tensor is a sum that is still to be carried out (`Partial`).

    Source: chapter "Sums over shards".
    """
    if not isinstance(tensor, DTensor):
        return []
    if any(placement.is_partial() for placement in tensor.placements):
        raise RuntimeError("a Partial tensor is a sum that is still to be carried out")
    mesh = tensor.device_mesh
    split = [d for d, place in enumerate(tensor.placements) if not place.is_replicate()]
    return [mesh.get_group(dimension) for dimension in split]


def why_not(param: Tensor, tensors: Sequence[Tensor], rows: bool) -> str | None:
    """Say why the part of a DTensor that this process holds has no kernel, or None.

    Args:
        param: the parameter.
        tensors: its gradient and state.
        rows: whether a transform sums over rows.
    """
    assert isinstance(param, DTensor)
    for tensor in tensors:
        if isinstance(tensor, DTensor) and any(p.is_partial() for p in tensor.placements):
            return "a gradient is Partial, a sum that is still to be carried out"
        if not isinstance(tensor, DTensor) or tensor.placements != param.placements:
            return "a gradient or state is placed otherwise than its parameter"
    if rows and any(getattr(place, "dim", 0) != 0 for place in param.placements):
        return "the rows of a parameter are split between processes"
    return None


def map_part(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Apply an elementwise function to the part of a DTensor that this process holds."""
    assert isinstance(tensor, DTensor)
    part, form = function(tensor.to_local()), (tensor.device_mesh, tensor.placements)
    return DTensor.from_local(part, *form, shape=tensor.shape, stride=tensor.stride())


def shard_number(tensor: Tensor) -> int:
    """Return a number that the parts of a tensor do not share, but copies of a part do."""
    number = 0
    for group in split_over(tensor):
        number = number * group.size() + group.rank()
    return number


def places_of(tensors: Sequence[tuple[int, Tensor]]) -> dict[ProcessGroup, Tensor]:
    """Return, for each group of processes, the places of the tensors that are split among it.

    Two processes may hold their tensors in different orders: a kernel takes tensors together by the
    alignment of their parts. The places, and the groups with them, come in the order of numbers.

    Args:
        tensors: pairs of a number, the same on every process, and a tensor.

    Source: chapter "Sums over shards".
    """
    found: dict[ProcessGroup, list[int]] = {}
    for place in sorted(range(len(tensors)), key=lambda place: tensors[place][0]):
        for group in split_over(tensors[place][1]):
            found.setdefault(group, []).append(place)
    return {
        group: torch.tensor(places, device=tensors[places[0]][1].device)
        for group, places in found.items()
    }


def add_totals(places: dict[ProcessGroup, Tensor], totals: Sequence[Tensor]) -> None:
    """Add up the totals of parts to totals of tensors, in place: one all-reduce per group.

    Args:
        places: what `places_of` returned for the tensors behind the totals, in their order.
        totals: vectors of float64, each entry the total of this process's part of one tensor.

    Source: chapter "Sums over shards".
    """
    home = next(iter(places.values())).device
    whole = torch.cat([vector.to(home) for vector in totals])
    for group, place in places.items():
        sent = whole[place]
        dist.all_reduce(sent, group=group)
        whole[place] = sent
    for vector, part in zip(totals, whole.split([len(v) for v in totals]), strict=True):
        vector.copy_(part)


def made_by_zero() -> bool:
    """Whether a ZeroRedundancyOptimizer is making the optimizer of one process of several."""
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    cls = getattr(module, "ZeroRedundancyOptimizer", None)
    code = getattr(getattr(cls, "_init_local_optimizer", None), "__code__", None)
    frame = inspect.currentframe()
    while frame is not None and code is not None:
        if frame.f_code is code:
            return bool(frame.f_locals["self"].world_size > 1)
        frame = frame.f_back
    return False
