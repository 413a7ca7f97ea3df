# Exported from book/cpu.md: edit the chapter, not this file.
"""Kernels for the CPU: the text that numba compiles, and the batch that runs it.

Derived in the chapter "A kernel for the CPU".
"""

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agrlib.batch import Batch, numbers_of, seeds_of
from agrlib.checks import with_numbers
from agrlib.compilers import NUMBA, first_call, load
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
from agrlib.threads import ALONE, Crew, Waves, guard_forks, schedule_of, waves_of, yielding

KINDS = """
INNER = dict(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
EXACT = dict(**INNER, forceinline=True)  # IEEE: a quotient by zero is no exception
"""


ADD = """
@intrinsic
def add(typing, total, term):  # in any order, so that several are added at once
    def build(context, builder, signature, arguments):
        return builder.fadd(*arguments, flags=("reassoc",))

    return types.float64(types.float64, types.float64), build
"""


TAKE = """
@intrinsic
def take(typing, counter):  # the number at an address, which goes up by one for all threads
    def build(context, builder, signature, arguments):
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, ir.IntType(64)(1), "seq_cst")

    return types.int64(types.int64), build
"""


READ = """
@intrinsic
def read(typing, counter):
    def build(context, builder, signature, arguments):
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(place, "seq_cst", 8)

    return types.int64(types.int64), build
"""


LET_OTHERS = """
@intrinsic
def let_others(typing, function):  # a C function, by its address
    def build(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.IntType(32), ()).as_pointer()
        builder.call(builder.inttoptr(arguments[0], kind), ())
        return context.get_dummy_value()

    return types.void(types.int64), build
"""


CPU_PRIMITIVES = """
@njit(**EXACT)
def sqrt(x):
    return np.sqrt(x)


@njit(**EXACT)
def maximum(x, y):
    return x if x >= y or x != x else y


@njit(**EXACT)
def where(condition, x, y):
    return x if condition else y
"""


CPU_TYPES = {
    torch.float32: ("np.float32", "{}", "{}"),
    torch.float64: ("np.float64", "F({})", "{}"),
    torch.bfloat16: ("np.uint16", "from_bfloat16({})", "to_bfloat16({})"),
    torch.float16: ("np.uint16", "from_float16({})", "to_float16({})"),
}


CPU_BFLOAT16 = """
@njit(**EXACT)
def from_bfloat16(x):
    return np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)


@njit(**EXACT)
def to_bfloat16(x):
    bits = np.float32(x).view(np.uint32)
    even = np.uint32(bits >> np.uint32(16)) & np.uint32(1)  # a tie goes to the even neighbor
    rounded = np.uint16(np.uint32(bits + np.uint32(0x7FFF) + even) >> np.uint32(16))
    return np.uint16(0x7FC0) if x != x else rounded


@njit(**EXACT)
def mix(h):
    h = np.uint32(np.uint32(h ^ np.uint32(h >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    h = np.uint32(np.uint32(h ^ np.uint32(h >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    return np.uint32(h ^ np.uint32(h >> np.uint32(16)))


@njit(**EXACT)
def to_bfloat16_stochastically(x, seed, i):
    place = np.uint32(i) * np.uint32(seed >> 32 | 1) + np.uint32(seed)
    noise = mix(np.uint32(place)) & np.uint32(0xFFFF)
    bits = np.float32(x).view(np.uint32)
    rounded = np.uint16(np.uint32(bits + noise) >> np.uint32(16))
    return rounded if abs(x) < np.float32(np.inf) else to_bfloat16(x)
"""


CPU_FLOAT16 = """
@intrinsic
def from_float16(typing, x):
    def build(context, builder, signature, arguments):
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), build


@intrinsic
def to_float16(typing, x):
    def build(context, builder, signature, arguments):
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), build
"""


