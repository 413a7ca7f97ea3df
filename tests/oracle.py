"""The methods once more, in float64 numpy, written from the equations and sharing no code."""

import numpy as np


def agr(g):
    """g_i (1 - |g_i| / sum_j |g_j|); zero stays zero, a one-element gradient is left as it is."""
    g = np.asarray(g)
    total = np.abs(g).sum()
    if g.size < 2 or total == 0:
        return g
    return g * (1 - np.abs(g) / total)


def normalize(g):
    return g / (np.linalg.norm(g) + 1e-8)


def centralize(g):
    """From each row its mean; a row is what one index of the first axis holds."""
    g = np.asarray(g)
    if g.ndim < 2:
        return g
    return g - np.stack([np.full_like(row, row.mean()) for row in g])


def clip_value(c):
    return lambda g: np.clip(g, -c, c)


def clip_norm(c):
    return lambda g: g * min(1.0, c / (np.linalg.norm(g) + 1e-6))


def clip_global_norm(c):
    """Takes the list of all gradients."""

    def clip(gradients):
        norm = np.sqrt(sum(np.sum(g**2) for g in gradients))
        return [g * min(1.0, c / (norm + 1e-6)) for g in gradients]

    return clip


def shape(name, gradients):
    """Send the gradients of one step through a transform, given as in a checkpoint."""
    function = eval(name, globals())
    if name.startswith("clip_global_norm"):
        return function(gradients)
    return [function(g) for g in gradients]


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


def adagrad(x, gradients, lr, lr_decay, weight_decay, initial_accumulator_value, eps, **flip):
    """Duchi, Hazan and Singer's figure 1 with a diagonal matrix, and torch's options."""
    squares = np.full_like(x, initial_accumulator_value)
    for t, g in enumerate(signed(gradients, **flip)):
        g = g + weight_decay * x
        squares = squares + g**2
        x = x - lr / (1 + t * lr_decay) * g / (np.sqrt(squares) + eps)
    return x


def rmsprop(x, gradients, lr, alpha, eps, weight_decay, momentum=0.0, centered=False, **flip):
    v, mean, b = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
    for g in signed(gradients, **flip):
        g = g + weight_decay * x
        v = alpha * v + (1 - alpha) * g**2
        mean = alpha * mean + (1 - alpha) * g
        size = np.sqrt(v - mean**2 if centered else v) + eps
        b = momentum * b + g / size
        x = x - lr * b
    return x


def amsgrad(x, gradients, **options):
    return adam(x, gradients, amsgrad=True, **options)


def padam(x, gradients, lr, betas, eps, weight_decay, partial, bias_correction=True, **flip):
    """Chen et al.'s algorithm 1, with the factor of the authors' code."""
    b1, b2 = betas
    m, v, largest = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
    for t, g in enumerate(signed(gradients, **flip), start=1):
        g = g + weight_decay * x
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        largest = np.maximum(largest, v)
        factor = np.sqrt(1 - b2**t) / (1 - b1**t) if bias_correction else 1.0
        x = x - lr * factor * m / (np.sqrt(largest) + eps) ** (2 * partial)
    return x


def adan(x, gradients, lr, betas, eps, weight_decay, no_prox=False, **flip):
    """Xie et al.'s algorithm 1 with the betas of the authors' code and their first step."""
    b1, b2, b3 = betas
    m, u, v = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
    before = None
    for t, g in enumerate(signed(gradients, **flip), start=1):
        change = np.zeros_like(x) if before is None else g - before
        before = g
        m = b1 * m + (1 - b1) * g
        u = b2 * u + (1 - b2) * change
        v = b3 * v + (1 - b3) * (g + b2 * change) ** 2
        move = m / (1 - b1**t) + b2 * u / (1 - b2**t)
        move = lr * move / (np.sqrt(v / (1 - b3**t)) + eps)
        rate = lr * weight_decay
        x = (1 - rate) * x - move if no_prox else (x - move) / (1 + rate)
    return x


def signed(gradients, maximize=False):
    return [-g if maximize else g for g in gradients]


METHODS = {
    "SGD": sgd,
    "Adagrad": adagrad,
    "RMSprop": rmsprop,
    "Adam": adam,
    "AdamW": adamw,
    "AMSGrad": amsgrad,
    "Padam": padam,
    "Adan": adan,
}
