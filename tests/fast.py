"""The fast path beside the eager reference: one list of runs for the CPU, the interpreter, a GPU.

A kernel's text is put together from parts that do not look at each other: the rule, the functions
of each transform, and lines that depend on nothing but the number of states and scalars, on what a
transform sums over and on its place. So the chains below meet every rule with every transform, and
every transform with every other in both orders, without meeting every triple.
"""

import copy
import io
import itertools
import math
import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from contract import (
    OPTIMIZERS,
    TRANSFORMS,
    Entry,
    bits,
    members,
    parameters,
    random_like,
    same,
    step,
    train,
)
from contract import seed as set_seed
from torch import Tensor

import agrlib
from agrlib import compilers, cpu, eager, gpu, threads

ENTRIES = {entry.name: entry for entry in OPTIMIZERS}
STEPS = 100
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}
SMALL = [(1,), (17,), (123, 5), (), (0,), (2, 3, 2, 2)]
SMALLER = [(17,), (2, 3)]  # the interpreter takes 10 ms for each tensor of a step
CHUNK = threads.CHUNK
LARGE = [(CHUNK - 1,), (CHUNK,), (CHUNK + 1,), (threads.SMALL + 1,), (3, CHUNK + 1), (257, 65)]


def gentle(entry: Entry) -> dict[str, Any]:
    """The entry's options with steps of ordinary size.

    With larger ones, what differs by one rounding grows: that is the method's, not the kernel's.
    """
    options = {**entry.kwargs, "lr": 0.1 * entry.kwargs["lr"]}
    return {**options, "eps": 0.1} if "eps" in options else options


