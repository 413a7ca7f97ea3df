"""The methods once more, in float64 numpy, written from the equations and sharing no code."""

import numpy as np


def agr(g):
    """g_i (1 - |g_i| / sum_j |g_j|); zero stays zero, a one-element gradient is left as it is."""
    g = np.asarray(g)
    total = np.abs(g).sum()
    if g.size < 2 or total == 0:
        return g
    return g * (1 - np.abs(g) / total)


def sgd(x, gradients, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, **flip):
    b = None
    for g in signed(gradients, **flip):
        d = g + weight_decay * x
        b = d if b is None else momentum * b + (1 - dampening) * d
        move = b if momentum else d
        x = x - lr * (d + momentum * b if nesterov else move)
    return x


def adam(
    x,
    gradients,
    lr,
    betas,
    eps,
    weight_decay,
    amsgrad=False,
    bias_correction=True,
    decoupled=False,
    **flip,
):
    """Kingma and Ba's algorithm 1; the maximum is of the uncorrected second moment."""
    b1, b2 = betas
    m, v, largest = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
    for t, g in enumerate(signed(gradients, **flip), start=1):
        if decoupled:
            x = (1 - lr * weight_decay) * x
        else:
            g = g + weight_decay * x
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        largest = np.maximum(largest, v) if amsgrad else v
        m_hat = m / (1 - b1**t) if bias_correction else m
        v_hat = largest / (1 - b2**t) if bias_correction else largest
        x = x - lr * m_hat / (np.sqrt(v_hat) + eps)
    return x


def adamw(x, gradients, **options):
    return adam(x, gradients, decoupled=True, **options)


def signed(gradients, maximize=False):
    return [-g if maximize else g for g in gradients]


METHODS = {"SGD": sgd, "Adam": adam, "AdamW": adamw}
