"""Saving, loading, resuming; what a checkpoint may not be loaded into."""

import copy
import io

import pytest
import torch
from contract import (
    OPTIMIZERS,
    Entry,
    bits,
    close,
    content,
    every,
    gradients,
    members,
    parameters,
    run,
    same,
    step,
    train,
    twins,
)

import agrlib

ADAM = next(entry for entry in OPTIMIZERS if entry.name == "Adam-amsgrad")


def saved(state_dict):
    """Through a file, as users do it."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def clones(params):
    return [torch.nn.Parameter(param.detach().clone()) for param in params]


def described(state_dict):
    return {
        (i, key): (bits(value), getattr(value, "device", None))
        for i, state in state_dict["state"].items()
        for key, value in state.items()
    }


@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64])
@every
def test_resuming_is_exact(entry, dtype, state_dtype):
    more = dict(transforms=[agrlib.agr, torch.sin], state_dtype=state_dtype, maximize=True)
    params = parameters(dtype)
    optimizer = entry.cls(params, **entry.kwargs, **more)
    grads = gradients(params, 6)
    train(optimizer, grads[:3])
    checkpoint = saved(optimizer.state_dict())
    assert checkpoint["param_groups"][0]["transforms"] == "agr, sin"
    others = clones(params)
    resumed = entry.cls(others, lr=0.5, **more)  # everything else comes with the checkpoint
    resumed.load_state_dict(state_dict=checkpoint)
    assert described(resumed.state_dict()) == described(optimizer.state_dict())
    assert repr(resumed) == repr(optimizer)
    assert resumed.param_groups[0]["transforms"][0] is agrlib.agr
    assert same(train(resumed, grads[3:]), train(optimizer, grads[3:]))


@every
def test_groups_resume_with_their_own_options(entry):
    def make(params, **more):
        groups = [
            dict(params=params[:2], transforms=[agrlib.agr]),
            dict(params=params[2:3], **more),
            dict(params=params[3:], transforms=[torch.sin]),
        ]
        return entry.cls(groups, **entry.kwargs)

    params = parameters()
    optimizer = make(params, lr=0.5, weight_decay=0.3)
    grads = gradients(params)
    train(optimizer, grads[:2])
    resumed = make(clones(params))
    resumed.load_state_dict(saved(optimizer.state_dict()))
    assert [g["transforms"] for g in resumed.param_groups] == [(agrlib.agr,), (), (torch.sin,)]
    assert same(train(resumed, grads[2:]), train(optimizer, grads[2:]))


@pytest.mark.parametrize("capturable", [False, True])
@twins
def test_a_checkpoint_of_torch_optim_continues_as_torch(entry, capturable):
    params = parameters()
    theirs = entry.twin(params, **entry.kwargs)
    grads = gradients(params, 8)
    train(theirs, grads[:4])
    ours = entry.cls(clones(params), lr=0.9, capturable=capturable, state_dtype=torch.float64)
    ours.load_state_dict(saved(theirs.state_dict()))
    group = ours.param_groups[0]
    assert {key: group[key] for key in entry.kwargs} == entry.kwargs
    assert (group["capturable"], group["state_dtype"]) == (capturable, torch.float64)
    close(train(ours, grads[4:]), train(theirs, grads[4:]), 1e-13)


@pytest.mark.parametrize("chain", [[], [agrlib.agr]], ids=repr)
@twins
def test_torch_optim_loads_our_checkpoint_and_knows_no_transforms(entry, chain):
    params = parameters()
    ours = entry.cls(params, transforms=chain, **entry.kwargs)
    grads = gradients(params, 8)
    train(ours, grads[:4])
    theirs = entry.twin(clones(params), lr=0.9)
    theirs.load_state_dict(saved(ours.state_dict()))
    ours.param_groups[0]["transforms"] = []
    close(train(theirs, grads[4:]), train(ours, grads[4:]), 1e-13)


@twins
def test_older_checkpoints_of_torch(entry):
    """`step` was a number once, SGD's empty buffer was None, and options were fewer."""
    params = parameters()
    theirs = entry.twin(params, **entry.kwargs)
    grads = gradients(params, 4)
    checkpoint = theirs.state_dict()
    for key in ("maximize", "foreach", "capturable", "differentiable", "fused"):
        checkpoint["param_groups"][0].pop(key, None)
    if "momentum" in entry.kwargs:
        checkpoint["state"] = {i: {"momentum_buffer": None} for i in range(len(params))}
    ours = entry.cls(clones(params), lr=0.9)
    ours.load_state_dict(checkpoint)
    close(train(ours, grads[:2]), train(theirs, grads[:2]), 1e-13)
    checkpoint = copy.deepcopy(theirs.state_dict())
    for state in checkpoint["state"].values():
        if "step" in state:
            state["step"] = int(state["step"])
    ours.load_state_dict(checkpoint)
    close(train(ours, grads[2:]), train(theirs, grads[2:]), 1e-13)


