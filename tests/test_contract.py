"""What torch's own optimizers are tested for, run through the list in contract.py."""

import collections
import copy
import decimal
import functools
import math
import operator
import pickle
import re

import oracle
import pytest
import torch
import torch.utils._pytree
from contract import (
    OPTIMIZERS,
    SHAPES,
    bits,
    close,
    content,
    every,
    feed,
    gradients,
    members,
    options,
    parameters,
    run,
    same,
    seed,
    step,
    train,
    twins,
    two_groups,
)
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import agrlib
from agrlib import GradientMethod
from agrlib.precision import noise_seed, round_stochastically

HALF = [torch.bfloat16, torch.float16]
NAN, INF = math.nan, math.inf
schedulers = torch.optim.lr_scheduler


def test_every_optimizer_is_in_the_list_and_has_an_oracle():
    exported = {v for v in vars(agrlib).values() if isinstance(v, type)}
    classes = {v for v in exported if issubclass(v, GradientMethod)} - {GradientMethod}
    assert {entry.cls for entry in OPTIMIZERS} == classes
    assert {cls.__name__ for cls in classes} == set(oracle.METHODS)
    assert len({entry.name for entry in OPTIMIZERS}) == len(OPTIMIZERS)


# --- what is refused ---------------------------------------------------------------------------

BAD = {
    "lr": [("Invalid learning rate", (-1.0, NAN, INF, torch.tensor(-1.0), torch.tensor([NAN])))],
    "weight_decay": [("Invalid weight_decay value", (-0.1, NAN, INF))],
    "eps": [("Invalid epsilon value", (-1e-8, NAN, INF))],
    "momentum": [("Invalid momentum value", (-0.1, NAN, INF))],
    "alpha": [("Invalid alpha value", (-0.1, 1.0, NAN, INF))],
    "lr_decay": [("Invalid lr_decay value", (-0.1, NAN, INF))],
    "initial_accumulator_value": [("Invalid initial_accumulator_value value", (-0.1, NAN, INF))],
    "partial": [("Invalid partial value", (-0.1, 0.51, NAN, INF))],
    "dampening": [("Invalid dampening value", (-0.1, 1.5, NAN, INF))],
    "betas": [
        ("Invalid beta parameter at index 0", ((-0.1, 0.9), (1.0, 0.9), (NAN, 0.9), (INF, 0.9))),
        ("Invalid beta parameter at index 1", ((0.9, -0.1), (0.9, 1.0), (0.9, NAN), (0.9, INF))),
    ],
}


@every
def test_hyperparameters_out_of_range_are_refused(entry):
    numeric = {
        key
        for key, default in options(entry.cls).items()
        if isinstance(default, float | tuple) and key != "transforms"
    }
    assert numeric <= set(BAD), "say what is out of range for the new hyperparameter"
    for key in numeric:
        for message, values in BAD[key]:
            for value in values:
                bad = {key: value}
                with pytest.raises(ValueError, match=message):
                    entry.cls(parameters(), **{**entry.kwargs, **bad})
                with pytest.raises(ValueError, match=message):
                    two_groups(entry, parameters(), **bad)
                optimizer = entry.cls(parameters()[:1], **entry.kwargs)
                with pytest.raises(ValueError, match=message):
                    optimizer.add_param_group(dict(params=parameters()[1:], **bad))
                assert len(optimizer.param_groups) == 1


@twins
def test_the_wording_is_torchs(entry):
    for key in set(BAD) & set(options(entry.cls)) - {"dampening"}:  # torch does not check it
        for _, values in BAD[key]:
            messages = []
            for cls in (entry.cls, entry.twin):
                with pytest.raises(ValueError) as caught:
                    cls(parameters(), **{**entry.kwargs, key: values[0]})
                messages.append(str(caught.value))
            assert messages[0] == messages[1]


def test_nesterov_without_momentum_or_with_dampening_is_refused():
    for wrong in (dict(), dict(momentum=0.9, dampening=0.1)):
        message = "Nesterov momentum requires a momentum and zero dampening"
        with pytest.raises(ValueError, match=message):
            agrlib.SGD(parameters(), nesterov=True, **wrong)


@every
def test_malformed_options_are_refused(entry):
    def refused(error, message, **wrong):
        with pytest.raises(error, match=message):
            entry.cls(parameters(), **{**entry.kwargs, **wrong})
        if error is not TypeError or "transforms" in wrong:
            with pytest.raises(error, match=message):
                two_groups(entry, parameters(), **wrong)

    refused(TypeError, "no_such_option", no_such_option=1)
    refused(ValueError, "Tensor lr must be 1-element", lr=torch.tensor([0.1, 0.2]))
    refused(ValueError, "Tensor weight_decay must be 1-element", weight_decay=torch.zeros(2))
    refused(ValueError, "Invalid state_dtype", state_dtype=torch.int32)
    refused(ValueError, "Invalid state_dtype", state_dtype="float32")
    refused(RuntimeError, "exclude each other", fused=True, differentiable=True)
    refused(RuntimeError, "foreach=True is not supported", foreach=True)
    refused(TypeError, "transforms takes a list", transforms=agrlib.agr)
    refused(TypeError, "transforms takes a list", transforms="agr")
    refused(TypeError, "a transform must be callable, not float", transforms=[0.5])


@pytest.mark.parametrize("entry", [e for e in OPTIMIZERS if "betas" in e.kwargs])
@pytest.mark.parametrize("betas", [(0.9,), (0.9, 0.99), (0.9, 0.99, 0.999), (0.9,) * 4])
def test_betas_must_be_as_many_as_the_method_has(entry, betas):
    """Or the step would raise only when earlier groups are written."""
    if len(betas) == len(entry.kwargs["betas"]):
        return
    with pytest.raises(ValueError, match="beta"):
        entry.cls(parameters(), **{**entry.kwargs, "betas": betas})


def with_gaps(params):
    last = torch.nn.Parameter(params[0].detach().repeat_interleave(2, dim=1)[:, ::2])
    return [*params[1:], last]


NO_KERNEL = {
    "foreach": ("not supported", dict(foreach=True), None),
    "function": ("sin is a plain function", dict(fused=True, transforms=[torch.sin]), None),
    "lambda": ("plain function", dict(fused=True, transforms=[agrlib.agr, lambda g: g]), None),
    "differentiable": ("exclude", dict(fused=True, differentiable=True), None),
    "gaps": ("not contiguous", dict(fused=True), with_gaps),
    "complex": (
        "no kernel for torch.complex64",
        dict(fused=True),
        lambda params: params + parameters(torch.complex64, [(2, 3)]),
    ),
}


