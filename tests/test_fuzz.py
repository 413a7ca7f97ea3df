"""Shapes, types and values that nobody thinks of: zeros, infinities, NaN, subnormal numbers."""

import math

import numpy as np
import oracle
import pytest
import torch
from contract import bits, every
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import agrlib

quick = settings(deadline=None, derandomize=True, max_examples=50, database=None)
FLOATS = {
    torch.float64: (np.float64, 1e-12),
    torch.float32: (np.float32, 2e-6),
    torch.float16: (np.float16, 2e-3),
    torch.bfloat16: (np.float32, 1.6e-2),
}
INTERESTING = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-40, -1e-45, 6e-8, 1e30, 3e38]
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@st.composite
def tensors(draw, shape, dtype, extremes=True):
    count = math.prod(shape)
    number = st.floats(-100, 100, width=16)
    if extremes:
        number = st.one_of(number, st.sampled_from(INTERESTING))
    values = draw(st.lists(number, min_size=count, max_size=count))
    return torch.tensor(values, dtype=torch.float64).to(dtype).reshape(shape)


def agree(value, reference, tolerance, smallest):
    """NaN and infinities in the same places, the rest close."""
    torch.testing.assert_close(
        value.double(), reference.double(), rtol=tolerance, atol=smallest, equal_nan=True
    )


@quick
@given(data=st.data(), shape=shapes, dtype=st.sampled_from(list(FLOATS)))
def test_agr_equals_the_oracle(data, shape, dtype):
    grad = data.draw(tensors(shape, dtype))
    wide = np.float64 if dtype == torch.float64 else np.float32  # where a sum may overflow
    with np.errstate(all="ignore"):
        exact = grad.double().numpy()
        total = np.abs(exact).sum()
        limit = float(np.finfo(wide).max)
        assume(not 0.999 * limit < total < 1.001 * limit)
        overflow = total > limit and np.isfinite(exact).all()  # in the type that sums
        reference = exact if overflow else oracle.agr(exact)  # all shares of infinity are 0
    raw = bits(grad)
    result = agrlib.agr(grad)
    assert bits(grad) == raw
    assert (result.shape, result.dtype) == (grad.shape, grad.dtype)
    reference = torch.from_numpy(np.array(reference)).to(dtype)
    smallest = 4 * torch.finfo(dtype).smallest_normal * 2**-7
    # 1 - share is rounded in units of 1: of an entry of share 1 - 1e-9 no digit need be right
    rounding = 4 * np.finfo(wide).eps * grad.double().abs().nan_to_num(0, 0, 0)
    near = (result.double() - reference.double()).abs() <= rounding
    agree(result.where(~near, reference), reference, FLOATS[dtype][1], smallest)


@quick
@given(data=st.data(), shape=shapes, dtype=st.sampled_from([torch.float64, torch.float32]))
def test_properties_of_agr(data, shape, dtype):
    grad = data.draw(tensors(shape, dtype, extremes=False))
    result = agrlib.agr(grad)
    assert (result.abs() <= grad.abs()).all(), "no entry grows"
    assert (result * grad >= 0).all(), "no entry changes its sign"
    assert torch.equal(agrlib.agr(-grad), -result), "odd"
    assert torch.equal(agrlib.agr(2 * grad), 2 * result), "homogeneous, exactly for powers of two"
    if grad.numel() > 1 and grad.abs().sum() > 0:
        shares = 1 - result.double() / grad.double().where(grad != 0, 1)
        total = shares.where(grad != 0, 0).sum().item()
        assert total == pytest.approx(1, abs=1e-4), "the shares add up to one"


def trained(cls, options, start, grads, **more):
    param = torch.nn.Parameter(start.clone())
    optimizer = cls([param], **options, **more)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    return param.detach(), {k: v for k, v in optimizer.state[param].items() if k != "step"}


@every
@quick
@given(data=st.data(), shape=shapes, dtype=st.sampled_from([torch.float64, torch.float32]))
def test_one_step_on_extreme_values(entry, data, shape, dtype):
    """As torch, and where torch has no such option as the oracle, from a fresh or a used state.

    Parameters are not infinite: decoupled decay as x - rate * x, which loses no digits, makes NaN
    of an infinity that torch's x * (1 - rate) keeps.
    """
    start, grad = (data.draw(tensors(shape, dtype)) for _ in range(2))
    start, grads = start.where(~start.isinf(), torch.nan), [grad]
    if data.draw(st.booleans()):
        start, first = (data.draw(tensors(shape, dtype, extremes=False)) for _ in range(2))
        grads = [first, grad]
    if entry.kwargs.get("centered"):  # torch fuses the difference: no inf - inf where v overflows
        start, *grads = (x.where(~(x.abs() > 1e18), 1) for x in (start, *grads))
    maximize = data.draw(st.booleans())
    ours, state = trained(entry.cls, entry.kwargs, start, grads, maximize=maximize)
    tolerance, smallest = FLOATS[dtype][1], {torch.float32: 1e-6, torch.float64: 1e-13}[dtype]
    if entry.twin:
        theirs, other = trained(entry.twin, entry.kwargs, start, grads, maximize=maximize)
        agree(ours, theirs, tolerance, smallest)
        assert state.keys() == other.keys()
        for key, value in state.items():
            agree(value, other[key], tolerance, smallest)
    elif dtype == torch.float64:
        method = oracle.METHODS[entry.cls.__name__]
        columns = [grad.numpy() for grad in grads]
        with np.errstate(all="ignore"):
            exact = method(start.numpy(), columns, maximize=maximize, **entry.kwargs)
        agree(ours, torch.from_numpy(np.array(exact)), tolerance, smallest)


@every
@quick
@given(data=st.data(), shape=shapes, dtype=st.sampled_from(list(FLOATS)))
def test_finite_steps_stay_finite_and_keep_their_type(entry, data, shape, dtype):
    start, *grads = (data.draw(tensors(shape, dtype, extremes=False)) for _ in range(3))
    param, state = trained(entry.cls, entry.kwargs, start, grads, transforms=[agrlib.agr])
    assert (param.shape, param.dtype) == (start.shape, dtype)
    assert param.isfinite().all()
    assert all(value.isfinite().all() and value.dtype == dtype for value in state.values())
