# Exported from book/gpu.md: edit the chapter, not this file.
"""Kernels for the GPU: the text that Triton compiles, and the batch that launches it.

Derived in the chapter "A kernel for the GPU".
"""

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agrlib.batch import Batch, items_of, numbers_of, seeds_of
from agrlib.checks import with_numbers
from agrlib.compilers import first_call, interpreting, load
from agrlib.layout import is_aligned
from agrlib.program import (
    Program,
    constants_of,
    context,
    finished,
    functions,
    indent,
    power_text,
    shape,
    update_lines,
)

GPU_TYPES = {
    torch.float32: "tl.float32",
    torch.float64: "tl.float64",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
}


GPU_HEADER = """
import triton
import triton.language as tl


@triton.jit
def maximum(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def where(condition, x, y):
    return tl.where(condition, x, y)


@triton.jit
def abs(x):
    return tl.abs(x)


@triton.jit
def sqrt(x):
    return {sqrt}


@triton.jit
def divide(x, y):
    return {divide}


@triton.jit
def at(table, role, tensors, t, like: tl.constexpr, ALIGNED: tl.constexpr):
    address = tl.load(table + role * tensors + t).to(tl.pointer_type(like))
    if ALIGNED:  # or else no load is wider than one entry
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def collect(partial, firsts, totals, BLOCK: tl.constexpr):
    t = tl.program_id(0)
    stop = tl.load(firsts + t + 1)
    sums = tl.zeros((BLOCK,), tl.float64)
    for k in range(tl.load(firsts + t), stop, BLOCK):
        i = k + tl.arange(0, BLOCK)
        sums += tl.load(partial + i, mask=i < stop, other=0.0)
    tl.store(totals + t, tl.sum(sums))
"""


GPU_FLOAT32 = dict(sqrt="tl.sqrt_rn(x)", divide="tl.div_rn(x, y)")  # IEEE, as in eager steps
GPU_FLOAT64 = dict(sqrt="tl.sqrt(x)", divide="x / y")


GPU_BFLOAT16 = """
@triton.jit
def to_bfloat16(x):
    bits = x.to(tl.uint32, bitcast=True)
    even = (bits >> 16) & 1  # a tie goes to the even neighbor
    rounded = ((bits + 0x7FFF + even) >> 16).to(tl.uint16)
    return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def mix(h):
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def to_bfloat16_stochastically(x, seed, i):
    bits = x.to(tl.uint32, bitcast=True)
    place = i.to(tl.uint32) * (seed >> 32 | 1).to(tl.uint32) + seed.to(tl.uint32)
    noise = mix(place) & 0xFFFF
    rounded = ((bits + noise) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.where(tl.abs(x) < float("inf"), rounded, to_bfloat16(x))
"""


GPU_POWER = """
@triton.jit
def two_to(n):
    return ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def power(x, y):  # x >= 0, y > 0
    subnormal = x < 1.1754944e-38
    bits = tl.where(subnormal, x * 16777216.0, x).to(tl.int32, bitcast=True)
    exponent = ((bits >> 23) - 127).to(tl.float32) - tl.where(subnormal, 24.0, 0.0)
    m = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)  # in [1, 2)
    large = m > 1.4142135
    exponent = tl.where(large, exponent + 1, exponent)
    m = tl.where(large, 0.5 * m, m)
    product = y * exponent  # and what its rounding has lost:
    lost = tl.fma(exponent, y + tl.zeros_like(exponent), -product)
    whole = tl.floor(product + 0.5)
    whole = tl.where(whole < -252, -252.0, tl.where(whole > 254, 254.0, whole))
    half = tl.floor(0.5 * whole)
    result = tl.exp2((product - whole) + lost + y * tl.log2(m)) * two_to(half)
    return tl.where(x > 0, tl.where(x < float("inf"), result * two_to(whole - half), x), x)
"""


GPU_POWER_FLOAT64 = """
@triton.jit
def power(x, y):  # x >= 0, y > 0
    return tl.where(x > 0, tl.exp2(y * tl.log2(x)), x)
"""


GPU_ARGUMENTS = (
    "items, table, flags, totals, counts, constants, scales, found_inf, partial, classes, "
    "numbers, seeds, tensors, length, ALIGNED: tl.constexpr, BLOCK: tl.constexpr"
)