# --- what is refused, before anything is written ------------------------------------------------


def refused(optimizer, checkpoint, *messages):
    before, text = content(optimizer), repr(optimizer)
    untouched = copy.deepcopy(checkpoint)
    for message in messages:
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(checkpoint)
    assert content(optimizer) == before
    assert repr(optimizer) == text
    assert described(checkpoint) == described(untouched)
    assert checkpoint["param_groups"] == untouched["param_groups"]


@every
def test_other_transforms_are_refused_and_the_text_says_how_to_load_on_purpose(entry):
    params = parameters()
    with_agr = entry.cls(params, transforms=[agrlib.agr], **entry.kwargs)
    grads = gradients(params)
    train(with_agr, grads[:2])
    groups = [dict(params=params[:3]), dict(params=params[3:], transforms=[torch.sin])]
    checkpoint = saved(with_agr.state_dict())
    for chain, shown in (([], r"\[\]"), ([torch.sin, agrlib.agr], r"\[sin, agr\]")):
        other = entry.cls(clones(params), lr=0.9, transforms=chain)
        train(other, grads[:1])
        refused(
            other,
            checkpoint,
            rf"made with transforms \[agr\], this optimizer has {shown} in group 0",
            r"To load it on purpose.* state_dict\['param_groups'\]\[0\]\['transforms'\] = ",
        )
        for group in checkpoint["param_groups"]:  # as the text says
            group["transforms"] = ", ".join(f.__name__ for f in chain)
        other.load_state_dict(checkpoint)
        assert list(other.param_groups[0]["transforms"]) == chain
        checkpoint = saved(with_agr.state_dict())
    two = entry.cls(groups, **entry.kwargs)
    record = saved(two.state_dict())
    plain = entry.cls([dict(params=params[:3]), dict(params=params[3:])], **entry.kwargs)
    refused(plain, record, r"made with transforms \[sin\], this optimizer has \[\] in group 1")


@twins
def test_a_checkpoint_without_a_record_loads_with_one_warning(entry):
    """In a framework that does the loading, nobody can write a record into the checkpoint."""

    def three(params, **middle):
        parts = params[:2], params[2:4], params[4:]
        return [dict(params=part, **(middle if i == 1 else {})) for i, part in enumerate(parts)]

    params = parameters()
    theirs = entry.twin(three(params), **entry.kwargs)
    grads = gradients(params, 4)
    train(theirs, grads[:2])
    checkpoint = saved(theirs.state_dict())
    ours = entry.cls(three(clones(params), transforms=[]), lr=0.9, transforms=[agrlib.agr])
    with pytest.warns(UserWarning) as caught:
        ours.load_state_dict(checkpoint)
    [warning] = caught
    assert "no record of transforms" in str(warning.message)
    assert str(warning.message).endswith("with [agr]")
    assert warning.filename == __file__
    assert [list(g["transforms"]) for g in ours.param_groups] == [[agrlib.agr], [], [agrlib.agr]]
    shaped = [
        [grad if 2 <= i < 4 else agrlib.agr(grad) for i, grad in enumerate(step)]
        for step in grads[2:]
    ]
    close(train(ours, grads[2:]), train(theirs, shaped), 1e-13)


@pytest.mark.filterwarnings("error")
@twins
def test_without_transforms_a_checkpoint_of_torch_loads_in_silence(entry):
    ours = entry.cls(parameters(), **entry.kwargs)
    ours.load_state_dict(entry.twin(parameters(), **entry.kwargs).state_dict())
    with_agr = entry.cls(parameters(), transforms=[agrlib.agr], **entry.kwargs)
    with_agr.load_state_dict(with_agr.state_dict())


@every
def test_an_empty_record_is_a_record(entry):
    plain = entry.cls(parameters(), **entry.kwargs)
    ours = entry.cls(parameters(), transforms=[agrlib.agr], **entry.kwargs)
    refused(ours, plain.state_dict(), r"made with transforms \[\], this optimizer has \[agr\]")