CPU_POWER = """
@njit(**EXACT)
def power(x, y):  # x >= 0, y > 0, through the logarithm in double precision
    z = np.float64(x)
    bits = z.view(np.int64)
    exponent = (bits >> 52) - 1023
    m = np.int64((bits & 0xFFFFFFFFFFFFF) | 0x3FF0000000000000).view(np.float64)  # in [1, 2)
    large = m > 1.4142135623730951
    m = 0.5 * m if large else m
    s = (m - 1.0) / (m + 1.0)  # log m = 2 atanh s, |s| < 0.172
    q = s * s
    series = 1 / 9 + q * (1 / 11 + q * (1 / 13 + q / 15))
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * series)))
    log2 = np.float64(exponent + large) + 2.8853900817779268 * s * series
    product = np.float64(y) * log2
    product = max(min(product, 1000.0), -1000.0)
    whole = np.floor(product + 0.5)
    r = 0.6931471805599453 * (product - whole)  # |r| < 0.347
    e = 1 / 120 + r * (1 / 720 + r * (1 / 5040 + r * (1 / 40320 + r / 362880)))
    e = 1.0 + r * (1.0 + r * (1 / 2 + r * (1 / 6 + r * (1 / 24 + r * e))))
    scale = np.int64((np.int64(whole) + 1023) << 52).view(np.float64)
    result = F(e * scale)
    result = F(0) if x == F(0) else result
    return result if x < F(np.inf) else x
"""


def cpu_load(program: Program, role: int) -> str:
    """Return the expression of entry i of the parameter (0), the gradient (1) or a state tensor."""
    dtype = program.dtypes[role]
    if dtype == torch.float32 and program.wide == "float64":
        return f"F(a{role}[i])"
    return CPU_TYPES[dtype][1].format(f"a{role}[i]")


def cpu_array(program: Program, role: int, address: str) -> str:
    return f"a{role} = carray(pointer({address}, {CPU_TYPES[program.dtypes[role]][0]}(0)), (n,))"


def cpu_sum(program: Program, j: int) -> str:
    """Return the function that adds up the summand of stage j over n entries."""
    arguments = ", ".join(["at", "n", "scale", *context(program, j)])
    body = [
        f"x = scale * {cpu_load(program, 1)}",
        *shape(program, j),
        f"total = add(total, np.float64(summand_{j}(x)))",
    ]
    return (
        f"@njit(**INNER)\ndef sum_{j}({arguments}):\n"
        f"    {cpu_array(program, 1, 'at')}\n    total = 0.0\n    for i in range(n):\n"
        f"{indent(body, 2)}\n    return total"
    )


def row_totals(program: Program, upto: int, call: str) -> list[str]:
    """Return the lines that compute the totals of the row at hand."""
    lines = []
    for j, stage in enumerate(program.stages[:upto]):
        if stage.over == "row":
            total = f"F({call.format(j=j, context=', '.join(context(program, j)))})"
            lines.append(f"total_{j} = F(0)")
            lines += [
                f"if covers_{j}:",
                f"    total_{j} = {finished(program, j, total, 'F(cols)')}",
            ]
    return lines


def cpu_reduce(program: Program, j: int) -> str:
    """Return the function that adds up the summand of stage j over some rows."""
    arguments = ", ".join(["grad", "rows", "cols", "scale", *context(program, j, rows=False)])
    size = program.dtypes[1].itemsize
    rest = ", ".join(["scale", *context(program, j)])
    body = [
        f"at = grad + {size} * r * cols",
        *row_totals(program, j, "sum_{j}(at, cols, scale, {context})"),
        f"total += sum_{j}(at, cols, {rest})",
    ]
    return (
        f"@njit(**INNER)\ndef reduce_{j}({arguments}):\n"
        f"    total = 0.0\n    for r in range(rows):\n{indent(body, 2)}\n    return total"
    )


def cpu_store(program: Program, role: int, result: str) -> str:
    """Return the line that stores a result as entry i of the parameter or of a state tensor."""
    form = CPU_TYPES[program.dtypes[role]][2]
    if role == 0 and program.stochastic:
        form = "to_bfloat16_stochastically({}, seed, first + i)"
    return f"a{role}[i] = {form.format(result)}"


def cpu_entry(program: Program) -> list[str]:
    """Return the lines that update entry i."""
    states = range(2, len(program.dtypes))
    results = ["p", *(f"s{role}" for role in states)]
    inputs = ["x", "p", *(cpu_load(program, role) for role in states), *program.scalars]
    x = f"scale * {cpu_load(program, 1)}"
    start = [f"x = {x}", *shape(program, len(program.stages)), "x = sign * x"]
    return [
        *(start if program.stages else [f"x = sign * ({x})"]),
        f"p = {cpu_load(program, 0)}",
        *update_lines(program),
        f"{', '.join(results)}{',' if len(results) == 1 else ''} = rule({', '.join(inputs)})",
        *(cpu_store(program, r, name) for r, name in zip((0, *states), results, strict=True)),
    ]