def gpu_load(program: Program, role: int, address: str, mask: str) -> str:
    """Return the expression of a block of a tensor, in the type of the arithmetic."""
    masked = f", mask={mask}, other=0.0" if mask else ""
    return f"tl.load({address} + i{masked}).to(tl.{program.wide})"


def blocks(body: Callable[[str], list[str]]) -> list[str]:
    """Return a loop over full blocks, whose loads are wide, and a masked block for what is left."""
    return [
        "full = n // BLOCK * BLOCK",
        "for k in range(0, full, BLOCK):",
        "    i = k + tl.arange(0, BLOCK)",
        *(f"    {line}" for line in body("")),
        "if full < n:",
        "    i = full + tl.arange(0, BLOCK)",
        *(f"    {line}" for line in body("i < n")),
    ]


def gpu_sum(program: Program, j: int) -> str:
    """Return the function that adds up the summand of stage j over n entries."""
    arguments = ["grad", "n", "scale", *context(program, j), "BLOCK: tl.constexpr"]

    def body(mask: str) -> list[str]:
        term = f"summand_{j}(x).to(tl.float64)"
        return [
            f"x = scale * {gpu_load(program, 1, 'grad', mask)}",
            *shape(program, j),
            f"sums += {f'tl.where({mask}, {term}, 0.0)' if mask else term}",
        ]

    lines = ["sums = tl.zeros((BLOCK,), tl.float64)", *blocks(body)]
    return (
        f"@triton.jit\ndef sum_{j}({', '.join(arguments)}):\n{indent(lines, 1)}\n"
        "    return tl.sum(sums)"
    )


GPU_ITEM = [
    "t = tl.load(items + 4 * item)",
    "first = tl.load(items + 4 * item + 1)",
    "rows = tl.load(items + 4 * item + 2)",
    "cols = tl.load(items + 4 * item + 3)",
    "if ALIGNED:",
    "    first = tl.multiple_of(first, 16)",
    "    cols = tl.multiple_of(cols, 16)",
    "scale = tl.load(scales)",
    "rows = tl.where(tl.load(found_inf) == 0, rows, 0)  # or else nothing is written",
]


def gpu_total(program: Program, j: int) -> str:
    """Return the line that loads and finishes the total of stage j, beyond a row."""
    q, wide = program.whole.index(j), f"to(tl.{program.wide})"
    total, count = (f"tl.load({a} + {q} * tensors + t).{wide}" for a in ("totals", "counts"))
    return f"total_{j} = {finished(program, j, total, count)}"


def gpu_start(program: Program, upto: int) -> list[str]:
    """Return the first lines of every kernel: its item, and the finished totals of its tensor."""
    stages = range(len(program.stages))
    names = itertools.chain.from_iterable(constants_of(program, j) for j in stages)
    lines = [f"{name} = tl.load(constants + {i})" for i, name in enumerate(names)]
    for j in stages[:upto]:
        lines.append(f"covers_{j} = tl.load(flags + {j} * tensors + t) != 0")
        if j in program.whole:
            lines.append(gpu_total(program, j))
    return [*GPU_ITEM, *lines]


def gpu_rows(program: Program, upto: int) -> list[str]:
    """Return the lines that compute the totals of the row at hand."""
    lines = []
    for j, stage in enumerate(program.stages[:upto]):
        if stage.over == "row":
            call = ", ".join(["row", "cols", "scale", *context(program, j), "BLOCK"])
            count = f"cols.to(tl.{program.wide})"
            total = f"sum_{j}({call}).to(tl.{program.wide})"
            lines.append(f"total_{j} = {finished(program, j, total, count)}")
    return lines


def gpu_reduce(program: Program, j: int) -> str:
    """Return the kernel that adds up the summand of stage j over one item."""
    call = ["row", "cols", "scale", *context(program, j), "BLOCK"]
    lines = [
        "item = tl.program_id(0)",
        *gpu_start(program, j),
        f"rows = tl.where(tl.load(flags + {j} * tensors + t) != 0, rows, 0)",
        f"grad = at(table, 1, tensors, t, {GPU_TYPES[program.dtypes[1]]}, ALIGNED) + first",
        "total = tl.zeros((), tl.float64)",
        "for r in range(rows):",
        "    row = grad + r * cols",
        *(f"    {line}" for line in gpu_rows(program, j)),
        f"    total += sum_{j}({', '.join(call)})",
        "tl.store(partial + item, total)",
    ]
    return f"@triton.jit\ndef reduce_{j}({GPU_ARGUMENTS}):\n{indent(lines, 1)}"


