# Exported from book/clipping.md: edit the chapter, not this file.
"""Gradient clipping: by value, by the norm of a tensor, by the norm of all tensors.

Derived in the chapter "Clipping"; the global norm after Pascanu, Mikolov and Bengio (2013).
"""

from numbers import Real

from torch import sqrt, where

from agrlib.transforms import Transform


def limit(grad, bound):
    return where(grad > bound, bound, where(grad < -bound, -bound, grad))  # (clip-value)


def square(grad):
    return abs(grad) * abs(grad)


def clip_factor(total, count, bound, eps, one):
    factor = bound / (sqrt(total) + eps)  # (clip-factor)
    return where(factor > one, one, factor)


def scale(grad, factor):
    return factor * grad  # (clip-norm)


def checked_bound(name: str, bound: float) -> float:
    """Return a clipping bound as a float, or raise."""
    if isinstance(bound, bool) or not isinstance(bound, Real):
        raise TypeError(f"{name} takes a number, as in {name}(1.0), not {type(bound).__name__}")
    if not bound >= 0:
        raise ValueError(f"Invalid {name} bound: {bound}")
    return float(bound)


def clip_value(bound: float) -> Transform:
    """Clip each entry of a gradient to the interval [-bound, bound].

    ``g_i <- max(-bound, min(g_i, bound))``, as ``torch.nn.utils.clip_grad_value_`` does. The
    direction of the gradient changes. NaN stays NaN. A complex gradient is a TypeError.

    Args:
        bound: the largest magnitude of an entry, at least 0, in units of the gradient.

    Returns:
        A transform.

    Raises:
        TypeError: the bound is no number.
        ValueError: the bound is negative or NaN.

    Example:
        >>> import torch
        >>> clip_value(1.0)(torch.tensor([3.0, -0.5]))
        tensor([ 1.0000, -0.5000])

    Source: chapter "Clipping".
    """
    bound = checked_bound("clip_value", bound)
    return Transform(limit, constants=(bound,), name=f"clip_value({bound})")


def clip_norm(bound: float) -> Transform:
    """Scale a gradient down to the given 2-norm, tensor by tensor.

    ``g <- g * min(1, bound / (||g|| + 1e-6))``, the form of ``torch.nn.utils.clip_grad_norm_`` with
    ``error_if_nonfinite=False``: an infinite norm makes zeros of the finite entries and NaN of the
    infinite ones, a NaN makes all NaN.

    Args:
        bound: the largest norm of a tensor's gradient, at least 0, in units of the gradient.

    Returns:
        A transform.

    Raises:
        TypeError: the bound is no number.
        ValueError: the bound is negative or NaN.

    Example:
        >>> import torch
        >>> clip_norm(1.0)(torch.tensor([3.0, -4.0]))
        tensor([ 0.6000, -0.8000])

    Source: chapter "Clipping".
    """
    bound = checked_bound("clip_norm", bound)
    constants = (bound, 1e-6, 1.0)
    return Transform(
        scale,
        over="tensor",
        summand=square,
        finish=clip_factor,
        constants=constants,
        name=f"clip_norm({bound})",
    )


def clip_global_norm(bound: float) -> Transform:
    """Scale all gradients of an optimizer by one factor, so that their joint 2-norm is bounded.

    ``g <- g * min(1, bound / (norm + 1e-6))``, where the norm covers every tensor of the optimizer
    whose chain holds this transform, at its place in the chain. The form, also for norms that are
    not finite, is that of ``torch.nn.utils.clip_grad_norm_`` with ``error_if_nonfinite=False``.
    Where an optimizer holds only some tensors of the model, under ZeRO, FSDP1 or in a pipeline, it
    is not the norm of the model: see the chapter "Sums over shards".

    Args:
        bound: the largest joint norm, at least 0, in units of the gradient.

    Returns:
        A transform.

    Raises:
        TypeError: the bound is no number.
        ValueError: the bound is negative or NaN.

    Example:
        >>> import torch
        >>> clip_global_norm(1.0).map([torch.tensor([3.0]), torch.tensor([-4.0])])
        [tensor([0.6000]), tensor([-0.8000])]

    Source: Pascanu, Mikolov and Bengio (2013), algorithm 1; chapter "Clipping".
    """
    bound = checked_bound("clip_global_norm", bound)
    constants = (bound, 1e-6, 1.0)
    return Transform(
        scale,
        over="all",
        summand=square,
        finish=clip_factor,
        constants=constants,
        name=f"clip_global_norm({bound})",
    )
