"""Parity over 100 steps of random gradients with torch.optim and with the numpy oracle."""

import numpy as np
import oracle
import pytest
import torch
from contract import OPTIMIZERS, Entry, every, gradients, options, parameters, train, twins

import agrlib

STEPS = 100
HOW_TO_RUN = {"foreach", "fused", "capturable", "differentiable"}
ELSEWHERE = {"transforms", "state_dtype", "stochastic_rounding", "maximize"}  # tested by themselves


def error(values, references):
    both = zip(values, references, strict=True)
    pairs = [(np.asarray(a, float), np.asarray(b, float)) for a, b in both]
    return max(np.max(np.abs(a - b) / (np.abs(b) + 0.1), initial=0.0) for a, b in pairs)


def eager_agr(grad):
    """AGR for torch's own optimizers, in torch's arithmetic and not agrlib's."""
    if grad.numel() < 2:
        return grad
    return grad * (1 - grad.abs() / grad.abs().sum())


def expected(entry, params, grads, regularized, **more):
    """The oracle's parameters after all steps, in float64 from the same numbers."""
    shape = oracle.agr if regularized else np.asarray
    method = oracle.METHODS[entry.cls.__name__]
    options = {**entry.kwargs, **more}
    columns = zip(*([grad.double().numpy() for grad in step] for step in grads), strict=True)
    return [
        method(param.detach().double().numpy(), [shape(grad) for grad in column], **options)
        for param, column in zip(params, columns, strict=True)
    ]


def torchs(entry, params, grads, regularized, **more):
    copies = [torch.nn.Parameter(param.detach().clone()) for param in params]
    optimizer = entry.twin(copies, **entry.kwargs, **more)
    return train(optimizer, [[eager_agr(g) if regularized else g for g in step] for step in grads])


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("regularized", [False, True], ids=["plain", "agr"])
@every
def test_parity(entry, regularized, maximize):
    transforms = [agrlib.agr] if regularized else []
    for dtype in (torch.float64, torch.float32):
        params = parameters(dtype)
        grads = gradients(params, STEPS)
        exact = expected(entry, params, grads, regularized, maximize=maximize)
        torch_too = entry.twin and torchs(entry, params, grads, regularized, maximize=maximize)
        optimizer = entry.cls(params, **entry.kwargs, transforms=transforms, maximize=maximize)
        values = train(optimizer, grads)
        if dtype == torch.float64:
            assert error(values, exact) <= 1e-11
            assert not torch_too or error(values, torch_too) <= 1e-11
        else:
            assert error(values, exact) <= 2e-5
            assert not torch_too or error(values, exact) <= error(torch_too, exact) + 1e-6


@pytest.mark.parametrize("cls", sorted({e.cls for e in OPTIMIZERS}, key=lambda cls: cls.__name__))
def test_every_numeric_keyword_is_away_from_its_default(cls):
    varied = {k for e in OPTIMIZERS if e.cls is cls for k, v in e.kwargs.items()}
    assert varied == set(options(cls)) - HOW_TO_RUN - ELSEWHERE
    for entry in (e for e in OPTIMIZERS if e.cls is cls):
        assert all(value != options(cls)[key] for key, value in entry.kwargs.items())


def test_torchs_defaults_and_their_order_are_kept():
    for name in oracle.METHODS:
        ours, torchs = options(getattr(agrlib, name)), options(getattr(torch.optim, name))
        positional = [k for k in ours if k not in HOW_TO_RUN | ELSEWHERE | {"bias_correction"}]
        assert positional == list(torchs)[: len(positional)]
        assert {k: ours[k] for k in positional} == {k: torchs[k] for k in positional}


def test_parity_with_the_defaults():
    for name in oracle.METHODS:
        entry = Entry(name, getattr(agrlib, name), {})
        params = parameters()
        grads = gradients(params, STEPS)
        torch_too = torchs(entry, params, grads, regularized=False)
        assert error(train(entry.cls(params), grads), torch_too) <= 1e-11


@twins
def test_parity_when_options_change_on_the_way(entry):
    """A momentum switched on late starts its buffer then."""
    late = {k: v for k, v in entry.kwargs.items() if k in ("momentum", "nesterov")}
    results = []
    for cls in (entry.cls, entry.twin):
        params = parameters()
        optimizer = cls(params, **{**entry.kwargs, **dict.fromkeys(late, 0)})
        grads = gradients(params, 10)
        train(optimizer, grads[:5])
        optimizer.param_groups[0].update(late, lr=0.5 * entry.kwargs["lr"])
        results.append(train(optimizer, grads[5:]))
    assert error(*results) <= 1e-11
