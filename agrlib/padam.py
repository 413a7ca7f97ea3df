# Exported from book/padam.md: edit the chapter, not this file.
"""Padam, partially adaptive momentum estimation (Chen et al., 2020, arXiv:1806.06763).

Derived in the chapter "Padam".
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, maximum, sqrt
from torch import pow as power
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from agrlib.checks import Group, require
from agrlib.optimizer import GradientMethod
from agrlib.options import Options


def padam(
    grad,
    param,
    exp_avg,
    exp_avg_sq,
    max_exp_avg_sq,
    beta1,
    weight1,
    beta2,
    weight2,
    step_size,
    exponent,
    eps,
):
    exp_avg = beta1 * exp_avg + weight1 * grad  # (padam-m)
    exp_avg_sq = beta2 * exp_avg_sq + weight2 * (grad * grad)  # (padam-v)
    max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq)  # (padam-max)
    denom = power(sqrt(max_exp_avg_sq) + eps, exponent)  # exponent = 2 p
    return param - step_size * (exp_avg / denom), exp_avg, exp_avg_sq, max_exp_avg_sq


class Padam(GradientMethod):
    """AMSGrad with a power p: without bias correction SGD (p = 0) to AMSGrad (p = 1/2).

    With the transformed gradient g, b1, b2 = betas and p = partial::

        m <- b1 * m + (1 - b1) * g
        v <- b2 * v + (1 - b2) * g^2
        w <- max(w, v)
        x <- x - lr * sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(w) + eps)^(2 p)

    Args:
        params: parameters or parameter groups; real or complex, of any floating-point type.
        lr: step size, a number or a one-element tensor.
        betas: weights of the old value in the two averages, each in [0, 1).
        eps: added to the root of the second moment, in units of the gradient; the smallest
            denominator is eps^(2 p).
        weight_decay: adds weight_decay * x to the gradient.
        partial: the power p of the second moment, in [0, 1/2].
        bias_correction: True multiplies lr by sqrt(1 - b2^t) / (1 - b1^t), whatever the power, as
            the authors' code does; this factor grows from step 13 on (default betas), and is a
            warm-up for p < 1/2. False leaves lr as it is: p = 0 is then SGD with averaged
            momentum, and at a constant lr no coordinate's rate ever grows.

    Raises:
        ValueError: a hyperparameter is negative, NaN or out of range.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 16.0]))
        >>> optimizer = Padam([weight], lr=1.0, betas=(0.0, 0.0), partial=1 / 4)
        >>> weight.grad = torch.tensor([1.0, 16.0])
        >>> optimizer.step()  # g / |g|^(1/2)
        >>> weight.data
        tensor([ 0., 12.])

    Source: Chen et al. (2020), algorithm 1, with the bias correction of the authors' code; chapter
    "Padam".
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        partial: float = 0.25,
        *,
        bias_correction: bool = True,
        **options: Unpack[Options],
    ) -> None:
        numbers = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, partial=partial)
        super().__init__(params, dict(numbers, bias_correction=bias_correction), **options)

    def check(self, group: Group) -> None:
        super().check(group)
        require(0.0 <= group["partial"] <= 0.5, "partial value", group["partial"])

    def update_rule(self, group: Group) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return padam, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

    def scalars(self, group: Group, lr: Any, step: Any) -> tuple[Any, ...]:
        beta1, beta2 = group["betas"]
        step_size = lr
        if group["bias_correction"]:
            step_size = lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step)  # (padam-bias)
        exponent = 2 * group["partial"]
        return beta1, 1 - beta1, beta2, 1 - beta2, step_size, exponent, group["eps"]
