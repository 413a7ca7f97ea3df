# Exported from book/distributed.md: edit the chapter, not this file.
"""Totals of tensors whose parts lie on several processes: FSDP2, tensor parallel, HSDP.

Derived in the chapter "Sums over shards".
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, whose parts lie on several processes."""
    return hasattr(type(tensor), "to_local")


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def placements(tensor: Tensor) -> Any:
    """Return how a tensor is spread over processes; None for a plain one."""
    return getattr(tensor, "placements", None)


def gathered(total: Tensor) -> Tensor:
    """Return the sum of a tensor that lies on several processes as a plain tensor."""
    return total.full_tensor() if is_sharded(total) else total  # type: ignore[attr-defined]


def split_over(tensor: Any) -> list[dist.ProcessGroup]:
    """Return the groups of processes that hold different parts of a tensor, one per mesh dimension.

    Along all other dimensions they hold copies, and adding copies up would count them twice.

    Args:
        tensor: a plain tensor, which has none, or a DTensor.

    Raises:
        RuntimeError: the tensor is a sum that is still to be carried out (`Partial`).

    Source: chapter "Sums over shards".
    """
    if not is_sharded(tensor):
        return []
    if any(placement.is_partial() for placement in tensor.placements):
        raise RuntimeError("a Partial tensor is a sum that is still to be carried out")
    mesh = tensor.device_mesh
    split = [d for d, place in enumerate(tensor.placements) if not place.is_replicate()]
    return [mesh.get_group(dimension) for dimension in split]


def why_not(param: Any, tensors: Sequence[Any], rows: bool) -> str | None:
    """Say why the part of a DTensor that this process holds has no kernel, or None.

    Args:
        param: the parameter.
        tensors: its gradient and state.
        rows: whether a transform sums over rows.
    """
    for tensor in tensors:
        if is_sharded(tensor) and any(p.is_partial() for p in tensor.placements):
            return "a gradient is Partial, a sum that is still to be carried out"
        if not is_sharded(tensor) or tensor.placements != param.placements:
            return "a gradient or state is placed otherwise than its parameter"
    if rows and any(getattr(place, "dim", 0) != 0 for place in param.placements):
        return "the rows of a parameter are split between processes"
    return None


def map_part(function: Callable[[Tensor], Tensor], tensor: Any) -> Tensor:
    """Apply an elementwise function to the part of a DTensor that this process holds."""
    part, form = function(tensor.to_local()), (tensor.device_mesh, tensor.placements)
    return type(tensor).from_local(part, *form, shape=tensor.shape, stride=tensor.stride())


def shard_number(tensor: Tensor) -> int:
    """Return a number that the parts of a tensor do not share, but copies of a part do."""
    number = 0
    for group in split_over(tensor):
        number = number * group.size() + group.rank()
    return number


def part_number(tensor: Tensor) -> int:
    """Return a number of the part that this process holds, in the bits above those of indices."""
    return shard_number(tensor) << 32 if is_sharded(tensor) else 0


def places_of(tensors: Sequence[tuple[int, Tensor]]) -> dict[dist.ProcessGroup, Tensor]:
    """Return, for each group of processes, the places of the tensors that are split among it.

    Two processes may hold their tensors in different orders: a kernel takes tensors together by the
    alignment of their parts. The places, and the groups with them, come in the order of numbers.

    Args:
        tensors: pairs of a number, the same on every process, and a tensor.

    Source: chapter "Sums over shards".
    """
    found: dict[dist.ProcessGroup, list[int]] = {}
    for place in sorted(range(len(tensors)), key=lambda place: tensors[place][0]):
        for group in split_over(tensors[place][1]):
            found.setdefault(group, []).append(place)
    return {
        group: torch.tensor(places, device=tensors[places[0]][1].device)
        for group, places in found.items()
    }


def add_totals(places: dict[dist.ProcessGroup, Tensor], totals: Sequence[Tensor]) -> None:
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
    frame = inspect.currentframe() if code is not None else None
    while frame is not None:
        if frame.f_code is code:
            return bool(frame.f_locals["self"].world_size > 1)
        frame = frame.f_back
    return False