@pytest.mark.parametrize("warm", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("case", NO_KERNEL)
@every
def test_what_has_no_kernel_is_refused_before_anything_is_written(entry, case, warm):
    """Asked for in the last group, when the step has already come to all others."""
    pytest.importorskip("numba", reason="numba has no wheel for this platform")
    message, wrong, change = NO_KERNEL[case]
    params = parameters(torch.float32, SHAPES[:3])
    optimizer = two_groups(entry, change(params) if change else params)
    grads = gradients(members(optimizer), 2)
    train(optimizer, grads[:warm])
    feed(members(optimizer), grads[1])
    before = content(optimizer)
    optimizer.param_groups[1].update(wrong)
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert content(optimizer) == before


@every
def test_kernels_for_a_device_without_any_are_refused_at_once(entry):
    param = torch.nn.Parameter(torch.ones(3, device="meta"))
    with pytest.raises(RuntimeError, match="fused=True: there are kernels for CPU and CUDA"):
        entry.cls([param], fused=True, **entry.kwargs)
    optimizer = entry.cls(parameters(), **entry.kwargs)
    with pytest.raises(RuntimeError, match="not for meta"):
        optimizer.add_param_group(dict(params=[param], fused=True))
    assert len(optimizer.param_groups) == 1


@every
def test_every_number_is_refused_by_name_where_it_is_none(entry):
    numeric = [k for k, v in entry.kwargs.items() if type(v) in (int, float)]
    assert {"lr", "weight_decay"} <= set(numeric)
    params = parameters()[:1]
    optimizer = two_groups(entry, params)
    feed(params, gradients(params)[0])
    for key in numeric:
        number = optimizer.param_groups[0][key]
        for wrong, message in (
            ("x", f"{key} must be a number, not 'x' of type str"),
            (None, f"{key} must be a number, not None"),
            (torch.ones(2), f"Tensor {key} must be 1-element"),
        ):
            with pytest.raises((TypeError, ValueError), match=message):
                entry.cls(parameters(), **{**entry.kwargs, key: wrong})
            optimizer.param_groups[0][key] = wrong
            with pytest.raises((TypeError, ValueError), match=message):
                optimizer.step()
        optimizer.param_groups[0][key] = number


@every
def test_options_spoiled_later_are_noticed_before_anything_is_written(entry):
    """What a scheduler or a user put into the last group must not leave half a step behind."""
    spoiled = [("lr", None), ("weight_decay", "much"), ("state_dtype", torch.int64)]
    spoiled += [(key, (0.9,)) for key in entry.kwargs if key == "betas"]
    for warm in (False, True):
        for key, value in spoiled:
            params = parameters()[:3]
            optimizer = two_groups(entry, params)
            grads = gradients(params, 2)
            train(optimizer, grads[:warm])
            feed(params, grads[1])
            before = content(optimizer)
            optimizer.param_groups[1][key] = value
            with pytest.raises((TypeError, ValueError)):
                optimizer.step()
            assert content(optimizer) == before, key


@every
def test_a_beta_of_one_is_refused_once_there_is_a_gradient(entry):
    """As in torch: a scheduler of momentum may put it there."""
    if "betas" not in entry.kwargs or not entry.kwargs.get("bias_correction", True):
        return
    for fused in (None, True) if entry.name in ("Adam", "Padam") else (None,):
        params = parameters()[:2]
        made = two_groups(entry, params, fused=fused)
        for group in made.param_groups:
            group["betas"] = (1.0, *group["betas"][1:])
        made.step()
        assert not made.state
        feed(params, gradients(params)[0])
        before = content(made)
        for beta in (1.0, torch.ones(1)):
            made.param_groups[1]["betas"] = (beta, *entry.kwargs["betas"][1:])
            made.param_groups[0]["betas"] = entry.kwargs["betas"]
            with pytest.raises(ZeroDivisionError, match=r"beta of 1 .*betas="):
                made.step()
            assert content(made) == before


def test_options_of_a_wrong_kind_are_named_with_their_type():
    param = torch.nn.Parameter(torch.ones(1))

    class Config(collections.UserList):
        pass

    with pytest.raises(TypeError, match=r"not \[0.9, 0.99\] of type Config"):
        agrlib.Adam([param], betas=Config([0.9, 0.99]))
    with pytest.raises(TypeError, match=r"lr must be a number, not .*'0.1'\) of type Decimal"):
        agrlib.Adam([param], lr=decimal.Decimal("0.1"))
    with pytest.raises(TypeError, match="momentum must be a number, not '9' of type str"):
        agrlib.SGD([param], momentum="9")
    with pytest.raises(ValueError, match="state_dtype: 'float32' of type str"):
        agrlib.SGD([param], state_dtype="float32")
    with pytest.raises(TypeError, match="not 'agr' of type str"):
        agrlib.SGD([param], transforms="agr")


@every
def test_none_and_false_change_nothing(entry):
    reference = run(entry)[1]
    for key in ("foreach", "fused"):
        for value in (None, False):
            assert same(run(entry, **{key: value})[1], reference)


# --- a step that raises leaves everything as it was --------------------------------------------


def fail(grad):
    """A user's function that gives up on the last parameter, which has this shape."""
    if grad.shape == (6,):
        raise ArithmeticError("given up")
    return grad.mul_(2)  # writes in place, which must not reach p.grad


def bad_shape(grad):
    return grad[:3] if grad.shape == (6,) else grad.zero_()


def bad_type(grad):
    return None if grad.shape == (6,) else grad


FAILURES = {
    "raises": (ArithmeticError, "given up", fail),
    "shape": (ValueError, r"bad_shape turned .* shape \(6,\) into one of shape \(3,\)", bad_shape),
    "type": (TypeError, "bad_type must return a tensor, not NoneType", bad_type),
    "sparse": (RuntimeError, "sparse gradients", None),
    "closure": (KeyError, "lost", None),
}


@pytest.mark.parametrize("warm", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("failure", FAILURES)
@every
def test_a_step_that_raises_changes_nothing(entry, failure, warm):
    error, message, function = FAILURES[failure]
    params = parameters(shapes=[(3, 4), (5,), (6,)])
    optimizer = two_groups(entry, params, transforms=[agrlib.agr])
    grads = gradients(params)
    if warm:
        train(optimizer, grads)
    feed(params, grads[0])
    if function is not None:
        for group in optimizer.param_groups:
            group["transforms"] = [agrlib.agr, function]
    if failure == "sparse":
        params[-1].grad = params[-1].grad.to_sparse()
    before, objects = content(optimizer), [p.grad for p in params]

    def closure():
        raise KeyError("lost")

    with pytest.raises(error, match=message):
        optimizer.step(closure if failure == "closure" else None)
    assert content(optimizer) == before
    assert all(param.grad is grad for param, grad in zip(params, objects, strict=True))


@pytest.mark.parametrize("strange", [7, torch.ones(7)], ids=["number", "shape"])
@every
def test_state_that_does_not_fit_is_refused_before_anything_is_written(entry, strange):
    params = parameters(shapes=[(3, 4), (5,), (6,)])
    optimizer = two_groups(entry, params)
    train(optimizer, gradients(params))
    before, state = content(optimizer), optimizer.state[params[-1]]
    for key, value in state.items():
        state[key] = strange
        with pytest.raises((RuntimeError, TypeError), match=f"state '{key}' (must be|has shape)"):
            optimizer.step()
        state[key] = value
        assert content(optimizer) == before


@every
def test_a_user_function_gets_a_copy_that_it_may_overwrite(entry):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        # `step`, which `run` calls, asserts that p.grad is as it was, bit for bit
        _, values = run(entry, dtype, transforms=[lambda g: g.mul_(0.5), lambda g: g.add_(1)])
        reference = run(entry, dtype, transforms=[lambda g: 0.5 * g + 1])[1]
        assert same(values, reference)


@every
def test_a_transform_that_compares_refuses_complex_gradients(entry):
    for large in (False, True):
        shapes = [(3, 4), (600, 600) if large else (5,)]
        params = [
            p
            for k, s in zip((torch.float64, torch.complex64), shapes, strict=True)
            for p in parameters(k, [s])
        ]
        made = two_groups(entry, params, transforms=[agrlib.clip_value(1.0)])
        feed(params, gradients(params)[0])
        before = content(made)
        with pytest.raises(
            TypeError, match=r"clip_value\(1.0\) compares .* put complex parameters"
        ):
            made.step()
        assert content(made) == before


# --- groups, closures, schedulers --------------------------------------------------------------


@twins
def test_a_dictionary_becomes_the_group_as_in_torch(entry):
    for cls in (entry.cls, entry.twin):
        first, second, third = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
        groups = [dict(params=[first]), dict(params=second, lr=0.5)]
        made = cls(groups, **entry.kwargs)
        made.add_param_group(added := dict(params=(p for p in [third]), weight_decay=0.25))
        groups.append(added)
        assert all(map(operator.is_, made.param_groups, groups))
        assert [group["lr"] for group in groups] == [entry.kwargs["lr"], 0.5, entry.kwargs["lr"]]
        assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.25]
        assert groups[1]["params"] == [second] and groups[2]["params"] == [third]
        groups[0]["lr"] = 0.25
        assert made.param_groups[0]["lr"] == 0.25


@every
def test_a_refused_group_is_left_as_it_was(entry):
    params = parameters()[:2]
    made = entry.cls(params[:1], **entry.kwargs)
    meta = torch.nn.Parameter(torch.ones(2, device="meta"))
    for error, wrong in (
        (ValueError, dict(params=params[1:], lr=-1.0)),
        (TypeError, dict(params=params[1:], transforms=agrlib.agr)),
        (ValueError, dict(params=params[:1])),
        (TypeError, dict(params=[1.0])),
        (TypeError, dict(params=set(params[1:]))),
        (ValueError, dict(params=[2 * params[1]])),
        (RuntimeError, dict(params=[meta], fused=True)),
        ((ValueError, TypeError), dict(params=[("weight", params[1])])),  # torch 2.4 has no names
        (KeyError, dict(lr=0.1)),
    ):
        given = dict(wrong)
        with pytest.raises(error):
            made.add_param_group(wrong)
        assert list(wrong) == list(given) and all(wrong[key] is given[key] for key in given)
        assert len(made.param_groups) == 1
    with pytest.raises(TypeError, match="param_group must be a dict"):
        made.add_param_group(params[1:])


@every
def test_groups_have_their_own_options(entry):
    own = dict(lr=0.06, weight_decay=0.3, transforms=[agrlib.agr, torch.sign], maximize=True)
    params = parameters()
    grads = gradients(params)
    values = train(two_groups(entry, params, **own), grads)
    first, last = parameters()[:-2], parameters()[-2:-1]
    params, grads = parameters()[:-1], [step[:-1] for step in grads]
    optimizer = two_groups(entry, params, **own)
    values = train(optimizer, grads)
    assert str(optimizer.param_groups[1]["transforms"]) == "agr, sign"
    alone = train(entry.cls(first, **entry.kwargs), [step[:-1] for step in grads])
    alone += train(entry.cls(last, **{**entry.kwargs, **own}), [step[-1:] for step in grads])
    assert same(values, alone)
    for key, value in own.items():  # and every one of them matters
        rest = {k: v for k, v in own.items() if k != key}
        assert not same(values, train(two_groups(entry, parameters()[:-1], **rest), grads)), value


@every
def test_closure(entry):
    target = [torch.ones_like(p) for p in parameters()]

    def make():
        params = parameters()
        optimizer = entry.cls(params, **entry.kwargs, transforms=[agrlib.agr])

        def closure():
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = sum((p - t).square().sum() for p, t in zip(params, target, strict=True))
            loss.backward()
            return loss

        return optimizer, closure, params

    optimizer, closure, params = make()
    losses = [optimizer.step(closure).item()]
    with torch.no_grad():  # the closure needs a graph all the same
        losses.append(optimizer.step(closure=closure).item())
    other, closure, others = make()
    by_hand = []
    for _ in range(2):
        by_hand.append(closure().item())
        assert other.step() is None
    assert losses == by_hand
    assert losses[1] < losses[0]
    assert same(params, others)


SCHEDULERS = {
    "StepLR": lambda o: schedulers.StepLR(o, 2, gamma=0.3),
    "Cosine": lambda o: schedulers.CosineAnnealingLR(o, 6),
    "OneCycle": lambda o: schedulers.OneCycleLR(
        o, 0.1, total_steps=8, cycle_momentum=bool({"momentum", "betas"} & set(o.defaults))
    ),
}


def scheduled(cls, kwargs, scheduler):
    params = parameters()
    optimizer = cls(params, **kwargs)
    plan = SCHEDULERS[scheduler](optimizer)
    written = []
    for grads in gradients(params, 6):
        keys = set(optimizer.param_groups[0]) & {"lr", "betas", "momentum"}
        written.append({key: optimizer.param_groups[0][key] for key in keys})
        step(optimizer, grads)
        plan.step()
    return [param.detach() for param in params], written


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@every
def test_schedulers(entry, scheduler):
    values, written = scheduled(entry.cls, entry.kwargs, scheduler)
    if entry.twin:
        close(values, scheduled(entry.twin, entry.kwargs, scheduler)[0], 1e-12)
    params = parameters()
    optimizer = entry.cls(params, **entry.kwargs)
    for values_then, grads in zip(written, gradients(params, 6), strict=True):
        optimizer.param_groups[0].update(values_then)
        step(optimizer, grads)
    assert same(values, params)
    assert len({str(values_then["lr"]) for values_then in written}) > 2


@every
def test_maximize_descends_on_negated_gradients(entry):
    """The order of a step: transforms see the raw gradient, then comes the sign, then decay."""
    for transforms, by_hand in (([], lambda g: g), ([torch.relu], torch.relu)):
        values = run(entry, maximize=True, transforms=transforms)[1]
        params = parameters()
        negated = [[-by_hand(g) for g in step] for step in gradients(params)]
        assert same(values, train(entry.cls(params, **entry.kwargs), negated))
    assert not same(run(entry)[1], run(entry, maximize=True)[1])


# --- kinds of learning rates, devices, autograd ------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-dim", "1-element"])
@every
def test_tensor_lr(entry, shape):
    lr = torch.full(shape, entry.kwargs["lr"], dtype=torch.float64)
    close(run(entry, lr=lr)[1], run(entry)[1], 1e-13)
    close(run(entry, torch.float32, lr=lr.float())[1], run(entry, torch.float32)[1], 1e-6)
    assert lr.item() == entry.kwargs["lr"]
    params = parameters()
    optimizer = entry.cls(params, **{**entry.kwargs, "lr": lr})
    grads = gradients(params)
    train(optimizer, grads[:2])
    lr.mul_(0.1)  # a tensor is read anew at every step
    values = train(optimizer, grads[2:])
    params = parameters()
    optimizer = entry.cls(params, **entry.kwargs)
    train(optimizer, grads[:2])
    optimizer.param_groups[0]["lr"] *= 0.1
    close(values, train(optimizer, grads[2:]), 1e-13)


def as_tensors(entry, shape):
    """The entry's options, numbers as tensors of one element."""

    def made(value):
        if isinstance(value, tuple):
            return tuple(map(made, value))
        if isinstance(value, float):
            return torch.full(shape, value, dtype=torch.float64)
        return value

    return {key: made(value) for key, value in entry.kwargs.items()}


@pytest.mark.parametrize("fused", [False, True], ids=["eager", "fused"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@every
def test_options_may_be_tensors_of_one_element(entry, shape, fused):
    if fused:
        pytest.importorskip("numba", reason="numba has no wheel for this platform")
    some = {"SGD-nesterov": (), "Adagrad": (1,), "AdamW": (1, 1), "Padam": (1,), "Adan": ()}
    if fused and some.get(entry.name) != shape:
        return  # which takes seconds each; kernels see numbers
    ends = []
    for kwargs in (entry.kwargs, as_tensors(entry, shape)):
        params = parameters(torch.float32)
        made, grads = entry.cls(params, fused=fused, **kwargs), gradients(params, 4)
        train(made, grads[:2])
        saved = pickle.loads(pickle.dumps(made.state_dict()))
        other = entry.cls(params, fused=fused, **entry.kwargs)
        other.load_state_dict(saved)
        for key in ("lr", "weight_decay"):
            assert bits(other.param_groups[0][key]) == bits(kwargs[key])
        ends.append(train(other, grads[2:]))
        assert made.param_groups[0]["lr"] is kwargs["lr"]
    assert same(*ends)


@every
def test_autograd_sees_options_that_are_tensors(entry):
    options = {k: v for k, v in as_tensors(entry, (1,)).items() if k != "initial_accumulator_value"}
    flat = [x for v in options.values() for x in (v if isinstance(v, tuple) else [v])]
    wanted = [x.requires_grad_() for x in flat if isinstance(x, torch.Tensor)]
    param = parameters(shapes=[(4,)])[0].detach() * 1
    made = entry.cls([param], differentiable=True, **options)
    for [grad] in gradients([param], 3):
        param.grad = grad
        made.step()
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(param.sum(), wanted))
    numbers = {key: entry.kwargs[key] for key in options}
    plain = entry.cls([p := parameters(shapes=[(4,)])[0]], **numbers)
    close([param.detach()], train(plain, gradients([p], 3)), 1e-13)


@every
def test_tensor_lr_of_zero_dimensions_does_not_widen_the_computation(entry):
    """A double of zero dimensions promotes a zero-dimensional parameter, and no other."""
    results = []
    for shape in ((), (2,)):
        params = [torch.nn.Parameter(torch.full(shape, 0.7, dtype=torch.float32))]
        lr = torch.tensor(entry.kwargs["lr"], dtype=torch.float64)
        optimizer = entry.cls(params, **{**entry.kwargs, "lr": lr}, capturable=True)
        train(optimizer, [[torch.full(shape, 0.1 * t)] for t in range(1, 6)])
        results.append(params[0].detach().reshape(-1)[:1])
    assert same(*([r] for r in results))


@every
def test_capturable(entry):
    close(run(entry, capturable=True)[1], run(entry)[1], 1e-13)
    close(run(entry, torch.float32, capturable=True)[1], run(entry, torch.float32)[1], 1e-6)


@every
def test_capturable_keeps_step_on_the_device_and_never_waits_for_it(entry):
    """The meta device has no values: whatever asked for one would raise."""
    lr = torch.tensor(0.1)
    for capturable, home in ((True, "meta"), (False, "cpu")):
        params = [torch.nn.Parameter(torch.empty(3, 2, device="meta"))]
        rest = {k: v for k, v in entry.kwargs.items() if k != "lr"}
        optimizer = entry.cls(params, lr=lr, capturable=capturable, **rest)
        for _ in range(2):
            params[0].grad = torch.empty(3, 2, device="meta")
            optimizer.step()
        state = optimizer.state[params[0]]
        assert all(v.device.type == "meta" for k, v in state.items() if k != "step")
        if entry.cls.counts_steps:
            assert state["step"].device.type == home


@every
def test_steps_that_only_follow_shapes(entry):
    """What estimates memory steps optimizers of tensors without numbers; large ones have a plan."""
    for shape in ((3, 4), (300, 300)):
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with fake:
            param = torch.nn.Parameter(torch.empty(shape))
        for more in (dict(lr=torch.tensor(0.1)), dict(transforms=[agrlib.agr, torch.sign])):
            made = entry.cls([param], **{**entry.kwargs, **more})
            with fake:
                for _ in range(2):
                    param.grad = torch.empty(shape)
                    made.step()
            kept = [v for k, v in made.state[param].items() if k != "step"]
            assert all(type(v) is FakeTensor and v.shape == shape for v in kept)


def in_other_defaults(change):
    """Do something while torch makes tensors elsewhere, and of another type."""
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            return change()
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("fused", [False, True], ids=["eager", "fused"])
@every
def test_torchs_defaults_change_nothing(entry, fused):
    """Neither the device nor the type in which torch makes tensors."""
    if fused:
        pytest.importorskip("numba", reason="numba has no wheel for this platform")
    if fused and entry.name not in ("SGD", "AdamW"):
        return  # which takes seconds each, and only the rules differ
    ends = []
    for run_in in (lambda change: change(), in_other_defaults):
        seed(0)
        params = [*parameters(torch.float32, [(3, 4)]), *parameters(torch.bfloat16, [(5,)])]
        chain = [agrlib.centralize, agrlib.agr, agrlib.clip_global_norm(1.0)]
        more = dict(fused=fused, stochastic_rounding=True, transforms=chain)
        made = run_in(functools.partial(entry.cls, params, **more, **entry.kwargs))
        for t, grads in enumerate(gradients(params, 4)):
            if t == 2:
                saved = made.state_dict()
                for state in saved["state"].values():
                    if "step" in state:
                        state["step"] = state["step"].item()  # as torch once did
                run_in(functools.partial(made.load_state_dict, saved))
            feed(params, grads)
            run_in(made.step)
        ends.append(content(made))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("transforms", [(), (agrlib.agr,)], ids=["plain", "agr"])
@every
def test_differentiable(entry, transforms):
    """Autograd through three steps equals finite differences, in start, lr and gradients."""

    def trained(start, lr, *grads):
        param = start.clone()
        rest = {k: v for k, v in entry.kwargs.items() if k != "lr"}
        optimizer = entry.cls([param], lr=lr, differentiable=True, transforms=transforms, **rest)
        for grad in grads:
            param.grad = grad
            optimizer.step()
        return param, *(v for k, v in optimizer.state[param].items() if k != "step")

    start = parameters(shapes=[(4,)])[0].detach().requires_grad_()
    lr = torch.tensor(entry.kwargs["lr"], dtype=torch.float64, requires_grad=True)
    grads = [grad.requires_grad_() for [grad] in gradients([start], 3)]
    assert torch.autograd.gradcheck(trained, (start, lr, *grads))
    result = trained(start, lr, *grads)[0]
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(result.sum(), (start, lr, *grads)))
    plain = entry.cls([p := torch.nn.Parameter(start.detach().clone())], **entry.kwargs)
    plain.param_groups[0]["transforms"] = list(transforms)
    train(plain, [[grad.detach()] for grad in grads])
    close([result.detach()], [p.detach()], 1e-14)


@every
def test_differentiable_refuses_a_leaf_and_says_why(entry):
    params = parameters()
    optimizer = entry.cls(params, differentiable=True, **entry.kwargs)
    feed(params, gradients(params, 1)[0])
    before = content(optimizer)
    with pytest.raises(RuntimeError, match="optimize a clone"):
        optimizer.step()
    assert content(optimizer) == before


@every
def test_gradients_that_require_grad_leave_no_graph(entry):
    optimizer, _ = run(entry, steps=1)
    for param in members(optimizer):
        param.grad = (2 * param).detach().requires_grad_() * 1
    optimizer.step()
    for param in members(optimizer):
        assert param.is_leaf
        assert not any(v.requires_grad for v in optimizer.state[param].values())


# --- kinds of tensors --------------------------------------------------------------------------


@every
def test_complex_numbers_are_pairs_of_reals(entry):
    for wide, narrow in ((torch.complex128, torch.float64), (torch.complex64, torch.float32)):
        params = parameters(wide)
        grads = gradients(params)
        pairs = [torch.nn.Parameter(torch.view_as_real(p.detach()).clone()) for p in params]
        real = [[torch.view_as_real(g) for g in step] for step in grads]
        optimizer = entry.cls(params, **entry.kwargs)
        values = train(optimizer, grads)
        reference = entry.cls(pairs, **entry.kwargs)
        assert pairs[0].dtype == narrow
        assert same([torch.view_as_real(v) for v in values], train(reference, real))
        for param, pair in zip(params, pairs, strict=True):
            for key, value in reference.state[pair].items():
                mine = optimizer.state[param][key]
                assert bits(value) == bits(mine if key == "step" else torch.view_as_real(mine))
        if entry.twin:
            twin = entry.twin(parameters(wide), **entry.kwargs)
            close(values, train(twin, grads), 1e-12 if wide == torch.complex128 else 1e-5)


@every
def test_conjugate_views_are_resolved(entry):
    results = []
    for lazy in (True, False):
        params = parameters(torch.complex128, [(3, 2)])
        optimizer = entry.cls(params, **entry.kwargs)
        grad = gradients(params, 1)[0][0].conj()
        params[0].grad = grad if lazy else grad.resolve_conj()
        optimizer.step()
        results.append(params[0].detach())
    assert same([results[0]], [results[1]])


@pytest.mark.parametrize("transforms", [(), (agrlib.agr,)], ids=["plain", "agr"])
@every
def test_strides_are_kept_and_change_no_value(entry, transforms):
    def strided(tensor):
        return tensor.contiguous(memory_format=torch.channels_last)

    makers = {
        "channels_last": strided,
        "transposed": lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
        "gaps": lambda t: t.repeat_interleave(2, dim=3)[..., ::2],
    }
    [plain] = parameters(shapes=[(4, 3, 2, 5)])
    grads = gradients([plain])
    reference = entry.cls([plain], transforms=transforms, **entry.kwargs)
    train(reference, grads)
    for name, make in makers.items():
        for same_strides in (True, False):
            [param] = parameters(shapes=[(4, 3, 2, 5)])
            param = torch.nn.Parameter(make(param.detach()))
            strides = param.stride()
            optimizer = entry.cls([param], transforms=transforms, **entry.kwargs)
            for [grad] in grads:
                param.grad = make(grad) if same_strides else grad.clone()
                raw = bits(param.grad)
                optimizer.step()
                assert bits(param.grad) == raw
            assert param.stride() == strides, name
            close([param.detach()], [plain.detach()], 1e-14)  # sums may run in another order
            for key, value in optimizer.state[param].items():
                close([value], [reference.state[plain][key]], 1e-14)
                if key != "step" and name != "gaps":
                    assert value.stride() == strides, name


@every
def test_expanded_gradients(entry):
    params = parameters(shapes=[(3, 4)])
    optimizer = entry.cls(params, transforms=[agrlib.agr, torch.relu_], **entry.kwargs)
    params[0].grad = torch.tensor(0.5, dtype=torch.float64).expand(3, 4)
    optimizer.step()
    assert params[0].grad.stride() == (0, 0)
    assert (params[0].grad == 0.5).all()
    [other] = parameters(shapes=[(3, 4)])
    reference = entry.cls([other], transforms=[agrlib.agr, torch.relu_], **entry.kwargs)
    step(reference, [torch.full((3, 4), 0.5, dtype=torch.float64)])
    assert same(params, [other])


@pytest.mark.parametrize("state_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", HALF)
@every
def test_half_precision_is_computed_in_float32_and_rounded_once(entry, dtype, state_dtype):
    halves, singles = (
        parameters(dtype),
        [torch.nn.Parameter(p.detach().float()) for p in parameters(dtype)],
    )
    both = dict(transforms=[agrlib.agr, lambda g: g / 3], maximize=True, **entry.kwargs)
    half, single = entry.cls(halves, state_dtype=state_dtype, **both), entry.cls(singles, **both)
    for grads in gradients(halves):
        step(half, grads)
        step(single, [grad.float() for grad in grads])
        for p, q in zip(halves, singles, strict=True):
            q.data.copy_(q.detach().to(dtype))
            assert p.dtype == dtype
            assert torch.equal(p.float(), q)
            for key, value in single.state[q].items():
                kept = torch.float32 if key == "step" else state_dtype or dtype
                value.copy_(value.to(kept))
                assert half.state[p][key].dtype == kept
                assert torch.equal(half.state[p][key].float(), value)


@pytest.mark.parametrize("state_dtype", [torch.float64, torch.float32, torch.bfloat16])
@every
def test_state_dtype(entry, state_dtype):
    for dtype in (torch.float32, torch.bfloat16, torch.complex64):
        optimizer, values = run(entry, dtype, state_dtype=state_dtype)
        for param in members(optimizer):
            assert param.dtype == dtype
            for key, value in optimizer.state[param].items():
                kind = state_dtype.to_complex() if dtype.is_complex else state_dtype
                assert value.dtype == (torch.float32 if key == "step" else kind)
        close(values, run(entry, dtype)[1], 0.1)


class Doubled(torch.Tensor):
    """A subclass that keeps other numbers and has few functions, as quantized weights do."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        if func is torch.ops.aten.copy_.default and isinstance(args[0], cls):
            args[0].inner.copy_(2 * args[1])
            return args[0]
        if func is torch.ops.aten.full_like.default or func._schema.is_mutable:
            raise NotImplementedError(f"Doubled has no {func}")
        halve = functools.partial(torch.utils._pytree.tree_map_only, cls, lambda t: t.inner / 2)
        return func(*halve(args), **halve(kwargs or {}))


@pytest.mark.parametrize("shape", [(3, 4), (300, 300)], ids=str)
@every
def test_classes_of_tensors_need_no_more_than_zeros_like(entry, shape):
    kwargs = {k: v for k, v in entry.kwargs.items() if k != "initial_accumulator_value"}
    [plain] = parameters(torch.float32, [shape])
    doubled = torch.nn.Parameter(Doubled(2 * plain.detach()))
    grads = gradients([plain], 2)
    for param in (plain, doubled):
        made = entry.cls([param], transforms=[agrlib.agr], **kwargs)
        for [grad] in grads:
            param.grad = grad.clone()
            made.step()
    close([doubled.inner / 2], [plain.detach()], 1e-6)
    assert all(type(v) is torch.Tensor for v in made.state[doubled].values())


# --- stochastic rounding -----------------------------------------------------------------------


def rounded(entry, number, shape=(4096,), **more):
    seed(number)
    param = torch.nn.Parameter(torch.full(shape, -0.7, dtype=torch.bfloat16))
    kwargs = {**entry.kwargs, "lr": 1e-3, **more}
    return entry.cls([param], stochastic_rounding=True, state_dtype=torch.float32, **kwargs), param


@every
def test_stochastic_rounding_is_unbiased(entry):
    optimizer, param = rounded(entry, 0)
    step(optimizer, [torch.full_like(param, 0.3)])
    exact = torch.nn.Parameter(torch.full((1,), -0.7, dtype=torch.bfloat16).float())
    reference = entry.cls([exact], **{**entry.kwargs, "lr": 1e-3})
    step(reference, [torch.full_like(exact, torch.tensor(0.3).bfloat16().item())])
    low, high = param.float().aminmax()
    assert low < exact.item() < high, "both neighbors must occur"
    assert len(param.unique()) == 2
    sigma = (high - low) / 2 / math.sqrt(param.numel())  # at most, for a coin with two sides
    assert abs(param.double().mean() - exact.item()) < 5 * sigma


@every
def test_stochastic_rounding_may_be_turned_on_later_and_draws_from_no_one_else(entry):
    torch.manual_seed(3)
    params = [torch.nn.Parameter(torch.full((64,), -0.7, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = two_groups(entry, params, lr=1e-3)
    optimizer.param_groups[1]["stochastic_rounding"] = True
    before = torch.get_rng_state()
    step(optimizer, [torch.full_like(param, 0.3) for param in params])
    assert [len(param.unique()) for param in params] == [1, 2]
    assert torch.equal(torch.get_rng_state(), before)


@every
def test_stochastic_rounding_differs_between_steps(entry):
    """With the same noise, those rounded up at one step would be among those of the other."""
    optimizer, param = rounded(entry, 0)
    ups = []
    for _ in range(2):
        param.data.fill_(-0.7)
        step(optimizer, [torch.full_like(param, 0.3)])
        ups.append(param == param.max())
    assert 0 < ups[0].sum() < param.numel()
    assert (ups[0] & ~ups[1]).any()
    assert (ups[1] & ~ups[0]).any()


@every
def test_stochastic_rounding_depends_on_seed_step_and_index_alone(entry):
    def trajectory(number, resume=None, deep=False):
        optimizer, param = rounded(entry, number, (64,))
        extra = torch.nn.Parameter(param.detach().clone())
        optimizer.add_param_group(dict(params=[extra]))
        history = []
        for t in range(4):
            if t == resume:
                saved = copy.deepcopy(optimizer.state_dict())
                values = [param.detach().clone(), extra.detach().clone()]
                optimizer, param = rounded(entry, 99, (64,))
                extra = torch.nn.Parameter(values[1])
                optimizer.add_param_group(dict(params=[extra]))
                param.data.copy_(values[0])
                optimizer.load_state_dict(saved)
            if deep and t == 2:
                optimizer = copy.deepcopy(optimizer)
                param, extra = members(optimizer)
            torch.rand(t)  # other users of the generator do not matter
            step(optimizer, [torch.full_like(param, 0.3), torch.full_like(extra, 0.3)])
            history += [param.detach().clone(), extra.detach().clone()]
        return history

    first = trajectory(1)
    assert same(first, trajectory(1))
    assert same(first, trajectory(1, resume=2)), "resuming must be exact"
    assert same(first, trajectory(1, deep=True))
    assert not same(first, trajectory(2))
    assert not torch.equal(first[0], first[1]), "two parameters round alike"


def flips(made, steps=2):
    """At each step, which entries half way between two neighbors each parameter rounds up."""
    found = []
    for _ in range(steps):
        for param in members(made):
            param.data.fill_(1)
            param.grad = torch.full_like(param, -(2**-8))
        made.step()
        found += [param.detach() > 1 for param in members(made)]
    return found


def halves(sizes=(2**14,) * 2):
    return [torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16)) for n in sizes]


@pytest.mark.parametrize("fused", [False, True], ids=["eager", "fused"])
def test_stochastic_rounding_of_neighbors_is_independent(fused):
    """Neighboring seeds, steps, parameters, groups and optimizers draw noise of their own."""
    if fused:
        pytest.importorskip("numba", reason="numba has no wheel for this platform")
    more, found = dict(lr=1.0, stochastic_rounding=True, fused=fused), []
    for number in range(3):
        seed(number)
        for _ in range(2):
            first, second, third = halves((2**14,) * 3)
            groups = [dict(params=[first, second]), dict(params=[third])]
            found += flips(agrlib.SGD(groups, **more))
    noise = 2.0 * torch.stack(found).double() - 1
    count = noise.shape[1]
    assert (noise.mean(1).abs() < 5 / count**0.5).all()
    spectrum = torch.fft.rfft(noise)
    for i, one in enumerate(spectrum[:-1]):  # also where one is the other, moved by any distance
        others = torch.fft.irfft(one.conj() * spectrum[i + 1 :], n=count) / count
        assert (others.abs() < 6.5 / count**0.5).all()
    swapped = noise.reshape(len(noise), -1, 2).flip(2).reshape(noise.shape)
    assert ((noise @ swapped.T).fill_diagonal_(0).abs() < 6.5 * count**0.5).all()


def test_stochastic_rounding_permutes_no_sequence():
    """Of 1500 steps with 8192 entries, no two draw the same numbers in another order."""
    values = [torch.full((8192,), 1 + 2.0**-7 * k / 5) for k in range(1, 5)]
    drawn = set()
    for t in range(1500):
        start = noise_seed(0, torch.tensor(t), 0)
        ups = [round_stochastically(value, start) > 1 for value in values]
        drawn.add(tuple(int(up.sum()) for up in ups))
    assert len(drawn) == 1500


@every
def test_every_way_counts_the_steps_that_round(entry):
    pytest.importorskip("numba", reason="numba has no wheel for this platform")
    for fused in (False, True) if entry.name in ("SGD", "SGD-heavy-ball", "AdamW") else (False,):
        params = [*parameters(torch.float32, [(3,)]), *parameters(torch.bfloat16, [(3,)])]
        made = entry.cls(params, fused=fused, stochastic_rounding=True, **entry.kwargs)
        train(made, gradients(params, 3))
        assert [made.state[param]["step"].item() for param in params] == [3.0, 3.0]


@every
def test_stochastic_rounding_of_other_values(entry):
    for dtype in (torch.float64, torch.float32, torch.float16):
        assert same(run(entry, dtype, stochastic_rounding=True)[1], run(entry, dtype)[1])
    for dtype in (torch.bfloat16,):  # empty, one element, zero dimensions, strided
        values = run(entry, dtype, stochastic_rounding=True)[1]
        close(values, run(entry, dtype)[1], 0.1)
    lr = torch.tensor(entry.kwargs["lr"])
    for more in (dict(lr=lr), dict(capturable=True)):
        close(
            run(entry, torch.bfloat16, stochastic_rounding=True, **more)[1],
            run(entry, torch.bfloat16, stochastic_rounding=True)[1],
            0.1,
        )
    params = [torch.nn.Parameter(torch.tensor([NAN, INF, -INF, 0.0], dtype=torch.bfloat16))]
    optimizer = entry.cls(params, stochastic_rounding=True, **{**entry.kwargs, "weight_decay": 0})
    step(optimizer, [torch.zeros_like(params[0])])
    assert bits(params[0].nan_to_num(1, 2, 3)) == bits(
        torch.tensor([1, 2, 3, 0], dtype=torch.bfloat16)
    )


# --- which parameters, which state -------------------------------------------------------------


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(3, 3).double(), torch.nn.Linear(3, 3).double()
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@every
def test_tied_parameters_are_updated_once(entry):
    torch.manual_seed(0)
    model = Tied()
    other = copy.deepcopy(model)
    optimizer = entry.cls(model.parameters(), **entry.kwargs)
    weight = entry.cls([other.first.weight], **entry.kwargs)
    biases = entry.cls([other.first.bias, other.second.bias], **entry.kwargs)
    for _ in range(3):
        for net, parts in ((model, [optimizer]), (other, [weight, biases])):
            net.zero_grad()
            net(torch.eye(3, dtype=torch.float64)).square().sum().backward()
            for part in parts:
                part.step()
    assert len(optimizer.state) in (0, 3)
    assert model.first.weight is model.second.weight
    assert same(model.parameters(), other.parameters())


@every
def test_parameters_without_gradient(entry):
    params = parameters()
    optimizer = entry.cls(params, transforms=[agrlib.agr], **entry.kwargs)
    before = content(optimizer)
    optimizer.step()
    assert content(optimizer) == before
    assert not optimizer.state

    grads = gradients(params)
    for t, full in enumerate(grads):  # the second parameter first has a gradient at the third step
        step(optimizer, [None if i == 1 and t < 2 else g for i, g in enumerate(full)])
        assert (params[1] in optimizer.state) == (t >= 2 and bool(optimizer.state))
    late = entry.cls([fresh := parameters()[1]], transforms=[agrlib.agr], **entry.kwargs)
    train(late, [[full[1]] for full in grads[2:]])
    assert same([params[1]], [fresh])
    for key, value in late.state[fresh].items():
        assert bits(optimizer.state[params[1]][key]) == bits(value)
    if entry.cls.counts_steps:
        assert [int(optimizer.state[p]["step"]) for p in params[:2]] == [4, 2]


@twins
def test_state_and_group_keys_are_torchs(entry):
    ours, theirs = run(entry)[0], entry.twin(parameters(), **entry.kwargs)
    train(theirs, gradients(members(theirs)))
    for p, q in zip(members(ours), members(theirs), strict=True):
        described = [
            {k: (v.shape, v.dtype, v.device) for k, v in o.state.get(x, {}).items()}
            for o, x in ((ours, p), (theirs, q))
        ]
        assert described[0] == described[1]
    own = {"transforms", "state_dtype", "stochastic_rounding", "bias_correction", "rounding_seed"}
    mine, torchs = set(ours.param_groups[0]), set(theirs.param_groups[0])
    assert mine >= torchs - {"decoupled_weight_decay"}  # how torch's AdamW marks its class
    assert mine <= torchs | own | {"capturable", "fused"}  # which not every class of torch has


@every
def test_deepcopy_and_pickle_keep_everything(entry):
    for clone in (copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))):
        params = parameters(shapes=[(3, 4), (5,)])
        more = dict(transforms=[agrlib.agr, torch.sign], maximize=True, state_dtype=torch.float64)
        optimizer = two_groups(entry, params, lr=0.5, **more)
        grads = gradients(params)
        train(optimizer, grads[:2])
        copied = clone(optimizer)
        assert type(copied) is type(optimizer)
        assert repr(copied) == repr(optimizer)
        assert copied.defaults == optimizer.defaults
        assert copied.param_groups[1]["transforms"][0] is agrlib.agr
        assert set(vars(copied)) >= {k for k in vars(optimizer) if not k.startswith("_")}
        assert content(copied).keys() == content(optimizer).keys()
        assert not {id(p) for p in members(copied)} & {id(p) for p in params}
        assert same(train(copied, grads[2:]), train(optimizer, grads[2:]))


@every
def test_repr_names_the_transforms(entry):
    chain = [agrlib.agr, torch.sign]
    text = repr(entry.cls(parameters(), transforms=chain, **entry.kwargs))
    assert text.startswith(entry.cls.__name__ + " (")
    assert re.search(r"^ +transforms: agr, sign$", text, re.MULTILINE)
    assert all(re.search(rf"^ +{key}: ", text, re.MULTILINE) for key in entry.kwargs)


def breaks(make, closure=False, attached=False, compiled=True):
    """How often torch.compile gives up in a training loop, and where the loop arrives."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()
    model = torch.nn.Linear(3, 3)
    optimizer = make(model.parameters())
    handle = agrlib.attach(optimizer, [torch.sign]) if attached else None
    schedulers.StepLR(optimizer, 2)

    def loss():
        model.zero_grad()
        value = model(torch.ones(2, 3)).square().sum()
        value.backward()
        return value

    def work():
        if closure:
            return optimizer.step(loss)
        optimizer.step()

    work = torch.compile(work, backend="eager") if compiled else work
    for _ in range(3):
        if not closure:
            loss()
        work()
    assert handle is None or handle.active
    return sum(counters["graph_break"].values()), [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("closure", [False, True], ids=["plain", "closure"])
@pytest.mark.parametrize("attached", [False, True], ids=["own", "attached"])
def test_a_compiled_loop_leaves_a_step_as_it_is(closure, attached):
    for cls in (agrlib.AdamW, torch.optim.SGD) if attached else (agrlib.AdamW,):

        class Method(cls):  # the first of its class
            pass

        make = functools.partial(Method, lr=0.1)
        found, ends = breaks(make, closure, attached)
        assert found == 1
        assert same(ends, breaks(make, closure, attached, compiled=False)[1])


def test_a_step_that_is_compiled_by_itself_or_unpickled_is_as_it_was():
    param = torch.nn.Parameter(torch.ones(3))
    made = pickle.loads(pickle.dumps(agrlib.AdamW([param], transforms=[agrlib.agr])))
    [param] = members(made)
    param.grad = torch.ones(3)
    counters.clear()
    torch.compile(made.step, backend="eager")()
    assert sum(counters["graph_break"].values()) <= 1
    assert made.state[param]["step"] == 1


@every
def test_hooks_of_step(entry):
    optimizer, _ = run(entry, steps=1)
    calls = []
    before = optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append("before"))
    after = optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append("after"))
    optimizer.step()
    assert calls == ["before", "after"]
    before.remove(), after.remove()
    optimizer.step()
    assert calls == ["before", "after"]


