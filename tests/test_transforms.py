"""The transform protocol, `agr`, and how chains run in a step."""

import copy
import functools
import inspect
import math
import pickle
import subprocess
import sys

import numpy as np
import oracle
import pytest
import torch
from contract import (
    OPTIMIZERS,
    bits,
    close,
    content,
    feed,
    gradients,
    members,
    parameters,
    run,
    same,
    step,
    train,
)

import agrlib
from agrlib import Transform, agr, transform, transforms

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("shape", [(3, 4), (7,), (2, 3, 2, 2), (1,), (1, 1), (), (0,), (0, 3)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agr_equals_the_oracle(dtype, shape):
    """Half precision is summed in float32, so the error is one rounding and no more."""
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    raw = bits(grad)
    result = agr(grad)
    assert bits(grad) == raw
    assert result.shape == grad.shape
    assert result.dtype == dtype
    exact = torch.from_numpy(np.asarray(oracle.agr(grad.double().numpy())))
    digits = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps / 1.9)
    torch.testing.assert_close(result.double(), exact, rtol=digits, atol=0)


def test_agr_of_many_half_precision_numbers():
    """A sum in float16 overflows at 65,504, one in bfloat16 stops growing at 256."""
    for dtype in (torch.float16, torch.bfloat16):
        grad = torch.full((100_000,), 1.0, dtype=dtype)
        grad[0] = 30_000.0
        assert agr(grad)[0].item() == pytest.approx(30_000 * (1 - 30 / 130), rel=0.005)


def test_agr_by_hand():
    assert agr(torch.tensor([3.0, -1.0])).tolist() == [0.75, -0.75]
    assert agr(torch.tensor([[2.0, 0.0], [1.0, -1.0]])).tolist() == [[1.0, 0.0], [0.75, -0.75]]
    for zeros in (torch.zeros(3), torch.zeros(1), torch.zeros(())):
        assert torch.equal(agr(zeros), zeros)
    for one in (torch.tensor([5.0]), torch.tensor(-5.0), torch.tensor([[math.nan]])):
        assert bits(agr(one)) == bits(one)
    # one element alone is not zero: the formula erases it, and exactly so
    assert all((agr(torch.tensor([x, 0.0])) == 0).all() for x in torch.rand(1000).tolist())


def test_agr_of_complex_numbers_keeps_the_phase():
    grad = torch.tensor([3 + 4j, 0j, -5j], dtype=torch.complex128)
    torch.testing.assert_close(agr(grad), grad * torch.tensor([0.5, 1, 0.5]))


def test_agr_of_values_that_are_not_finite():
    inf, nan = math.inf, math.nan
    assert repr(agr(torch.tensor([inf, 1.0, -2.0])).tolist()) == "[nan, 1.0, -2.0]"
    assert agr(torch.tensor([nan, 1.0])).isnan().all()


def test_agr_refuses_a_sparse_gradient():
    with pytest.raises(RuntimeError, match="sparse"):
        agr(torch.eye(3).to_sparse())


def halve_rule(grad, factor):
    return factor * grad


def magnitude(grad):
    return abs(grad)


def mean(total, count):
    return total / count


def minus(grad, total):
    return grad - total


halve = Transform(halve_rule, constants=(0.5,), name="halve")
centered_rows = Transform(minus, over="row", summand=lambda g: g, finish=mean, name="centered_rows")
centered = Transform(minus, over="tensor", summand=lambda g: g, finish=mean, name="centered")
whole = Transform(
    lambda grad, total: grad / total, over="all", summand=magnitude, smallest=2, name="whole"
)


def test_what_a_transform_sums_over():
    grads = [
        torch.randn(3, 4),
        torch.randn(5),
        torch.randn(2, 3, 2),
        torch.randn(()),
        torch.ones(0),
    ]
    rows = centered_rows.map(grads)
    for i, axes in ((0, 1), (2, (1, 2))):  # a total is summed in double precision, rounded once
        total = grads[i].double().sum(axes, keepdim=True).float()
        assert torch.equal(rows[i], grads[i] - total / grads[i][0].numel())
    assert all(rows[i] is grads[i] for i in (1, 3)), "a vector has no rows"
    for grad, result in zip(grads, centered.map(grads), strict=True):
        torch.testing.assert_close(result, grad - grad.mean() if grad.numel() else grad)
    together = Transform(minus, over="all", summand=lambda g: g, finish=mean, name="together")
    everything = torch.cat([grad.reshape(-1) for grad in grads])
    for grad, result in zip(grads, together.map(grads), strict=True):
        torch.testing.assert_close(result, grad - everything.mean())
    total = sum(grad.abs().sum() for grad in grads if grad.numel() > 1)
    results = whole.map(grads)
    for i in (0, 1, 2):
        torch.testing.assert_close(results[i], grads[i] / total)
    assert results[3] is grads[3], "smaller than `smallest`: neither counted nor changed"
    assert torch.equal(halve(torch.tensor([4.0, -2.0])), torch.tensor([2.0, -1.0]))
    assert centered_rows(torch.ones(0, 3)).shape == (0, 3)
    assert centered_rows(torch.ones(3, 0)).shape == (3, 0)


def test_half_precision_stays_wide_inside_a_chain():
    """Two transforms in a step are rounded once, at the end, not in between."""
    grad = torch.randn(64, generator=torch.Generator().manual_seed(0)).bfloat16()
    [[result]] = transforms.run_chains([transforms.Chain.of([agr, halve])], [[grad.float()]])
    assert result.dtype == torch.float32
    assert torch.equal(result, halve(agr(grad.float())))
    assert agr(grad).dtype == grad.dtype


def test_declarations_that_make_no_sense_are_refused():
    for wrong in (
        dict(over="column", summand=magnitude),
        dict(over="row"),
        dict(summand=magnitude),
    ):
        with pytest.raises(ValueError, match="over"):
            Transform(minus, **wrong)


def test_transforms_have_a_name_and_compare_by_what_they_do():
    again = Transform(halve_rule, constants=(0.5,), name="halve")
    assert again == halve
    assert hash(again) == hash(halve)
    others = [
        Transform(halve_rule, constants=(0.25,), name="halve"),
        Transform(halve_rule, constants=(0.5,), name="quarter"),
        Transform(halve_rule, constants=(0.5,), name="halve", smallest=2),
        agr,
        halve_rule,
    ]
    assert all(other != halve for other in others)
    assert [repr(t) for t in (agr, halve)] == ["agr", "halve"]
    assert transform(constants=(0.5,))(halve_rule).__name__ == "halve_rule"
    assert "magnitudes" in agr.__doc__


def test_transforms_are_copied_and_pickled_by_name_or_by_value():
    for clone in (copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))):
        assert clone(agr) is agr
        assert clone(halve) == halve
        assert clone(transforms.Chain([agr, halve])) == (agr, halve)
        assert repr(clone(transforms.Chain([agr, halve]))) == "agr, halve"


