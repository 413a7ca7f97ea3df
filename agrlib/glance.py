# Exported from book/glance.md: edit the chapter, not this file.
"""A quick look at all tensors of a step, through the C functions of CPython and DLPack.

Derived in the chapter "A glance at a thousand tensors".
"""

import ctypes
import functools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agrlib.arithmetic import Unsupported
from agrlib.compilers import NUMBA, broken_compiler, can_import, first_call, load, warn_once
from agrlib.layout import PLAIN, Layout


class ExchangeAPI(ctypes.Structure):
    """DLPack's table of C functions, version 1."""

    names = ("previous", "allocate", "lend", "borrow", "describe", "stream")
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        *((name, ctypes.c_void_p) for name in names),
    )


@functools.cache
def description() -> tuple[int, ...] | None:
    """Return where three functions lie: torch's that describes a tensor, and two of Python's."""
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None or not can_import("numba"):
        return None
    kind = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    try:
        place = kind(("PyCapsule_GetPointer", ctypes.pythonapi))(capsule, b"dlpack_exchange_api")
    except ValueError:  # a capsule of another kind
        return None
    api = ExchangeAPI.from_address(place)
    if api.major != 1 or not api.describe:
        return None
    others = ctypes.pythonapi.PyDict_GetItemWithError, ctypes.pythonapi.PyErr_Clear
    return api.describe, *(ctypes.cast(other, ctypes.c_void_p).value or 0 for other in others)


NUMBERS = {  # of types in DLPack: 2 for floating point, 4 for bfloat16, then bits, then lanes
    torch.float16: 2 | 16 << 8 | 1 << 16,
    torch.float32: 2 | 32 << 8 | 1 << 16,
    torch.float64: 2 | 64 << 8 | 1 << 16,
    torch.bfloat16: 4 | 16 << 8 | 1 << 16,
}


def device_number(tensor: Tensor) -> int:
    """Return a tensor's device as DLPack numbers it."""
    kind, number = tensor.__dlpack_device__()
    return int(kind) | number << 32


CALLS = """
def calling(result):  # C functions of two words, by their addresses
    @intrinsic
    def call(typing, function, one, two):
        def build(context, builder, signature, arguments):
            word = ir.IntType(64)
            kind = ir.FunctionType(ir.IntType(result.bitwidth), (word, word)).as_pointer()
            return builder.call(builder.inttoptr(arguments[0], kind), arguments[1:])

        return result(types.int64, types.int64, types.int64), build

    return call


ask, find = calling(types.int32), calling(types.int64)


@intrinsic
def tell(typing, function):
    def build(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.VoidType(), ()).as_pointer()
        builder.call(builder.inttoptr(arguments[0], kind), ())
        return context.get_dummy_value()

    return types.void(types.int64), build
"""


def forms_of(layout: Layout) -> np.ndarray:
    """Return a row for each tensor: how many axes it has, and each one's size and stride."""
    axes = max(map(len, layout.shapes))
    forms = np.zeros((len(layout.shapes), 1 + 2 * axes), np.int64)
    for form, shape, strides in zip(forms, layout.shapes, layout.strides, strict=True):
        form[0] = len(shape)
        form[1 : 1 + 2 * len(shape)] = np.stack((shape, strides), axis=1).ravel()
    return forms


def places_in_memory(objects: Sequence[Any]) -> np.ndarray:
    """Return where Python's objects lie: in CPython, an id is an address."""
    return np.array([*map(id, objects)], np.int64)


LOOK = """
@njit(cache=True)
def look(describe, lookup, forget, params, grads, states, keys, values, device, dtypes, steps,
         forms, old, addresses, answer):
    moved = 0
    grads = carray(pointer(grads, np.int64(0)), (len(params),))
    for role in range(len(addresses)):
        for t in range(len(forms)):
            tensor = params[t] if role == 0 else grads[t]
            if role >= 2:
                tensor = find(lookup, states[t], keys[role - 2])
            if role >= 2 and tensor != values[role - 2, t] or (
                ask(describe, tensor, answer.ctypes.data) != 0
            ):
                tell(forget)  # a Python error, if there is one
                return -1
            axes = answer[2] & 0xFFFFFFFF
            if answer[0] == 0 or answer[1] != device or answer[2] >> 32 != dtypes[role]:
                return -1
            shape = carray(pointer(answer[3], np.int64(0)), (axes,))
            strides = carray(pointer(answer[4], np.int64(0)), (axes,))
            if role == steps:
                for a in range(axes):
                    if shape[a] != 1:
                        return -1
            elif axes != forms[t, 0]:
                return -1
            else:
                for a in range(axes):
                    size, stride = forms[t, 1 + 2 * a], forms[t, 2 + 2 * a]
                    if shape[a] != size or (size != 1 and strides[a] != stride):
                        return -1
            addresses[role, t] = answer[0] + answer[5]
            if addresses[role, t] != old[role, t]:
                moved = 1
    return moved
"""


