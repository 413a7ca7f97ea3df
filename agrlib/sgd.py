# Exported from book/sgd.md: edit the chapter, not this file.
"""Gradient descent with heavy-ball or Nesterov momentum.

Derived in the chapter "Gradient descent, momentum, Nesterov"; momentum after Polyak (1964) and
Nesterov (1983), in the convention of torch.optim.SGD.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from agrlib.checks import Group, require
from agrlib.optimizer import GradientMethod
from agrlib.options import Options


def descend(grad, param, lr):
    return (param - lr * grad,)  # (sgd-step)


def heavy_ball(grad, param, momentum_buffer, lr, momentum, grad_weight):
    momentum_buffer = momentum * momentum_buffer + grad_weight * grad  # (sgd-buffer)
    return param - lr * momentum_buffer, momentum_buffer  # (sgd-heavy-ball)


def nesterov_momentum(grad, param, momentum_buffer, lr, momentum, grad_weight):
    momentum_buffer = momentum * momentum_buffer + grad_weight * grad  # (sgd-buffer)
    return param - lr * (grad + momentum * momentum_buffer), momentum_buffer  # (sgd-nesterov)


class SGD(GradientMethod):
    """Gradient descent, with heavy-ball or Nesterov momentum.

    With the transformed gradient g and a buffer b that starts as the first g::

        b <- momentum * b + (1 - dampening) * g
        x <- x - lr * b                      heavy ball
        x <- x - lr * (g + momentum * b)     Nesterov

    and without momentum ``x <- x - lr * g``.

    Args:
        params: parameters or parameter groups; real or complex, of any floating-point type.
        lr: step size, a number or a one-element tensor.
        momentum: weight of the old buffer, at least 0.
        dampening: 1 minus the weight of the new gradient, in [0, 1].
        weight_decay: adds weight_decay * x to the gradient.
        nesterov: look ahead along the buffer.

    Raises:
        ValueError: a hyperparameter is out of range, or Nesterov momentum without momentum or with
            dampening.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = SGD([weight], lr=0.5, momentum=0.9)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0., 0.])

    Source: chapter "Gradient descent, momentum, Nesterov".
    """

    counts_steps = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        **options: Unpack[Options],
    ) -> None:
        numbers = dict(lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay)
        super().__init__(params, dict(numbers, nesterov=nesterov), **options)

    def check(self, group: Group) -> None:
        super().check(group)
        momentum, dampening = group["momentum"], group["dampening"]
        require(0.0 <= momentum < float("inf"), "momentum value", momentum)
        require(0.0 <= dampening <= 1.0, "dampening value", dampening)
        if group["nesterov"] and (momentum == 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")

    def update_rule(self, group: Group) -> tuple[Callable[..., Any], tuple[str, ...]]:
        if group["momentum"] == 0:
            return descend, ()
        return nesterov_momentum if group["nesterov"] else heavy_ball, ("momentum_buffer",)

    def scalars(self, group: Group, lr: Any, step: Any) -> tuple[Any, ...]:
        if group["momentum"] == 0:
            return (lr,)
        return lr, group["momentum"], 1 - group["dampening"] * (step > 1)