SCRIPT = """
import copy, functools, io, pickle, sys
import agrlib, cloudpickle, torch

@agrlib.transform(constants=(0.5,))
def shrink(grad, factor):
    return factor * grad

@agrlib.transform(over="all", summand=lambda grad: grad * grad, finish=lambda sum, n: sum / n)
def whole(grad, total):
    return grad / total

def scale(grad, factor):
    return factor * grad

class Twice:
    def __call__(self, grad):
        return 2 * grad

def local():
    @agrlib.transform()
    def negative(grad):
        return -grad
    return negative

third = agrlib.transform(constants=(0.25,))(scale)
named = agrlib.Transform(scale, constants=(0.75,), name="named")
chain = [shrink, whole, third, named, agrlib.agr, agrlib.clip_norm(1.0), Twice()]

def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)

param = torch.nn.Parameter(torch.ones(3))
param.grad = torch.ones(3)
optimizer = agrlib.AdamW([param], transforms=chain)
optimizer.step()
by_cloudpickle = lambda value: pickle.loads(cloudpickle.dumps(value))
for clone in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), saved, by_cloudpickle):
    again = clone(chain)
    assert again[:6] == chain[:6] and [*map(hash, again[:6])] == [*map(hash, chain[:6])], again
    assert again[4] is agrlib.agr
    assert clone(optimizer).param_groups[0]["transforms"][:6] == tuple(chain[:6])
    assert scale(2.0, 3.0) == pickle.loads(pickle.dumps(scale))(2.0, 3.0)
more = [local(), lambda grad: grad, functools.partial(scale, factor=3.0)]
sys.stdout.buffer.write(cloudpickle.dumps((chain + more, optimizer)))
"""


def test_transforms_of_a_main_script_travel(tmp_path):
    """To a process that knows nothing of the script, where cloudpickle takes what is in it."""
    pytest.importorskip("cloudpickle", reason="it is in the extra `dev`")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, script], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    chain, made = pickle.loads(done.stdout)
    names = "shrink, whole, scale, named, agr, clip_norm(1.0), Twice"
    assert repr(transforms.Chain(chain[:7])) == names
    results = [function(torch.ones(2))[0].item() for function in chain]
    assert results == pytest.approx(
        [0.5, 1.0, 0.25, 0.75, 0.5, 0.5**0.5, 2.0, -1.0, 1.0, 3.0], 1e-5
    )
    assert str(made.param_groups[0]["transforms"]) == names
    [param] = made.param_groups[0]["params"]
    param.grad = torch.ones(3)
    made.step()
    assert made.state[param]["step"] == 2


