"""`attach`: transforms for optimizers that know nothing of them."""

import copy
import pickle

import pytest
import torch
from contract import (
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
    step,
    train,
    twins,
)

import agrlib

CHAIN = [agrlib.agr, torch.sin]
HOW = ["for-loop", "foreach", "fused"]


def theirs(entry, how="for-loop", dtype=torch.float64, **more):
    switch = {} if how == "for-loop" else {how: True}
    return entry.twin(parameters(dtype), **entry.kwargs, **switch, **more)


@pytest.mark.parametrize("how", HOW)
@twins
def test_attached_equals_built_in(entry, how):
    if how == "fused" and "fused" not in options(entry.twin):
        pytest.skip("torch has no fused version of it")
    for more in ({}, dict(maximize=True)):
        optimizer = theirs(entry, how, **more)
        agrlib.attach(optimizer, CHAIN)
        values = train(optimizer, gradients(members(optimizer)))  # asserts p.grad is as it was
        close(values, run(entry, transforms=CHAIN, **more)[1], 1e-13)
        assert not same(values, train(theirs(entry, how, **more), gradients(parameters())))


OTHERS = {
    "Adagrad": dict(lr=0.1),
    "RMSprop": dict(lr=0.1, momentum=0.5),
    "Adamax": dict(lr=0.1),
    "NAdam": dict(lr=0.1),
    "RAdam": dict(lr=0.1),
    "Adadelta": dict(lr=0.1),
    "Rprop": dict(lr=0.1),
    "ASGD": dict(lr=0.1),
}


@pytest.mark.parametrize("name", OTHERS)
def test_any_torch_optimizer(name):
    def make():
        return getattr(torch.optim, name)(parameters(), **OTHERS[name])

    attached, by_hand = make(), make()
    agrlib.attach(attached, [agrlib.agr, torch.cos])  # changes signs, which is all Rprop sees
    grads = gradients(members(attached))
    shaped = [[torch.cos(agrlib.agr(g)) for g in one_step] for one_step in grads]
    assert same(train(attached, grads), train(by_hand, shaped))
    assert not same(train(make(), grads), members(attached))


def test_transforms_run_left_to_right():
    results = []
    for chain in ([agrlib.agr, torch.sin], [torch.sin, agrlib.agr]):
        optimizer = torch.optim.SGD(parameters(), lr=1.0)
        agrlib.attach(optimizer, chain)
        results.append(train(optimizer, gradients(members(optimizer), 1)))
    assert not same(*results)


@every
def test_attached_to_our_own_classes(entry):
    """Its chain runs before the optimizer's own."""
    optimizer = entry.cls(parameters(), transforms=[torch.sin], **entry.kwargs)
    agrlib.attach(optimizer, [agrlib.agr])
    values = train(optimizer, gradients(members(optimizer)))
    assert same(values, run(entry, transforms=CHAIN)[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.complex64])
def test_types_of_gradients(dtype):
    """Computed wide, and rounded once before the optimizer sees it."""
    optimizer = torch.optim.SGD(parameters(dtype), lr=0.1)
    agrlib.attach(optimizer, [agrlib.agr, lambda g: g / 3])
    grads = gradients(members(optimizer), 1)
    by_hand = torch.optim.SGD(parameters(dtype), lr=0.1)
    wide = torch.complex64 if dtype.is_complex else torch.float32
    shaped = [[(agrlib.agr(g.to(wide)) / 3).to(dtype) for g in one_step] for one_step in grads]
    assert same(train(optimizer, grads), train(by_hand, shaped))


# --- closures -----------------------------------------------------------------------------------


def problem(make):
    """An optimizer over one matrix and a closure that fits it to the identity."""
    param = torch.nn.Parameter(torch.linspace(-1, 2, 9, dtype=torch.float64).reshape(3, 3))
    optimizer = make([param])

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad(set_to_none=closure.forget)
        loss = (param - torch.eye(3)).pow(4).sum()
        loss.backward()
        closure.raw = param.grad.clone()
        closure.seen.append(param.grad)
        return loss

    closure.seen, closure.forget = [], True
    return optimizer, param, closure


