"""The fast path on a GPU: the runs of the other files again, and what only a GPU can show."""

import contextlib

import pytest
import torch
from contract import every, members, same
from fast import (
    ENTRIES,
    LARGE,
    METHODS,
    SCENARIOS,
    SMALL,
    Way,
    check_ran,
    combinations,
    gentle,
    go,
    halves,
    happens,
    large,
    measure_special,
    name_of,
    parity,
    rounded_stochastically,
    start,
    stream,
    tensors,
)

import agrlib

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
GPU = Way(True, "cuda")
RUNS = {name_of(*run): run for run in combinations()}
LARGE_RUNS = {name_of(*run): run for run in large()}
BOTH = [agrlib.centralize, agrlib.agr]
methods = pytest.mark.parametrize("entry", METHODS, ids=lambda entry: entry.name)


@pytest.mark.parametrize("run", RUNS.values(), ids=list(RUNS))
def test_parity_over_100_steps(run):
    case = parity(*run, shapes=SMALL)
    case.check(case.measure("cuda"))


@pytest.mark.parametrize("run", RUNS.values(), ids=list(RUNS))
def test_values_that_are_no_ordinary_numbers(run):
    assert measure_special(*run, device="cuda") == []


@pytest.mark.parametrize("run", LARGE_RUNS.values(), ids=list(LARGE_RUNS))
def test_parity_of_tensors_in_many_parts(run):
    case = parity(*run, shapes=[*LARGE, (4, 4096), (2**20,)], steps=20)
    case.check(case.measure("cuda"))


@pytest.mark.parametrize("name", SCENARIOS)
@methods
def test_scenarios(entry, name):
    case = happens(entry, name)
    case.check(case.measure("cuda"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chain", [[], BOTH], ids=repr)
@methods
def test_half_precision_is_computed_in_float32_and_rounded_once(entry, chain, dtype):
    halves(entry, dtype, torch.float32, chain, device="cuda")


def test_stochastic_rounding_is_that_of_eager_steps_on_either_device():
    entry = ENTRIES["SGD-heavy-ball"]
    ways = [GPU, Way(False, "cuda"), Way(False)]
    first, *others = (
        [v.cpu() for v in tensors(rounded_stochastically(entry, w)).values()] for w in ways
    )
    assert all(same(first, other) for other in others)
    resumed = tensors(rounded_stochastically(entry, GPU, resume=True)).values()
    assert same(first, [value.cpu() for value in resumed])


# --- nothing waits ------------------------------------------------------------------------------


@contextlib.contextmanager
def no_waiting():
    """Let whatever would make the host wait for the device raise."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("chain", [[], BOTH, [agrlib.clip_global_norm(0.5)]], ids=repr)
@every
def test_no_step_waits_for_the_device(entry, chain):
    """Neither the first one, which plans and compiles, nor those under a gradient scaler."""
    optimizer = GPU.optimizer(entry, GPU.parameters(torch.float32, SMALL), transforms=chain)
    found = torch.zeros((), device="cuda")
    for t, grads in enumerate(list(stream(optimizer, 5))):
        for param, grad in zip(members(optimizer), grads, strict=True):
            param.grad = grad
        if t > 2:
            optimizer.grad_scale, optimizer.found_inf = torch.ones_like(found), found
        with no_waiting():
            optimizer.step()
    check_ran(optimizer)


def test_waiting_would_be_noticed():
    with pytest.raises(RuntimeError, match="synchroniz"), no_waiting():
        torch.ones(1, device="cuda").item()


@pytest.mark.parametrize("chain", [[], BOTH], ids=repr)
@every
def test_a_replayed_graph_is_a_step(entry, chain):
    """The learning rate and the number of the step are read on the device, at each replay."""
    results = []
    for graphed in (True, False):
        params = GPU.parameters(torch.float32, [(17,), (64, 48)])
        lr = torch.tensor(gentle(entry)["lr"], device="cuda")
        optimizer = GPU.optimizer(entry, params, lr=lr, capturable=True, transforms=chain)
        grads = list(stream(optimizer, 8))
        for param in params:
            param.grad = torch.zeros_like(param)
        fill(params, grads[0])
        on_a_stream(optimizer.step)
        fill(params, grads[1])
        optimizer.step()
        replay = optimizer.step
        if graphed:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            replay = graph.replay
        for t, values in enumerate(grads[2:]):
            fill(params, values)
            lr.fill_(gentle(entry)["lr"] / (1 + t))
            replay()
        results.append([value.cpu() for value in tensors(optimizer).values()])
    assert same(*results)


def fill(params, values):
    for param, value in zip(params, values, strict=True):
        param.grad.copy_(value)


def on_a_stream(function):
    """As CUDA graphs want their first calls."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)


@methods
def test_a_gradient_scaler_changes_nothing_and_an_infinity_nothing_at_all(entry):
    results = []
    for scale in (2.0**12, None):
        params = GPU.parameters(torch.float32, [(17,), (2, 3)])
        optimizer = GPU.optimizer(entry, params)
        scaler = torch.amp.GradScaler("cuda", init_scale=scale or 1.0, enabled=scale is not None)
        for t, grads in enumerate(stream(optimizer, 3)):
            optimizer.zero_grad()
            loss = sum((p * g).sum() for p, g in zip(params, grads, strict=True))
            scaler.scale(loss).backward()
            before = [value.clone() for value in tensors(optimizer).values()]
            if t == 1 and scale:
                params[0].grad[0] = torch.inf
            if t != 1 or scale:
                scaler.step(optimizer)
            if t == 1:
                assert same(before, tensors(optimizer).values())
            scaler.update()
        results.append([value.cpu() for value in tensors(optimizer).values()])
    assert same(*results)


# --- memory and devices -------------------------------------------------------------------------


@pytest.mark.parametrize("chain", [[], BOTH], ids=repr)
def test_a_step_needs_no_memory_that_grows_with_the_parameters(chain):
    optimizer = go(
        GPU.optimizer(
            ENTRIES["AdamW"], GPU.parameters(torch.float32, [(4096, 4096)]), transforms=chain
        ),
        2,
    )
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 0.01 * 4 * 4096**2


def test_a_norm_over_both_devices():
    """Parameters of the CPU and of the GPU in one optimizer share one total."""
    clip = agrlib.clip_global_norm(0.5)
    results = []
    for device in ("cuda", "cpu"):
        params = Way(True, device).parameters(torch.float32, [(17,)])
        params += Way(True).parameters(torch.float32, [(2, 3)])
        optimizer = Way(True).optimizer(ENTRIES["SGD"], params, transforms=[clip])
        results.append([value.cpu() for value in tensors(go(optimizer)).values()])
    for value, other in zip(*results, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-7)


@methods
def test_state_moves_between_the_cpu_and_the_gpu(entry):
    """Through a checkpoint; and a step that lies on the CPU is moved where a kernel counts."""
    one = start(entry, GPU)
    params = [torch.nn.Parameter(param.detach().cpu()) for param in members(one)]
    two = entry.cls(params, fused=False, **gentle(entry))
    two.load_state_dict(one.state_dict())
    params = [torch.nn.Parameter(param.detach().cuda()) for param in members(go(two))]
    three = GPU.optimizer(entry, params)
    three.load_state_dict(two.state_dict())
    go(three, seed=3)
    check_ran(three)
    for value, other in zip(members(three), members(go(two, seed=3)), strict=True):
        torch.testing.assert_close(value.cpu(), other, rtol=2e-6, atol=2e-7)