def cpu_row(program: Program) -> str:
    """Return the function that updates n entries in a row."""
    roles, numbers = range(len(program.dtypes)), ["sign", "decays", "rate", *program.scalars]
    arguments = [*(f"at_{role}" for role in roles), "n", "scale", "seed", "first"]
    arguments += [*context(program, len(program.stages)), "numbers"]
    arrays = [cpu_array(program, role, f"at_{role}") for role in roles]
    unpacked = [f"{name} = numbers[{i}]" for i, name in enumerate(numbers)]
    unpacked[1] = "decays = numbers[1] != F(0)"
    lines = [*arrays, *unpacked, "for i in range(n):"]
    return (
        f"@njit(**INNER)\ndef update_row({', '.join(arguments)}):\n"
        f"{indent(lines, 1)}\n{indent(cpu_entry(program), 2)}"
    )


def cpu_update(program: Program) -> str:
    """Return the function that updates some rows."""
    stages, roles = len(program.stages), range(len(program.dtypes))
    arguments = ["table", "t", "first", "rows", "cols", "scale", "seed"]
    arguments += [*context(program, stages, rows=False), "numbers"]
    tables = [f"table_{r} = table[{r}, t]" for r in roles]
    addresses = [f"table_{r} + {program.dtypes[r].itemsize} * begin" for r in roles]
    call = [*addresses, "cols", "scale", "seed", "begin", *context(program, stages), "numbers"]
    body = [
        "begin = first + r * cols",
        *row_totals(program, stages, f"sum_{{j}}({addresses[1]}, cols, scale, {{context}})"),
        f"update_row({', '.join(call)})",
    ]
    lines = [*tables, "for r in range(rows):"]
    return (
        f"@njit(**INNER)\ndef update({', '.join(arguments)}):\n"
        f"{indent(lines, 1)}\n{indent(body, 2)}"
    )


def cpu_item(program: Program) -> list[str]:
    """Return the lines that look up item k, what its tensor is part of, and the constants."""
    stages = range(len(program.stages))
    names = itertools.chain.from_iterable(constants_of(program, j) for j in stages)
    return [
        "t, first, rows, cols = items[k, 0], items[k, 1], items[k, 2], items[k, 3]",
        *(f"covers_{j} = flags[{j}, t]" for j in stages),
        *(f"{name} = constants[{i}]" for i, name in enumerate(names)),
    ]


def cpu_phase(program: Program, q: int) -> list[str]:
    """Return the lines that sum the q-th whole stage over item k, or finish its total."""
    j, size = program.whole[q], program.dtypes[1].itemsize
    call = [f"table[1, t] + {size} * first", "rows", "cols", "scale"]
    call += context(program, j, rows=False)
    return [
        f"if phase == {q}:",
        f"    partial[k] = reduce_{j}({', '.join(call)}) if covers_{j} else 0.0",
        "    return",
        f"if phase == WHOLE and covers_{j}:",
        f"    totals[{q}, t] = reduce_{j}({', '.join(call)})",
        f"total_{j} = {finished(program, j, f'F(totals[{q}, t])', f'F(counts[{q}, t])')}",
    ]


def cpu_work(program: Program) -> str:
    """Return the function that does one item of work: one phase of one part of one tensor."""
    sums, lines = len(program.whole), cpu_item(program)
    for q in range(sums):
        lines += cpu_phase(program, q)
    call = ["table", "t", "first", "rows", "cols", "scale", "seeds[t]"]
    call += [*context(program, len(program.stages), rows=False), "numbers[classes[t]]"]
    lines.append(f"update({', '.join(call)})")
    return (
        f"SUMS = {sums}  # the phases before the update; a small tensor goes through all at once\n"
        f"WHOLE = {sums + 1}\n\n\n@njit(**INNER)\ndef work(phase, k, items, table, "
        "flags, classes, numbers, totals, counts, constants, scale, seeds, partial):\n"
        + indent(lines, 1)
    )