@pytest.mark.parametrize("forget", [True, False])
@twins
def test_closures(entry, forget):
    optimizer, param, closure = problem(lambda p: entry.twin(p, **entry.kwargs))
    closure.forget = forget
    agrlib.attach(optimizer, CHAIN)
    ours, same_param, same_closure = problem(
        lambda p: entry.cls(p, transforms=CHAIN, **entry.kwargs)
    )
    for i in range(4):
        loss = optimizer.step(closure) if i % 2 else optimizer.step(closure=closure)
        torch.testing.assert_close(loss, ours.step(same_closure), rtol=1e-12, atol=0)
        assert param.grad is closure.seen[-1]
        assert torch.equal(param.grad, closure.raw)
    close([param], [same_param], 1e-12)


def test_lbfgs_evaluates_its_closure_many_times():
    optimizer, param, closure = problem(lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=5))
    agrlib.attach(optimizer, [agrlib.agr])
    optimizer.step(closure)
    assert len(closure.seen) > 2
    assert torch.equal(param.grad, closure.raw)

    reference, other, plain = problem(lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=5))

    def shaped():
        loss = plain()
        with torch.no_grad():
            other.grad = agrlib.agr(other.grad)
        return loss

    reference.step(shaped)
    assert torch.equal(param, other)
    assert len(plain.seen) == len(closure.seen)


def test_lbfgs_after_a_closure_that_raises():
    optimizer, param, closure = problem(lambda p: torch.optim.LBFGS(p, max_iter=5))
    agrlib.attach(optimizer, [agrlib.agr])

    def gives_up():
        loss = closure()
        if len(closure.seen) == 3:
            raise ArithmeticError("given up")
        return loss

    with pytest.raises(ArithmeticError):
        optimizer.step(gives_up)
    assert torch.equal(param.grad, closure.raw)
    assert param.grad is closure.seen[-1]


# --- failures -----------------------------------------------------------------------------------


def give_up(grad):
    raise ArithmeticError("given up")


def lose_shape(grad):
    grad.zero_()  # of its own copy
    return grad.reshape(-1)[:1]


@pytest.mark.parametrize(
    ("error", "chain", "sparse"),
    [
        (ArithmeticError, [agrlib.agr, give_up], False),
        (ValueError, [lose_shape], False),
        (TypeError, [lambda g: None], False),
        (RuntimeError, [agrlib.agr], True),
    ],
)
def test_a_step_that_raises_changes_nothing(error, chain, sparse):
    optimizer = torch.optim.Adam(parameters(shapes=[(3, 4), (5,)]))
    params = members(optimizer)
    train(optimizer, gradients(params))
    feed(params, gradients(params, 1)[0])
    if sparse:
        params[-1].grad = params[-1].grad.to_sparse()
    agrlib.attach(optimizer, chain)
    before, grads = content(optimizer), [p.grad for p in params]
    with pytest.raises(error):
        optimizer.step()
    assert content(optimizer) == before
    assert all(p.grad is grad for p, grad in zip(params, grads, strict=True))


def test_gradients_are_restored_when_the_optimizer_itself_raises():
    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            assert (members(self)[0].grad == -1).all()
            raise ArithmeticError("given up")

    optimizer = Broken(parameters(), lr=1.0)
    params = members(optimizer)
    feed(params, [torch.ones_like(p) for p in params])
    agrlib.attach(optimizer, [torch.neg])
    before, grads = content(optimizer), [p.grad for p in params]
    with pytest.raises(ArithmeticError):
        optimizer.step()
    assert content(optimizer) == before
    assert all(p.grad is grad for p, grad in zip(params, grads, strict=True))


def test_what_is_refused():
    optimizer = torch.optim.SGD(parameters(), lr=1.0)
    for wrong in (agrlib.agr, "agr", [0.5]):
        with pytest.raises(TypeError, match=r"transforms takes a list|must be callable"):
            agrlib.attach(optimizer, wrong)
    assert "step" not in vars(optimizer)
    handle = agrlib.attach(optimizer, CHAIN)
    with pytest.raises(RuntimeError, match=r"remove\(\) them first"):
        agrlib.attach(optimizer, CHAIN)
    handle.remove()
    agrlib.attach(optimizer, CHAIN)


