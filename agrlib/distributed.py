# Exported from book/distributed.md: edit the chapter, not this file.
"""Totals of tensors whose parts lie on several processes: FSDP2, tensor parallel, HSDP.

Derived in the chapter "Sums over shards".
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

MeshDimension = tuple[DeviceMesh, int]


def split_over(tensor: Tensor) -> list[MeshDimension]:
    """Return the mesh dimensions along which the processes hold different parts of a tensor.

    Along all others they hold copies, and adding copies up would count them twice.

    Args:
        tensor: a plain tensor, which has none, or a DTensor.

    Raises:
        RuntimeError: the tensor is a sum that is still to be carried out (``Partial``).

    Source: chapter "Sums over shards".
    """
    if not isinstance(tensor, DTensor):
        return []
    if any(placement.is_partial() for placement in tensor.placements):
        raise RuntimeError("a gradient is Partial: redistribute it before the step")
    mesh = tensor.device_mesh
    return [(mesh, d) for d, place in enumerate(tensor.placements) if not place.is_replicate()]


def why_not(param: Tensor, tensors: Sequence[Tensor], rows: bool) -> str | None:
    """Say why the part of a DTensor that this process holds has no kernel, or None.

    Args:
        param: the parameter.
        tensors: its gradient and state.
        rows: whether a transform sums over rows.
    """
    assert isinstance(param, DTensor)
    for tensor in tensors:
        if not isinstance(tensor, DTensor) or tensor.placements != param.placements:
            return "a gradient or state is placed otherwise than its parameter"
    if rows and any(place.is_shard() and not place.is_shard(0) for place in param.placements):
        return "the rows of a parameter are split between processes"
    return None


def shard_number(tensor: Tensor) -> int:
    """Return a number that the parts of a tensor do not share, but copies of a part do."""
    number = 0
    for mesh, dimension in split_over(tensor):
        number = number * mesh.size(dimension) + mesh.get_local_rank(dimension)
    return number


def places_of(params: Sequence[Sequence[Tensor]]) -> dict[MeshDimension, list[list[int]]]:
    """Return, for each mesh dimension, which tensors of each list are split along it.

    Args:
        params: lists of tensors, in the same order on every process.

    Source: chapter "Sums over shards".
    """
    found: dict[MeshDimension, list[list[int]]] = {}
    for row, tensors in enumerate(params):
        for t, tensor in enumerate(tensors):
            for dimension in split_over(tensor):
                found.setdefault(dimension, [[] for _ in params])[row].append(t)
    return found


def add_totals(places: dict[MeshDimension, list[list[int]]], totals: Sequence[Tensor]) -> None:
    """Add up the totals of parts to totals of tensors, in place: one all-reduce per mesh dimension.

    Args:
        places: what `places_of` returned for the tensors behind the totals.
        totals: vectors of float64, each entry the total of this process's part of one tensor.

    Source: chapter "Sums over shards".
    """
    for (mesh, dimension), rows in places.items():
        pairs = [
            (vector, torch.as_tensor(row)) for vector, row in zip(totals, rows, strict=True) if row
        ]
        sent = torch.cat([vector[row] for vector, row in pairs])
        dist.all_reduce(sent, group=mesh.get_group(dimension))
        parts = sent.split([len(row) for _, row in pairs])
        for (vector, row), whole in zip(pairs, parts, strict=True):
            vector[row] = whole