@every
def test_zero_gradients_change_nothing_but_by_decay(entry):
    params = parameters()
    still = entry.cls(params, transforms=[agrlib.agr], **{**entry.kwargs, "weight_decay": 0})
    start = [param.detach().clone() for param in params]
    assert same(train(still, [[torch.zeros_like(p) for p in params]] * 3), start)
    decaying = entry.cls(params, transforms=[agrlib.agr], **entry.kwargs)
    values = train(decaying, [[torch.zeros_like(p) for p in params]])
    for value, old in zip(values, start, strict=True):
        assert (value.abs() < old.abs()).all()


# --- every option changes a number -------------------------------------------------------------

CHANGED = dict(transforms=[agrlib.agr], state_dtype=torch.float32, alpha=0.5, partial=0.3)
HOW_TO_RUN = {"foreach", "fused", "capturable", "differentiable"}  # change no number, on purpose


def alternatives(entry, key):
    value = {**options(entry.cls), **entry.kwargs}[key]
    if key == "betas":
        return [(*value[:i], 0.5, *value[i + 1 :]) for i in range(len(value))]
    if key in CHANGED:
        return [CHANGED[key]]
    return [not value] if isinstance(value, bool) else [value * 1.5 + 0.01]


@pytest.mark.parametrize("cls", {entry.cls: None for entry in OPTIMIZERS})
def test_every_option_changes_a_number(cls):
    entries = [entry for entry in OPTIMIZERS if entry.cls is cls]
    for key in set(options(cls)) - HOW_TO_RUN:
        seen = []
        for entry in entries:
            for other in alternatives(entry, key):
                try:  # bfloat16, so that rounding and the state's type can show
                    changed = run(entry, torch.bfloat16, **{key: other})[1]
                except ValueError:  # an option that this combination excludes
                    continue
                seen.append(not same(changed, run(entry, torch.bfloat16)[1]))
        assert any(seen), f"{key} changes nothing"
        if key not in ("dampening", "state_dtype"):  # without momentum there is no buffer
            assert all(seen), f"{key} changes nothing in one of the variants"