CPU_RUN = """
@njit(nogil=True, error_model="numpy", cache=True)
def run(leads, board, rest, waves, claims, order, steps, items, table, flags, classes, numbers,
        totals, counts, constants, scale, seeds, partial):
    at = board.ctypes.data
    begun, patience = at + 24 * len(waves), 1 << 14
    if leads:
        take(begun)
    while read(begun) == 0 and patience > 0:
        let_others(rest)
        patience -= 1
    if read(begun) == 0:  # whoever wants the step was interrupted before it began
        return
    for w in range(len(waves)):
        phase, first, count = waves[w, 0], waves[w, 1], waves[w, 2]
        next, done, gate = at + 24 * w, at + 24 * w + 8, at + 24 * w + 16
        claim = take(next)
        while claim < count:
            for k in range(claims[first + claim], claims[first + claim + 1]):
                work(phase, order[k], items, table, flags, classes, numbers, totals, counts,
                     constants, scale, seeds, partial)
            if take(done) == count - 1:
                if phase < 0:
                    for i in range(len(steps)):
                        number = carray(pointer(steps[i], np.float32(0)), (1,))
                        number[0] += np.float32(1)
                elif phase < SUMS:  # in the order of the items, whoever has summed them
                    for k in range(claims[first], claims[first + count]):
                        totals[phase, items[order[k], 0]] += partial[order[k]]
                take(gate)
            claim = take(next)
        while read(gate) == 0:
            let_others(rest)
"""


def cpu_head(program: Program) -> list[str]:
    """Return the part of a kernel's text that comes before the rule: types, roots and powers."""
    counters = TAKE, READ, LET_OTHERS
    parts = [NUMBA, KINDS, ADD, *counters, CPU_PRIMITIVES, f"F = np.{program.wide}"]
    if torch.bfloat16 in program.dtypes:
        parts.append(CPU_BFLOAT16)
    if torch.float16 in program.dtypes:
        parts.append(CPU_FLOAT16)
    scalar_power = "@njit(**EXACT)\ndef power(x, y):\n    return x**y"
    general = CPU_POWER.strip("\n") if program.wide == "float32" else scalar_power
    return [*parts, power_text(program, "@njit(**EXACT)", general)]


def cpu_source(program: Program) -> str:
    """Return the text of a CPU kernel: numba compiles it, all cores run it.

    Args:
        program: what the kernel computes.

    Example:
        >>> from agrlib.sgd import descend
        >>> dtypes = (torch.float32, torch.float32)
        >>> text = cpu_source(Program(descend, (), (), "rule", "", dtypes, False))
        >>> print(text[text.index("        x = ") : text.index("a0[i] =")].rstrip())
                x = sign * (scale * a1[i])
                p = a0[i]
                p, = rule(x, p, the_lr)

    Source: chapter "A kernel for the CPU".
    """
    parts = cpu_head(program)
    parts += functions(program, "@njit(**EXACT)", exact_division=False)
    parts += [cpu_sum(program, j) for j, stage in enumerate(program.stages) if stage.over]
    parts += [cpu_reduce(program, j) for j in program.whole]
    parts += [cpu_row(program), cpu_update(program), cpu_work(program), CPU_RUN]
    return "\n\n\n".join(part.strip("\n") for part in parts if part) + "\n"


READ_STEPS = """
@njit(cache=True)
def read_steps(addresses, values):
    alike = True
    for i in range(len(addresses)):
        values[i] = carray(pointer(addresses[i], np.float32(0)), (1,))[0]
        alike = alike and values[i] == values[0]
    return alike
"""


def classes_in(steps: np.ndarray, alike: bool) -> tuple[list[float], Any]:
    """Return the different numbers of steps, and which of them each tensor has."""
    if alike:
        return steps[:1].tolist(), 0
    known, place = np.unique(steps, return_inverse=True)
    return known.tolist(), place


def steps_for_rule(batch: "CPUBatch", members: slice) -> np.ndarray:
    """Return the number of this step for each tensor; a rule that counts none asks for 1 or 2."""
    if batch.method.counts_steps:
        return batch.steps[members] + 1
    return np.where(batch.new[members], 1, 2)