MANY = 32  # tensors of a batch from which on a glance is worth its own compilation


def is_possible(layout: Layout) -> bool:
    """Whether a glance at a batch can be had, and is worth its compilation."""
    if os.environ.get("AGRLIB_GLANCE") == "0" or broken_compiler(torch.device("cpu")):
        return False
    few = len(layout.params) < MANY or layout.sharded or any(0 in s for s in layout.shapes)
    return not few and description() is not None


class Glance:
    """A quick look at all tensors of a batch, after one that took its time.

    Args:
        layout: the parameters, and how all tensors lay in memory a moment ago.
        keys: the names of the state tensors, the number of the step among them.
        states: the state of each parameter.

    Source: chapter "A glance at a thousand tensors".
    """

    def __init__(self, layout: Layout, keys: list[str], states: list[dict[str, Tensor]]) -> None:
        found = description()
        assert found is not None
        self.functions, self.layout, self.states = found, layout, states
        self.run = load("\n\n".join((NUMBA, CALLS, LOOK)), "look").look
        self.single = [i for i, shape in enumerate(layout.shapes) if shape.numel() == 1]
        self.values = [[state[key] for state in states] for key in keys]
        dtypes = [form[0][0] for form in layout.forms]
        counts = len(keys) + 2 > len(dtypes)  # the last key is the number of the step
        dtypes += [torch.float32] * counts
        known = [places_in_memory(values) for values in self.values]
        self.places = [places_in_memory(those) for those in (layout.params, states, keys)]
        self.known = np.array(known, np.int64).reshape(len(keys), len(states))
        self.dtypes = np.array([NUMBERS[dtype] for dtype in dtypes], np.int64)
        self.device, self.forms = device_number(layout.params[0]), forms_of(layout)
        self.steps = len(dtypes) - 1 if counts else -1
        self.answer = np.zeros(6, np.int64)
        first_call(self.run, self.compile)

    def call(self, count: int, grads: np.ndarray, old: np.ndarray, addresses: np.ndarray) -> int:
        """Look at the first `count` tensors of each kind; -1 if in doubt, 1 if some have moved."""
        params, dicts, keys = self.places
        gradients = grads.__array_interface__["data"][0]
        tensors = params[:count], gradients, dicts[:count], keys, self.known[:, :count]
        forms = self.device, self.dtypes, self.steps, self.forms[:count]
        return self.run(*self.functions, *tensors, *forms, old, addresses, self.answer)

    def compile(self) -> None:
        """Look at no tensors."""
        none = np.zeros((len(self.dtypes), 0), np.int64)
        self.call(0, np.zeros(0, object), none, none)

    def look(
        self, states: list[dict[str, Tensor]], grads: list[Tensor], old: np.ndarray
    ) -> np.ndarray | None:
        """Return the addresses of all tensors, the same array if none moved; None if in doubt."""
        if states is not self.states or not set(map(type, grads)) <= PLAIN:
            return None
        if any(grads[i].is_neg() for i in self.single):
            return None
        addresses = np.empty_like(old)
        found = self.call(len(grads), np.fromiter(grads, object, len(grads)), old, addresses)
        if found > 0 and self.has_turned(grads, addresses, old):
            return None
        return None if found < 0 else addresses if found else old

    def has_turned(self, grads: list[Tensor], addresses: np.ndarray, old: np.ndarray) -> bool:
        """Whether a tensor of one entry that has moved has the negative bit now."""
        rows = self.layout.params, grads, *self.values
        moved = np.argwhere(addresses[:, self.single] != old[:, self.single]).tolist()
        return any(rows[role][self.single[k]].is_neg() for role, k in moved)


def glance_at(layout: Layout, keys: list[str], states: list[dict[str, Tensor]]) -> Glance | None:
    """Return a glance at a batch, or None where it cannot or need not be had."""
    if not is_possible(layout):
        return None
    try:
        return Glance(layout, keys, states)
    except Unsupported as error:  # then every tensor is asked
        warn_once(f"steps take longer, because {error}")
        return None