def test_transforms_that_differ_in_their_arguments_are_refused():
    def scale(grad, factor):
        return factor * grad

    halves = [agrlib.Transform(scale, constants=(c,), name=f"scale({c})") for c in (0.5, 0.25)]
    first, second = (agrlib.SGD(parameters(), transforms=[halve]) for halve in halves)
    assert first.state_dict()["param_groups"][0]["transforms"] == "scale(0.5)"
    refused(second, first.state_dict(), r"\[scale\(0.5\)\], this optimizer has \[scale\(0.25\)\]")


@every
def test_other_shapes_and_groups_are_refused(entry):
    params = parameters()
    optimizer = entry.cls(params, **entry.kwargs)
    train(optimizer, gradients(params))
    checkpoint = saved(optimizer.state_dict())
    if checkpoint["state"]:
        shapes = [(3, 4), (5,), (2, 3, 2, 3), (), (1,), (0,)]
        other = entry.cls(parameters(shapes=shapes), **entry.kwargs)
        train(other, gradients(members(other)))
        refused(other, checkpoint, r"shape \(2, 3, 2, 2\), its parameter \(2, 3, 2, 3\)")
    fewer = entry.cls(parameters(shapes=[(3, 4), (5,)]), **entry.kwargs)
    refused(fewer, checkpoint, "doesn't match the size")
    groups = [dict(params=[param]) for param in parameters()]
    refused(entry.cls(groups, **entry.kwargs), checkpoint, "different number of parameter groups")


# --- what is kept -------------------------------------------------------------------------------


@every
def test_a_loaded_checkpoint_does_not_alias(entry):
    params = parameters()
    optimizer = entry.cls(params, **entry.kwargs)
    grads = gradients(params)
    train(optimizer, grads)
    checkpoint = optimizer.state_dict()
    before = copy.deepcopy(checkpoint)
    for state_dtype in (None, torch.float64, torch.float32):
        other = entry.cls(clones(params), state_dtype=state_dtype, **entry.kwargs)
        checkpoint["param_groups"][0]["state_dtype"] = state_dtype
        other.load_state_dict(checkpoint)
        assert other.param_groups is not checkpoint["param_groups"]
        train(other, grads)
        assert described(checkpoint) == described(before)
        mine = {t.data_ptr() for state in other.state.values() for t in state.values()}
        theirs = {t.data_ptr() for state in checkpoint["state"].values() for t in state.values()}
        assert not (mine & theirs) - {0}


@every
def test_state_dict_is_the_same_every_time_and_changes_nothing(entry):
    params = parameters()
    optimizer = entry.cls(params, transforms=[agrlib.agr], **entry.kwargs)
    train(optimizer, gradients(params))
    groups = optimizer.param_groups
    first, second = optimizer.state_dict(), copy.deepcopy(optimizer).state_dict()
    assert described(first) == described(second)
    assert first["param_groups"] == second["param_groups"]
    assert optimizer.param_groups is groups
    assert groups[0]["transforms"] == (agrlib.agr,)


@every
def test_float32_state_of_bfloat16_parameters_is_not_rounded_by_loading(entry):
    params = parameters(torch.bfloat16)
    optimizer = entry.cls(params, state_dtype=torch.float32, **entry.kwargs)
    train(optimizer, gradients(params))
    other = entry.cls(clones(params), state_dtype=torch.float32, **entry.kwargs)
    other.load_state_dict(saved(optimizer.state_dict()))
    assert described(other.state_dict()) == described(optimizer.state_dict())
    if optimizer.state:
        floats = {v.dtype for state in other.state.values() for v in state.values()}
        assert floats == {torch.float32}


@twins
def test_float32_state_wanted_for_a_checkpoint_of_torch(entry):
    params = parameters(torch.bfloat16)
    theirs = entry.twin(params, **entry.kwargs)
    train(theirs, gradients(params))
    ours = entry.cls(clones(params), state_dtype=torch.float32, **entry.kwargs)
    ours.load_state_dict(theirs.state_dict())
    for p, q in zip(members(ours), params, strict=True):
        for key, value in ours.state[p].items():
            assert value.dtype == torch.float32
            assert torch.equal(value, theirs.state[q][key].float())


@every
def test_how_to_run_does_not_come_from_a_checkpoint(entry):
    """A checkpoint of a run with other switches must not turn them on here."""
    first = entry.cls(parameters(), capturable=True, **entry.kwargs)
    train(first, gradients(members(first)))
    checkpoint = saved(first.state_dict())
    checkpoint["param_groups"][0].update(foreach=True, fused=True, differentiable=True)
    second = entry.cls(parameters(), fused=False, **entry.kwargs)
    second.load_state_dict(checkpoint)
    keys = ("foreach", "fused", "capturable", "differentiable")
    assert [second.param_groups[0][key] for key in keys] == [None, False, False, False]
    grads = gradients(members(second))
    close(train(second, grads), train(entry_like(second, checkpoint, entry), grads), 1e-13)


