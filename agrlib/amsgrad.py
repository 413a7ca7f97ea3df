# Exported from book/amsgrad.md: edit the chapter, not this file.
"""AMSGrad (Reddi, Kale and Kumar, 2018).

Derived in the chapter "AMSGrad"; `agrlib.adam` uses the same rule for `amsgrad=True`.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, maximum, sqrt
from torch.optim.optimizer import ParamsT

from agrlib.optimizer import GradientMethod
from agrlib.checks import Group, require


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


class AMSGrad(GradientMethod):
    """Adam with a denominator that never shrinks: the largest second moment so far.

    With the transformed gradient g and b1, b2 = betas::

        m <- b1 * m + (1 - b1) * g
        v <- b2 * v + (1 - b2) * g^2
        w <- max(w, v)
        x <- x - lr * (m / (1 - b1^t)) / (sqrt(w / (1 - b2^t)) + eps)

    The maximum is of the uncorrected second moment, as in torch's ``Adam(amsgrad=True)``.

    Args:
        params: parameters or parameter groups; real or complex, of any floating-point type.
        lr: step size, a number or a one-element tensor.
        betas: weights of the old value in the two averages, each in [0, 1).
        eps: added to the root of the second moment, in units of the gradient.
        weight_decay: adds weight_decay * x to the gradient.
        bias_correction: False gives the paper's plain equations: both quotients by 1 - b^t are left
            out.
        transforms: gradient transforms, applied left to right; for this and the keywords after it
            see `GradientMethod`.

    Raises:
        ValueError: a hyperparameter is negative, NaN or out of range.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = AMSGrad([weight], lr=0.5)
        >>> weight.square().sum().backward()
        >>> optimizer.step()  # the first step moves every coordinate by lr
        >>> weight.data
        tensor([0.5000, 1.5000])

    Source: Reddi, Kale and Kumar (2018), algorithm 2; chapter "AMSGrad".
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = True,
        transforms: Iterable[Callable[[Tensor], Tensor]] = (),
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(
            params,
            dict(
                lr=lr,
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
                bias_correction=bias_correction,
                amsgrad=True,  # so that torch's Adam loads the checkpoint as what it is
            ),
            transforms=transforms,
            maximize=maximize,
            foreach=foreach,
            fused=fused,
            capturable=capturable,
            differentiable=differentiable,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
        )

    def check(self, group: Group) -> None:
        super().check(group)
        require(group["amsgrad"] is True, "amsgrad value, take Adam to switch it off", False)

    def update_rule(self, group: Group) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return amsgrad, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

    def scalars(self, group: Group, lr: Any, step: Any) -> tuple[Any, ...]:
        beta1, beta2 = group["betas"]
        correction1 = correction2 = 1.0
        if group["bias_correction"]:
            correction1, correction2 = 1 - beta1**step, 1 - beta2**step
        step_size, root2 = lr / correction1, correction2**0.5
        return beta1, 1 - beta1, beta2, 1 - beta2, step_size, root2, group["eps"]
