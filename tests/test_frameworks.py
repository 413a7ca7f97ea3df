"""What frameworks ask of an optimizer, without them; tests/frameworks runs the real ones."""

import copy
import inspect
import pickle

import pytest
import torch
from contract import bits, close, every, gradients, members, parameters, same, step, train

import agrlib

SHAPES = [(3, 4), (5,)]
ways = pytest.mark.parametrize("fused", [None, False, True])


def floats():
    return parameters(torch.float32, SHAPES)


def made(cls=agrlib.AdamW, params=None, **options):
    return cls(floats() if params is None else params, lr=0.1, **options)


# --- gradient scaling ---------------------------------------------------------------------------


def leaves_scaling_to_the_step(optimizer):
    """As torch.amp.GradScaler and Lightning ask."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


@ways
@every
def test_only_fused_true_takes_over_the_scaling(entry, fused):
    optimizer = entry.cls(floats(), fused=fused, **entry.kwargs)
    copies = copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))
    for each in (optimizer, *copies):
        assert leaves_scaling_to_the_step(each) is (fused is True)


def test_scaling_follows_the_groups():
    first, second = floats()
    optimizer = agrlib.AdamW([first], lr=0.1)
    optimizer.add_param_group(dict(params=[second], fused=True))
    assert leaves_scaling_to_the_step(optimizer)
    optimizer.param_groups[1]["fused"] = None
    assert not leaves_scaling_to_the_step(optimizer)


def test_a_checkpoint_does_not_change_who_scales():
    for mine, theirs in ((True, None), (None, True)):
        optimizer = made(fused=mine)
        optimizer.load_state_dict(made(fused=theirs).state_dict())
        assert leaves_scaling_to_the_step(optimizer) is (mine is True)


def test_a_wrapper_that_looks_like_its_optimizer_answers_for_it():
    """Lightning's wrappers inherit from the optimizer's class, but have none of its attributes."""

    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer
            self.__class__ = type("Wrapped", (Wrapper, type(optimizer)), {})

        def __getattr__(self, name):
            return getattr(self.optimizer, name)

    for fused in (None, True):
        wrapped = Wrapper(made(fused=fused))
        assert isinstance(wrapped, agrlib.AdamW)
        assert leaves_scaling_to_the_step(wrapped) is (fused is True)
        assert wrapped.param_groups is wrapped.optimizer.param_groups


def scaled_step(optimizer, spoil=False, clip=None):
    """A step under a scaler; return how often `step` was called, as accelerate finds it out."""
    calls, own = [], optimizer.step
    optimizer.step = lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    params = members(optimizer)
    optimizer.zero_grad()
    scaler.scale(sum((p * p).sum() for p in params)).backward()
    if spoil:
        params[0].grad[0, 0] = torch.inf
    if clip is not None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(params, clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.step = own
    return len(calls)


@pytest.mark.parametrize("chain", [[], [agrlib.agr]], ids=repr)
@ways
def test_an_overflow_skips_the_step_where_frameworks_see_it(fused, chain):
    optimizer = made(fused=fused, transforms=chain)
    assert scaled_step(optimizer, spoil=True) == (fused is True)
    assert same(members(optimizer), floats())
    assert not optimizer.state
    assert scaled_step(optimizer) == 1
    assert not same(members(optimizer), floats())


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("mixed", [False, True])
@ways
def test_scaled_and_clipped_steps_are_those_of_torch(fused, mixed, clip):
    """Mixed: a group that asked for fused=True beside one that did not."""
    first, second = floats()
    groups = [dict(params=[first]), dict(params=[second], **(dict(fused=True) if mixed else {}))]
    ours, theirs = made(params=groups, fused=fused), made(torch.optim.AdamW)
    for _ in range(3):
        scaled_step(ours, clip=clip), scaled_step(theirs, clip=clip)
    close(members(ours), members(theirs), 1e-6)


@pytest.mark.parametrize("clip", [None, 0.5])
@ways
def test_what_a_scaled_step_leaves_in_the_gradients(fused, clip):
    optimizer = made(fused=fused)
    scaled_step(optimizer, clip=clip)
    norm = sum(p.grad.square().sum() for p in members(optimizer)).sqrt()
    plain = sum((2 * p).square().sum() for p in floats()).sqrt()
    expected = clip or plain * (1024 if fused else 1)
    torch.testing.assert_close(norm, torch.as_tensor(expected), rtol=1e-4, atol=0.0)


# --- steps, closures, hooks -----------------------------------------------------------------------


@pytest.mark.parametrize("keyword", [False, True])
@ways
def test_gradients_that_appear_in_the_closure_are_the_ones_used(fused, keyword):
    """Lightning zeroes, computes and clips the gradients in the closure of the step."""
    optimizer, reference = (made(fused=f, transforms=[agrlib.agr]) for f in (fused, False))
    [grads] = gradients(members(optimizer), 1)
    losses = []

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = sum((p * g).sum() for p, g in zip(members(optimizer), grads, strict=True))
        loss.backward()
        torch.nn.utils.clip_grad_value_(members(optimizer), 0.5)
        losses.append(loss)
        return loss

    result = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
    assert losses == [result]
    step(reference, [grad.clamp(-0.5, 0.5) for grad in grads])
    close(members(optimizer), members(reference), 1e-6)


def test_the_closure_may_return_nothing():
    """Lightning's manual optimization gives an empty one."""
    optimizer = made()
    step(optimizer, gradients(members(optimizer), 1)[0])
    assert optimizer.step(closure=lambda: None) is None


