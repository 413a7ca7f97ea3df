# Exported from book/adagrad.md: edit the chapter, not this file.
"""AdaGrad (Duchi, Hazan and Singer, 2011).

Derived in the chapter "AdaGrad".
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, sqrt
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from agrlib.checks import Group, require
from agrlib.optimizer import GradientMethod
from agrlib.options import Options


def adagrad(grad, param, sum_sq, step_size, eps):
    sum_sq = sum_sq + grad * grad  # (adagrad-sum)
    return param - step_size * (grad / (sqrt(sum_sq) + eps)), sum_sq  # (adagrad-step)


class Adagrad(GradientMethod):
    """Divide each coordinate by the root of the sum of its squared gradients.

    With the transformed gradient g and a sum s that starts at `initial_accumulator_value`::

        s <- s + g^2
        x <- x - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(s) + eps)

    Args:
        params: parameters or parameter groups; real or complex, of any floating-point type.
        lr: step size, a number or a one-element tensor.
        lr_decay: lowers the step size with the number t of the step, as above.
        weight_decay: adds weight_decay * x to the gradient.
        initial_accumulator_value: what the sum of squares starts with, in units of the gradient
            squared.
        eps: added to the root of the sum, in units of the gradient.

    Raises:
        ValueError: a hyperparameter is negative, NaN or out of range.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = Adagrad([weight], lr=0.5)
        >>> weight.square().sum().backward()
        >>> optimizer.step()  # the first step moves every coordinate by lr
        >>> weight.data
        tensor([0.5000, 1.5000])

    Source: Duchi, Hazan and Singer (2011), figure 1; chapter "AdaGrad".
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        **options: Unpack[Options],
    ) -> None:
        start = dict(initial_accumulator_value=initial_accumulator_value, eps=eps)
        own = dict(lr=lr, lr_decay=lr_decay, weight_decay=weight_decay, **start)
        super().__init__(params, own, **options)

    def check(self, group: Group) -> None:
        super().check(group)
        decay, start = group["lr_decay"], group["initial_accumulator_value"]
        require(0.0 <= decay < float("inf"), "lr_decay value", decay)
        require(0.0 <= start < float("inf"), "initial_accumulator_value value", start)

    def update_rule(self, group: Group) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return adagrad, ("sum",)

    def initial_value(self, group: Group, key: str) -> float:
        return group["initial_accumulator_value"]

    def scalars(self, group: Group, lr: Any, step: Any) -> tuple[Any, ...]:
        return lr / (1 + (step - 1) * group["lr_decay"]), group["eps"]
