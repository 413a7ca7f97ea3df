# Exported from book/batch.md: edit the chapter, not this file.
"""The parameters that one kernel updates: their tables, and where their tensors lie.

Derived in the chapter "One launch for many tensors".
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from operator import is_, itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from agrlib.checks import Group, Method
from agrlib.glance import Glance, glance_at
from agrlib.layout import Layout, has_form, has_strides, parts_in
from agrlib.precision import noise_seed
from agrlib.program import Program
from agrlib.transforms import Transform


class Member(NamedTuple):
    """A parameter on the fast path."""

    param: Tensor
    group: int
    number: int  # among all parameters of the optimizer
    new: bool  # without state so far
    noise: int  # tells the rounding noise of its part from that of all others


def spans_of(members: Sequence[Member]) -> list[tuple[int, slice]]:
    """Return each group with the stretch of the batch that belongs to it."""
    groups = [member.group for member in members]
    spans = [(g, groups.index(g), groups.count(g)) for g in dict.fromkeys(groups)]
    return [(g, slice(first, first + count)) for g, first, count in spans]


def rows_of(t: int, part: Tensor, chunk: int) -> list[tuple[int, int, int, int]]:
    """Cut a tensor between rows into items of about `chunk` entries."""
    count, cols = part.shape[0], part.numel() // part.shape[0]
    rows = max(1, chunk // cols)
    return [(t, r * cols, min(rows, count - r), cols) for r in range(0, count, rows)]


def items_of(
    parts: Sequence[Tensor], by_row: Sequence[bool], chunks: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Cut tensors into items (tensor, first entry, rows, columns); also say where each begins."""
    items: list[tuple[int, int, int, int]] = []
    firsts = [0]
    for t, (part, rowwise, chunk) in enumerate(zip(parts, by_row, chunks, strict=True)):
        size = part.numel()
        if rowwise and size:
            items += rows_of(t, part, chunk)
        else:
            items += [(t, i, 1, min(chunk, size - i)) for i in range(0, size, max(chunk, 1))]
        firsts.append(len(items))
    return np.array(items, np.int64).reshape(-1, 4), np.array(firsts, np.int64)


def numbers_of(method: Method, decay: str, group: Group, lr: Any, step: Any) -> list[Any]:
    """Return a row of a kernel's table: sign, decay, and the scalars of the rule."""
    rate = lr * group["weight_decay"] if decay == "parameter" else group["weight_decay"]
    sign, decays = -1.0 if group["maximize"] else 1.0, (group["weight_decay"] != 0) * 1.0
    return [sign, decays, rate, *method.scalars(group, lr, step)]


def seeds_of(group: Group, members: Iterable[Member], steps: Any, device: Any) -> Tensor:
    """Return what the rounding noise of each tensor starts from."""
    index = torch.tensor([member.noise for member in members], device=device)
    count = steps if isinstance(steps, Tensor) else torch.from_numpy(steps)
    return noise_seed(group["rounding_seed"], count.long(), index)


def mark_as_written(params: list[Tensor]) -> None:
    """Tell autograd what a kernel has written."""
    try:
        increment_version(params)
    except (TypeError, RuntimeError):  # before torch 2.5, one by one
        for param in params:
            increment_version(param)


