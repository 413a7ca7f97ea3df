# Exported from book/adan.md: edit the chapter, not this file.
"""Adan, adaptive Nesterov momentum (Xie et al., 2024).

Derived in the chapter "Adan".
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, sqrt
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from agrlib.checks import Group
from agrlib.optimizer import GradientMethod
from agrlib.options import Options


def adan(
    grad,
    param,
    exp_avg,
    exp_avg_diff,
    exp_avg_sq,
    prev_grad,
    beta1,
    weight1,
    beta2,
    weight2,
    beta3,
    weight3,
    not_first,
    step_size,
    diff_size,
    root3,
    eps,
    keep,
    growth,
):
    diff = not_first * (grad - prev_grad)  # (adan-diff)
    ahead = grad + beta2 * diff  # (adan-ahead)
    exp_avg = beta1 * exp_avg + weight1 * grad  # (adan-m)
    exp_avg_diff = beta2 * exp_avg_diff + weight2 * diff  # (adan-d)
    exp_avg_sq = beta3 * exp_avg_sq + weight3 * (ahead * ahead)  # (adan-v)
    denom = sqrt(exp_avg_sq) / root3 + eps
    update = (step_size * exp_avg + diff_size * exp_avg_diff) / denom
    param = (keep * param - update) / growth  # (adan-step)
    return param, exp_avg, exp_avg_diff, exp_avg_sq, grad


class Adan(GradientMethod):
    """Adam with Nesterov momentum from the change of the gradient, and proximal weight decay.

    With the transformed gradient g, the change d of it since the last step (0 at the first) and
    b1, b2, b3 = betas::

        m <- b1 * m + (1 - b1) * g
        u <- b2 * u + (1 - b2) * d
        v <- b3 * v + (1 - b3) * (g + b2 * d)^2
        x <- x - lr * (m / (1 - b1^t) + b2 * u / (1 - b2^t)) / (sqrt(v / (1 - b3^t)) + eps)
        x <- x / (1 + lr * weight_decay)

    Args:
        params: parameters or parameter groups; real or complex, of any floating-point type.
        lr: step size, a number or a one-element tensor.
        betas: weights of the old value in the three averages, each in [0, 1).
        eps: added to the root of the second moment, in units of the gradient.
        weight_decay: divides the parameter by 1 + lr * weight_decay after the step.
        no_prox: decay as AdamW does instead: x <- x - lr * weight_decay * x before the step.

    Raises:
        ValueError: a hyperparameter is negative, NaN or out of range.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = Adan([weight], lr=0.5)
        >>> weight.square().sum().backward()
        >>> optimizer.step()  # the first step moves every coordinate by lr
        >>> weight.data
        tensor([0.5000, 1.5000])

    Source: Xie et al. (2024), algorithm 1, with the authors' code for the first step; chapter
    "Adan".
    """

    number_of_betas = 3
    weight_decay_acts_on = "rule"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        no_prox: bool = False,
        **options: Unpack[Options],
    ) -> None:
        own = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, no_prox=no_prox)
        super().__init__(params, own, **options)

    def update_rule(self, group: Group) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return adan, ("exp_avg", "exp_avg_diff", "exp_avg_sq", "prev_grad")

    def scalars(self, group: Group, lr: Any, step: Any) -> tuple[Any, ...]:
        beta1, beta2, beta3 = group["betas"]
        weights = beta1, 1 - beta1, beta2, 1 - beta2, beta3, 1 - beta3
        step_size, diff_size = lr / (1 - beta1**step), lr * beta2 / (1 - beta2**step)
        root3, rate = (1 - beta3**step) ** 0.5, lr * group["weight_decay"]
        keep, growth = (1 - rate, 1.0) if group["no_prox"] else (1.0, 1 + rate)  # (adan-prox)
        return *weights, (step > 1) * 1.0, step_size, diff_size, root3, group["eps"], keep, growth