def test_a_chain_runs_left_to_right():
    def plus(grad):
        return grad + 1

    grad = torch.tensor([3.0, -1.0, 4.0])
    results = []
    for chain in ([agr, plus], [plus, agr]):
        param = torch.nn.Parameter(torch.zeros(3))
        step(agrlib.SGD([param], lr=1.0, transforms=chain), [grad])
        results.append(-param.detach())
    close(results, [agr(grad) + 1, agr(grad + 1)], 1e-7)
    assert not torch.allclose(*results)


def test_a_sum_over_all_tensors_spans_the_groups_whose_chain_holds_it():
    params = parameters(shapes=[(3, 4), (5,), (2, 2), (6,)])
    groups = [
        dict(params=params[:1], transforms=[whole]),
        dict(params=params[1:2], transforms=[agr, whole, torch.sin]),
        dict(params=params[2:3]),
        dict(params=params[3:], transforms=[whole]),
    ]
    [grads] = gradients(params, 1)
    start = [param.detach().clone() for param in params]
    values = train(agrlib.SGD(groups, lr=1.0), [[*grads[:3], None]])  # the last has no gradient
    total = grads[0].abs().sum() + agr(grads[1]).abs().sum()
    moved = [grads[0] / total, torch.sin(agr(grads[1]) / total), grads[2], torch.zeros(6)]
    for value, old, move in zip(values, start, moved, strict=True):
        torch.testing.assert_close(value, old - move, rtol=1e-13, atol=1e-13)


def test_sums_over_all_tensors_that_wait_for_each_other_are_refused():
    other = Transform(minus, over="all", summand=magnitude, name="other")
    params = parameters()
    groups = [
        dict(params=params[:2], transforms=[whole, other]),
        dict(params=params[2:], transforms=[other, whole]),
    ]
    opt = agrlib.SGD(groups, lr=1.0)
    feed(params, gradients(params, 1)[0])
    before = content(opt)
    with pytest.raises(ValueError, match="different order"):
        opt.step()
    assert content(opt) == before


def test_two_sums_over_all_tensors_in_one_chain():
    params = parameters(shapes=[(3,), (2, 2)])
    [grads] = gradients(params, 1)
    start = [param.detach().clone() for param in params]
    values = train(agrlib.SGD(params, lr=1.0, transforms=[whole, halve, whole]), [grads])
    total = sum(grad.abs().sum() for grad in grads)
    for value, old, grad in zip(values, start, grads, strict=True):  # the second has total 1/2
        torch.testing.assert_close(value, old - grad / total, rtol=1e-13, atol=1e-13)


def test_a_transform_may_be_any_callable():
    class Scale:
        def __call__(self, grad):
            return 2 * grad

    entry = OPTIMIZERS[0]
    opt, values = run(entry, transforms=(f for f in [Scale()]))
    assert str(opt.param_groups[0]["transforms"]) == "Scale"
    assert same(values, run(entry, transforms=[lambda g: 2 * g])[1])
    opt.param_groups[0]["transforms"] = [agr]  # put there as a plain list, later
    step(opt, gradients(members(opt), 1)[0])
    assert str(opt.param_groups[0]["transforms"]) == "agr"


def test_a_user_transform_sees_float32_for_half_precision_and_no_graph():
    seen = []

    def look(grad):
        seen.append((grad.dtype, grad.requires_grad, torch.is_grad_enabled()))
        return grad

    for dtype in DTYPES:
        param = torch.nn.Parameter(torch.ones(3, dtype=dtype))
        step(agrlib.SGD([param], lr=1.0, transforms=[look]), [torch.ones(3, dtype=dtype)])
    wide = [torch.float64, torch.float32, torch.float32, torch.float32]
    assert seen == [(dtype, False, False) for dtype in wide]


def test_a_transform_of_a_partial_is_copied():
    halve = agrlib.Transform(functools.partial(torch.mul, 0.5), name="halve")
    assert copy.deepcopy(halve)(torch.ones(1)).item() == 0.5
    assert repr(agrlib.Transform(functools.partial(torch.mul, 0.5))) == "partial"