class Lookup:
    """Where the tensors of a batch lie: asked anew at every step.

    Args:
        layout: the parameters, and how a kernel was told that they lie in memory.
        keys: the names of the state tensors, the number of the step among them.
    """

    def __init__(self, layout: Layout, keys: list[str]) -> None:
        self.layout, self.keys = layout, keys
        self.filled = np.array([part.numel() > 0 for part in layout.parts])
        self.tensors: list[list[Tensor]] = []
        self.addresses = np.zeros((2 + len(keys), len(layout.params)), np.int64)
        self.glance: Glance | None = None
        self.every: list[Any] = []
        self.states: list[dict[str, Tensor]] = []

    def find_states(self, state: Any) -> list[dict[str, Tensor]]:
        """Return each parameter's state; looked up again only if the optimizer's has changed."""
        every = [*state, *state.values()]
        same = len(every) == len(self.every) and all(map(is_, every, self.every))
        if not (same and self.states):
            self.states = [state.get(p, {}) for p in self.layout.params]
            self.every = every
        return self.states

    def find(self, state: Any, grads: list[Tensor]) -> bool:
        """Look up all tensors again; return whether they still fit the kernel."""
        states = self.find_states(state)
        found = None
        if self.glance is not None:
            found = self.glance.look(states, grads, self.addresses)
        if found is None:
            return self.inspect(states, grads)
        self.addresses = found
        self.tensors[1] = grads  # a user's function may have made them; the kernel is still to run
        return True

    def fits(self, role: int, tensors: list[Tensor], seen: bool) -> bool:
        """Whether tensors have the form of their role; those seen before may have been turned."""
        if not seen:
            return has_form(self.layout, role, tensors)
        is_step = role == len(self.layout.forms)
        return is_step or has_strides(self.layout, parts_in(self.layout, tensors))

    def inspect(self, states: list[dict[str, Tensor]], grads: list[Tensor]) -> bool:
        """Look up all tensors again, one question after the other."""
        layout = self.layout
        try:
            rows = [layout.params, grads, *(list(map(itemgetter(k), states)) for k in self.keys)]
            known = self.tensors or [[] for _ in rows]
            pairs = zip(rows, known, strict=True)
            seen = [bool(old) and all(map(is_, row, old)) for row, old in pairs]
            if not all(map(self.fits, range(len(rows)), rows, seen)):
                return False
            found = [list(map(Tensor.data_ptr, parts_in(layout, row))) for row in rows]
        except (AttributeError, KeyError, RuntimeError, TypeError):
            return False  # a state was removed or is no tensor, or a gradient is sparse
        addresses = np.array(found, np.int64)
        if not addresses[:, self.filled].all():  # a tensor without memory
            return False
        moved = (addresses != self.addresses).any(axis=1).tolist()
        for role, (same, elsewhere) in enumerate(zip(seen, moved, strict=True)):
            if same and elsewhere and not has_form(layout, role, rows[role]):
                return False
        self.tensors = rows
        self.addresses = addresses if any(moved) else self.addresses
        self.glance = glance_at(layout, self.keys, states)
        return True


class Batch(ABC):
    """Parameters that one kernel updates, and the tables that the kernel reads."""

    def __init__(
        self,
        method: Method,
        program: Program,
        chain: tuple[Transform, ...],
        members: list[Member],
    ) -> None:
        self.method, self.program, self.chain, self.members = method, program, chain, members
        params = [member.param for member in members]
        self.layout = Layout.of(params, program.dtypes)
        self.device = self.layout.device
        self.whole = [chain[j] for j in program.whole]
        covers = [[f.covers(p) for p in params] for f in chain]
        self.covers = np.array(covers, np.bool_).reshape(len(chain), len(members))
        by_row = [f for f in chain if f.over == "row"]
        self.by_row = [any(f.covers(p) for f in by_row) for p in params]
        self.entries = np.array([float(p.numel()) for p in params])
        self.counts = torch.from_numpy(np.tile(self.entries, (len(self.whole), 1)))
        self.totals = torch.zeros_like(self.counts)
        self.spans = spans_of(members)
        rounds = method.param_groups[members[0].group]["stochastic_rounding"]
        self.counts_steps = method.counts_steps or bool(rounds)
        self.lookup = Lookup(self.layout, [*program.state, *["step"] * self.counts_steps])
        self.new = np.array([member.new for member in members], np.bool_)

    def own(self, values: list[Any]) -> list[Any]:
        """Return what belongs to the batch, of one value for each parameter of the optimizer."""
        if len(values) == len(self.members):
            return values
        return [values[member.number] for member in self.members]

    def point(self, grads: list[Tensor]) -> bool:
        """Look up all tensors again; return whether they still fit the kernel."""
        old = self.lookup.addresses
        fits = self.lookup.find(self.method.state, grads)
        if fits and self.lookup.addresses is not old:
            self.place(self.lookup.addresses)
        return fits

    def written(self) -> None:
        """Tell autograd what a kernel has written, and let go of the gradients."""
        mark_as_written(self.layout.params)
        self.lookup.tensors[1] = []
        self.new[:] = False

    def count_of(self, q: int) -> float:
        """Return over how many entries the q-th whole stage sums in this batch."""
        return float(self.entries[self.covers[self.program.whole[q]]].sum())

    @abstractmethod
    def place(self, addresses: np.ndarray) -> None:
        """Hand the addresses to the kernel, where they have changed."""

    @abstractmethod
    def count(self, scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Hand over what is new in this step: the gradient scale and the scalars of the rule."""

    @abstractmethod
    def reduce(self, q: int) -> None:
        """Sum this process's parts for the q-th whole stage into `totals[q]`."""

    @abstractmethod
    def run(self, alone: bool) -> None:
        """Update; `alone` says that the totals are still to be computed."""
