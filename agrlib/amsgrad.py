# Exported from book/amsgrad.md: edit the chapter, not this file.
"""AMSGrad (Reddi, Kale and Kumar, 2018).

Derived in the chapter "AMSGrad"; its rule stands in `agrlib.adam`, which uses it as well.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from agrlib.adam import Adam, amsgrad
from agrlib.checks import Group, require
from agrlib.options import Options, unexpected


class AMSGrad(Adam):
    """Adam with a denominator that never shrinks: the largest second moment so far.

    With the transformed gradient g and b1, b2 = betas::

        m <- b1 * m + (1 - b1) * g
        v <- b2 * v + (1 - b2) * g^2
        w <- max(w, v)
        x <- x - lr * (m / (1 - b1^t)) / (sqrt(w / (1 - b2^t)) + eps)

    The maximum is of the uncorrected second moment, as in torch's ``Adam(amsgrad=True)``.

    Args:
        bias_correction: False gives the paper's plain equations: both quotients by 1 - b^t are left
            out.

    Raises:
        ValueError: a hyperparameter is negative, NaN or out of range.

    Example:
        >>> import torch
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
        **options: Unpack[Options],
    ) -> None:
        if "amsgrad" in options:
            raise unexpected(type(self), "amsgrad")
        super().__init__(  # the group says True, so that torch's Adam loads it as what it is
            params, lr, betas, eps, weight_decay, True, bias_correction=bias_correction, **options
        )

    def check(self, group: Group) -> None:
        super().check(group)
        require(group["amsgrad"] is True, "amsgrad value, take Adam to switch it off", False)

    def update_rule(self, group: Group) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return amsgrad, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