def seed_noise(batch: "CPUBatch", group: Any, members: slice) -> None:
    """Say what the rounding noise of a group's tensors starts from in this step."""
    own, steps = batch.members[members], batch.steps[members] + 1
    batch.seeds[members] = seeds_of(group, own, steps, batch.device)


def fill_numbers(batch: "CPUBatch", alike: bool) -> None:
    """Compute the scalars of all groups, one row for each number of steps that occurs in one."""
    rows: list[list[Any]] = []
    for g, members in batch.spans:
        group = with_numbers(batch.method.param_groups[g], float)
        if batch.program.stochastic:
            seed_noise(batch, group, members)
        known, place = classes_in(steps_for_rule(batch, members), alike)
        batch.classes[members] = len(rows) + place
        given = batch.method, batch.program.decay, group, float(group["lr"])
        rows += [numbers_of(*given, step) for step in known]
    batch.numbers = np.array(rows, batch.wide)


def arguments_for(batch: "CPUBatch", waves: Waves) -> tuple[Any, ...]:
    """Return the arguments of one call of a kernel, with a board of its own."""
    board = np.zeros(3 * len(waves.phases) + 1, np.int64)
    work = *waves[:3], batch.step_addresses, batch.schedule.items
    tensors = batch.addresses, batch.covers, batch.classes, batch.numbers
    sums = batch.totals.numpy(), batch.counts.numpy(), batch.constants
    return board, yielding(), *work, *tensors, *sums, batch.scale, batch.seeds, batch.partial


def compile_kernels(batch: "CPUBatch") -> None:
    """Call both kernels of a batch with nothing to do."""
    none, nothing = batch.addresses[0, :0], batch.steps[:0]
    first_call(batch.kernel, lambda: batch.call(waves_of([], batch.schedule.sizes)))
    first_call(batch.read_steps, lambda: batch.read_steps(none, nothing))


class CPUBatch(Batch):
    """A batch whose kernel numba compiles."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        guard_forks()
        self.wide, size = np.dtype(self.program.wide).type, len(self.members)
        self.kernel = load(cpu_source(self.program), self.program.rule.__name__).run
        self.read_steps = load("\n\n".join((NUMBA, READ_STEPS)), "steps").read_steps
        self.seeds, self.classes = np.zeros(size, np.int64), np.zeros(size, np.int64)
        self.numbers = np.zeros((1, 3 + len(self.program.scalars)), self.wide)
        self.constants = np.array([c for f in self.chain for c in f.constants], self.wide)
        self.scale, self.cores = self.wide(1), 0
        self.steps = np.zeros(size * self.counts_steps, np.float32)
        self.place(self.lookup.addresses)
        self.arrange()
        compile_kernels(self)

    def arrange(self) -> None:
        """Cut the work for the threads that torch may use now."""
        if (cores := torch.get_num_threads()) != self.cores:
            self.cores, sums = cores, len(self.whole)
            self.schedule = schedule_of(self.layout.parts, self.by_row, sums, cores)
            self.partial = np.zeros(len(self.schedule.items))

    def place(self, addresses: np.ndarray) -> None:
        self.addresses = addresses
        self.step_addresses = addresses[-1] if self.counts_steps else addresses[0, :0]

    def count(self, scale: Tensor | None, found_inf: Tensor | None) -> None:
        self.arrange()
        self.scale = self.wide(1 if scale is None else 1 / scale.item())
        alike = self.read_steps(self.step_addresses, self.steps)
        if not self.method.counts_steps:
            alike = not self.new.any()
        fill_numbers(self, alike)

    def call(self, waves: Waves) -> None:
        """Do the work together with others, where there is enough of it."""
        arguments = arguments_for(self, waves)
        others = min(self.cores - 1, waves.entries // ALONE)
        if others > 0:
            Crew.offer(others, (self.kernel, False, *arguments))
        self.kernel(True, *arguments)

    def reduce(self, q: int) -> None:
        self.totals[q] = 0
        self.call(self.schedule.together[q])

    def run(self, alone: bool) -> None:
        if alone:
            self.totals.zero_()
        self.call(self.schedule.alone if alone else self.schedule.together[-1])
        self.written()
