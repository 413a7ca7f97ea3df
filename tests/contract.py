"""The list that a new optimizer joins with one line, and the helpers of the tests that run it."""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import agrlib

SHAPES = [(3, 4), (5,), (2, 3, 2, 2), (), (1,), (0,)]
DIRECTIONS = dict(betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1)
AVERAGE = dict(alpha=0.9, eps=1e-3, weight_decay=0.1)
THREE = dict(betas=(0.8, 0.7, 0.95), eps=1e-3, weight_decay=0.1)


# What torch has under another name.
TWINS = {agrlib.AMSGrad: functools.partial(torch.optim.Adam, amsgrad=True)}


class Entry(NamedTuple):
    name: str
    cls: Callable[..., torch.optim.Optimizer]
    kwargs: dict[str, Any]  # away from the defaults

    @property
    def twin(self) -> Any:
        """Torch's version of the method, where there is one that takes the same options."""
        cls = TWINS.get(self.cls) or getattr(torch.optim, self.cls.__name__, None)
        known = set(inspect.signature(cls).parameters) if cls else set()
        return cls if set(self.kwargs) <= known else None


# Name, class, constructor arguments. Every check of the contract runs on every line.
OPTIMIZERS = [
    Entry("SGD", agrlib.SGD, dict(lr=0.03, weight_decay=0.1)),
    Entry(
        "SGD-heavy-ball",
        agrlib.SGD,
        dict(lr=0.03, momentum=0.8, dampening=0.3, weight_decay=0.1),
    ),
    Entry("SGD-nesterov", agrlib.SGD, dict(lr=0.03, momentum=0.8, nesterov=True, weight_decay=0.1)),
    Entry(
        "Adagrad",
        agrlib.Adagrad,
        dict(lr=0.1, lr_decay=0.01, weight_decay=0.1, initial_accumulator_value=0.25, eps=1e-3),
    ),
    Entry("RMSprop", agrlib.RMSprop, dict(lr=0.03, **AVERAGE)),
    Entry("RMSprop-momentum", agrlib.RMSprop, dict(lr=0.005, momentum=0.7, **AVERAGE)),
    Entry("RMSprop-centered", agrlib.RMSprop, dict(lr=0.02, centered=True, **AVERAGE)),
    Entry(
        "RMSprop-centered-momentum",
        agrlib.RMSprop,
        dict(lr=0.02, momentum=0.7, centered=True, **AVERAGE),
    ),
    Entry("Adam", agrlib.Adam, dict(lr=0.02, **DIRECTIONS)),
    Entry("Adam-amsgrad", agrlib.Adam, dict(lr=0.02, amsgrad=True, **DIRECTIONS)),
    Entry("Adam-plain", agrlib.Adam, dict(lr=0.02, bias_correction=False, **DIRECTIONS)),
    Entry("AdamW", agrlib.AdamW, dict(lr=0.02, **DIRECTIONS)),
    Entry("AdamW-amsgrad", agrlib.AdamW, dict(lr=0.02, amsgrad=True, **DIRECTIONS)),
    Entry("AdamW-plain", agrlib.AdamW, dict(lr=0.02, bias_correction=False, **DIRECTIONS)),
    Entry("AMSGrad", agrlib.AMSGrad, dict(lr=0.02, **DIRECTIONS)),
    Entry("AMSGrad-plain", agrlib.AMSGrad, dict(lr=0.02, bias_correction=False, **DIRECTIONS)),
    Entry("Padam", agrlib.Padam, dict(lr=0.05, partial=1 / 8, **DIRECTIONS)),
    Entry(
        "Padam-plain",
        agrlib.Padam,
        dict(lr=0.05, partial=0.4, bias_correction=False, **DIRECTIONS),
    ),
    Entry("Adan", agrlib.Adan, dict(lr=0.02, **THREE)),
    Entry("Adan-no-prox", agrlib.Adan, dict(lr=0.02, no_prox=True, **THREE)),
]
# Every transform of the library; those that take a bound, with one.
TRANSFORMS = [
    agrlib.clip_value(0.7),
    agrlib.clip_norm(1.1),
    agrlib.clip_global_norm(2.3),
    agrlib.normalize,
    agrlib.centralize,
    agrlib.agr,
]
every = pytest.mark.parametrize("entry", OPTIMIZERS, ids=lambda entry: entry.name)
twins = pytest.mark.parametrize(
    "entry", [entry for entry in OPTIMIZERS if entry.twin], ids=lambda entry: entry.name
)


