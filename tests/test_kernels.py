"""The kernels that numba makes for the CPU, beside the eager reference."""

import itertools

import pytest
import torch
from contract import OPTIMIZERS, TRANSFORMS, every
from fast import (
    CHAINS,
    ENTRIES,
    LARGE,
    METHODS,
    SCENARIOS,
    SMALL,
    Way,
    beside_eager,
    check_ran,
    combinations,
    halves,
    happens,
    has_no_root,
    large,
    measure_special,
    name_of,
    near,
    parity,
    rounded_stochastically,
    start,
    stream,
    tensors,
)

import agrlib
from agrlib import kernels

pytest.importorskip("numba", reason="numba has no wheel for this platform")
RUNS = {name_of(*run): run for run in combinations()}
LARGE_RUNS = {name_of(*run): run for run in large()}
every_run = pytest.mark.parametrize("run", RUNS.values(), ids=list(RUNS))


def test_the_runs_meet_every_rule_with_every_transform_and_all_pairs():
    everything = {repr(f) for f in TRANSFORMS}
    for entry in OPTIMIZERS:
        chains = [chain for e, chain, _ in RUNS.values() if e is entry]
        assert [] in chains
        assert {repr(f) for chain in chains for f in chain} == everything
    for entries in ([ENTRIES["SGD"]], OPTIMIZERS[1:]):
        met = {repr(c) for e, c, dtype in RUNS.values() if e in entries and dtype == torch.float32}
        assert {repr(list(pair)) for pair in itertools.permutations(TRANSFORMS, 2)} <= met
    doubles = [(e.name, repr(c)) for e, c, dtype in RUNS.values() if dtype == torch.float64 and c]
    assert {name for name, _ in doubles} == set(CHAINS)
    for transform in everything:
        assert sum(transform in chain for _, chain in doubles) >= 4


@every_run
def test_parity_over_100_steps(run):
    case = parity(*run)
    case.check(case.measure())


@every_run
def test_values_that_are_no_ordinary_numbers(run):
    assert measure_special(*run) == []


@pytest.mark.parametrize("run", LARGE_RUNS.values(), ids=list(LARGE_RUNS))
def test_parity_of_tensors_in_many_parts(run):
    case = parity(*run, shapes=LARGE)
    case.check(case.measure())


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("entry", METHODS, ids=lambda entry: entry.name)
def test_scenarios(entry, name):
    case = happens(entry, name)
    case.check(case.measure())


def test_the_checks_of_the_fast_path_can_fail():
    """Kernels that did not run, an eager rule that did, and an error: each is noticed."""
    entry = ENTRIES["AdamW"]
    with pytest.raises(KeyError, match="_plan"):
        check_ran(start(entry, Way(False)))
    optimizer = start(entry, Way(True))
    optimizer.param_groups[0]["fused"] = False
    with pytest.raises(TypeError, match="not callable"):
        optimizer.step()
    case = parity(entry, [], shapes=[(3,)], steps=1)
    good = dict(params=0.0, state=0.0, exact=True)
    for bad in (dict(params=3e-6), dict(state=3e-6)):
        with pytest.raises(AssertionError):
            case.check({**good, **bad})
    with pytest.raises(AssertionError):
        parity(ENTRIES["SGD"], []).check({**good, "exact": False})
    assert [has_no_root(e, [agrlib.agr]) for e in OPTIMIZERS].count(True) == 3


# --- half precision -----------------------------------------------------------------------------

HALF = [torch.bfloat16, torch.float16]
SOME = [("SGD", [agrlib.agr, agrlib.centralize]), ("AdamW", [agrlib.centralize, agrlib.agr])]


@every
def test_half_precision_is_computed_in_float32_and_rounded_once(entry):
    """The type of the state alternates, so that every entry meets both."""
    for i, dtype in enumerate(HALF):
        kept = (None, torch.float32)[(OPTIMIZERS.index(entry) + i) % 2]
        halves(entry, dtype, kept, [])


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name, chain", SOME, ids=repr)
def test_half_precision_through_a_chain(name, chain, dtype):
    halves(ENTRIES[name], dtype, torch.float32, chain)
    measured = beside_eager(ENTRIES[name], dtype, chain, state_dtype=torch.float32)
    assert measured["worst"] <= near(dtype)
    assert measured["equal"] > 0.99
    assert measured["exact"] or not has_no_root(ENTRIES[name], chain)


@pytest.mark.parametrize("name", ["SGD-heavy-ball", "SGD-nesterov", "AdamW", "Adan"])
def test_stochastic_rounding_is_that_of_eager_steps(name):
    more = dict(stochastic_rounding=True, state_dtype=torch.float32)
    measured = beside_eager(ENTRIES[name], torch.bfloat16, [], **more)
    assert measured["worst"] <= near(torch.bfloat16)
    assert measured["equal"] > 0.999
    assert measured["exact"] or not has_no_root(ENTRIES[name], [])


@pytest.mark.parametrize("name", ["SGD-heavy-ball", "Adan"])
def test_stochastic_rounding_depends_on_the_seed_and_on_nothing_else(name):
    def values(**more):
        return tensors(rounded_stochastically(ENTRIES[name], Way(True), **more))

    def same(first, second):
        return all(torch.equal(value, second[key]) for key, value in first.items())

    first = values()
    assert same(first, values())
    assert same(first, values(resume=True))
    assert not same(first, values(seed=1))
    eager = tensors(rounded_stochastically(ENTRIES[name], Way(False)))
    assert same(first, eager) or name == "Adan"


def test_stochastic_rounding_by_a_kernel_is_unbiased():
    param = torch.nn.Parameter(torch.full((2**16,), -0.7, dtype=torch.bfloat16))
    optimizer = Way(True).optimizer(ENTRIES["SGD"], [param], stochastic_rounding=True)
    optimizer.param_groups[0].update(lr=1e-3, weight_decay=0.0)
    param.grad = torch.full_like(param, 0.3)
    start = param.detach().double()[0].item()
    optimizer.step()
    exact = start - 1e-3 * param.grad[0].double().item()
    low, high = param.detach().double().aminmax()
    assert low < exact < high
    sigma = (high - low) / 2 / len(param) ** 0.5
    assert abs(param.detach().double().mean() - exact) < 5 * sigma
    assert len(param.unique()) == 2


# --- bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", LARGE_RUNS.values(), ids=list(LARGE_RUNS))
def test_the_number_of_threads_changes_no_bit(run):
    """Every partial sum is the same whoever adds it up, and their order is that of the parts."""
    import numba

    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("one processor")
    entry, chain, dtype = run
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            params = Way(True).parameters(dtype, [*LARGE, *SMALL])
            optimizer = Way(True).optimizer(entry, params, transforms=chain)
            for grads in stream(optimizer, 3):
                for param, grad in zip(params, grads, strict=True):
                    param.grad = grad
                optimizer.step()
        finally:
            torch.set_num_threads(before)
        assert {batch.cores for batch in optimizer.__dict__["_plan"].batches} == {threads}
        results.append(tensors(optimizer))
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_a_kernel_is_one_for_all_bounds_and_for_both_kinds_of_norms():
    """Constants are arguments: another bound compiles nothing."""
    texts = set()
    for clip in (agrlib.clip_norm(1.0), agrlib.clip_norm(2.0), agrlib.clip_global_norm(3.0)):
        optimizer = start(ENTRIES["SGD"], Way(True), transforms=[clip])
        [batch] = optimizer.__dict__["_plan"].batches
        texts.add(kernels.cpu_source(batch.program))
    assert len(texts) == 1