@every
def test_integer_parameters_are_refused(entry):
    whole = torch.ones(3, dtype=torch.int64)
    whole.grad = torch.ones(3, dtype=torch.int64)
    optimizer = entry.cls([whole], **entry.kwargs)
    with pytest.raises(RuntimeError, match="int64 cannot be optimized"):
        optimizer.step()
    assert whole.tolist() == [1, 1, 1] and not optimizer.state


@pytest.mark.parametrize(
    "options", [dict(eps="1e-8"), dict(betas=0.9), dict(betas=("0.9", 0.99)), dict(lr=None)]
)
def test_options_that_are_no_numbers_are_named(options):
    [name] = options
    with pytest.raises(TypeError, match=f"{name}.* must be"):
        agrlib.Adam([torch.nn.Parameter(torch.ones(1))], **options)


@pytest.mark.parametrize("wrong", [None, 5, "agr", agrlib.agr, {agrlib.agr}, {}])
def test_transforms_must_be_a_list(wrong):
    with pytest.raises(TypeError, match=r"takes a list of functions, like \[agr\]"):
        agrlib.SGD([torch.nn.Parameter(torch.ones(1))], transforms=wrong)


@pytest.mark.parametrize("result", [lambda param: param, lambda param: (param, param, param)])
def test_a_rule_that_returns_the_wrong_things_is_named(result):
    def faulty(grad, param, memory, lr):
        return result(param)

    class Faulty(agrlib.GradientMethod):
        def update_rule(self, group):
            return faulty, ("memory",)

        def scalars(self, group, lr, step):
            return (lr,)

    param = torch.nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    optimizer = Faulty([param], dict(lr=1.0, weight_decay=0.0))
    with pytest.raises(TypeError, match=r"rule faulty must return the tuple \(param, memory\)"):
        optimizer.step()
    assert param.tolist() == [1.0, 1.0] and not optimizer.state