def test_a_complex_result_for_a_real_gradient_is_refused():
    param = torch.nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    optimizer = agrlib.SGD([param], transforms=[lambda grad: grad * 1j])
    with pytest.raises(TypeError, match="real gradient into a complex one"):
        optimizer.step()
    assert param.tolist() == [1.0, 1.0]


COMPLEX = {  # two real sums in one complex one; a real sum that makes a complex number
    "sum": dict(apply=lambda g, total: g - total.real, summand=lambda g: torch.complex(g, g * g)),
    "result": dict(apply=lambda g, total: torch.complex(g, g) / total, summand=magnitude),
}


@pytest.mark.parametrize("over", ["tensor", "all"])
@pytest.mark.parametrize("kind", COMPLEX)
def test_a_declaration_that_makes_complex_numbers_of_a_real_gradient_is_refused(kind, over):
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    for param in params:
        param.grad = torch.ones(2)
    made = Transform(**COMPLEX[kind], over=over, name="made")
    optimizer = agrlib.SGD([dict(params=[p], transforms=[made]) for p in params])
    with pytest.raises(TypeError, match="made makes complex numbers of a real gradient: let its"):
        optimizer.step()
    assert all(param.tolist() == [1.0, 1.0] for param in params)
    phase = Transform(lambda g, total: g / total, over=over, summand=lambda g: g, name="phase")
    assert phase(torch.tensor([1j, 3j])).tolist() == [0.25, 0.75]


CLIPS = [agrlib.clip_value, agrlib.clip_norm, agrlib.clip_global_norm]


@pytest.mark.parametrize("clip", CLIPS)
def test_the_bound_of_a_clip(clip):
    name = clip.__name__
    for wrong in (-1.0, -math.inf, math.nan):
        with pytest.raises(ValueError, match=f"Invalid {name} bound"):
            clip(wrong)
    for wrong in ("1", None, True, torch.tensor([1.0, 2.0])):
        with pytest.raises(TypeError, match=rf"{name} takes a number, as in {name}\(1.0\), not "):
            clip(wrong)
    assert repr(clip(1)) == repr(clip(np.float64(1))) == f"{name}(1.0)"
    assert clip(1) == clip(1.0) == pickle.loads(pickle.dumps(clip(1.0))) == copy.deepcopy(clip(1))
    assert clip(1) != clip(2)
    assert len({clip(1), clip(1.0), clip(2)}) == 2
    assert (clip(0.0)(torch.tensor([3.0, -4.0])) == 0).all()
    big = torch.tensor([3e9, -4e9])
    assert torch.equal(clip(math.inf)(big), big)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bound", [0.3, 1e3])
def test_clips_equal_torchs_functions(bound, dtype):
    inf, nan = math.inf, math.nan
    for values in (
        [0.0, 0.0],
        [3.0, -4.0],
        [inf, 1.0],
        [-inf, inf],
        [nan, 1.0],
        [1e-6, 0.0],
        [2.0],
    ):
        for clip, reference in (
            (agrlib.clip_value, torch.nn.utils.clip_grad_value_),
            (agrlib.clip_norm, torch.nn.utils.clip_grad_norm_),
            (agrlib.clip_global_norm, torch.nn.utils.clip_grad_norm_),
        ):
            param = torch.nn.Parameter(torch.zeros(len(values), dtype=dtype))
            param.grad = torch.tensor(values, dtype=dtype)
            ours = clip(bound)(param.grad)
            reference([param], bound)
            digits = 1e-6 if dtype in (torch.float64, torch.float32) else 2 * torch.finfo(dtype).eps
            torch.testing.assert_close(ours, param.grad, rtol=digits, atol=0, equal_nan=True)


@pytest.mark.parametrize("clip", [agrlib.clip_norm, agrlib.clip_global_norm])
def test_the_norm_of_complex_numbers_is_that_of_torch(clip):
    params = [torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64)) for _ in range(2)]
    params[1] = torch.nn.Parameter(torch.zeros(3))
    for param, values in zip(params, ([3 + 4j, 1j], [1.0, -2.0, 0.0]), strict=True):
        param.grad = torch.tensor(values, dtype=param.dtype)
    ours = clip(0.5).map([param.grad for param in params])
    together = [params] if clip is agrlib.clip_global_norm else [[param] for param in params]
    for group in together:
        torch.nn.utils.clip_grad_norm_(group, 0.5)
    close(ours, [param.grad for param in params], 1e-6)


def test_transforms_are_told_apart_by_all_that_they_declare():
    """And their kernels: `plan` asks for the same fields."""
    assert {*transforms.FIELDS, "name"} == set(inspect.signature(agrlib.Transform).parameters)
