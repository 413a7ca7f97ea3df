"""Half precision in a kernel, rounded to the nearest or stochastically, and bits of its totals."""

import pytest
import torch
from contract import OPTIMIZERS, every
from fast import (
    ENTRIES,
    LARGE,
    SMALL,
    Way,
    beside_eager,
    halves,
    has_no_root,
    large,
    name_of,
    near,
    rounded_stochastically,
    start,
    stream,
    tensors,
)

import agrlib
from agrlib import cpu

pytest.importorskip("numba", reason="numba has no wheel for this platform")
LARGE_RUNS = {name_of(*run): run for run in large()}


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
        texts.add(cpu.cpu_source(batch.program))
    assert len(texts) == 1