def test_a_misspelt_kind_of_weight_decay_is_refused():
    class Misspelt(agrlib.SGD):
        weight_decay_acts_on = "params"

    with pytest.raises(ValueError, match="weight_decay_acts_on: 'params'"):
        Misspelt([torch.nn.Parameter(torch.ones(1))])


# --- large tensors ------------------------------------------------------------------------------


KINDS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.complex64: 1e-6, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("kind", KINDS, ids=str)
@every
def test_a_large_tensor_in_parts_is_updated_like_a_whole_one(entry, kind, monkeypatch):
    results = []
    for part in (1000, 10**9):
        seed(0)
        monkeypatch.setattr(agrlib.precision, "PART", part)
        params = parameters(kind, [(64, 40), (3, 5)])
        more = dict(transforms=[agrlib.agr, agrlib.clip_global_norm(0.5)], maximize=True)
        more |= dict(stochastic_rounding=kind == torch.bfloat16)
        made = entry.cls(params, fused=False, **{**entry.kwargs, **more})
        moved = train(made, gradients(params))
        results.append([*moved, *(v for state in made.state.values() for v in state.values())])
    close(*results, KINDS[kind])


def scaled_by_its_norm(grad, param, lr):
    return (param - lr * grad / grad.norm(),)


def test_only_functions_of_numbers_are_applied_to_parts(monkeypatch):
    """A user's rule may see the whole tensor; it has no kernel, but it has eager steps."""
    monkeypatch.setattr(agrlib.precision, "PART", 10)

    class Scaled(agrlib.SGD):
        def update_rule(self, group):
            return scaled_by_its_norm, ()

        def scalars(self, group, lr, step):
            return (lr,)

    param = torch.nn.Parameter(torch.zeros(100))
    param.grad = torch.ones(100)
    Scaled([param], lr=1.0, fused=False).step()
    torch.testing.assert_close(param.detach(), torch.full((100,), -0.1))


