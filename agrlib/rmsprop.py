# Exported from book/rmsprop.md: edit the chapter, not this file.
"""RMSProp (Tieleman and Hinton, 2012), with the options of torch.optim.RMSprop.

Derived in the chapter "RMSProp".
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, sqrt, where
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from agrlib.checks import Group, require
from agrlib.optimizer import GradientMethod
from agrlib.options import Options


def rmsprop(grad, param, square_avg, lr, alpha, weight, eps):
    square_avg = alpha * square_avg + weight * (grad * grad)  # (rmsprop-v)
    return param - lr * (grad / (sqrt(square_avg) + eps)), square_avg  # (rmsprop-step)


def rmsprop_momentum(grad, param, square_avg, momentum_buffer, lr, alpha, weight, eps, momentum):
    square_avg = alpha * square_avg + weight * (grad * grad)
    momentum_buffer = momentum * momentum_buffer + grad / (sqrt(square_avg) + eps)
    return param - lr * momentum_buffer, square_avg, momentum_buffer  # (rmsprop-momentum)


def rmsprop_centered(grad, param, square_avg, grad_avg, lr, alpha, weight, eps, zero):
    square_avg = alpha * square_avg + weight * (grad * grad)
    grad_avg = alpha * grad_avg + weight * grad  # (rmsprop-mean)
    variance = square_avg - grad_avg * grad_avg  # (rmsprop-variance), below zero by rounding only
    denom = sqrt(where(variance < zero, zero, variance)) + eps
    return param - lr * (grad / denom), square_avg, grad_avg


def rmsprop_centered_momentum(
    grad, param, square_avg, grad_avg, momentum_buffer, lr, alpha, weight, eps, zero, momentum
):
    square_avg = alpha * square_avg + weight * (grad * grad)
    grad_avg = alpha * grad_avg + weight * grad
    variance = square_avg - grad_avg * grad_avg
    denom = sqrt(where(variance < zero, zero, variance)) + eps
    momentum_buffer = momentum * momentum_buffer + grad / denom
    return param - lr * momentum_buffer, square_avg, grad_avg, momentum_buffer


class RMSprop(GradientMethod):
    """Divide each coordinate by the root of a moving average of its squared gradients.

    With the transformed gradient g::

        v <- alpha * v + (1 - alpha) * g^2
        x <- x - lr * g / (sqrt(v) + eps)

    With `centered`, v in the denominator is replaced by the variance v - a^2, where a is the moving
    average of g. With momentum, the quotient goes through a buffer:
    ``b <- momentum * b + g / (sqrt(v) + eps)`` and ``x <- x - lr * b``.

    Args:
        params: parameters or parameter groups; real or complex, of any floating-point type.
        lr: step size, a number or a one-element tensor.
        alpha: weight of the old value in the averages, in [0, 1).
        eps: added to the root, in units of the gradient.
        weight_decay: adds weight_decay * x to the gradient.
        momentum: weight of the old buffer, at least 0.
        centered: divide by the standard deviation instead of the root mean square.

    Raises:
        ValueError: a hyperparameter is negative, NaN or out of range.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = RMSprop([weight], lr=0.05)
        >>> weight.square().sum().backward()
        >>> optimizer.step()  # the first step moves every coordinate by lr / sqrt(1 - alpha)
        >>> weight.data
        tensor([0.5000, 1.5000])

    Source: Tieleman and Hinton (2012), lecture 6e; chapter "RMSProp".
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        **options: Unpack[Options],
    ) -> None:
        numbers = dict(lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum)
        super().__init__(params, dict(numbers, centered=centered), **options)

    def check(self, group: Group) -> None:
        super().check(group)
        alpha, momentum = group["alpha"], group["momentum"]
        require(0.0 <= alpha < 1.0, "alpha value", alpha)
        require(0.0 <= momentum < float("inf"), "momentum value", momentum)

    def update_rule(self, group: Group) -> tuple[Callable[..., Any], tuple[str, ...]]:
        if group["momentum"] == 0:
            if group["centered"]:
                return rmsprop_centered, ("square_avg", "grad_avg")
            return rmsprop, ("square_avg",)
        if group["centered"]:
            return rmsprop_centered_momentum, ("square_avg", "grad_avg", "momentum_buffer")
        return rmsprop_momentum, ("square_avg", "momentum_buffer")

    def scalars(self, group: Group, lr: Any, step: Any) -> tuple[Any, ...]:
        zero = (0.0,) if group["centered"] else ()
        momentum = (group["momentum"],) if group["momentum"] != 0 else ()
        return lr, group["alpha"], 1 - group["alpha"], group["eps"], *zero, *momentum