def options(cls: Any) -> dict[str, Any]:
    """The constructor's keywords and defaults."""
    parameters = inspect.signature(cls).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def random_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    values = torch.randn(tensor.shape, generator=generator, dtype=wide)
    return values.to(tensor.device, tensor.dtype)


def parameters(
    dtype: torch.dtype = torch.float64,
    shapes: Iterable[tuple[int, ...]] = SHAPES,
    seed: int = 0,
    device: str = "cpu",
) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    blank = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
    return [torch.nn.Parameter(random_like(tensor, generator)) for tensor in blank]


def gradients(params: Iterable[Tensor], steps: int = 4, seed: int = 1) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    params = list(params)
    return [[random_like(param, generator) for param in params] for _ in range(steps)]


def members(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def seed(number: int) -> None:
    """Seed as in a process of its own: every group that rounds takes the next number."""
    torch.manual_seed(number)
    agrlib.precision.seeded.clear()


def feed(params: Iterable[Tensor], grads: Iterable[Tensor | None]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = None if grad is None else grad.clone()


def step(optimizer: torch.optim.Optimizer, grads: Iterable[Tensor | None]) -> None:
    """One step; whatever is tested, no gradient may be written or replaced."""
    params = members(optimizer)
    feed(params, grads)
    before = [(param.grad, bits(param.grad)) for param in params]
    optimizer.step()
    for param, (grad, content) in zip(params, before, strict=True):
        assert param.grad is grad, "p.grad was replaced"
        assert bits(grad) == content, "p.grad was written"


def train(optimizer: Any, grads: Iterable[Iterable[Tensor | None]]) -> list[Tensor]:
    for one_step in grads:
        step(optimizer, one_step)
    return [param.detach().clone() for param in members(optimizer)]


def run(entry: Entry, dtype: torch.dtype = torch.float64, steps: int = 4, **more: Any):
    """Train an entry on random gradients; return the optimizer and its parameters."""
    params = parameters(dtype)
    optimizer = entry.cls(params, **{**entry.kwargs, **more})
    return optimizer, train(optimizer, gradients(params, steps))


def bits(value: Any) -> Any:
    """What can be compared bit for bit; -0 differs from 0, and NaN equals itself."""
    if not isinstance(value, Tensor):
        return value
    if value.layout != torch.strided:
        return str(value.layout), bits(value.to_dense())
    flat = torch.view_as_real(value) if value.is_complex() else value
    flat = flat.detach().contiguous().reshape(-1).view(torch.uint8)
    return tuple(value.shape), value.stride(), value.dtype, flat.cpu().numpy().tobytes()


def content(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Everything a step may write, bit for bit, and every gradient."""
    found = {}
    for i, param in enumerate(members(optimizer)):
        found[f"{i}"], found[f"{i}.grad"] = bits(param), bits(param.grad)
        for key, value in optimizer.state.get(param, {}).items():
            found[f"{i}.{key}"] = bits(value)
    return found


def same(first: Iterable[Tensor], second: Iterable[Tensor]) -> bool:
    return [bits(tensor) for tensor in first] == [bits(tensor) for tensor in second]


def close(first: Iterable[Tensor], second: Iterable[Tensor], tolerance: float) -> None:
    for a, b in itertools.zip_longest(first, second):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def two_groups(entry: Entry, params: list[Any], **last: Any) -> Any:
    """The entry with the last parameter in a group of its own."""
    return entry.cls([dict(params=params[:-1]), dict(params=params[-1:], **last)], **entry.kwargs)
