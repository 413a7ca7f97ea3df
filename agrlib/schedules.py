# Exported from book/schedules.md: edit the chapter, not this file.
"""Step-size schedules refined from the gradient norms of a run (Defazio et al., 2023).

Derived in the chapter "Step-size schedules".
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from agrlib.checks import described, require


def refined_factors(norms: Tensor, power: float) -> Tensor:
    weights = (norms.min() / norms) ** power  # (schedules-weights)
    rest = weights.flip(0).cumsum(0).flip(0)  # (schedules-rest)
    steps = weights[:-1] * rest[1:]
    return steps / steps.max()  # (schedules-steps)


def running_median(values: list[float], half: int) -> list[float]:
    """Return the median of each value and `half` neighbors on both sides, mirrored at the ends."""
    padded = values[half:0:-1] + values + values[-2 : -2 - half : -1]
    window, medians = sorted(padded[: 2 * half]), []
    for old, new in zip(padded, padded[2 * half :], strict=False):
        insort(window, new)
        medians.append(window[half])
        del window[bisect_left(window, old)]
    return medians


class Schedule:
    """The factor of the step size for each step of a run, counted from 0; after the last it is 0.

    The factors are an attribute, so that they stand in the state dict of a `LambdaLR`.
    """

    def __init__(self, factors: Sequence[float]) -> None:
        self.factors = tuple(factors)

    def __call__(self, step: int) -> float:
        return self.factors[step] if step < len(self.factors) else 0.0


def check_numbers(power: float, smoothing: float) -> None:
    """Refuse settings that are no numbers or out of range."""
    for name, value in (("power", power), ("smoothing", smoothing)):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, not {described(value)}")
    require(0.0 <= power < float("inf"), "power", power)
    require(0.0 <= smoothing <= 1.0, "smoothing", smoothing)


def checked_norms(grad_norms: Sequence[float] | Tensor) -> list[float]:
    """Return the norms of a run as a list of numbers, or raise."""
    typed = hasattr(grad_norms, "dtype")  # else plain numbers, not to be rounded to float32
    norms = torch.as_tensor(grad_norms, dtype=None if typed else torch.float64).detach()
    if norms.is_complex():
        raise TypeError(f"grad_norms must be real numbers, not {norms.dtype}")
    require(norms.dim() == 1, "grad_norms, give one axis; shape", tuple(norms.shape))
    require(len(norms) >= 2, "grad_norms, give two or more; length", len(norms))
    values = norms.cpu().double().tolist()
    for step, value in enumerate(values):
        require(value >= 0.0, f"gradient norm at index {step}", value)  # NaN fails too
    return values


def refine_schedule(
    grad_norms: Sequence[float] | Tensor, *, power: float = 2.0, smoothing: float = 0.1
) -> Schedule:
    """Turn the gradient norms of a run into the factors of the step size for the next run.

    With G_1, ..., G_T the norms after a running median::

        w_t = G_t^-power
        factor_t = w_t * (w_(t+1) + ... + w_T), divided by the largest of these

    Equal norms give linear decay to 0; norms that fall at the start give a warm-up before it.

    Args:
        grad_norms: the norm of the gradient at each step, shape (T,) with T >= 2, in any unit: the
            2-norm over all parameters for SGD, the 1-norm for Adam and its like.
        power: 2 for SGD, 1 for Adam and its like; 0 makes it linear decay.
        smoothing: share of the run, in [0, 1], that the running median sees; 0 leaves it out.

    Returns:
        A callable ``step -> factor`` for `torch.optim.lr_scheduler.LambdaLR`: steps count from 0,
        the largest factor is 1, and from step T - 1 on it is 0. It can be pickled.

    Raises:
        TypeError: a number was expected.
        ValueError: fewer than two norms, more than one axis, a norm that is negative or NaN, or
            still 0 or infinite after the median; a `power` or `smoothing` out of range.

    Example:
        >>> factor = refine_schedule([2.0, 1.0, 1.0, 1.0], smoothing=0.0)
        >>> [factor(step) for step in range(5)]
        [0.375, 1.0, 0.5, 0.0, 0.0]

    Source: Defazio et al. (2023); chapter "Step-size schedules".
    """
    check_numbers(power, smoothing)
    values = checked_norms(grad_norms)
    medians = running_median(values, int(smoothing * len(values)) // 2)
    for step, value in enumerate(medians):
        require(0.0 < value < float("inf"), f"smoothed gradient norm at index {step}", value)
    factors = refined_factors(torch.tensor(medians, dtype=torch.float64), float(power))
    require(bool(factors.isfinite().all()), "power, norms differ by too much for it", power)
    return Schedule([*factors.tolist(), 0.0])