def entry_like(optimizer, checkpoint, entry):
    again = entry.cls(clones(parameters()), fused=None, **entry.kwargs)
    again.load_state_dict(checkpoint)
    return again


@pytest.mark.parametrize("capturable", [True, False])
def test_step_moves_to_where_capturable_says(capturable):
    params = [torch.nn.Parameter(torch.ones(2, device="meta"))]
    optimizer = ADAM.cls(params, capturable=capturable)
    state = dict(step=3.0, exp_avg=torch.ones(2), exp_avg_sq=torch.ones(2))
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: state}})
    assert optimizer.state[params[0]]["step"].device.type == ("meta" if capturable else "cpu")
    assert optimizer.state[params[0]]["exp_avg"].device.type == "meta"


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6),
    reason="optimizers take named parameters from torch 2.6 on",
)
@every
def test_named_parameters(entry):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1)).double()
    other = copy.deepcopy(model)
    named = entry.cls(model.named_parameters(), transforms=[agrlib.agr], **entry.kwargs)
    plain = entry.cls(other.parameters(), transforms=[agrlib.agr], **entry.kwargs)
    grads = gradients(model.parameters())
    assert same(train(named, grads[:2]), train(plain, grads[:2]))
    names = [name for name, _ in model.named_parameters()]
    checkpoint = saved(named.state_dict())
    assert checkpoint["param_groups"][0]["param_names"] == names
    again = entry.cls(copy.deepcopy(model).named_parameters(), transforms=[agrlib.agr], lr=0.9)
    again.load_state_dict(checkpoint)
    assert again.param_groups[0]["param_names"] == names
    assert same(train(again, grads[2:]), train(named, grads[2:]))


def test_a_late_momentum_buffer_keeps_its_dampening_under_stochastic_rounding():
    """Whether a buffer exists decides its first step, and not how often the parameter moved."""
    options = dict(lr=0.1, momentum=0.8, dampening=0.3)
    results = []
    for more in ({}, dict(stochastic_rounding=True)):  # which rounds nothing in float64
        params = parameters()
        theirs = torch.optim.SGD(params, **options)
        grads = gradients(params)
        train(theirs, grads[:2])
        ours = agrlib.SGD(clones(params), lr=0.1, **more)
        ours.load_state_dict(theirs.state_dict())
        results.append(train(ours, grads[2:]))
    assert same(*results)
    results = []
    for more in ({}, dict(stochastic_rounding=True)):
        params = parameters()
        ours = agrlib.SGD(params, lr=0.1, dampening=0.3, **more)
        step(ours, gradients(params)[0])
        ours.param_groups[0]["momentum"] = 0.8
        results.append(train(ours, gradients(params)[1:]))
    assert same(*results)


# --- hooks of users -----------------------------------------------------------------------------


def test_hooks_of_state_dict():
    params = parameters()
    optimizer = ADAM.cls(params, transforms=[agrlib.agr], **ADAM.kwargs)
    train(optimizer, gradients(params))
    seen = []

    def before(o):
        seen.append(o.param_groups[0]["transforms"])
        o.param_groups[0]["lr"] = 0.25

    def after(o, state_dict):
        seen.append(o.param_groups[0]["transforms"])
        assert state_dict["param_groups"][0]["transforms"] == "agr"
        return {**state_dict, "extra": 1}

    optimizer.register_state_dict_pre_hook(before)
    optimizer.register_state_dict_post_hook(after)
    made = optimizer.state_dict()
    assert made["extra"] == 1
    assert made["param_groups"][0]["lr"] == optimizer.param_groups[0]["lr"] == 0.25
    assert seen == [(agrlib.agr,), (agrlib.agr,)], "hooks see the optimizer as it is"


