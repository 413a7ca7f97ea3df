"""The contract of `refine_schedule`: the schedule, what it refuses, and life inside a LambdaLR."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

import agrlib
from agrlib.schedules import running_median

NORMS = [4.0, 2.0, 1.0, 2.0, 0.5, 1.0, 1.0]


def factors(norms, **options):
    schedule = agrlib.refine_schedule(norms, **options)
    return [schedule(step) for step in range(len(norms))]


def by_hand(norms, power):
    """Sums written out: w_t * (w_(t+1) + ... + w_T), divided by the largest."""
    weights = [norm**-power for norm in norms]
    steps = [w * math.fsum(weights[t + 1 :]) for t, w in enumerate(weights)]
    return [step / max(steps) for step in steps]


@pytest.mark.parametrize("power", [0, 0.5, 1.0, 2.0, 3])
def test_factors_are_those_of_the_formula(power):
    assert factors(NORMS, power=power, smoothing=0.0) == pytest.approx(
        by_hand(NORMS, power), rel=1e-12
    )


@pytest.mark.parametrize("length", [2, 3, 10, 1000])
def test_equal_norms_give_linear_decay(length):
    """LinearLR's, for one step less, since the last factor is 0."""
    expected = [1 - step / (length - 1) for step in range(length)]
    assert factors([0.3] * length) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("length", [2, 5, 64, 333])
def test_the_largest_factor_is_one_and_the_last_is_zero(length):
    found = factors(np.random.default_rng(0).lognormal(size=length))
    assert max(found) == 1.0 and found[-1] == 0.0 and min(found) >= 0.0
    assert all(type(value) is float for value in found)


def test_after_the_end_it_stays_zero():
    schedule = agrlib.refine_schedule(NORMS)
    assert [schedule(step) for step in (6, 7, 8, 10**9)] == [0.0] * 4


@pytest.mark.parametrize("unit", [1e-150, 1e-30, 1e30, 1e150])
def test_the_unit_of_the_norms_does_not_matter(unit):
    assert factors([unit * norm for norm in NORMS]) == pytest.approx(factors(NORMS), rel=1e-9)


@pytest.mark.parametrize(
    "norms",
    [
        tuple(NORMS),
        np.array(NORMS),
        np.array(NORMS, dtype=np.float32),
        torch.tensor(NORMS),
        torch.tensor(NORMS).double().requires_grad_(),
        torch.tensor(NORMS).bfloat16(),
        [torch.tensor(norm) for norm in NORMS],
        [4, 2, 1, 2, 0.5, 1, 1],
    ],
)
def test_norms_come_in_many_kinds(norms):
    assert factors(norms) == factors(NORMS)


# --- the running median -------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 3, 10, 57, 200])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5, 1.0])
def test_median_over_a_share_of_the_run_mirrored_at_the_ends(length, smoothing):
    norms = np.random.default_rng(1).lognormal(size=length)
    half = int(smoothing * length) // 2
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(norms, half, "reflect"), 2 * half + 1)
    medians = np.median(windows, axis=1)
    assert np.array_equal(running_median(norms.tolist(), half), medians)
    assert factors(norms, smoothing=smoothing) == factors(medians, smoothing=0.0)


@pytest.mark.parametrize("wild", [0.0, 1e9, math.inf])
@pytest.mark.parametrize("at", [0, 50, 99])
def test_one_wild_norm_is_taken_out_by_the_median(wild, at):
    norms = [1.0] * 100
    norms[at] = wild
    assert factors(norms) == factors([1.0] * 100)


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norms", "text"),
    [
        ([], "two or more; length: 0"),
        ([1.0], "two or more; length: 1"),
        (torch.ones(2, 3), r"one axis; shape: \(2, 3\)"),
        (torch.tensor(1.0), r"one axis; shape: \(\)"),
        ([1.0, math.nan, 1.0], "gradient norm at index 1: nan"),
        ([1.0, 2.0, -0.5], "gradient norm at index 2: -0.5"),
        ([1.0, 0.0, 1.0], "smoothed gradient norm at index 1: 0.0"),
        ([math.inf, 1.0, 1.0], "smoothed gradient norm at index 0: inf"),
        ([1e-200, 1.0, 1.0], "power, norms differ by too much for it: 2.0"),
    ],
)
def test_bad_norms_are_refused(norms, text):
    with pytest.raises(ValueError, match=f"^Invalid .*{text}"):
        agrlib.refine_schedule(norms)


@pytest.mark.parametrize("name", ["power", "smoothing"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_numbers_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"Invalid {name}: {value}"):
        agrlib.refine_schedule(NORMS, **{name: value})


def test_smoothing_is_a_share():
    with pytest.raises(ValueError, match="Invalid smoothing: 7"):
        agrlib.refine_schedule(NORMS, smoothing=7)


@pytest.mark.parametrize("options", [dict(power="2"), dict(power=True), dict(smoothing=None)])
def test_what_is_no_number_is_refused(options):
    with pytest.raises(TypeError, match="must be a number"):
        agrlib.refine_schedule(NORMS, **options)


@pytest.mark.parametrize("norms", ["1234", None, ["a", "b"], torch.ones(3, dtype=torch.complex64)])
def test_norms_that_are_no_numbers_are_refused(norms):
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        agrlib.refine_schedule(norms)


def test_settings_go_by_their_names():
    with pytest.raises(TypeError):
        agrlib.refine_schedule(NORMS, 2.0)


# --- in a LambdaLR ------------------------------------------------------------------------------


def training(norms, optimizer=agrlib.SGD):
    params = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(3))]
    groups = [dict(params=params[:1]), dict(params=params[1:], lr=0.5)]
    made = optimizer(groups, lr=2.0)
    return made, LambdaLR(made, agrlib.refine_schedule(norms))


def rates(optimizer, scheduler, steps):
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [agrlib.SGD, agrlib.AdamW])
def test_every_group_follows_it(kind):
    expected = [[2.0 * factor, 0.5 * factor] for factor in [*factors(NORMS), 0.0]]
    assert rates(*training(NORMS, kind), 8) == expected


@pytest.mark.filterwarnings("error")
def test_a_checkpoint_has_the_factors_in_it():
    """A run goes on with its own schedule, though the scheduler was made with another."""
    whole = rates(*training(NORMS), 7)
    first, plan = training(NORMS)
    begun = rates(first, plan, 3)
    buffer = io.BytesIO()
    torch.save(dict(optimizer=first.state_dict(), scheduler=plan.state_dict()), buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    second, plan = training([1.0] * 7)
    second.load_state_dict(saved["optimizer"])
    plan.load_state_dict(saved["scheduler"])
    assert begun + rates(second, plan, 4) == whole


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_are_the_same_schedule(copied):
    schedule = agrlib.refine_schedule(NORMS)
    assert copied(schedule).factors == schedule.factors


def test_a_long_run_takes_no_long_time():
    """Ten thousand norms, each the median of a thousand, in far less than a second."""
    assert max(factors(np.random.default_rng(2).lognormal(size=10_000))) == 1.0
