# Exported from book/roofline.md: edit the chapter, not this file.
"""What a step must move and compute, and how long that takes at least.

The roofline model of Williams, Waterman and Patterson (2009), applied to optimizers in the chapter
"The roofline".
"""

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import agrlib
from agrlib.precision import state_dtype


def one_pass(optimizer: agrlib.GradientMethod) -> int:
    """Return the bytes of reading gradient, parameter and state and writing the last two, once."""
    total = 0
    for group in optimizer.param_groups:
        _, keys = optimizer.update_rule(group)
        for param in group["params"]:
            state = len(keys) * state_dtype(group, param).itemsize
            total += param.numel() * (3 * param.element_size() + 2 * state)
    return total


def summed(optimizer: agrlib.GradientMethod) -> list[int]:
    """Return the bytes of gradient behind each sum that an update must wait for.

    Raises:
        TypeError: a transform is a plain function, which does not say what it sums.
    """
    sizes = []
    for group in optimizer.param_groups:
        for f in group["transforms"]:
            if not isinstance(f, agrlib.Transform):
                raise TypeError(f"{f!r} does not say what it sums: make a Transform of it")
            covered = [p.numel() * p.element_size() for p in group["params"] if f.covers(p)]
            sizes += {"tensor": covered, "all": [sum(covered)]}.get(f.over or "", [])
    return sizes


def step_bytes(optimizer: agrlib.GradientMethod, cache: int = 0) -> int:
    """Return the bytes that one step must move between memory and a cache of so many bytes.

    Args:
        optimizer: of this library; its rules, transforms and types of numbers are looked at.
        cache: what is in it at the start, and what is left in it at the end, is not moved.

    Returns:
        Bytes, for all parameters, whether or not they have a gradient.

    Raises:
        TypeError: a transform is a plain function.

    Example:
        >>> import torch
        >>> weights = [torch.zeros(10, 10), torch.zeros(10)]
        >>> step_bytes(agrlib.SGD(weights)), step_bytes(agrlib.SGD(weights, momentum=0.9))
        (1320, 2200)
        >>> step_bytes(agrlib.SGD(weights), cache=100)
        1120
    """
    again = sum(max(0, size - cache) for size in summed(optimizer))
    return max(0, one_pass(optimizer) - 2 * cache + again)


def bytes_per_parameter(optimizer: agrlib.GradientMethod) -> float:
    """Return the bytes that a step must move, the cache left out, for each parameter.

    Example:
        >>> import torch
        >>> weights = [torch.zeros(10, 10)]
        >>> bytes_per_parameter(agrlib.AdamW(weights))
        28.0
        >>> bytes_per_parameter(agrlib.AdamW(weights, transforms=[agrlib.centralize, agrlib.agr]))
        32.0
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return step_bytes(optimizer) / sum(param.numel() for param in params)


def operations(rule: Callable[..., Any]) -> int:
    """Count the arithmetic operations in the source of a rule, a root or a quotient as one.

    Example:
        >>> from agrlib.adam import adam
        >>> operations(adam)
        13
    """
    [function] = ast.parse(textwrap.dedent(inspect.getsource(rule))).body
    assert isinstance(function, ast.FunctionDef)
    nodes = (node for line in function.body for node in ast.walk(line))
    return sum(isinstance(node, ast.BinOp | ast.UnaryOp | ast.Compare | ast.Call) for node in nodes)


def intensity(optimizer: agrlib.GradientMethod) -> float:
    """Return the operational intensity of the first group's rule, in operations per byte.

    What its transforms compute is not counted, what they read is.

    Example:
        >>> import torch
        >>> f"{intensity(agrlib.AdamW([torch.zeros(10)])):.3f}"
        '0.464'
    """
    rule, _ = optimizer.update_rule(optimizer.param_groups[0])
    return operations(rule) / bytes_per_parameter(optimizer)


def attainable(intensity: float, peak: float, bandwidth: float) -> float:
    """Return the rate that the roofline allows at an operational intensity.

    Example:
        >>> attainable(0.5, peak=100.0, bandwidth=40.0), attainable(5.0, peak=100.0, bandwidth=40.0)
        (20.0, 100.0)
    """
    return min(peak, bandwidth * intensity)  # the ridge point is at peak / bandwidth
