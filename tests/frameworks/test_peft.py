"""agrlib's optimizers on adapters of peft: `make frameworks` installs it and runs this file."""

import functools

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from test_transformers import distance, sentences, tiny, weights

import agrlib

OPTIONS = dict(lr=0.01, weight_decay=0.1)
ours = functools.partial(agrlib.AdamW, **OPTIONS)
theirs = functools.partial(torch.optim.AdamW, **OPTIONS)


def adapted(**options):
    """In double precision, as Adam makes much of the rounding in gradients that are nearly zero."""
    targets = dict(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(tiny(), LoraConfig(r=4, **targets, **options)).double()


def train(model, optimizer, steps=6):
    rows = sentences()
    for start in range(0, 4 * steps, 4):
        tokens = torch.stack([row["input_ids"] for row in rows[start % 32 : start % 32 + 4]])
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    return weights(model)


def everything(model):
    """Frozen parameters, too: they have no gradient."""
    return model.parameters()


def adapters(model):
    return [param for param in model.parameters() if param.requires_grad]


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("choice", [everything, adapters])
@pytest.mark.parametrize("options", [{}, dict(use_dora=True)], ids=["lora", "dora"])
def test_without_transforms_training_is_that_of_torch(choice, options, fused):
    ends = []
    for make in (theirs, functools.partial(ours, fused=fused)):
        model = adapted(**options)
        ends.append(train(model, make(choice(model))))
    assert distance(*ends) < 1e-10


@pytest.mark.parametrize("chain", [[agrlib.agr], [agrlib.centralize, agrlib.normalize]], ids=repr)
@pytest.mark.parametrize("fused", [False, True])
def test_transforms_act_on_the_adapters_alone(chain, fused):
    """At the first step one of the two factors is zero, and so is the gradient of the other."""
    model = adapted()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    plain = adapted()
    expected = train(plain, theirs(adapters(plain)))
    changed = train(model, ours(adapters(model), transforms=chain, fused=fused))
    assert distance(changed, expected) > 1e-4
    for name, param in model.named_parameters():
        assert torch.equal(param, before[name]) is not param.requires_grad, name
        assert param.isfinite().all()


@pytest.mark.parametrize("fused", [None, True])
def test_loraplus(fused):
    """Its groups have step sizes of their own, and one of them is empty."""
    ends = []
    for cls, more in ((agrlib.AdamW, dict(fused=fused)), (torch.optim.AdamW, {})):
        model = adapted()
        options = dict(lr=0.01, loraplus_lr_ratio=16, loraplus_weight_decay=0.1, **more)
        ends.append(train(model, create_loraplus_optimizer(model, cls, **options)))
    assert distance(*ends) < 1e-10


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    make = functools.partial(ours, transforms=[agrlib.agr])
    model = adapted()
    optimizer = make(adapters(model))
    train(model, optimizer)
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    whole = train(model, optimizer)
    again = PeftModel.from_pretrained(tiny().double(), tmp_path, is_trainable=True).double()
    resumed = make(adapters(again))
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert distance(train(again, resumed), whole) == 0.0


def fine_tune(model):
    # in the book: peft
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = agrlib.AdamW(trained, lr=0.01, transforms=[agrlib.agr])
    # end
    return model, optimizer, trained


def test_the_lines_of_the_book():
    model, optimizer, trained = fine_tune(tiny())
    tokens = torch.stack([row["input_ids"] for row in sentences()])
    before = model(input_ids=tokens, labels=tokens).loss
    assert len(trained) == 8 == len(optimizer.param_groups[0]["params"])
    train(model, optimizer, steps=40)
    assert model(input_ids=tokens, labels=tokens).loss < before
