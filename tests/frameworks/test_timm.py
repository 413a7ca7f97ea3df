"""agrlib's optimizers with timm's groups and schedules: `make frameworks` runs this file.

timm brings torchvision, which must not stand beside transformers: an environment of its own.
"""

import functools

import pytest
import timm
import timm.optim
import timm.scheduler
import timm.utils
import torch

import agrlib

OPTIONS = dict(lr=0.01, weight_decay=0.1)
ours = functools.partial(agrlib.AdamW, **OPTIONS)
shaped = functools.partial(ours, transforms=[agrlib.agr])
theirs = functools.partial(torch.optim.AdamW, **OPTIONS)


def tiny():
    """In double precision: Adam makes much of the rounding in gradients that should be zero."""
    torch.manual_seed(0)
    sizes = dict(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    return timm.create_model("vit_tiny_patch16_224", **sizes).double()


def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(12, 3, 16, 16, generator=generator, dtype=torch.float64)
    return images, torch.arange(12) % 3


def weights(model):
    return [param.detach().clone() for param in model.parameters()]


def distance(first, second):
    return max((a - b).abs().max().item() for a, b in zip(first, second, strict=True))


def decayed(model):
    return timm.optim.param_groups_weight_decay(model, weight_decay=0.1)


def by_layer(model):
    return timm.optim.param_groups_layer_decay(model, weight_decay=0.1, layer_decay=0.7)


def plain(model):
    return model.parameters()


def train(model, optimizer, steps=range(6), scaler=None, clip=None):
    """Steps of timm's cosine schedule, which multiplies each group's step size by its scale."""
    schedule = timm.scheduler.CosineLRScheduler(optimizer, t_initial=8, warmup_t=2)
    images, labels = batch()
    for i in steps:
        schedule.step(i)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        if scaler:
            scaler(loss, optimizer, clip_grad=clip, parameters=model.parameters())
        else:
            loss.backward()
            optimizer.step()
    return weights(model)


def trained(make, groups, **options):
    model = tiny()
    return train(model, make(groups(model)), **options)


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("groups", [plain, decayed, by_layer])
def test_without_transforms_training_is_that_of_torch(groups, fused):
    expected = trained(theirs, groups)
    assert distance(trained(functools.partial(ours, fused=fused), groups), expected) < 1e-9
    changed = trained(functools.partial(shaped, fused=fused), groups)
    assert distance(changed, expected) > 1e-4


def test_each_layer_has_its_step_size():
    ends = [trained(ours, groups) for groups in (decayed, by_layer)]
    assert distance(*ends) > 1e-4
    optimizer = ours(by_layer(model := tiny()))
    train(model, optimizer, steps=[5])
    rates = {group["lr"] / group["lr_scale"] for group in optimizer.param_groups}
    assert max(rates) == pytest.approx(min(rates))
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("fused", [None, True])
def test_the_scaler(fused, clip):
    make = functools.partial(ours, fused=fused)
    ends = [
        trained(each, decayed, scaler=timm.utils.NativeScaler("cpu"), clip=clip)
        for each in (make, theirs)
    ]
    assert distance(*ends) < 1e-9


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    model = tiny()
    optimizer = shaped(by_layer(model))
    train(model, optimizer, range(3))
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "checkpoint")
    whole = train(model, optimizer, range(3, 6))
    model_state, optimizer_state = torch.load(tmp_path / "checkpoint", weights_only=True)
    again = tiny()
    again.load_state_dict(model_state)
    resumed = shaped(by_layer(again))
    resumed.load_state_dict(optimizer_state)
    assert distance(train(again, resumed, range(3, 6)), whole) == 0.0


def make_optimizer(model):
    # in the book: timm
    groups = timm.optim.param_groups_layer_decay(model, weight_decay=0.1, layer_decay=0.7)
    optimizer = agrlib.AdamW(groups, lr=0.01, transforms=[agrlib.agr])
    # end
    return optimizer


def test_the_lines_of_the_book():
    model = tiny()
    images, labels = batch()
    train(model, make_optimizer(model), range(8))
    assert torch.nn.functional.cross_entropy(model(images), labels) < 1.0  # from log 3
