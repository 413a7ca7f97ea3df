"""agrlib's optimizers in Lightning: `make frameworks` installs it and runs this file."""

import functools
import logging

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins.precision import MixedPrecision

import agrlib

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore")  # advice about loggers and workers
OPTIONS = dict(lr=0.05, weight_decay=0.1)
ours = functools.partial(agrlib.AdamW, **OPTIONS)
shaped = functools.partial(ours, transforms=[agrlib.agr])
theirs = functools.partial(torch.optim.AdamW, **OPTIONS)


class Regression(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
        )

    def training_step(self, batch, index):
        inputs, targets = batch
        return torch.nn.functional.mse_loss(self.net(inputs), targets)

    def configure_optimizers(self):
        return agrlib.AdamW(self.parameters(), lr=0.05, transforms=[agrlib.agr])


class Chosen(Regression):
    """The module with another optimizer, a schedule, and perhaps an infinite gradient."""

    def __init__(self, make, spoil=None):
        super().__init__()
        self.make, self.spoil = make, spoil

    def configure_optimizers(self):
        optimizer = self.make(self.parameters())
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return [optimizer], [dict(scheduler=schedule, interval="step")]

    def on_after_backward(self):
        if self.global_step == self.spoil:
            self.net[0].bias.grad[0] = torch.inf


class Manual(Chosen):
    """Manual optimization, once with a closure and once without."""

    automatic_optimization = False

    def training_step(self, batch, index):
        optimizer = self.optimizers()

        def closure():
            loss = super(Chosen, self).training_step(batch, index)
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")

        if index % 2:
            optimizer.step(closure=closure)
        else:
            closure()
            optimizer.step()


def batches():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 8, generator=generator)
    data = torch.utils.data.TensorDataset(inputs, inputs.sum(1, keepdim=True))
    return torch.utils.data.DataLoader(data, batch_size=8)