def scaled_step(optimizer, params, unscale):
    """One step under a gradient scaler that multiplies the loss by 1024."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loss = scaler.scale(sum((p * torch.arange(1.0, p.numel() + 1)).sum() for p in params))
    loss.backward()
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)


@pytest.mark.parametrize("chain", [[agrlib.agr], [torch.tanh]])
def test_gradient_scaler(chain):
    """A fused step would unscale after the transforms; all others are unscaled before."""
    shapes = [(3,), (4,)]
    for fused, unscale in ((False, False), (False, True), (True, True)):
        optimizer = torch.optim.Adam(parameters(torch.float32, shapes), fused=fused)
        agrlib.attach(optimizer, chain)
        scaled_step(optimizer, members(optimizer), unscale)
        reference = torch.optim.Adam(parameters(torch.float32, shapes))
        shaped = [chain[0](torch.arange(1.0, p.numel() + 1)) for p in members(reference)]
        close(members(optimizer), train(reference, [shaped]), 1e-6)
    optimizer = torch.optim.Adam(parameters(torch.float32, shapes), fused=True)
    agrlib.attach(optimizer, chain)
    with pytest.raises(RuntimeError, match=r"scaler\.unscale_\(optimizer\)"):
        scaled_step(optimizer, members(optimizer), unscale=False)
    assert same(members(optimizer), parameters(torch.float32, shapes))


@pytest.mark.parametrize("fused", [None, True])
def test_gradient_scaler_skips_our_own_classes_on_overflow(fused):
    for scale, moves in ((1024.0, True), (float("inf"), False)):
        params = parameters(torch.float32, [(3,)])
        optimizer = agrlib.AdamW(params, transforms=[agrlib.agr], fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(members(optimizer)[0].sum()).backward()
        members(optimizer)[0].grad.mul_(scale)
        scaler.step(optimizer)
        assert same(members(optimizer), parameters(torch.float32, [(3,)])) != moves


# --- schedulers, removal, copies ----------------------------------------------------------------


@pytest.mark.filterwarnings("error")  # as a scheduler warns when it missed a step
@pytest.mark.parametrize("first", ["attach", "scheduler"])
@pytest.mark.parametrize("removed", [False, True])
def test_before_or_after_a_scheduler(first, removed):
    optimizer = torch.optim.SGD(parameters(), lr=0.5, momentum=0.9)
    if first == "attach":
        handle = agrlib.attach(optimizer, CHAIN)
    plan = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    if first == "scheduler":
        handle = agrlib.attach(optimizer, CHAIN)
    reference = torch.optim.SGD(parameters(), lr=0.5, momentum=0.9)
    for t, grads in enumerate(gradients(members(optimizer))):
        if t == 2 and removed:
            handle.remove()
        shaped = [g if t >= 2 and removed else torch.sin(agrlib.agr(g)) for g in grads]
        step(optimizer, grads)
        step(reference, shaped)
        plan.step()
        reference.param_groups[0]["lr"] *= 0.5
    assert same(members(optimizer), members(reference))


def test_remove_gives_the_step_back_and_twice_is_harmless():
    optimizer = torch.optim.SGD(parameters(), lr=0.5)
    handle = agrlib.attach(optimizer, [torch.zeros_like])
    start = [p.detach().clone() for p in members(optimizer)]
    grads = gradients(start)
    assert same(train(optimizer, grads), start)
    handle.remove()
    assert "step" not in vars(optimizer)
    handle.remove()
    reference = torch.optim.SGD(parameters(), lr=0.5)
    assert same(train(optimizer, grads), train(reference, grads))
    second = agrlib.attach(optimizer, [torch.zeros_like])
    handle.remove()  # ended already: it does not end the second
    stays = [p.detach().clone() for p in members(optimizer)]
    assert same(train(optimizer, grads), stays)
    second.remove()


def test_remove_keeps_a_step_that_someone_else_put_on_the_optimizer():
    optimizer = torch.optim.SGD(parameters(), lr=0.5)
    handle = agrlib.attach(optimizer, [torch.zeros_like])
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # wraps the attached step
    handle.remove()
    start = [p.detach().clone() for p in members(optimizer)]
    assert not same(train(optimizer, gradients(start)), start)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_do_not_carry_the_attachment(clone):
    optimizer = torch.optim.SGD(parameters(), lr=0.5)
    agrlib.attach(optimizer, [torch.zeros_like])
    copied = clone(optimizer)
    start = [p.detach().clone() for p in members(copied)]
    assert not same(train(copied, gradients(start)), start)
    assert same(train(optimizer, gradients(start)), start)
    assert "transforms" not in optimizer.state_dict()["param_groups"][0]


def test_hooks_and_arguments_of_step():
    class Extra(torch.optim.SGD):
        def step(self, closure=None, *, factor=1.0):
            for param in members(self):
                param.data -= factor * param.grad
            return factor

    optimizer = Extra([torch.nn.Parameter(torch.ones(2))], lr=1.0)
    agrlib.attach(optimizer, [lambda g: 2 * g])
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    members(optimizer)[0].grad = torch.ones(2)
    assert optimizer.step(factor=0.25) == 0.25
    assert calls == ["before", "after"]
    assert members(optimizer)[0].tolist() == [0.5, 0.5]


def test_parameters_added_later_and_without_gradient():
    optimizer = torch.optim.SGD(parameters(shapes=[(3,)]), lr=0.5)
    agrlib.attach(optimizer, [agrlib.agr])
    late = parameters(shapes=[(4,), (2,)], seed=5)
    optimizer.add_param_group(dict(params=late, lr=0.1))
    raw = [torch.arange(1.0, 4).double(), torch.arange(1.0, 5).double(), None]
    start = [p.detach().clone() for p in members(optimizer)]
    feed(members(optimizer), raw)
    optimizer.step()
    torch.testing.assert_close(late[0].detach(), start[1] - 0.1 * agrlib.agr(raw[1]))
    torch.testing.assert_close(members(optimizer)[0].detach(), start[0] - 0.5 * agrlib.agr(raw[0]))
    assert bits(late[1]) == bits(start[2])
    assert late[1].grad is None


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6),
    reason="torch's own Adam overwrites what autograd needs before torch 2.6",
)
def test_differentiable():
    start = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64, requires_grad=True)

    def trained(grad):
        param = start.clone()
        optimizer = torch.optim.Adam([param], lr=0.1, differentiable=True)
        agrlib.attach(optimizer, [agrlib.agr])
        for _ in range(2):
            param.grad = grad
            optimizer.step()
        return param

    assert torch.autograd.gradcheck(trained, [start.detach().clone().requires_grad_()])


def test_a_gradient_that_a_hook_of_the_step_drops_stays_dropped():
    param = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([param], lr=1.0)
    agrlib.attach(optimizer, [lambda grad: grad])
    optimizer.register_step_post_hook(lambda optimizer, args, kwargs: optimizer.zero_grad())
    for _ in range(3):
        param.sum().backward()
        optimizer.step()
    assert param.tolist() == [-3.0, -3.0] and param.grad is None


@pytest.mark.parametrize("size", [1, 2])
def test_a_step_that_writes_the_gradient_writes_a_copy(size):
    class Writing(torch.optim.SGD):
        def step(self, closure=None):
            self.param_groups[0]["params"][0].grad.mul_(10)

    param = torch.nn.Parameter(torch.zeros(size))
    param.grad = torch.ones(size)
    optimizer = Writing([param], lr=1.0)
    agrlib.attach(optimizer, [agrlib.agr])
    optimizer.step()
    assert param.grad.tolist() == [1.0] * size


def test_only_optimizers_are_attached_to():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    before = torch.optim.SGD.step
    for wrong in (torch.optim.SGD, scheduler, None):
        with pytest.raises(TypeError, match="takes an optimizer"):
            agrlib.attach(wrong, [agrlib.agr])
    assert torch.optim.SGD.step is before
