# Exported from book/normalization.md: edit the chapter, not this file.
"""Gradient normalization: each tensor's gradient at unit length.

Derived in the chapter "Gradient normalization".
"""

from torch import sqrt

from agrlib.transforms import transform


def squared_magnitude(grad):
    return abs(grad) * abs(grad)


def norm(total, count, eps):
    return sqrt(total) + eps  # (normalize-norm)


@transform(over="tensor", summand=squared_magnitude, finish=norm, constants=(1e-8,))
def normalize(grad, total):
    """Divide a gradient by its 2-norm over the whole tensor.

    ``g <- g / (||g|| + 1e-8)``: the direction stays, the length becomes 1, or less for a gradient
    that is not much longer than 1e-8. Zero stays zero.
    Half-precision gradients are summed in float32.

    Args:
        grad: a gradient of any shape and any floating-point or complex type.

    Returns:
        The normalized gradient, of the same shape and type.

    Raises:
        RuntimeError: the gradient is sparse.

    Example:
        >>> import torch
        >>> normalize(torch.tensor([3.0, -4.0]))
        tensor([ 0.6000, -0.8000])

    Source: chapter "Gradient normalization".
    """
    return grad / total  # (normalize)
