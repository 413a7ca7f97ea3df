"""Parity over 100 steps of random gradients with torch.optim and with the numpy oracle."""

import inspect
import itertools

import numpy as np
import oracle
import pytest
import torch
from contract import (
    OPTIMIZERS,
    SHAPES,
    TRANSFORMS,
    TWINS,
    Entry,
    every,
    gradients,
    options,
    parameters,
    same,
    train,
)

import agrlib

STEPS = 100
HOW_TO_RUN = {"foreach", "fused", "capturable", "differentiable"}
ELSEWHERE = {"transforms", "state_dtype", "stochastic_rounding", "maximize"}  # tested by themselves


def error(values, references):
    both = zip(values, references, strict=True)
    pairs = [(np.asarray(a, float), np.asarray(b, float)) for a, b in both]
    return max(np.max(np.abs(a - b) / (np.abs(b) + 0.1), initial=0.0) for a, b in pairs)


def by_torch(name, grads):
    """A transform in torch's own arithmetic, or by torch's own function, not agrlib's."""
    copies = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for copy, grad in zip(copies, grads, strict=True):
        copy.grad = grad.clone()
    kind, bound = name.rstrip(")").split("(") if "(" in name else (name, None)
    if kind == "clip_global_norm":
        torch.nn.utils.clip_grad_norm_(copies, float(bound))
    for param in copies:
        grad = param.grad
        if kind == "clip_value":
            torch.nn.utils.clip_grad_value_([param], float(bound))
        if kind == "clip_norm":
            torch.nn.utils.clip_grad_norm_([param], float(bound))
        if kind == "normalize":
            param.grad = grad / (torch.linalg.vector_norm(grad) + 1e-8)
        if kind == "centralize" and grad.dim() > 1:
            param.grad = grad - grad.mean(dim=tuple(range(1, grad.dim())), keepdim=True)
        if kind == "agr" and grad.numel() > 1:
            param.grad = grad * (1 - grad.abs() / grad.abs().sum())
    return [param.grad for param in copies]


def through(shape, chain, grads):
    for transform in chain:
        grads = shape(repr(transform), grads)
    return grads


def expected(entry, params, grads, chain, **more):
    """The oracle's parameters after all steps, in float64 from the same numbers."""
    method = oracle.METHODS[entry.cls.__name__]
    options = {**entry.kwargs, **more}
    shaped = [
        through(oracle.shape, chain, [grad.double().numpy() for grad in step]) for step in grads
    ]
    return [
        method(param.detach().double().numpy(), column, **options)
        for param, column in zip(params, zip(*shaped, strict=True), strict=True)
    ]


def torchs(entry, params, grads, chain, **more):
    copies = [torch.nn.Parameter(param.detach().clone()) for param in params]
    optimizer = entry.twin(copies, **entry.kwargs, **more)
    return train(optimizer, [through(by_torch, chain, step) for step in grads])


def compare(entry, chain, shapes, steps=STEPS, **more):
    """Steps in both precisions, against the oracle and against torch."""
    for dtype in (torch.float64, torch.float32):
        params = parameters(dtype, shapes)
        grads = gradients(params, steps)
        exact = expected(entry, params, grads, chain, **more)
        torch_too = entry.twin and torchs(entry, params, grads, chain, **more)
        optimizer = entry.cls(params, **entry.kwargs, transforms=chain, **more)
        values = train(optimizer, grads)
        if dtype == torch.float64:
            assert error(values, exact) <= 1e-11
            assert not torch_too or error(values, torch_too) <= 1e-11
        else:
            assert error(values, exact) <= 2e-5
            assert not torch_too or error(values, exact) <= error(torch_too, exact) + 1e-6


@pytest.mark.parametrize("maximize", [False, True])
@every
def test_parity(entry, maximize):
    compare(entry, [], SHAPES, maximize=maximize)


@pytest.mark.parametrize("number", range(len(TRANSFORMS)), ids=lambda i: repr(TRANSFORMS[i]))
@every
def test_parity_with_a_transform(entry, number):
    """Half of them ascend: a transform sees the gradient, whose sign turns behind it."""
    compare(entry, [TRANSFORMS[number]], SHAPES, maximize=number % 2 == 1)


@pytest.mark.parametrize("pair", list(itertools.permutations(TRANSFORMS, 2)), ids=repr)
@every
def test_parity_with_two_transforms(entry, pair):
    """Few steps: transforms keep nothing from one to the next."""
    compare(entry, list(pair), [(3, 4), (2, 2, 1, 2), ()], steps=5)


def test_every_transform_of_the_library_is_in_the_list():
    listed = {repr(transform).split("(")[0] for transform in TRANSFORMS}
    made = {name for name in agrlib.__all__ if isinstance(getattr(agrlib, name), agrlib.Transform)}
    makers = {
        name
        for name in agrlib.__all__
        if inspect.signature(getattr(agrlib, name)).return_annotation is agrlib.Transform
    }
    assert listed == made | makers
    grads = gradients(parameters(), 1)[0]
    for transform in TRANSFORMS:  # and the bounds are such that each of them does something
        assert not same(grads, [torch.as_tensor(g) for g in through(by_torch, [transform], grads)])


@pytest.mark.parametrize("cls", sorted({e.cls for e in OPTIMIZERS}, key=lambda cls: cls.__name__))
def test_every_numeric_keyword_is_away_from_its_default(cls):
    varied = {k for e in OPTIMIZERS if e.cls is cls for k, v in e.kwargs.items()}
    assert varied == set(options(cls)) - HOW_TO_RUN - ELSEWHERE
    for entry in (e for e in OPTIMIZERS if e.cls is cls):
        assert all(value != options(cls)[key] for key, value in entry.kwargs.items())


NAMESAKES = [name for name in oracle.METHODS if hasattr(torch.optim, name)]


def test_torchs_defaults_and_their_order_are_kept():
    assert set(NAMESAKES) == {"SGD", "Adagrad", "RMSprop", "Adam", "AdamW"}
    for name in NAMESAKES:
        ours, torchs = options(getattr(agrlib, name)), options(getattr(torch.optim, name))
        positional = [k for k in ours if k not in HOW_TO_RUN | ELSEWHERE | {"bias_correction"}]
        assert positional == list(torchs)[: len(positional)]
        assert {k: ours[k] for k in positional} == {k: torchs[k] for k in positional}


def test_parity_with_the_defaults():
    entries = [Entry(name, getattr(agrlib, name), {}) for name in NAMESAKES]
    for entry in [*entries, *(Entry(cls.__name__, cls, {}) for cls in TWINS)]:
        params = parameters()
        grads = gradients(params, STEPS)
        torch_too = torchs(entry, params, grads, [])
        assert error(train(entry.cls(params), grads), torch_too) <= 1e-11


@pytest.mark.parametrize("entry", [e for e in OPTIMIZERS if e.cls is agrlib.SGD])
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