@torch.no_grad()
def test_what_is_cut_into_parts(monkeypatch):
    monkeypatch.setattr(agrlib.precision, "PART", 10)
    cut, rule = agrlib.precision.parts_of, agrlib.sgd.descend
    a, b = torch.arange(24.0).reshape(4, 6), torch.ones(4, 6)
    parts = list(cut(rule, a, b))
    assert [part.tolist() for part, _ in parts] == [
        [float(x) for x in range(k, min(k + 10, 24))] for k in (0, 10, 20)
    ]
    parts[1][0].zero_()
    assert a.reshape(-1)[10:20].eq(0).all() and a.reshape(-1)[20:].ne(0).all()
    for whole in [(a.t(), b.t()), (a, b.reshape(6, 4)), (a[:1], b[:1]), (a, b.to("meta"))]:
        assert list(cut(rule, *whole)) == [whole]
    assert list(cut(scaled_by_its_norm, a, b)) == [(a, b)]
    with torch.enable_grad():
        assert list(cut(rule, a, b)) == [(a, b)]


def swap(grad, param, memory, lr):
    return memory, param


def delay(grad, param, last, older, lr):
    return param - lr * older, grad, last


def method(rule, *keys):
    class Method(GradientMethod):
        counts_steps = False

        def update_rule(self, group):
            return rule, keys

        def scalars(self, group, lr, step):
            return (lr,)

    return Method


