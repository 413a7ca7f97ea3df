# Exported from book/centralization.md: edit the chapter, not this file.
"""Gradient centralization (Yong et al., 2020).

Derived in the chapter "Gradient centralization".
"""

from agrlib.transforms import transform


def entry(grad):
    return grad


def row_mean(total, count):
    return total / count  # (centralize-mean)


@transform(over="row", summand=entry, finish=row_mean)
def centralize(grad, total):
    """Subtract from each row of a gradient its mean.

    A row is everything that one index of the first axis holds: the weights into one output unit of
    a linear or convolutional layer. With M entries in row i::

        g_ij <- g_ij - (1 / M) * sum_k g_ik

    Tensors with fewer than two axes, such as biases, are returned as they are. A row of one entry
    becomes 0, so the weight of a layer with one input would not move: give it a group of its own.

    Args:
        grad: a gradient of any shape and any floating-point or complex type.

    Returns:
        The centralized gradient, of the same shape and type.

    Raises:
        RuntimeError: the gradient is sparse.

    Example:
        >>> import torch
        >>> centralize(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))
        tensor([[-1.,  1.],
                [ 0.,  0.]])

    Source: Yong et al. (2020), equation 1; chapter "Gradient centralization".
    """
    return grad - total  # (centralize)
