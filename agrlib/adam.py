# Exported from book/adam.md: edit the chapter, not this file.
"""Adam (Kingma and Ba, 2015) and AdamW (Loshchilov and Hutter, 2019).

Derived in the chapter "Adam and AdamW", the rule `amsgrad` in the chapter "AMSGrad".
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, maximum, sqrt
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from agrlib.checks import Group
from agrlib.optimizer import GradientMethod
from agrlib.options import Options


def adam(grad, param, exp_avg, exp_avg_sq, beta1, weight1, beta2, weight2, step_size, root2, eps):
    exp_avg = beta1 * exp_avg + weight1 * grad  # (adam-m)
    exp_avg_sq = beta2 * exp_avg_sq + weight2 * (grad * grad)  # (adam-v)
    denom = sqrt(exp_avg_sq) / root2 + eps
    return param - step_size * (exp_avg / denom), exp_avg, exp_avg_sq  # (adam-step)


def amsgrad(
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
    root2,
    eps,
):
    exp_avg = beta1 * exp_avg + weight1 * grad
    exp_avg_sq = beta2 * exp_avg_sq + weight2 * (grad * grad)
    max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq)  # (amsgrad-max)
    denom = sqrt(max_exp_avg_sq) / root2 + eps
    return param - step_size * (exp_avg / denom), exp_avg, exp_avg_sq, max_exp_avg_sq


class Adam(GradientMethod):
    """Two moving averages: the direction from the mean, its scale from the mean square.

    With the transformed gradient g and b1, b2 = betas::

        m <- b1 * m + (1 - b1) * g
        v <- b2 * v + (1 - b2) * g^2
        x <- x - lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    Args:
        params: parameters or parameter groups; real or complex, of any floating-point type.
        lr: step size, a number or a one-element tensor.
        betas: weights of the old value in the two averages, each in [0, 1).
        eps: added to the root of the second moment, in units of the gradient.
        weight_decay: adds weight_decay * x to the gradient.
        amsgrad: divide by the largest second moment so far instead of the present one.
        bias_correction: False leaves the averages as they are, biased towards their zero start.

    Raises:
        ValueError: a hyperparameter is negative, NaN or out of range.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = Adam([weight], lr=0.5)
        >>> weight.square().sum().backward()
        >>> optimizer.step()  # the first step moves every coordinate by lr
        >>> weight.data
        tensor([0.5000, 1.5000])

    Source: Kingma and Ba (2015), algorithm 1; chapter "Adam and AdamW".
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        bias_correction: bool = True,
        **options: Unpack[Options],
    ) -> None:
        numbers = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        flags = dict(amsgrad=amsgrad, bias_correction=bias_correction)
        super().__init__(params, numbers | flags, **options)

    def update_rule(self, group: Group) -> tuple[Callable[..., Any], tuple[str, ...]]:
        if group["amsgrad"]:
            return amsgrad, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        return adam, ("exp_avg", "exp_avg_sq")

    def scalars(self, group: Group, lr: Any, step: Any) -> tuple[Any, ...]:
        beta1, beta2 = group["betas"]
        correction1 = correction2 = 1.0
        if group["bias_correction"]:
            correction1, correction2 = 1 - beta1**step, 1 - beta2**step  # (adam-bias)
        step_size, root2 = lr / correction1, correction2**0.5
        return beta1, 1 - beta1, beta2, 1 - beta2, step_size, root2, group["eps"]


class AdamW(Adam):
    """Adam with decoupled weight decay: the parameter decays, the gradient does not.

    First ``x <- x - lr * weight_decay * x``, then Adam's step, with moments of the bare gradient.

    Args:
        weight_decay: takes lr * weight_decay * x off the parameter.

    Raises:
        ValueError: a hyperparameter is negative, NaN or out of range.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = AdamW([weight], lr=0.5, weight_decay=0.1)
        >>> weight.grad = torch.zeros(2)
        >>> optimizer.step()  # no gradient, decay alone: times 1 - 0.5 * 0.1
        >>> weight.data
        tensor([0.9500, 1.9000])

    Source: Loshchilov and Hutter (2019), algorithm 2; chapter "Adam and AdamW".
    """

    weight_decay_acts_on = "parameter"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        bias_correction: bool = True,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            bias_correction=bias_correction,
            **options,
        )
