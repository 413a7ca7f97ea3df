# Exported from book/threads.md: edit the chapter, not this file.
"""Work that several threads share: items, drawn from a counter, wave after wave.

Derived in the chapter "Threads that draw their work".
"""

import contextlib
import ctypes
import functools
import importlib
import itertools
import os
import queue
import threading
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from torch import Tensor

from agrlib.batch import items_of

CHUNK = 16384  # entries of an item on the CPU; four times as many in large batches
SMALL = 131072  # a tensor up to this size is summed and updated by one core, from its cache
TOGETHER = 2**19  # per core, entries of larger tensors that are summed, and then updated


class Waves(NamedTuple):
    """Work for all threads, wave after wave."""

    phases: np.ndarray  # for each wave its phase, its first claim, and how many there are
    claims: np.ndarray  # where in `order` each claim begins, and the last one ends
    order: np.ndarray  # the items
    entries: int


def waves_of(wanted: Iterable[tuple[int, np.ndarray]], sizes: np.ndarray) -> Waves:
    """Bundle the items of each phase; a phase of -1 has none, but one claim."""
    waves, starts, order, begin = [], [0], [np.zeros(0, np.int64)], 0
    for phase, items in wanted:
        if len(items) == 0 and phase >= 0:
            continue
        full = (np.cumsum(sizes[items]) - 1) // CHUNK
        ends = [*(1 + np.flatnonzero(np.diff(full))), len(items)]
        waves.append((phase, len(starts) - 1, len(ends)))
        starts += [begin + int(end) for end in ends]
        order.append(items)
        begin += len(items)
    every = np.concatenate(order)
    table = np.array(waves, np.int64).reshape(-1, 3)
    return Waves(table, np.array(starts, np.int64), every, int(sizes[every].sum()))


class Schedule(NamedTuple):
    """The items of a batch, and the waves in which they are done."""

    items: np.ndarray
    sizes: np.ndarray  # entries of each item
    alone: Waves  # everything, where no total needs other batches
    together: list[Waves]  # one sum after the other, and the update


def small_first(
    small: Sequence[bool], each: Sequence[np.ndarray], entries: np.ndarray, sums: int, cores: int
) -> list[tuple[int, np.ndarray]]:
    """Say what is done when: small tensors at once, larger ones in groups that a cache holds."""
    small_items = [items for items, s in zip(each, small, strict=True) if s]
    wanted = [(sums + 1, np.concatenate([np.zeros(0, np.int64), *small_items]))]
    large = [t for t, s in enumerate(small) if not s]
    ends = np.cumsum(entries[large])
    turns = dict(zip(large, ends // (TOGETHER * cores), strict=True))
    for _, group in itertools.groupby(large, turns.get):
        items = np.concatenate([each[t] for t in group])
        wanted += [(phase, items) for phase in range(sums + 1)]
    return wanted


def schedule_of(parts: Sequence[Tensor], by_row: Sequence[bool], sums: int, cores: int) -> Schedule:
    """Cut the work into items, and say in which waves they are done; `sums` come before updates."""
    entries = np.array([part.numel() for part in parts], np.int64)
    small = [sums > 0 and size <= SMALL for size in entries.tolist()]
    chunk = int(min(max(CHUNK, entries.sum() // 64), 4 * CHUNK))  # not by cores: sums depend on it
    items, firsts = items_of(parts, by_row, [SMALL if s else chunk for s in small])
    sizes, everything = items[:, 2] * items[:, 3], np.arange(len(items))
    each = [everything[first:stop] for first, stop in itertools.pairwise(firsts)]
    alone = small_first(small, each, entries, sums, cores) if sums else [(0, everything)]
    end = (-1, everything[:0])
    phases = [[(phase, everything)] for phase in range(sums)]
    together = [*phases, [(sums, everything), end]]
    waves = [waves_of(wanted, sizes) for wanted in together]
    return Schedule(items, sizes, waves_of([*alone, end], sizes), waves)


ALONE = 2**16  # entries for which no thread is woken


class Crew:
    """Threads of this process that help with kernels."""

    crews: ClassVar[dict[int, "Crew"]] = {}  # by process: a forked one has no threads yet

    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self.size = 0

    @classmethod
    def offer(cls, count: int, job: tuple[Any, ...]) -> None:
        """Ask `count` threads to call a kernel: ``job`` is the kernel and its arguments."""
        crew = cls.crews.get(os.getpid()) or cls.crews.setdefault(os.getpid(), Crew())
        try:
            while crew.size < count:
                threading.Thread(target=crew.work, name="agrlib", daemon=True).start()
                crew.size += 1
        except RuntimeError:  # the system gives no more threads, or the interpreter is ending
            count = min(count, crew.size)
        with contextlib.suppress(queue.Empty):
            while True:  # what nobody has taken up by now, its caller has done
                crew.jobs.get_nowait()
        for _ in range(count):
            crew.jobs.put(job)

    def work(self) -> None:
        while True:
            kernel, *arguments = self.jobs.get()
            kernel(*arguments)
            del kernel, arguments


@functools.cache
def guard_forks() -> None:
    """Let forks wait until nothing is compiled: a child would wait for the compiler for ever."""
    lock = importlib.import_module("numba.core.compiler_lock").global_compiler_lock
    if hasattr(os, "register_at_fork"):
        release = dict.fromkeys(("after_in_parent", "after_in_child"), lock.release)
        os.register_at_fork(before=lock.acquire, **release)


@functools.cache
def yielding() -> int:
    """Return the address of the C function by which a thread that waits lets others run."""
    posix = os.name == "posix"
    function = ctypes.CDLL(None).sched_yield if posix else ctypes.cdll.kernel32.SwitchToThread
    return ctypes.cast(function, ctypes.c_void_p).value or 0
