"""The kernels that numba makes for the CPU, beside the eager reference."""

import itertools

import pytest
import torch
from contract import OPTIMIZERS, TRANSFORMS
from fast import (
    CHAINS,
    ENTRIES,
    LARGE,
    Way,
    check_ran,
    combinations,
    has_no_root,
    large,
    measure_special,
    name_of,
    parity,
    start,
)

import agrlib

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
    single = [(e, c) for e, c, dtype in RUNS.values() if dtype == torch.float32]
    met = {repr(chain) for entry, chain in single if entry is not ENTRIES["SGD"]}
    assert {repr(list(pair)) for pair in itertools.permutations(TRANSFORMS, 2)} <= met
    met = {repr(chain) for entry, chain in single if entry is ENTRIES["SGD"]}
    exact = [agrlib.clip_value(0.7), agrlib.centralize, agrlib.agr]
    assert {repr(list(pair)) for pair in itertools.product(exact, repeat=2)} <= met
    assert {repr([transform, transform]) for transform in TRANSFORMS} <= met
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


def test_the_checks_of_the_fast_path_can_fail():
    """Kernels that did not run, an eager rule that did, and an error: each is noticed."""
    entry = ENTRIES["AdamW"]
    with pytest.raises(KeyError, match="_plan"):
        check_ran(start(entry, Way(False)))
    optimizer = start(entry, Way(True))
    optimizer.param_groups[0]["fused"] = False
    with pytest.raises(TypeError, match="the eager rule ran"):
        optimizer.step()
    case = parity(entry, [], shapes=[(3,)], steps=1)
    good = dict(params=0.0, state=0.0, exact=True)
    for bad in (dict(params=3e-6), dict(state=3e-6)):
        with pytest.raises(AssertionError):
            case.check({**good, **bad})
    with pytest.raises(AssertionError):
        parity(ENTRIES["SGD"], []).check({**good, "exact": False})
    exact = {entry.cls for entry in OPTIMIZERS if has_no_root(entry, [agrlib.agr])}
    assert exact == {agrlib.SGD}
