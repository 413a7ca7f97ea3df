"""agrlib's optimizers in transformers' Trainer: `make frameworks` installs it and runs this."""

import functools

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    get_linear_schedule_with_warmup,
    set_seed,
)

import agrlib

OPTIONS = dict(lr=0.01, weight_decay=0.1)
ours = functools.partial(agrlib.AdamW, **OPTIONS)
shaped = functools.partial(ours, transforms=[agrlib.agr])
theirs = functools.partial(torch.optim.AdamW, **OPTIONS)


def tiny():
    """A language model made from a configuration; nothing is downloaded."""
    set_seed(0)
    sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, max_position_embeddings=16)
    layers = dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    return LlamaForCausalLM(LlamaConfig(**sizes, **layers))


def sentences():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 32, (32, 8), generator=generator)
    return [dict(input_ids=row, labels=row) for row in tokens]


def arguments(folder, **options):
    quiet = dict(report_to=[], disable_tqdm=True, use_cpu=True, seed=0)
    steps = dict(max_steps=8, per_device_train_batch_size=4, save_strategy="no")
    return TrainingArguments(str(folder), **quiet, **{**steps, **options})


def weights(model):
    return [param.detach().clone() for param in model.parameters()]


def distance(first, second):
    return max((a - b).abs().max().item() for a, b in zip(first, second, strict=True))


def trained(folder, make, resume=None, **options):
    """Train with a fresh model and the given optimizer; return its parameters."""
    model = tiny()
    optimizer = make(model.parameters())
    schedule = get_linear_schedule_with_warmup(optimizer, 2, 8)
    given = dict(train_dataset=sentences(), optimizers=(optimizer, schedule))
    trainer = Trainer(model, arguments(folder, **options), **given)
    trainer.train(resume_from_checkpoint=resume)
    return weights(model)


CHAIN = dict(transforms=[agrlib.agr])
SETTINGS = {
    "clipped": dict(max_grad_norm=0.1),
    "not clipped": dict(max_grad_norm=0.0),
    "accumulated": dict(gradient_accumulation_steps=2, max_grad_norm=0.1),
    "bf16": dict(bf16=True, max_grad_norm=0.1),
}
settings = pytest.mark.parametrize("options", SETTINGS.values(), ids=list(SETTINGS))


@settings
def test_without_transforms_training_is_that_of_torch(tmp_path, options):
    expected = trained(tmp_path, theirs, **options)
    tolerance = 2e-4 if options.get("bf16") else 1e-6  # activations may round to a neighbour
    for make in (ours, functools.partial(ours, fused=True)):
        assert distance(trained(tmp_path, make, **options), expected) < tolerance
    assert distance(trained(tmp_path, shaped, **options), expected) > 5e-4


def test_a_class_and_its_keywords_instead_of_an_optimizer(tmp_path):
    """The Trainer then makes the groups with and without weight decay, and the schedule."""
    ends = []
    for cls, more in ((agrlib.AdamW, {}), (torch.optim.AdamW, {}), (agrlib.AdamW, CHAIN)):
        model = tiny()
        given = dict(optimizer_cls_and_kwargs=(cls, dict(lr=0.01, **more)))
        trainer = Trainer(
            model, arguments(tmp_path, weight_decay=0.1), train_dataset=sentences(), **given
        )
        trainer.train()
        decays = [group["weight_decay"] for group in trainer.optimizer.param_groups]
        assert decays == [0.1, 0.0]
        ends.append(weights(model))
    assert distance(ends[0], ends[1]) < 1e-6
    assert distance(ends[0], ends[2]) > 1e-4


def test_transforms_see_the_gradients_that_the_trainer_has_clipped(tmp_path):
    seen = []

    def look(grad):
        seen.append(grad.norm().item())
        return grad

    trained(tmp_path, functools.partial(ours, transforms=[look]), max_grad_norm=0.01)
    assert max(seen) <= 0.01


# --- checkpoints ----------------------------------------------------------------------------------

SAVE = dict(save_strategy="steps", save_steps=4)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    whole = trained(tmp_path, shaped, **SAVE)
    resumed = trained(tmp_path / "again", shaped, resume=str(tmp_path / "checkpoint-4"))
    assert distance(resumed, whole) == 0.0


def test_a_run_of_torch_goes_on_with_transforms_and_says_so(tmp_path):
    whole, halfway = trained(tmp_path, theirs, **SAVE), str(tmp_path / "checkpoint-4")
    assert distance(trained(tmp_path / "ours", ours, resume=halfway), whole) < 1e-6
    with pytest.warns(UserWarning, match="no record of transforms"):
        changed = trained(tmp_path / "agr", shaped, resume=halfway)
    assert distance(changed, whole) > 1e-5


def test_another_chain_is_refused(tmp_path):
    trained(tmp_path, shaped, **SAVE)
    halfway = str(tmp_path / "checkpoint-4")
    with pytest.raises(ValueError, match=r"made with transforms \[agr\]"):
        trained(tmp_path / "ours", ours, resume=halfway)
    trained(tmp_path / "torch", theirs, resume=halfway)  # torch knows no transforms


# --- the lines of the book ------------------------------------------------------------------------


def fine_tune(model, dataset, folder):
    # in the book: trainer
    optimizer = agrlib.AdamW(model.parameters(), lr=0.01, transforms=[agrlib.agr])
    schedule = get_linear_schedule_with_warmup(optimizer, 2, 40)
    options = dict(max_steps=40, max_grad_norm=1.0, use_cpu=True, report_to=[])
    trainer = Trainer(
        model,
        TrainingArguments(folder, **options),
        train_dataset=dataset,
        optimizers=(optimizer, schedule),
    )
    trainer.train()
    # end
    return trainer


def fine_tune_with_groups(model, dataset, arguments):
    # in the book: class
    chosen = agrlib.AdamW, dict(lr=0.01, transforms=[agrlib.agr])
    trainer = Trainer(model, arguments, train_dataset=dataset, optimizer_cls_and_kwargs=chosen)
    # end
    return trainer


def test_the_lines_of_the_book(tmp_path):
    trainer = fine_tune(tiny(), sentences(), str(tmp_path))
    assert trainer.evaluate(sentences())["eval_loss"] < 0.8 * torch.tensor(32.0).log()
    trainer = fine_tune_with_groups(tiny(), sentences(), arguments(tmp_path, weight_decay=0.1))
    trainer.train()
    decays = [group["weight_decay"] for group in trainer.optimizer.param_groups]
    assert decays == [0.1, 0.0]
    assert trainer.optimizer.param_groups[0]["transforms"] == (agrlib.agr,)