def gpu_store(program: Program, role: int) -> str:
    """Return the form of a result in the type in which it is stored."""
    if role == 0 and program.stochastic:
        return "to_bfloat16_stochastically({}, seed, begin + i)"
    if program.dtypes[role] == torch.bfloat16:
        return "to_bfloat16({})"
    return f"{{}}.to({GPU_TYPES[program.dtypes[role]]})"


def gpu_entries(program: Program, mask: str) -> list[str]:
    """Return the lines that update a block of entries."""
    stored = [0, *range(2, len(program.dtypes))]
    results = ["p", *(f"s{role}" for role in stored[1:])]
    loads = [gpu_load(program, role, f"b{role}", mask) for role in range(len(program.dtypes))]
    inputs = ["x", "p", *loads[2:], *program.scalars]
    masked = f", mask={mask}" if mask else ""
    return [
        f"x = scale * {loads[1]}",
        *shape(program, len(program.stages)),
        "x = sign * x",
        f"p = {loads[0]}",
        *update_lines(program),
        f"{', '.join(results)}{',' if len(results) == 1 else ''} = rule({', '.join(inputs)})",
        *(
            f"tl.store(b{role} + i, {gpu_store(program, role).format(name)}{masked})"
            for role, name in zip(stored, results, strict=True)
        ),
    ]


def gpu_update(program: Program) -> str:
    """Return the kernel that updates one item."""
    stages, roles = len(program.stages), range(len(program.dtypes))
    numbers = ["sign", "decays", "rate", *program.scalars]
    values = [f"{name} = tl.load(numbers + place + {i})" for i, name in enumerate(numbers)]
    values[1] = "decays = tl.load(numbers + place + 1) != 0"
    types = [GPU_TYPES[dtype] for dtype in program.dtypes]
    lines = [
        "item = tl.num_programs(0) - 1 - tl.program_id(0)  # what was summed last comes first",
        *gpu_start(program, stages),
        "seed = tl.load(seeds + t)",
        "place = tl.load(classes + t) * length",
        *values,
        *(f"a{r} = at(table, {r}, tensors, t, {types[r]}, ALIGNED)" for r in roles),
        "n = cols",
        "for r in range(rows):",
        "    begin = first + r * cols",
        "    row = a1 + begin",
        *(f"    {line}" for line in gpu_rows(program, stages)),
        *(f"    b{r} = a{r} + begin" for r in roles),
        *(f"    {line}" for line in blocks(lambda mask: gpu_entries(program, mask))),
    ]
    return f"@triton.jit\ndef update({GPU_ARGUMENTS}):\n{indent(lines, 1)}"


def gpu_source(program: Program) -> str:
    """Return the text of the GPU kernels: one per phase, for all tensors of a batch.

    Args:
        program: what the kernels compute.

    Example:
        >>> from agrlib.sgd import descend
        >>> dtypes = (torch.float32, torch.float32)
        >>> text = gpu_source(Program(descend, (), (), "rule", "", dtypes, False))
        >>> print(text[text.index("@triton.jit\\ndef rule") : text.index("@triton.jit\\ndef up")])
        @triton.jit
        def rule(grad, param, lr):
            return (param - lr * grad,)
        <BLANKLINE>
        <BLANKLINE>

    Source: chapter "A kernel for the GPU".
    """
    exact = GPU_FLOAT64 if program.wide == "float64" else GPU_FLOAT32
    parts = [GPU_HEADER.strip("\n").format(**exact)]
    if torch.bfloat16 in program.dtypes:
        parts.append(GPU_BFLOAT16.strip("\n"))
    general = GPU_POWER_FLOAT64 if program.wide == "float64" else GPU_POWER
    if text := power_text(program, "@triton.jit", general.strip("\n")):
        parts.append(text)
    parts += functions(program, "@triton.jit", exact_division=True)
    parts += [gpu_sum(program, j) for j, stage in enumerate(program.stages) if stage.over]
    parts += [gpu_reduce(program, j) for j in program.whole]
    parts.append(gpu_update(program))
    return "\n\n\n".join(parts) + "\n"


def on_its_device(device: torch.device) -> Any:
    """Return a context in which kernels are launched on a device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def on_device(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Copy numbers to a device without waiting for it."""
    there = values if isinstance(values, Tensor) else torch.from_numpy(np.asarray(values))
    there = there.to(dtype or there.dtype)
    if device.type == "cuda" and there.device.type == "cpu":
        there = there.pin_memory()
    return there.to(device, non_blocking=True)


