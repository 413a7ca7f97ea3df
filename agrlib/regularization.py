# Exported from book/regularization.md: edit the chapter, not this file.
"""Adaptive gradient regularization (Jiang et al., 2024, arXiv:2407.16944).

Derived in the chapter "Adaptive gradient regularization".
"""

from torch import where

from agrlib.transforms import transform


def magnitude(grad):
    return abs(grad)


def nonzero_total(total, count, zero, one):
    return where(total == zero, one, total)  # an all-zero gradient stays zero: 0 / 1, not 0 / 0


@transform(over="tensor", summand=magnitude, finish=nonzero_total, constants=(0.0, 1.0), smallest=2)
def agr(grad, total):
    """Shrink each entry of a gradient by its share of the sum of magnitudes.

    With the sum over the whole tensor::

        g_i <- g_i * (1 - |g_i| / sum_j |g_j|)

    Large entries are damped most. An all-zero gradient stays zero, and a one-element gradient,
    which the formula would erase, is returned as it is. Half-precision gradients are summed in
    float32. The magnitude of a complex entry is its modulus, so the phase is kept.

    Args:
        grad: a gradient of any shape and any floating-point or complex type.

    Returns:
        The regularized gradient, of the same shape and type.

    Raises:
        RuntimeError: the gradient is sparse.

    Example:
        >>> import torch
        >>> agr(torch.tensor([3.0, -1.0]))
        tensor([ 0.7500, -0.7500])
        >>> agr(torch.zeros(2)), agr(torch.tensor([5.0]))
        (tensor([0., 0.]), tensor([5.]))

    Source: Jiang et al. (2024); chapter "Adaptive gradient regularization".
    """
    return grad - grad * (abs(grad) / total)  # (agr)
