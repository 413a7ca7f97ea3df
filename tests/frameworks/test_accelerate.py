"""agrlib's optimizers in accelerate: `make frameworks` installs it and runs this file."""

import functools
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed
from torch.optim.lr_scheduler import StepLR

import agrlib

OPTIONS = dict(lr=0.05, weight_decay=0.1)
ours = functools.partial(agrlib.AdamW, **OPTIONS)
shaped = functools.partial(ours, transforms=[agrlib.agr])
theirs = functools.partial(torch.optim.AdamW, **OPTIONS)
loss_of = torch.nn.functional.mse_loss


def network():
    set_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))


def batches(size=8):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 8, generator=generator)
    data = torch.utils.data.TensorDataset(inputs, inputs.sum(1, keepdim=True))
    return torch.utils.data.DataLoader(data, batch_size=size)


def weights(model):
    return [param.detach().clone() for param in model.parameters()]


def distance(first, second):
    return max((a - b).abs().max().item() for a, b in zip(first, second, strict=True))


def train(accelerator, model, optimizer, loader):
    schedule = StepLR(optimizer, 4, gamma=0.5)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    for inputs, targets in loader:
        with accelerator.accumulate(model):
            loss = torch.nn.functional.mse_loss(model(inputs), targets)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def start(**options):
    """An accelerator that knows nothing of those before it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(cpu=True, **options)


def trained(make, **options):
    """Train with a fresh model; return its parameters."""
    accelerator, model = start(**options), network()
    train(accelerator, model, make(model.parameters()), batches())
    return weights(model)


# --- one process ----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_without_transforms_training_is_that_of_torch(precision, accumulated):
    options = dict(mixed_precision=precision, gradient_accumulation_steps=accumulated)
    expected = trained(theirs, **options)
    assert distance(trained(ours, **options), expected) < 1e-6
    assert distance(trained(functools.partial(ours, fused=True), **options), expected) < 1e-6
    assert distance(trained(shaped, **options), expected) > 1e-3


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    ends = []
    for resumed in (False, True):
        accelerator, model = start(), network()
        model, optimizer, loader = accelerator.prepare(model, shaped(model.parameters()), batches())
        for i, (inputs, targets) in enumerate(loader):
            if i == 4 and not resumed:
                accelerator.save_state(tmp_path)
            if i == 4 and resumed:
                accelerator.load_state(tmp_path)
            if i < 4 and resumed:
                continue
            accelerator.backward(loss_of(model(inputs), targets))
            optimizer.step()
            optimizer.zero_grad()
        ends.append(weights(model))
    assert distance(*ends) == 0.0


# --- gradient scaling -----------------------------------------------------------------------------


def scaled(make, steps="..!...", clip=None):
    """Steps under a scaler, which accelerate makes on a GPU; at "!" there is an overflow."""
    accelerator, model = start(), network()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    schedule = StepLR(optimizer := make(model.parameters()), 1, gamma=0.5)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    skipped = []
    for kind, (inputs, targets) in zip(steps, batches(), strict=False):
        accelerator.backward(loss_of(model(inputs), targets))
        if kind == "!":
            model[0].weight.grad[0, 0] = torch.inf
        if clip:
            accelerator.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        skipped.append(optimizer.step_was_skipped)
    return weights(model), skipped, schedule.get_last_lr()


@pytest.mark.parametrize("chain", [[], [agrlib.agr]], ids=repr)
@pytest.mark.parametrize("fused", [None, False])
def test_a_skipped_step_is_seen_and_the_schedule_waits(fused, chain):
    make = functools.partial(ours, fused=fused, transforms=chain)
    _, skipped, [rate] = scaled(make)
    assert skipped == [False, False, True, False, False, False]
    assert rate == 0.05 / 2**5


@pytest.mark.parametrize("clip", [None, 0.1])
def test_under_a_scaler_training_is_that_of_torch(clip):
    expected, _, _ = scaled(theirs, clip=clip)
    assert distance(scaled(ours, clip=clip)[0], expected) < 1e-6
    assert distance(scaled(shaped, clip=clip)[0], expected) > 1e-4


def test_with_fused_true_a_skipped_step_is_not_seen_as_with_torch():
    for make in (ours, theirs):
        _, skipped, [rate] = scaled(functools.partial(make, fused=True))
        assert not any(skipped)
        assert rate == 0.05 / 2**6
    expected, _, _ = scaled(functools.partial(theirs, fused=True), clip=0.1)
    assert distance(scaled(functools.partial(ours, fused=True), clip=0.1)[0], expected) < 1e-6


def test_the_wrappers_by_themselves():
    start()
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = agrlib.AdamW([weight], lr=1.0)
    scaler = torch.amp.GradScaler("cpu")
    wrapped = AcceleratedOptimizer(optimizer, scaler=scaler)
    schedule = AcceleratedScheduler(StepLR(optimizer, 1, 0.5), wrapped, split_batches=True)
    scaler.scale(torch.ones(()))
    weight.grad = torch.full((3,), torch.inf)
    wrapped.step(), schedule.step()
    assert wrapped.step_was_skipped
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert weight.tolist() == [1.0] * 3


# --- two processes --------------------------------------------------------------------------------


def one_of_two(folder, accumulated):
    """What each process does: train with every optimizer on its half of the batches."""
    for name, make in dict(ours=ours, shaped=shaped, theirs=theirs).items():
        accelerator, model = (
            Accelerator(cpu=True, gradient_accumulation_steps=accumulated),
            network(),
        )
        assert accelerator.num_processes == 2
        train(accelerator, model, make(model.parameters()), batches(4))
        torch.save(weights(model), f"{folder}/{name}{accelerator.process_index}")


@pytest.mark.parametrize("accumulated", [1, 2])
def test_two_processes(tmp_path, accumulated):
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, "-m", *launch, __file__, str(tmp_path), str(accumulated)]
    subprocess.run(command, check=True, timeout=240)
    ends = {path.name: torch.load(path) for path in tmp_path.iterdir()}
    for name in ("ours", "shaped", "theirs"):
        assert distance(ends[f"{name}0"], ends[f"{name}1"]) == 0.0
    assert distance(ends["ours0"], ends["theirs0"]) < 1e-6
    assert distance(ends["shaped0"], ends["theirs0"]) > 1e-3


def main():
    model = network()
    optimizer = agrlib.AdamW(model.parameters(), lr=0.05, transforms=[agrlib.agr])
    train(Accelerator(cpu=True), model, optimizer, batches())
    return model


def test_the_lines_of_the_book():
    start()
    losses = [
        torch.stack([loss_of(model(inputs), targets) for inputs, targets in batches()]).mean()
        for model in (network(), main())
    ]
    assert losses[1] < losses[0] / 2


if __name__ == "__main__":
    one_of_two(sys.argv[1], int(sys.argv[2]))