BLOCK = 1024  # entries at once: with 128 threads, two loads of 16 bytes each for float32


def chunk_for(entries: int, device: torch.device) -> int:
    """Return the size of an item, such that each processor of the device gets several."""
    processors = 1
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    chunk = 1 << (entries // (8 * processors)).bit_length()
    return min(max(chunk, 4 * BLOCK), 64 * BLOCK)


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being recorded; memory of the host cannot be pinned then."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class AddressTable:
    """The addresses of a batch, on its device; a CUDA graph may be recorded meanwhile."""

    def __init__(self, device: torch.device, form: tuple[int, int]) -> None:
        self.device, self.form = device, form
        self.there = on_device(np.zeros(form, np.int64), device)
        self.spare: Tensor | None = None
        self.recorded: list[Tensor] = []

    def prepare(self) -> None:
        """Have memory of the host at hand for a change while a graph is recorded."""
        if self.spare is None and not is_capturing(self.device):
            spare = torch.empty(self.form, dtype=torch.int64, device="cpu")
            self.spare = spare.pin_memory() if self.device.type == "cuda" else spare

    def put(self, table: Tensor) -> None:
        """Copy the addresses to the device."""
        if not is_capturing(self.device):
            self.there = on_device(table, self.device)
        elif self.spare is not None:  # every replay copies it again, so it must stay as it is
            self.there = torch.empty_like(table, device=self.device)
            self.there.copy_(self.spare.copy_(table), non_blocking=True)
            self.recorded.append(self.spare)
            self.spare = None
        else:
            raise RuntimeError("take one step outside of a CUDA graph before recording another")


class Numbers:
    """The kernel's table of scalars, of which only what is new is copied to the device."""

    def __init__(self, device: torch.device, dtype: torch.dtype, form: tuple[int, int]) -> None:
        self.there = torch.zeros(form, dtype=dtype, device=device)
        self.known: dict[int, list[Any]] = {}

    def put(self, members: slice, row: list[Any]) -> None:
        """Hand over the numbers of some tensors, plain ones or tensors on the device."""
        known = self.known.setdefault(members.start, [None] * len(row))
        for column, value in enumerate(row):
            if isinstance(value, Tensor) or known[column] != value:
                self.there[members, column] = value
            known[column] = None if isinstance(value, Tensor) else value


class Tables:
    """What does not change between the steps of a batch, on its device.

    Args:
        batch: the parameters, their program and their chain.
        dtype: the type in which the rule computes.
    """

    def __init__(self, batch: Batch, dtype: torch.dtype) -> None:
        device, parts, size = batch.device, batch.layout.parts, len(batch.members)
        chunk = chunk_for(sum(part.numel() for part in parts), device)
        items, firsts = items_of(parts, batch.by_row, [chunk] * size)
        constants = [c for f in batch.chain for c in f.constants] or [0.0]
        self.length = len(items)
        self.items, self.firsts = on_device(items, device), on_device(firsts, device)
        self.covers = on_device(batch.covers.astype(np.int8), device)
        self.classes = on_device(np.arange(size), device)
        self.constants = on_device(constants, device, dtype)
        self.one = on_device([1.0], device, dtype)
        self.zero = on_device([0.0], device, torch.float32)


def is_aligned_at(table: Tensor, parts: list[Tensor], by_row: list[bool]) -> bool:
    """Whether all tensors, and the rows of those that are summed by row, begin at 16 bytes."""
    rows = [part for part, row in zip(parts, by_row, strict=True) if row and part.numel()]
    columns = (part.numel() // part.shape[0] for part in rows)
    return not (table % 16).any() and all(cols % 16 == 0 for cols in columns)


def first_or_later(new: np.ndarray, device: torch.device) -> Any:
    """Return 1 for tensors that had no state so far, and 2 for all others."""
    if new.any() and not new.all():
        return on_device(np.where(new, 1.0, 2.0), device)
    return 1 if new.all() else 2


def advance(steps: list[Tensor], found_inf: Tensor | None) -> None:
    """Count a step of each tensor, unless a gradient scaler called it off."""
    torch._foreach_add_(steps, 1)
    if found_inf is not None:
        torch._foreach_sub_(steps, [found_inf.reshape(steps[0].shape)] * len(steps))


def seed_noise(batch: "GPUBatch", group: Any, members: slice, steps: Tensor) -> None:
    """Say what the rounding noise of a group's tensors starts from in this step."""
    own = batch.members[members], steps.long(), batch.device
    batch.seeds[members] = seeds_of(group, *own)


def fill_numbers(batch: "GPUBatch") -> None:
    """Hand over the scalars of all groups; the numbers of the steps stay on the device."""
    method, device = batch.method, batch.device
    if batch.counts_steps:
        steps = torch.stack(batch.lookup.tensors[-1]).double().reshape(-1) + 1
    for g, members in batch.spans:
        group = with_numbers(method.param_groups[g])
        if batch.program.stochastic:
            seed_noise(batch, group, members, steps[members])
        counts = method.counts_steps
        step = steps[members] if counts else first_or_later(batch.new[members], device)
        row = numbers_of(method, batch.program.decay, group, group["lr"], step)
        batch.numbers.put(members, row)


def arguments_for(batch: "GPUBatch") -> tuple[Any, ...]:
    """Return the arguments of a launch."""
    there, numbers = batch.tables, batch.numbers.there
    tensors = there.items, batch.table.there, there.covers, batch.totals, batch.counts
    values = there.constants, batch.scale, batch.found_inf, batch.partial, there.classes
    return *tensors, *values, numbers, batch.seeds, len(batch.members), numbers.shape[1]


LAUNCH = dict(num_warps=4, enable_fp_fusion=False)  # one rounding per operation


class GPUBatch(Batch):
    """A batch whose kernels Triton compiles."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.kernels = load(gpu_source(self.program), f"{self.program.rule.__name__}_gpu")
        device, size = self.device, len(self.members)
        self.wide, self.placed = getattr(torch, self.program.wide), False
        self.addresses, self.tables = self.lookup.addresses, Tables(self, self.wide)
        self.counts, self.totals = on_device(self.counts, device), on_device(self.totals, device)
        self.seeds = on_device(np.zeros(size, np.int64), device)
        self.scale, self.found_inf = self.tables.one, self.tables.zero
        self.partial = torch.zeros(self.tables.length, dtype=torch.float64, device=device)
        self.numbers = Numbers(device, self.wide, (size, 3 + len(self.program.scalars)))
        self.table = AddressTable(device, (len(self.program.dtypes), size))
        self.aligned = all(is_aligned(part, self.chain) for part in self.layout.parts)
        if device.type == "cuda" or interpreting():
            first_call(self.kernels, self.compile)

    def compile(self) -> None:
        """Launch all kernels as in a step that a gradient scaler calls off: nothing is written."""
        self.found_inf = self.tables.zero + 1
        for q in range(len(self.whole)):
            self.reduce(q)
        self.call(self.kernels.update)
        self.found_inf = self.tables.zero

    def place(self, addresses: np.ndarray) -> None:
        if self.placed and np.array_equal(addresses, self.addresses):
            return
        self.addresses, self.placed = addresses, True
        table = torch.from_numpy(addresses[: len(self.program.dtypes)])
        self.aligned = is_aligned_at(table, self.layout.parts, self.by_row)
        self.table.put(table)

    def count(self, scale: Tensor | None, found_inf: Tensor | None) -> None:
        self.table.prepare()
        self.scale, self.found_inf = self.tables.one, self.tables.zero
        if scale is not None:
            self.scale = scale.double().reciprocal().to(self.device, self.wide)
        if found_inf is not None:
            self.found_inf = found_inf.to(self.device, torch.float32)
        fill_numbers(self)

    def call(self, kernel: Any) -> None:
        """Launch a kernel, a program of it for each item."""
        if self.tables.length:
            arguments = arguments_for(self)
            with on_its_device(self.device):
                launch = kernel[(self.tables.length,)]
                launch(*arguments, ALIGNED=self.aligned, BLOCK=BLOCK, **LAUNCH)

    def reduce(self, q: int) -> None:
        self.call(getattr(self.kernels, f"reduce_{self.program.whole[q]}"))
        with on_its_device(self.device):
            collect = self.kernels.collect[(len(self.members),)]
            collect(self.partial, self.tables.firsts, self.totals[q], BLOCK=BLOCK)

    def run(self, alone: bool) -> None:
        for q in range(len(self.whole) if alone else 0):
            self.reduce(q)
        self.call(self.kernels.update)
        if self.counts_steps:
            called_off = None if self.found_inf is self.tables.zero else self.found_inf
            advance(self.lookup.tensors[-1], called_off)
        self.written()