def test_a_load_hook_may_change_the_checkpoint():
    params = parameters()
    with_agr = ADAM.cls(params, transforms=[agrlib.agr], **ADAM.kwargs)
    train(with_agr, gradients(params))
    plain = ADAM.cls(clones(params), lr=0.9)

    def forget_transforms(optimizer, state_dict):
        groups = [{**group, "transforms": ""} for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    plain.register_load_state_dict_pre_hook(forget_transforms)
    plain.load_state_dict(with_agr.state_dict())
    assert described(plain.state_dict()) == described(with_agr.state_dict())


def test_a_hook_after_loading_has_the_last_word():
    params = parameters(torch.bfloat16)
    optimizer = ADAM.cls(params, state_dtype=torch.float32, **ADAM.kwargs)
    train(optimizer, gradients(params))
    kinds = set()

    def forget(o):
        for state in o.state.values():
            kinds.add(state["exp_avg"].dtype)
            state["exp_avg"].zero_()

    optimizer.register_load_state_dict_post_hook(forget)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert kinds == {torch.float32}, "the hook sees the state as it will be"
    assert all((state["exp_avg"] == 0).all() for state in optimizer.state.values())
    assert any((state["exp_avg_sq"] != 0).any() for state in optimizer.state.values())


@pytest.mark.parametrize("cls, decoupled", [(agrlib.Adam, True), (agrlib.AdamW, False)])
def test_the_other_kind_of_weight_decay_is_refused(cls, decoupled):
    param = torch.nn.Parameter(torch.ones(2))
    saved = torch.optim.Adam([param], weight_decay=0.1).state_dict()
    saved["param_groups"][0]["decoupled_weight_decay"] = decoupled  # as torch 2.7 and later save it
    optimizer = cls([param], lr=0.5)
    with pytest.raises(ValueError, match="coupled weight decay: load it into Adam"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.5
    saved["param_groups"][0]["decoupled_weight_decay"] = not decoupled
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


DECAYS = [(agrlib.Adam, agrlib.AdamW), (agrlib.AdamW, agrlib.Adam), (agrlib.AdamW, agrlib.AMSGrad)]


@pytest.mark.parametrize("made, loaded", DECAYS, ids=repr)
def test_our_own_checkpoints_say_what_the_decay_acted_on(made, loaded):
    entry = Entry("", made, dict(lr=0.1, weight_decay=0.1))
    optimizer, _ = run(entry)
    refused(loaded(parameters(), lr=0.5), saved(optimizer.state_dict()), "coupled weight decay")
    twin = getattr(torch.optim, made.__name__)(parameters(), lr=0.5)
    twin.load_state_dict(saved(optimizer.state_dict()))
    optimizer.load_state_dict(saved(twin.state_dict()))
    assert "decoupled_weight_decay" not in optimizer.param_groups[0]


def test_a_checkpoint_of_another_method_is_refused():
    for made, loaded, text in (
        (agrlib.Adam, agrlib.SGD, "another method: it has no momentum, dampening"),
        (agrlib.SGD, agrlib.Adam, "another method: it has no betas, eps"),
        (agrlib.Adam, agrlib.Padam, "another method: it has no partial"),
        (agrlib.Adan, agrlib.Adam, "give 2 of them"),
        (torch.optim.AdamW, agrlib.Adan, "give 3 of them"),
        (torch.optim.Adam, agrlib.AMSGrad, "take Adam to switch it off"),
    ):
        params = parameters()
        optimizer = made(params, lr=0.1, weight_decay=0)
        train(optimizer, gradients(params, 1))
        refused(loaded(parameters(), lr=0.5), saved(optimizer.state_dict()), text)


def test_options_that_the_constructor_refuses_are_refused_in_a_checkpoint():
    for cls, wrong in (
        (agrlib.Adam, dict(lr=-1.0)),
        (agrlib.Padam, dict(partial=3.0)),
        (agrlib.RMSprop, dict(alpha=1.5)),
        (agrlib.SGD, dict(nesterov=True)),
    ):
        checkpoint = cls(parameters()).state_dict()
        checkpoint["param_groups"][0].update(wrong)
        refused(cls(parameters()), checkpoint, "Invalid|requires")


def test_the_advice_for_each_group_leads_to_the_end():
    def two(**last):
        params = parameters()
        groups = [dict(params=params[:3]), dict(params=params[3:], **last)]
        return agrlib.Adam(groups, transforms=[agrlib.agr])

    ours, checkpoint = two(transforms=[agrlib.normalize]), two().state_dict()
    for i in range(2):
        checkpoint["param_groups"][i]["transforms"] = ""
    for i, name in enumerate(("agr", "normalize")):
        refused(ours, checkpoint, rf"\[{name}\] in group {i}.*\[{i}\]\['transforms'\] = '{name}'")
        checkpoint["param_groups"][i]["transforms"] = name
    ours.load_state_dict(checkpoint)


def test_a_plain_list_of_transforms_is_recorded_as_a_chain():
    first, second = (agrlib.Adam(parameters(), transforms=t) for t in ([agrlib.agr], []))
    second.param_groups[0]["transforms"] = [agrlib.agr]  # no step has seen it yet
    assert second.state_dict()["param_groups"][0]["transforms"] == "agr"
    second.load_state_dict(first.state_dict())