def test_signatures_that_are_looked_up():
    step_takes, zero_takes = (
        inspect.signature(f).parameters for f in (agrlib.AdamW.step, agrlib.AdamW.zero_grad)
    )
    assert list(step_takes) == ["self", "closure"]  # no grad_scaler, which torch would then pass
    assert zero_takes["set_to_none"].default is True


def test_zeroing_with_and_without_none():
    optimizer = made()
    params = members(optimizer)
    for set_to_none in (False, True):
        step(optimizer, gradients(params, 1)[0])
        optimizer.zero_grad(set_to_none=set_to_none)
        assert all((p.grad is None) is set_to_none for p in params)
    before = bits(params[0])
    optimizer.step()  # nothing has a gradient
    assert bits(params[0]) == before


def test_hooks_run_around_every_step():
    """Training loops count and time steps with them; a scheduler counts with a wrapped `step`."""
    seen, optimizer = [], made()
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    step(optimizer, gradients(members(optimizer), 1)[0])
    assert seen == ["before", "after"]


# --- groups and checkpoints -----------------------------------------------------------------------


def test_the_defaults_are_those_of_the_constructor():
    """Schedulers and monitors of learning rates read them."""
    optimizer = agrlib.AdamW(floats(), lr=0.1, betas=(0.8, 0.9), transforms=[agrlib.agr])
    assert optimizer.defaults["lr"] == 0.1
    assert optimizer.defaults["betas"] == optimizer.param_groups[0]["betas"] == (0.8, 0.9)


@ways
def test_parameters_that_are_replaced_in_their_group_are_updated(fused):
    """accelerate puts those of a prepared model there."""
    optimizer = made(fused=fused)
    step(optimizer, gradients(members(optimizer), 1)[0])
    groups, others = optimizer.param_groups, floats()
    groups[0]["params"] = others
    optimizer.state.clear()
    [grads] = gradients(others, 1)
    reference = made(fused=False)
    step(optimizer, grads), step(reference, grads)
    assert optimizer.param_groups is groups
    close(others, members(reference), 1e-6)


def rebuilt(value):
    """A copy, made as frameworks do that move a checkpoint to another device."""
    if isinstance(value, torch.Tensor):
        return value.to("cpu", copy=True)
    if isinstance(value, dict):
        return type(value)({key: rebuilt(each) for key, each in value.items()})
    if isinstance(value, list | tuple):
        return type(value)(rebuilt(each) for each in value)
    return value


@every
def test_a_checkpoint_that_a_framework_has_moved_is_the_same(entry, tmp_path):
    """accelerate loads the empty one, too, when it wraps an optimizer."""
    optimizer, resumed = (
        entry.cls(floats(), transforms=[agrlib.agr], **entry.kwargs) for _ in range(2)
    )
    optimizer.load_state_dict(rebuilt(optimizer.state_dict()))
    grads = gradients(members(optimizer))
    with torch.no_grad():
        for param, value in zip(members(resumed), train(optimizer, grads[:2]), strict=True):
            param.copy_(value)
    torch.save(dict(optimizer=rebuilt(optimizer.state_dict())), tmp_path / "checkpoint")
    loaded = torch.load(tmp_path / "checkpoint", weights_only=True, map_location="cpu")
    resumed.load_state_dict(loaded["optimizer"])
    assert same(train(resumed, grads[2:]), train(optimizer, grads[2:]))


def test_what_a_framework_notes_in_a_group_stays_there():
    """timm's `lr_scale`, a scheduler's `initial_lr`, a name."""
    notes = dict(lr_scale=0.5, group_name="head", param_names=["weight", "bias"])
    optimizer = made(params=[dict(params=floats(), **notes)])
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    step(optimizer, gradients(members(optimizer), 1)[0])
    other = made(params=[dict(params=floats(), **notes)])
    other.load_state_dict(optimizer.state_dict())
    group = other.param_groups[0]
    assert {key: group[key] for key in notes} == notes
    assert group["initial_lr"] == 0.1


@ways
def test_an_empty_group_is_harmless(fused):
    """peft makes one for the embeddings of a model that has none to train."""
    groups = [dict(params=floats()), dict(params=[], lr=1e-6)]
    optimizer, reference = made(params=groups, fused=fused), made(fused=False)
    grads = gradients(members(optimizer))
    close(train(optimizer, grads), train(reference, grads), 1e-6)
    optimizer.load_state_dict(optimizer.state_dict())