def scaled():
    """What precision="16-mixed" means on a GPU; on a CPU Lightning must be given it."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return MixedPrecision("16-mixed", "cpu", scaler)


def trainer(**options):
    quiet = dict(enable_progress_bar=False, enable_model_summary=False)
    defaults = dict(accelerator="cpu", max_epochs=2, enable_checkpointing=False, logger=False)
    return L.Trainer(**quiet, **{**defaults, **options})


def weights(model):
    return [param.detach().clone() for param in model.parameters()]


def fitted(make, module=Chosen, spoil=None, **options):
    """Return a fresh model after training."""
    if "plugins" in options:
        options["plugins"] = options["plugins"]()
    options["callbacks"] = [callback() for callback in options.get("callbacks", ())]
    L.seed_everything(0, verbose=False)
    model = module(make, spoil)
    trainer(**options).fit(model, batches())
    return model


def fit(make, **options):
    """Train with a fresh model; return its parameters."""
    return weights(fitted(make, **options))


def distance(first, second):
    return max((a - b).abs().max().item() for a, b in zip(first, second, strict=True))


average = functools.partial(EMAWeightAveraging, decay=0.5)
swa = functools.partial(StochasticWeightAveraging, swa_lrs=0.01, swa_epoch_start=1)
SETTINGS = {
    "plain": dict(),
    "bf16": dict(precision="bf16-mixed"),
    "bf16, clipped": dict(precision="bf16-mixed", gradient_clip_val=0.1),
    "clipped by value": dict(gradient_clip_val=0.01, gradient_clip_algorithm="value"),
    "bf16, clipped by value": dict(
        precision="bf16-mixed", gradient_clip_val=0.01, gradient_clip_algorithm="value"
    ),
    "bf16 throughout": dict(precision="bf16-true"),
    "scaled": dict(plugins=scaled),
    "scaled, clipped": dict(plugins=scaled, gradient_clip_val=0.1),
    "scaled, an overflow": dict(plugins=scaled, gradient_clip_val=0.1, spoil=3),
    "accumulated": dict(accumulate_grad_batches=3, gradient_clip_val=0.1),
    "moving average": dict(callbacks=[average]),
    "stochastic weight averaging": dict(callbacks=[swa]),
    "by hand": dict(module=Manual),
    "by hand, bf16": dict(module=Manual, precision="bf16-mixed"),
}
settings = pytest.mark.parametrize("options", SETTINGS.values(), ids=list(SETTINGS))


@settings
def test_without_transforms_training_is_that_of_torch(options):
    expected = fit(theirs, **options)
    # one rounding of bfloat16 may fall otherwise; training is compared within a few of them
    tolerance = 0.02 if options.get("precision") == "bf16-true" else 1e-6
    assert distance(fit(ours, **options), expected) < tolerance
    assert distance(fit(shaped, **options), expected) > 1e-4


def test_an_overflow_leaves_out_the_step_but_not_that_of_the_schedule():
    once = dict(plugins=scaled, max_epochs=1)
    before = fit(shaped, **once, limit_train_batches=1)
    assert distance(before, fit(shaped, **once, limit_train_batches=2)) > 1e-3
    for make in (shaped, theirs):
        before = fit(make, **once, limit_train_batches=1)
        model = fitted(make, spoil=1, **once, limit_train_batches=2)
        assert distance(before, weights(model)) == 0.0
        assert model.lr_schedulers().get_last_lr() == [pytest.approx(0.05 * 0.9**2)]


def test_the_fused_step_unscales_and_cannot_be_clipped_in_between():
    fused = functools.partial(ours, fused=True)
    assert distance(fit(fused, plugins=scaled), fit(theirs, plugins=scaled)) < 1e-6
    for make in (fused, functools.partial(theirs, fused=True)):
        with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
            fit(make, precision="bf16-mixed", gradient_clip_val=0.1)
    chain = dict(transforms=[agrlib.clip_global_norm(0.1)], fused=True)
    clipped = fit(functools.partial(ours, **chain), plugins=scaled)
    assert distance(clipped, fit(theirs, plugins=scaled, gradient_clip_val=0.1)) < 1e-6


def test_transforms_see_the_gradients_that_lightning_has_clipped():
    seen = []

    def look(grad):
        seen.append(grad.norm().item())
        return grad

    fit(functools.partial(ours, transforms=[look]), gradient_clip_val=0.1)
    assert max(seen) <= 0.1 < max(seen) * 1.5


# --- checkpoints ----------------------------------------------------------------------------------


def run(folder, make, **resume):
    """Two epochs with a checkpoint after each, or what is left of them."""
    L.seed_everything(0, verbose=False)
    model = Chosen(make)
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer(callbacks=[keep], enable_checkpointing=True).fit(model, batches(), **resume)
    return weights(model)


@pytest.mark.parametrize("only_data", [None, True, False])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, only_data):
    whole = run(tmp_path, shaped)
    options = dict(ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=only_data)
    assert distance(run(tmp_path / "again", shaped, **options), whole) == 0.0


def test_a_run_of_torch_goes_on_with_transforms_and_says_so(tmp_path):
    whole = run(tmp_path, theirs)
    with pytest.warns(UserWarning, match="no record of transforms") as caught:
        changed = run(tmp_path / "agr", shaped, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert len([w for w in caught if "no record" in str(w.message)]) == 1
    assert distance(changed, whole) > 1e-3
    plain = run(tmp_path / "plain", ours, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert distance(plain, whole) < 1e-6


def test_another_chain_is_refused(tmp_path):
    run(tmp_path, shaped)
    with pytest.raises(ValueError, match=r"made with transforms \[agr\]"):
        run(tmp_path / "plain", ours, ckpt_path=tmp_path / "epoch=0.ckpt")
    run(tmp_path / "torch", theirs, ckpt_path=tmp_path / "epoch=0.ckpt")  # knows no transforms


# --- beside the trainer ---------------------------------------------------------------------------


def test_learning_rates_and_momenta_are_monitored(tmp_path):
    monitor = LearningRateMonitor(logging_interval="step", log_momentum=True)
    logger = L.pytorch.loggers.CSVLogger(tmp_path)
    fit(shaped, callbacks=[lambda: monitor], logger=logger, log_every_n_steps=1)
    assert monitor.lrs["lr-AdamW"][:2] == pytest.approx([0.05, 0.045])
    assert monitor.last_momentum_values == {"lr-AdamW-momentum": 0.9}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fabric(precision):
    ends = []
    for make in (ours, theirs):
        L.seed_everything(0, verbose=False)
        fabric = L.Fabric(accelerator="cpu", precision=precision)
        model = Regression()
        network, optimizer = fabric.setup(model.net, make(model.parameters()))
        for inputs, targets in fabric.setup_dataloaders(batches()):
            optimizer.zero_grad()
            fabric.backward(torch.nn.functional.mse_loss(network(inputs), targets))
            fabric.clip_gradients(network, optimizer, max_norm=0.1)
            optimizer.step()
        ends.append(weights(model))
    assert distance(*ends) < 1e-6


def train():
    model = Regression()
    options = dict(precision="bf16-mixed", gradient_clip_val=1.0)
    L.Trainer(max_epochs=5, accelerator="cpu", **options).fit(model, batches())
    return model


def test_the_lines_of_the_book(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    L.seed_everything(0, verbose=False)
    losses = [
        torch.stack([model.training_step(batch, 0) for batch in batches()]).mean().item()
        for model in (Regression(), train())
    ]
    assert losses[1] < losses[0] / 2