def chains_of(number: int) -> list[list[Any]]:
    """The chains of one optimizer: all transforms, two by two, each once.

    As players are paired in a tournament: in each of its rounds everyone meets someone, and when
    all rounds are over everyone has met all others; half of the optimizers take the other order.
    """
    players = list(range(len(TRANSFORMS))) + [None] * (len(TRANSFORMS) % 2)
    last = len(players) - 1
    turn = number % last
    pairs = [(turn, last)]
    pairs += [((turn + i) % last, (turn - i) % last) for i in range(1, last // 2 + 1)]
    order = -1 if number // last % 2 else 1
    return [[TRANSFORMS[i] for i in pair[::order] if players[i] is not None] for pair in pairs]


CHAINS = {entry.name: chains_of(k) for k, entry in enumerate(OPTIMIZERS)}


class Way(NamedTuple):
    """How a run is made: through kernels or eagerly, and where."""

    fused: bool
    device: str = "cpu"

    def parameters(self, dtype: torch.dtype, shapes: Iterable[tuple[int, ...]]) -> list[Any]:
        return parameters(dtype, shapes, device=self.device)

    def optimizer(self, entry: Entry, params: Any, **more: Any) -> Any:
        made = entry.cls(params, fused=self.fused, **{**gentle(entry), **more})
        return guard(made) if self.fused else made


def guard(optimizer: Any) -> Any:
    """Let every use of the eager rule raise."""
    optimizer.never_eager = True
    return optimizer


def update(optimizer: Any, *arguments: Any, way: Any = eager.update) -> None:
    if getattr(optimizer, "never_eager", False):
        raise TypeError("the eager rule ran")
    way(optimizer, *arguments)


eager.update = update


def stream(optimizer: Any, steps: int, seed: int = 1) -> Iterator[list[Tensor]]:
    """Random gradients, laid out as the parameters are."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        params = members(optimizer)
        yield [torch.empty_like(p).copy_(random_like(p, generator)) for p in params]


def check_ran(optimizer: Any) -> None:
    """Kernels of the right kind have updated every parameter that has a gradient."""
    batches = optimizer.__dict__["_plan"].batches
    taken = [param for batch in batches for param in batch.layout.params]
    assert {id(p) for p in taken} == {id(p) for p in members(optimizer) if p.grad is not None}
    assert len(taken) == len(set(map(id, taken))) > 0
    for batch in batches:
        triton = batch.device.type == "cuda" or compilers.interpreting()
        assert type(batch) is (gpu.GPUBatch if triton else cpu.CPUBatch)


# --- comparison ---------------------------------------------------------------------------------


def kind(value: Tensor) -> Tensor:
    """NaN, an infinity of one sign or the other, zero or any other number."""
    value = torch.view_as_real(value) if value.is_complex() else value
    signs = torch.where(value.isinf(), 3.0 * value.sign(), (value != 0).double())
    return torch.where(value.isnan(), 2.0, signs)


def error(value: Tensor, reference: Tensor) -> float:
    """The largest |a - b| / (|b| + 0.1), infinite where one is no number and the other is."""
    a, b = (torch.view_as_real(x) if x.is_complex() else x for x in (value, reference))
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    finite = b.isfinite()
    if not torch.equal(kind(a)[~finite], kind(b)[~finite]) or not a[finite].isfinite().all():
        return math.inf
    return ((a - b).abs() / (b.abs() + 0.1))[finite].max().item() if finite.any() else 0.0


def tensors(optimizer: Any) -> dict[str, Tensor]:
    """Every parameter and every tensor of the state, named."""
    found = {}
    for i, param in enumerate(members(optimizer)):
        found[f"{i}"] = param.detach()
        found.update({f"{i}.{k}": v for k, v in optimizer.state.get(param, {}).items()})
    return found


def compare(fast: Any, eager: Any) -> dict[str, Any]:
    """The largest errors of parameters and state; all else must be the same."""
    ours, theirs = tensors(fast), tensors(eager)
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        other = theirs[name]
        assert (value.shape, value.dtype) == (other.shape, other.dtype), name
        if name.endswith(".step"):
            assert value.item() == other.item(), name
        else:
            assert (value.stride(), value.device) == (other.stride(), other.device), name
    errors = {name: error(value, theirs[name]) for name, value in ours.items()}
    return dict(
        params=max(v for name, v in errors.items() if "." not in name),
        state=max([v for name, v in errors.items() if "." in name], default=0.0),
        kinds=all(torch.equal(kind(v.cpu()), kind(theirs[n].cpu())) for n, v in ours.items()),
        exact=all(bits(v) == bits(theirs[name]) for name, v in ours.items()),
    )


class Case(NamedTuple):
    """A run that is made twice, and how well both must agree."""

    run: Callable[[Way], Any]
    tolerance: float
    exact: bool = False
    steps: int = 0

    def measure(self, device: str = "cpu") -> dict[str, Any]:
        fast, eager = self.run(Way(True, device)), self.run(Way(False, device))
        check_ran(fast)
        assert not eager.__dict__.get("_plan")
        return compare(fast, eager)

    def check(self, measured: dict[str, Any]) -> None:
        assert measured["params"] <= self.tolerance, measured
        assert measured["state"] <= self.tolerance, measured
        assert measured["exact"] or not self.exact, measured


def has_no_root(entry: Entry, chain: Iterable[Any]) -> bool:
    """Whether a run is exact: torch's root of float32 may be one rounding off, on the CPU."""
    rootless = {agrlib.agr, agrlib.centralize}
    return entry.cls is agrlib.SGD and all(
        f in rootless or repr(f).startswith("clip_value") for f in chain
    )


# --- parity -------------------------------------------------------------------------------------


def parity(
    entry: Entry,
    chain: list[Any],
    dtype: torch.dtype = torch.float32,
    shapes: Iterable[tuple[int, ...]] = SMALL,
    steps: int = STEPS,
) -> Case:
    def run(way: Way) -> Any:
        optimizer = way.optimizer(entry, way.parameters(dtype, shapes), transforms=chain)
        train(optimizer, stream(optimizer, steps))
        return optimizer

    return Case(run, TOLERANCE[dtype], has_no_root(entry, chain), steps)


def name_of(entry: Entry, chain: list[Any], dtype: torch.dtype = torch.float32) -> str:
    return f"{entry.name} {chain} {str(dtype).removeprefix('torch.')}"


def combinations() -> Iterator[tuple[Entry, list[Any], torch.dtype]]:
    """What is run: all rules alone and with their chains, each also once in double precision.

    Every pair of transforms is the chain of some rule, in both orders. With the shortest rule run
    those besides whose steps must be exact, and each transform twice.
    """
    for number, entry in enumerate(OPTIMIZERS):
        yield entry, [], torch.float32
        for chain in CHAINS[entry.name]:
            yield entry, chain, torch.float32
        yield entry, CHAINS[entry.name][number // 2 % 3], torch.float64
    for name in ("SGD", "AdamW"):
        yield ENTRIES[name], [], torch.float64
    for pair in itertools.product(TRANSFORMS, repeat=2):
        if pair[0] is pair[1] or has_no_root(ENTRIES["SGD"], pair):
            yield ENTRIES["SGD"], list(pair), torch.float32


def large() -> Iterator[tuple[Entry, list[Any], torch.dtype]]:
    """Chains for tensors of many parts; a kernel of the list above serves for these too."""
    clip = next(f for f in TRANSFORMS if f.over == "all")
    centralized = [agrlib.centralize, agrlib.agr]
    for name, chain in (
        ("SGD-heavy-ball", centralized),
        ("AdamW", []),
        ("SGD", [agrlib.centralize, clip]),
        ("SGD", [agrlib.normalize, agrlib.centralize]),
        ("SGD", [agrlib.centralize, agrlib.centralize]),
        ("Adan", [agrlib.agr]),
    ):
        yield ENTRIES[name], chain, torch.float32
    yield ENTRIES["AdamW"], centralized, torch.float64


def put(*values: float) -> Callable[[Tensor], Tensor]:
    def write(grad: Tensor) -> Tensor:
        flat = grad.view(-1)
        for i, value in enumerate(values):
            flat[-i] = value
        return grad

    return write


SPECIAL = {
    "zero": lambda grad: grad.zero_(),
    "nan": put(math.nan),
    "inf": put(math.inf),
    "-inf": put(-math.inf),
    "both": put(math.inf, -math.inf),
    "all inf": lambda grad: grad.fill_(math.inf),
    "huge": lambda grad: grad.mul_(1e30 if grad.dtype == torch.float32 else 1e200),
    "tiny": lambda grad: grad.mul_(1e-30 if grad.dtype == torch.float32 else 1e-200),
    "nan in one": lambda grad: grad.fill_(math.nan) if grad.dim() > 1 else grad,
}


def special(entry: Entry, chain: list[Any], dtype: torch.dtype, pattern: str) -> Case:
    """A step with gradients that are no ordinary numbers, and one with ordinary ones."""

    def run(way: Way) -> Any:
        params = way.parameters(dtype, [(1,), (6,), (2, 3)])
        optimizer = way.optimizer(entry, params, transforms=chain)
        for i, grads in enumerate(stream(optimizer, 2)):
            step(optimizer, grads if i else map(SPECIAL[pattern], grads))
        return optimizer

    return Case(run, TOLERANCE[dtype])


def measure_special(
    entry: Entry, chain: list[Any], dtype: torch.dtype, device: str = "cpu"
) -> list[str]:
    """The patterns for which both ways do not agree."""
    wrong = []
    for pattern in SPECIAL:
        case = special(entry, chain, dtype, pattern)
        measured = case.measure(device)
        if not measured["kinds"] or max(measured["params"], measured["state"]) > case.tolerance:
            wrong.append(f"{pattern}: {measured}")
    return wrong


# --- what happens between two steps -------------------------------------------------------------

SCENARIOS: dict[str, Callable[[Entry, Way], Any]] = {}
METHODS = [ENTRIES["AdamW"], ENTRIES["SGD-heavy-ball"]]


def scenario(function: Callable[[Entry, Way], Any]) -> Callable[[Entry, Way], Any]:
    SCENARIOS[function.__name__] = function
    return function


def go(optimizer: Any, steps: int = 3, seed: int = 1) -> Any:
    train(optimizer, stream(optimizer, steps, seed))
    return optimizer


def start(entry: Entry, way: Way, **more: Any) -> Any:
    """An optimizer after two steps."""
    return go(way.optimizer(entry, way.parameters(torch.float32, SMALLER), **more), 2)


@scenario
def a_scheduler_sets_lr(entry, way):
    optimizer = start(entry, way)
    plan = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.3)
    for grads in stream(optimizer, 5, seed=2):
        step(optimizer, grads)
        plan.step()
    return optimizer


@scenario
def lr_is_a_tensor(entry, way):
    lr = torch.tensor(entry.kwargs["lr"], device=way.device)
    optimizer = start(entry, way, lr=lr)
    lr.mul_(0.1)
    return go(optimizer)


@scenario
def capturable(entry, way):
    return go(start(entry, way, capturable=True))


@scenario
def groups_differ_in_their_options(entry, way):
    params = way.parameters(torch.float32, [(17,), (2, 3), (5,), (4,)])
    own = [{}, dict(weight_decay=0.0), dict(maximize=True), dict(lr=0.01, weight_decay=0.3)]
    groups = [dict(params=[p], **more) for p, more in zip(params, own, strict=True)]
    return go(way.optimizer(entry, groups), 5)


@scenario
def groups_differ_in_their_chains(entry, way):
    params = way.parameters(torch.float32, [(17,), (2, 3), (5,)])
    chains = [[agrlib.agr], [agrlib.centralize, agrlib.agr], []]
    groups = [dict(params=[p], transforms=c) for p, c in zip(params, chains, strict=True)]
    return go(way.optimizer(entry, groups))


@scenario
def a_norm_spans_groups_and_types(entry, way):
    clip, kinds = agrlib.clip_global_norm(0.5), [torch.float32, torch.float64]
    params = [way.parameters(kind, [(17,), (2, 3)]) for kind in kinds]
    groups = [
        dict(params=params[0], transforms=[clip]),
        dict(params=params[1], transforms=[agrlib.agr, clip]),
        dict(params=way.parameters(torch.float32, [(5,)])),
    ]
    return go(way.optimizer(entry, groups))


@scenario
def gradients_come_late_and_pause(entry, way):
    params = way.parameters(torch.float32, [(17,), (2, 3), (4,)])
    optimizer = way.optimizer(entry, params, transforms=[agrlib.agr])
    for t, grads in enumerate(stream(optimizer, 6)):
        step(optimizer, [grads[0], grads[1] if t > 1 else None, grads[2] if t % 2 else None])
    return optimizer


@scenario
def a_parameter_is_frozen_for_a_while(entry, way):
    optimizer = start(entry, way)
    first = members(optimizer)[0]
    first.requires_grad_(False)
    for grads in stream(optimizer, 2, seed=2):
        step(optimizer, [None, *grads[1:]])
    first.requires_grad_(True)
    return go(optimizer)


@scenario
def a_group_is_added(entry, way):
    optimizer = start(entry, way)
    [param] = way.parameters(torch.float32, [(4,)])
    optimizer.add_param_group(dict(params=[param], lr=0.01, weight_decay=0.0))
    return go(optimizer)


@scenario
def data_is_replaced(entry, way):
    optimizer = start(entry, way)
    for param in members(optimizer):
        param.data = 0.5 * param.data
    return go(optimizer)


@scenario
def the_state_is_replaced(entry, way):
    """By other tensors under its keys, and by other memory under its tensors."""
    optimizer = start(entry, way)
    for state in optimizer.state.values():
        for key, value in state.items():
            state[key] = value.clone() if key == "step" else 0.5 * value
    go(optimizer)
    for state in optimizer.state.values():
        for value in state.values():
            value.data = value.data.clone()
    return go(optimizer, seed=3)


@scenario
def the_state_changes_its_type(entry, way):
    optimizer = start(entry, way)
    for group in optimizer.param_groups:
        group["state_dtype"] = torch.float64
    optimizer.load_state_dict(optimizer.state_dict())
    return go(optimizer)


@scenario
def the_state_is_forgotten(entry, way):
    optimizer = start(entry, way)
    optimizer.state.clear()
    return go(optimizer)


@scenario
def options_change(entry, way):
    optimizer = start(entry, way)
    changes = dict(lr=0.004, weight_decay=0.0, maximize=True)
    for key, value in changes.items():
        optimizer.param_groups[0][key] = value
        go(optimizer, 1)
    for key, value in dict(betas=(0.5, 0.6), momentum=0.3, eps=0.2).items():
        if key in optimizer.param_groups[0]:
            optimizer.param_groups[0][key] = value
    return go(optimizer)


@scenario
def the_rule_changes(entry, way):
    key, value = ("amsgrad", True) if "betas" in entry.kwargs else ("nesterov", True)
    optimizer = start(entry, way)
    optimizer.param_groups[0].update({key: value, "dampening": 0})
    return go(optimizer)


@scenario
def the_chain_changes(entry, way):
    optimizer = start(entry, way)
    optimizer.param_groups[0]["transforms"] = [agrlib.agr]
    return go(optimizer)


def step_in_place(optimizer, steps=2, seed=2):
    """Steps whose gradients lie where the last ones lay."""
    for grads in stream(optimizer, steps, seed):
        for param, grad in zip(members(optimizer), grads, strict=True):
            param.grad.copy_(grad)
        optimizer.step()
    return optimizer


@scenario
def gradients_keep_their_memory(entry, way):
    return step_in_place(start(entry, way), 3)


@scenario
def reloaded(entry, way):
    optimizer = start(entry, way)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    params = [torch.nn.Parameter(param.detach().clone()) for param in members(optimizer)]
    other = way.optimizer(entry, params)
    other.load_state_dict(torch.load(file, weights_only=True))
    return go(other)


@scenario
def copied_and_pickled(entry, way):
    optimizer = start(entry, way)
    copied = copy.deepcopy(optimizer)
    assert not {id(p) for p in members(copied)} & {id(p) for p in members(optimizer)}
    go(copied)
    kept = [param.detach().clone() for param in members(copied)]
    thawed = pickle.loads(pickle.dumps(copied))
    go(thawed, seed=3)
    assert same([param.detach() for param in members(copied)], kept)
    return thawed


@scenario
def only_the_step_moves(entry, way):
    optimizer = step_in_place(start(entry, way))
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].data = state["step"].data + 5
    return step_in_place(optimizer, 3)


@scenario
def a_state_gets_another_name(entry, way):
    optimizer = step_in_place(start(entry, way))
    for state in optimizer.state.values():
        state["saved"] = state.pop(next(key for key in state if key != "step"))
    return step_in_place(optimizer)


@scenario
def states_change_places(entry, way):
    optimizer = go(way.optimizer(entry, way.parameters(torch.float32, [(4,), (4,)])))
    one, two = members(optimizer)
    first, second = optimizer.state.pop(one), optimizer.state.pop(two)
    optimizer.state[two], optimizer.state[one] = first, second
    return step_in_place(optimizer)


def misplaced(tensor: Tensor) -> Tensor:
    """The same numbers where no 16 bytes begin."""
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    room[1:] = tensor.reshape(-1)
    moved = room[1:].view(tensor.shape)
    assert moved.data_ptr() % 16
    return moved


@scenario
def memory_is_laid_out_in_many_ways(entry, way):
    """Not aligned, channels last, transposed, and axes of length 1 whose stride is anything."""
    shapes = [(5,), (2, 3), (2, 3, 2, 2), (4, 6), (3, 1, 2)]
    plain = [param.detach() for param in way.parameters(torch.float32, shapes)]
    laid = [
        misplaced(plain[0]),
        misplaced(plain[1]),
        plain[2].to(memory_format=torch.channels_last),
        plain[3].t().contiguous().t(),
        plain[4].as_strided((3, 1, 2), (2, 7, 1)),
    ]
    optimizer = way.optimizer(entry, [torch.nn.Parameter(x) for x in laid])
    for grads in stream(optimizer, 3):
        grads[4] = grads[4].contiguous()
        step(optimizer, grads)
    return optimizer


@scenario
def rows_are_laid_out_in_many_ways(entry, way):
    plain = [x.detach() for x in way.parameters(torch.float32, [(2, 3), (2, 3, 2, 2), (1, 4)])]
    laid = [misplaced(plain[0]), plain[1].to(memory_format=torch.channels_last), plain[2]]
    params = [torch.nn.Parameter(x) for x in laid]
    return go(way.optimizer(entry, params, transforms=[agrlib.centralize, agrlib.agr]))


def happens(entry: Entry, name: str) -> Case:
    exact = entry.cls is agrlib.SGD and name != "a_norm_spans_groups_and_types"
    return Case(lambda way: SCENARIOS[name](entry, way), TOLERANCE[torch.float32], exact)


# --- half precision -----------------------------------------------------------------------------


def halves(
    entry: Entry,
    dtype: torch.dtype,
    state_dtype: torch.dtype | None,
    chain: list[Any],
    device: str = "cpu",
) -> dict[str, Any]:
    """Whether three fast steps are those in float32, rounded once each."""
    shapes = [(17,), (2, 3), (1,)]

    def run(kind: torch.dtype, **more: Any) -> Any:
        narrow = parameters(dtype, shapes, device=device)
        params = [torch.nn.Parameter(p.detach().to(kind)) for p in narrow]
        return Way(True, device).optimizer(entry, params, transforms=chain, **more)

    half, single = run(dtype, state_dtype=state_dtype), run(torch.float32)
    for grads in stream(half, 3):
        step(half, grads)
        step(single, [grad.float() for grad in grads])
        check_ran(half)
        for name, value in tensors(single).items():
            kept = state_dtype if "." in name and state_dtype else dtype
            other = tensors(half)[name]
            if not name.endswith(".step"):
                assert other.dtype == kept, name
                value.copy_(value.to(kept))
            assert torch.equal(other.float(), value), name
    return dict(params=0.0, state=0.0, kinds=True, exact=True)


def near(dtype: torch.dtype) -> float:
    """One rounding of a half-precision number, in terms of `error`."""
    return torch.finfo(dtype).eps


def beside_eager(entry: Entry, dtype: torch.dtype, chain: list[Any], **more: Any) -> dict[str, Any]:
    """Single steps of both ways from the same numbers: one rounding apart at most, and seldom."""
    shapes = [(123, 5), (17,), (1,)]
    ways = [Way(True), Way(False)]
    pair = []
    for way in ways:
        set_seed(0)
        pair.append(way.optimizer(entry, way.parameters(dtype, shapes), transforms=chain, **more))
    worst, equal = 0.0, []
    for grads in stream(pair[0], 10):
        for optimizer in pair:
            step(optimizer, grads)
        both = [tensors(optimizer) for optimizer in pair]
        assert set(both[0]) == set(both[1])
        for name, value in both[0].items():
            worst = max(worst, error(value, both[1][name]))
            equal.append((value == both[1][name]).double().mean().item())
            value.copy_(both[1][name])
    check_ran(pair[0])
    return dict(worst=worst, equal=sum(equal) / len(equal), exact=min(equal) == 1.0)


def rounded_stochastically(entry: Entry, way: Way, seed: int = 0, resume: bool = False) -> Any:
    """Six steps in bfloat16, the last three perhaps by another optimizer that loads the first's."""
    set_seed(seed)
    more = dict(stochastic_rounding=True, state_dtype=torch.float32)
    optimizer = way.optimizer(entry, way.parameters(torch.bfloat16, [(123, 5), (17,)]), **more)
    grads = list(stream(optimizer, 6))
    train(optimizer, grads[:3])
    if resume:
        torch.manual_seed(99)
        params = [torch.nn.Parameter(param.detach().clone()) for param in members(optimizer)]
        other = way.optimizer(entry, params, **more)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer = other
    train(optimizer, grads[3:])
    return optimizer
