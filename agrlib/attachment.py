# Exported from book/attachment.md: edit the chapter, not this file.
"""Gradient transforms for any torch optimizer.

Derived in the chapter "Attaching transforms".
"""

import functools
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from agrlib.checkpoint import outside_graphs
from agrlib.checks import dense
from agrlib.transforms import Chain, run_chains


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse what has no step of its own that could be wrapped."""
    if not hasattr(optimizer, "param_groups"):  # a class, a scheduler, a module
        raise TypeError(f"attach takes an optimizer, not {optimizer!r}")
    present = getattr(optimizer.step, "attachment", None)
    if present is not None and present.active:
        raise RuntimeError("this optimizer has transforms attached: remove() them first")


def refuse_scaled(optimizer: Optimizer) -> None:
    """Raise where the step would unscale what has been transformed."""
    if getattr(optimizer, "grad_scale", None) is not None:
        raise RuntimeError(
            "the fused step would unscale the gradients after the transforms: "
            "call scaler.unscale_(optimizer) before scaler.step(optimizer)"
        )


def shape(chain: Chain, raw: list[Tensor]) -> list[Tensor]:
    """Send gradients through a chain; the results are new tensors, which a step may write to."""
    [results] = run_chains([chain], [raw])
    return [
        grad.clone() if grad is old else grad.to(old.dtype)
        for grad, old in zip(results, raw, strict=True)
    ]


def swap_in(optimizer: Optimizer, chain: Chain) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Put the transformed gradients in place of the raw ones; return parameters and both."""
    params = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    raw = [dense(p.grad) for p in params]
    with torch.set_grad_enabled(bool(optimizer.defaults.get("differentiable"))):
        swapped = list(zip(params, raw, shape(chain, raw), strict=True))
    for param, _, shaped in swapped:
        param.grad = shaped
    return swapped


def swap_out(swapped: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Put the raw gradients back."""
    for param, raw, shaped in swapped:
        if param.grad is shaped:  # or else a hook of the step has dropped it: zero_grad
            param.grad = raw


class Attachment:
    """The handle that `attach` returns: `remove()` ends the attachment."""

    def __init__(self, optimizer: Optimizer, transforms: Iterable[Callable[[Tensor], Tensor]]):
        check_optimizer(optimizer)
        self.chain, self.optimizer, self.active = Chain.of(transforms), optimizer, True
        self._swapped: list[tuple[Tensor, Tensor, Tensor]] = []
        inner = optimizer.step

        @functools.wraps(inner)  # keeps the marks that learning-rate schedulers look for
        def step(optimizer: Optimizer, closure: Any = None, *args: Any, **kwargs: Any) -> Any:
            if not self.active:
                return inner(*(() if closure is None else (closure,)), *args, **kwargs)
            return self._step(inner, closure, *args, **kwargs)

        step.attachment = self  # type: ignore[attr-defined]
        self._before = optimizer.__dict__.get("step")
        outside = outside_graphs(step)
        self._step_method = types.MethodType(outside, optimizer)  # schedulers wrap bound methods
        optimizer.step = self._step_method  # type: ignore[method-assign]

    def remove(self) -> None:
        """Give the optimizer its own step back; a second call does nothing."""
        if self.active and self.optimizer.__dict__.get("step") is self._step_method:
            del self.optimizer.step
            if self._before is not None:
                self.optimizer.step = self._before  # type: ignore[method-assign]
        self.active = False

    def _step(self, inner: Any, closure: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_scaled(self.optimizer)
        try:
            if closure is None:
                self._swapped = swap_in(self.optimizer, self.chain)
                return inner(*args, **kwargs)

            def shaped_closure() -> Any:
                self._restore()  # the closure accumulates into the raw gradients
                loss = closure()
                self._swapped = swap_in(self.optimizer, self.chain)
                return loss

            return inner(shaped_closure, *args, **kwargs)
        finally:
            self._restore()

    def _restore(self) -> None:
        swapped, self._swapped = self._swapped, []
        swap_out(swapped)


def attach(optimizer: Optimizer, transforms: Iterable[Callable[[Tensor], Tensor]]) -> Attachment:
    """Let any torch optimizer see transformed gradients.

    Around every `step`, each `p.grad` is replaced by chain(p.grad) and put back afterwards, also
    when the step raises and when the step takes a closure. Hooks of the step see the transformed
    gradients. A copy or a pickle of the optimizer does not carry the attachment, nor does its
    checkpoint.

    Args:
        optimizer: a torch.optim.Optimizer, whether or not a scheduler was made for it already.
        transforms: gradient transforms, applied left to right.

    Returns:
        A handle; `handle.remove()` ends it.

    Raises:
        TypeError: a transform is not callable, or `transforms` is not a list.
        RuntimeError: the optimizer has an attachment; in `step`, a gradient is sparse, or a
            gradient scaler left the unscaling to a fused step.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> handle = attach(optimizer, [torch.sign])
        >>> weight.grad = torch.tensor([0.3, -0.1])
        >>> optimizer.step()
        >>> weight.data, weight.grad
        (tensor([0., 2.]), tensor([ 0.3000, -0.1000]))
        >>> handle.remove()

    Source: chapter "Attaching transforms".
    """
    return Attachment(optimizer, transforms)