def test_a_rule_may_hand_its_inputs_on():
    """Nothing is overwritten before it has been copied to where it goes."""
    for rule, keys, expected in (
        (swap, ("memory",), [0.0, 1.0, 0.0, 1.0]),
        (delay, ("last", "older"), [1.0, 1.0, 0.0, -2.0]),
    ):
        param = torch.nn.Parameter(torch.ones(1))
        made = method(rule, *keys)([param], dict(lr=1.0, weight_decay=0.0), fused=False)
        found = []
        for k in range(4):
            step(made, [torch.full((1,), k + 1.0)])
            found.append(param.item())
        assert found == expected


def test_a_result_of_a_wrong_shape_leaves_everything_as_it_was():
    def faulty(grad, param, memory, lr):
        return torch.ones(7), memory + grad

    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    made = method(faulty, "memory")([param], dict(lr=1.0, weight_decay=0.0), fused=False)
    made.state[param]["memory"] = torch.zeros(3)
    before = content(made)
    with pytest.raises(RuntimeError, match="shape"):
        made.step()
    assert content(made) == before


class Twice:
    __hash__ = None

    def __call__(self, grad):
        return 2 * grad


def by_its_norm(function):
    @functools.wraps(function)
    def wrapped(grad):
        return function(grad / grad.norm())

    return wrapped


@by_its_norm
def unit(grad):
    return grad


def total_only(grad, total):
    return total


def itself(grad):
    return grad


@pytest.mark.parametrize(
    "made, expected",
    [
        (agrlib.Transform(Twice(), name="twice"), 2.0),
        (agrlib.Transform(unit), 0.1),
        (agrlib.Transform(total_only, over="tensor", summand=itself), 100.0),
    ],
    ids=["unhashable", "wrapped", "total"],
)
def test_transforms_of_large_tensors_may_be_anything(made, expected, monkeypatch):
    monkeypatch.setattr(agrlib.precision, "PART", 10)
    param = torch.nn.Parameter(torch.zeros(100))
    step(agrlib.SGD([param], lr=1.0, fused=False, transforms=[made]), [torch.ones(100)])
    torch.testing.assert_close(param.detach(), torch.full((100,), -expected))
