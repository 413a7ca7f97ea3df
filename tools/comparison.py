"""Measure every update rule with every gradient transform: the table of the chapter "comparison".

Each cell of the table gets the same budget: the same step sizes, tried on the same seeds, and five
final runs at the best one. The results go to book/results/comparison.json after each cell; a second
start goes on where the first one stopped. Everything that decides a number is in PROTOCOL.
"""

import argparse
import datetime
import itertools
import json
import math
import os
import platform
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

import agrlib
from agrlib import experiment

RESULTS = Path(__file__).resolve().parent.parent / "book" / "results" / "comparison.json"
RULES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": agrlib.SGD,
    "heavy ball": partial(agrlib.SGD, momentum=0.9),
    "Nesterov": partial(agrlib.SGD, momentum=0.9, nesterov=True),
    "AdaGrad": agrlib.Adagrad,
    "RMSProp": agrlib.RMSprop,
    "Adam": agrlib.Adam,
    "AdamW": agrlib.AdamW,
    "AMSGrad": agrlib.AMSGrad,
    "Padam": partial(agrlib.Padam, partial=1 / 8),
    "Adan": agrlib.Adan,
}
TRANSFORMS: dict[str, list[Callable[[Tensor], Tensor]]] = {
    "none": [],
    "clip_value": [agrlib.clip_value(0.03)],
    "clip_norm": [agrlib.clip_norm(0.2)],
    "clip_global_norm": [agrlib.clip_global_norm(0.4)],
    "normalize": [agrlib.normalize],
    "centralize": [agrlib.centralize],
    "agr": [agrlib.agr],
    "centralize, agr": [agrlib.centralize, agrlib.agr],
}


class UpdateCentralizedAdamW(agrlib.AdamW):
    """AdamW whose update, weight decay included, is centralized; the gradient is not."""

    weight_decay_acts_on = "rule"  # the step leaves the decay to the rule

    def update_rule(self, group: dict[str, Any]) -> tuple[Callable[..., Any], tuple[str, ...]]:
        rule, keys = super().update_rule(group)

        def centralized(grad: Tensor, param: Tensor, *rest: Any) -> tuple[Tensor, ...]:
            *rest_of_adam, decay = rest
            new, *state = rule(grad, param - decay * param, *rest_of_adam)
            return param + agrlib.centralize(new - param), *state

        return centralized, keys

    def scalars(self, group: dict[str, Any], lr: Any, step: Any) -> tuple[Any, ...]:
        return *super().scalars(group, lr, step), lr * group["weight_decay"]


# by the same protocol, but outside of the table: no chain of transforms makes it
OUTSIDE: dict[tuple[str, str], Callable[..., torch.optim.Optimizer]] = {
    ("AdamW", "update centralized"): UpdateCentralizedAdamW,
}
PROTOCOL: dict[str, Any] = dict(
    data="scikit-learn's digits, cut as in agrlib.experiment.load_digits",
    model="agrlib.experiment.mlp(): 64-64-64-10, ReLU",
    batch_size=64,
    epochs=40,
    schedule="cosine: the step size falls to 0 over all epochs, once per epoch",
    step_sizes=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0],
    tuning_seeds=[100, 101],
    tuned_by="smallest mean validation loss after the last epoch",
    seeds=[0, 1, 2, 3, 4],
    options="the defaults, except momentum=0.9 where named and partial=1/8 for Padam",
    transforms={name: str(list(chain)) for name, chain in TRANSFORMS.items()},
)


def provenance() -> dict[str, Any]:
    """Say on what, with what and when the results were measured."""
    return dict(
        command="python tools/comparison.py",
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, one used",
        python=platform.python_version(),
        torch=torch.__version__,
        numpy=numpy.__version__,
        agrlib=agrlib.__version__,
    )


def run(
    rule: str, transform: str, lr: float, seed: int, data: experiment.Data, protocol: dict[str, Any]
) -> dict[str, Any]:
    """Train once and measure on the test part; losses in nats, accuracy as a share."""
    experiment.seed_everything(seed)
    model = experiment.mlp()
    make = OUTSIDE.get((rule, transform)) or RULES[rule]
    optimizer = make(model.parameters(), lr=lr, transforms=TRANSFORMS.get(transform, []))
    schedule = CosineAnnealingLR(optimizer, protocol["epochs"])
    history = experiment.train(
        model, data, optimizer, protocol["epochs"], protocol["batch_size"], seed, schedule
    )
    loss, accuracy = experiment.evaluate(model, data.test)
    return dict(
        seed=seed,
        train_loss=[short(value) for value in history.train_loss],
        valid_loss=[short(value) for value in history.valid_loss],
        test_loss=short(loss),
        test_accuracy=short(accuracy),
    )


def short(value: float) -> float | None:
    """Round to six digits; None where the number is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def cell(
    rule: str, transform: str, data: experiment.Data, protocol: dict[str, Any]
) -> dict[str, Any]:
    """Tune the step size of a rule with a transform and make the final runs."""

    def runs(lr: float, seeds: list[int]) -> list[dict[str, Any]]:
        return [run(rule, transform, lr, seed, data, protocol) for seed in seeds]

    def score(lr: float) -> float:
        ends = [trial["valid_loss"][-1] for trial in runs(lr, protocol["tuning_seeds"])]
        return math.inf if None in ends else sum(ends)

    best = min(protocol["step_sizes"], key=score)
    return dict(rule=rule, transform=transform, lr=best, runs=runs(best, protocol["seeds"]))


def load(path: Path, protocol: dict[str, Any]) -> dict[str, Any]:
    """Read what an earlier start has measured; refuse results of another protocol."""
    if not path.exists():
        return dict(protocol=protocol, provenance=provenance(), cells=[])
    results = json.loads(path.read_text())
    if results["protocol"] != protocol:
        raise SystemExit(f"{path} was measured with another protocol: move it away first")
    return results


def save(path: Path, results: dict[str, Any]) -> None:
    """Replace the file in one go, so that a stop in between loses no more than one cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".part")
    rows = ",\n".join(json.dumps(row) for row in results["cells"])
    head = json.dumps({key: results[key] for key in ("protocol", "provenance")}, indent=1)
    half.write_text(f'{head[:-2]},\n "cells": [\n{rows}\n ]\n}}\n')
    half.replace(path)


def measure(path: Path = RESULTS, protocol: dict[str, Any] = PROTOCOL) -> dict[str, Any]:
    """Measure the cells that the file lacks."""
    torch.set_num_threads(1)
    data, results = experiment.load_digits(), load(path, protocol)
    done = {(row["rule"], row["transform"]) for row in results["cells"]}
    for rule, transform in (*itertools.product(RULES, TRANSFORMS), *OUTSIDE):
        if (rule, transform) not in done:
            results["cells"].append(cell(rule, transform, data, protocol))
            results["provenance"] = provenance()
            save(path, results)
            print(f"{rule}, {transform}: lr {results['cells'][-1]['lr']}", flush=True)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file to go on with")
    measure(parser.parse_args().out)
    sys.exit(0)
