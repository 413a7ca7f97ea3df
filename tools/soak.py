"""Soak the library: threads and forked workers step, change and reload optimizers for half an hour.

Every optimizer on the compiled way has a twin on the eager way, which sees the same gradients and
the same changes: other options, one group more, parameters that are frozen for a while, checkpoints
that are saved and loaded. Both are compared every 100 steps in double precision, and the compiled
one goes on from the twin's values. Meanwhile guests are forked from the running process, and some
of them are killed. What must hold: no error, no hang, no difference, no growing memory, and no file
left behind. `python tools/soak.py --minutes 30` prints a line a minute and a verdict; the exit
status is 0 if everything held.
"""

import argparse
import faulthandler
import functools
import io
import mmap
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import agrlib
from agrlib import GradientMethod, eager

METHODS: list[tuple[type[GradientMethod], dict[str, Any]]] = [
    (agrlib.AdamW, {}),
    (agrlib.SGD, {}),
    (agrlib.SGD, dict(momentum=0.8, dampening=0.3)),
    (agrlib.SGD, dict(momentum=0.8, nesterov=True)),
    (agrlib.Adagrad, dict(lr_decay=0.01)),
    (agrlib.RMSprop, {}),
    (agrlib.RMSprop, dict(momentum=0.7, centered=True)),
    (agrlib.Adam, {}),
    (agrlib.Adam, dict(amsgrad=True)),
    (agrlib.AdamW, dict(bias_correction=False)),
    (agrlib.AMSGrad, {}),
    (agrlib.Padam, dict(partial=1 / 8)),
    (agrlib.Padam, dict(partial=0.3)),
    (agrlib.Adan, {}),
    (agrlib.Adan, dict(no_prox=True)),
]
CHAINS: list[list[Any]] = [
    [],
    [agrlib.agr],
    [agrlib.centralize, agrlib.agr],
    [agrlib.clip_global_norm(2.3)],
    [agrlib.clip_norm(1.1)],
    [agrlib.normalize],
    [agrlib.clip_value(0.7)],
    [agrlib.centralize],
]
CASES = [(cls, options, chain) for chain in CHAINS for cls, options in METHODS]
ROOT = Path(__file__).resolve().parent.parent
NEXT_START = """
import torch, agrlib
weight = torch.nn.Parameter(torch.ones(3))
weight.grad = torch.ones(3)
agrlib.SGD([weight], fused=True).step()
"""
SMALL = [(17,), (4, 5), (2, 3, 2), (1,)]  # compiled because they ask for it
LARGE = [(300, 240), (17,), (2, 3, 2), ()]  # compiled because they are large enough
TOLERANCE = 1e-12  # of the largest number of a tensor
STRETCH = 100  # steps between two comparisons
SILENCE = 60  # seconds after which a thread or a worker counts as hanging
WINDOW = 20  # minutes at the end of a run, in which memory must not grow
GROWTH = 0.01


def numbers(known: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """Draw those options that a method has."""
    found = dict(
        lr=10 ** draw.uniform(-4, -2),
        weight_decay=draw.choice([0.0, draw.uniform(0.01, 0.1)]),
        eps=10 ** draw.uniform(-3, -1),
        alpha=draw.uniform(0.5, 0.99),
        betas=tuple(draw.uniform(0.5, 0.99) for _ in known.get("betas", ())),
        maximize=draw.random() < 0.5,
    )
    return {key: value for key, value in found.items() if key in known}


def members(optimizer: GradientMethod) -> list[Tensor]:
    """Return all parameters."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def saved(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Send a checkpoint through torch.save and back."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def distance(value: Tensor, reference: Tensor) -> float:
    """Return the largest difference, relative to the largest number; infinite for NaN."""
    if not reference.numel():
        return 0.0
    size = max(reference.abs().max().item(), 1e-100)
    off = (value - reference).abs().max().item() / size
    return off if off < np.inf else np.inf


def update(optimizer: Any, *arguments: Any, way: Any = eager.update) -> None:
    """The eager way of one parameter; the compiled twin must never take it."""
    assert not getattr(optimizer, "must_compile", False), "a compiled step went the eager way"
    way(optimizer, *arguments)


eager.update = update  # type: ignore[assignment]


class Pair:
    """An optimizer on the compiled way and its eager twin."""

    def __init__(self, case: tuple[Any, ...], draw: random.Random) -> None:
        self.cls, self.options, self.chain = case
        self.draw = draw
        self.generator = torch.Generator().manual_seed(draw.getrandbits(32))
        self.fused = draw.choice([True, None])
        shapes = SMALL if self.fused else LARGE
        values = [self.normal(shape) for shape in shapes]
        self.fast, self.twin = (
            self.make([dict(params=[torch.nn.Parameter(v.clone()) for v in values])], fused)
            for fused in (self.fused, False)
        )
        self.frozen: set[int] = set()
        self.change_options()

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def make(self, groups: list[dict[str, Any]], fused: bool | None) -> GradientMethod:
        """Make an optimizer; one on the compiled way must never take the other."""
        made = self.cls(groups, transforms=self.chain, fused=fused, **self.options)
        if fused is not False:
            made.must_compile = True
        return made

    def renewed(self, optimizer: GradientMethod, state: dict[str, Any]) -> GradientMethod:
        """Return a new optimizer of the same parameters, with the state of a checkpoint."""
        groups = [dict(params=group["params"]) for group in optimizer.param_groups]
        made = self.make(groups, False if optimizer is self.twin else self.fused)
        made.load_state_dict(saved(state))
        return made

    def step(self) -> None:
        """Change something, seldom, and step with new gradients, in the old memory or in new."""
        if self.draw.random() < 0.03:
            self.draw.choice(
                [self.change_options, self.add_group, self.freeze_or_thaw, self.reload]
            )()
        again = self.draw.random() < 0.5
        for i, (one, two) in enumerate(zip(members(self.fast), members(self.twin), strict=True)):
            if i in self.frozen:
                one.grad = two.grad = None
            elif again and one.grad is not None:
                one.grad.normal_(generator=self.generator)
            else:
                one.grad = two.grad = self.normal(tuple(one.shape))
        self.step_compiled()
        self.twin.step()

    def step_compiled(self) -> None:
        """Step on two threads, also where torch may use one: it fills new states with its own."""
        threads = torch.get_num_threads()
        torch.set_num_threads(2 if self.fast.state else threads)
        self.fast.step()
        torch.set_num_threads(threads)

    def change_options(self) -> None:
        for first, second in zip(self.fast.param_groups, self.twin.param_groups, strict=True):
            found = numbers(self.fast.defaults, self.draw)
            first.update(found)
            second.update(found)

    def add_group(self) -> None:
        if len(self.fast.param_groups) < 4:
            value, found = self.normal((3, 4)), numbers(self.fast.defaults, self.draw)
            for optimizer in (self.fast, self.twin):
                param = torch.nn.Parameter(value.clone())
                optimizer.add_param_group(dict(params=[param], **found))

    def freeze_or_thaw(self) -> None:
        """Never the first parameter, which makes the others worth compiling."""
        i = self.draw.randrange(1, len(members(self.fast)))
        self.frozen ^= {i}
        for optimizer in (self.fast, self.twin):
            members(optimizer)[i].requires_grad_(i not in self.frozen)

    def reload(self) -> None:
        self.fast = self.renewed(self.fast, self.fast.state_dict())
        self.twin = self.renewed(self.twin, self.twin.state_dict())

    def compare(self) -> float:
        """Return how far the two are apart; then the compiled one starts from the twin's values."""
        worst = 0.0
        for one, two in zip(members(self.fast), members(self.twin), strict=True):
            first, second = self.fast.state.get(one, {}), self.twin.state.get(two, {})
            assert set(first) == set(second), f"other states: {set(first) ^ set(second)}"
            pairs = [(one.detach(), two.detach()), *((first[k], second[k]) for k in first)]
            worst = max(worst, *(distance(a, b) for a, b in pairs))
            one.data.copy_(two.data)
        if worst > TOLERANCE:
            raise AssertionError(f"{self.fast!r}\nis {worst:.1e} from its twin")
        self.fast = self.renewed(self.fast, self.twin.state_dict())
        return worst


class Board:
    """What all threads and workers report, in memory that forked processes share."""

    def __init__(self, size: int) -> None:
        shared = mmap.mmap(-1, 4 * 8 * size)
        self.rows = np.frombuffer(shared, np.float64).reshape(size, 4)
        self.rows[:, 0] = time.monotonic()

    def stepped(self, number: int) -> None:
        self.rows[number, 0] = time.monotonic()
        self.rows[number, 1] += 1

    def compared(self, number: int, worst: float) -> None:
        self.rows[number, 2] += 1
        self.rows[number, 3] = max(worst, self.rows[number, 3])

    def silent(self) -> set[int]:
        """Return who has not reported for too long."""
        return set(np.flatnonzero(time.monotonic() - self.rows[:, 0] > SILENCE).tolist())


def prepare(draw: random.Random, until: float) -> list[Any]:
    """Make kernels, which forked processes have then too; return their cases, those made in time.

    Those of the last chain are left for guests to make, and to be killed over.
    """
    threads, made = torch.get_num_threads(), []
    torch.set_num_threads(1)  # a fork would lose the others
    for case in CASES[: -len(METHODS)]:
        Pair(case, draw).step()
        made.append(case)
        if time.monotonic() > until:
            break
    torch.set_num_threads(threads)
    return made


def train(board: Board, number: int, cases: list[Any], seed: int, deadline: float) -> None:
    """Step pair after pair until the time is over, or until the first process is gone."""
    draw, parent = random.Random(1000 * seed + number), os.getppid()
    while True:
        pair = Pair(draw.choice(cases), draw)
        for _ in range(3):
            for _ in range(STRETCH):
                pair.step()
                board.stepped(number)
                if time.monotonic() > deadline:
                    break
            board.compared(number, pair.compare())
            if time.monotonic() > deadline or os.getppid() != parent:
                return


def fork(work: Callable[[], None]) -> int:
    """Do some work in a forked process, on one thread of torch's: its others do not survive."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        torch.set_num_threads(1)
        faulthandler.register(signal.SIGUSR1)
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def resident(pid: int) -> float:
    """Return the resident memory of a process in MB; NaN where the system does not tell."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return np.nan
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def visit(seed: int) -> None:
    """What a guest does: a few comparisons, first of what nobody has made a kernel for."""
    draw = random.Random(seed)
    for case in (draw.choice(CASES[-len(METHODS) :]), *draw.sample(CASES, 2)):
        pair = Pair(case, draw)
        for _ in range(STRETCH):
            pair.step()
        pair.compare()


class Soak:
    """One run, in the process that forks workers and guests and whose threads step beside them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.start = options, time.monotonic()
        self.deadline = self.start + 60 * options.minutes
        self.draw = random.Random(options.seed)
        self.cases = prepare(self.draw, self.start + 20 * options.minutes)
        print(f"{len(self.cases)} kernels in {time.monotonic() - self.start:.0f} s", flush=True)
        self.board = Board(options.threads + options.workers)
        self.failures: list[str] = []
        self.memory: list[list[float]] = []  # of this process and of each worker, every 5 seconds
        self.guests: dict[int, tuple[float, bool]] = {}  # until when, and whether killed then
        self.visits, self.minutes = 0, 0
        self.workers = {  # with their numbers
            fork(functools.partial(self.train, number)): number
            for number in range(options.threads, options.threads + options.workers)
        }
        self.processes = [os.getpid(), *self.workers]
        self.threads = [
            threading.Thread(target=self.try_to_train, args=(number,), daemon=True)
            for number in range(options.threads)
        ]

    def train(self, number: int) -> None:
        train(self.board, number, self.cases, self.options.seed, self.deadline)

    def try_to_train(self, number: int) -> None:
        """Train in a thread."""
        try:
            self.train(number)
        except BaseException:
            self.failures.append(traceback.format_exc())

    def run(self) -> list[str]:
        """Watch until everyone has ended; return what went wrong."""
        for thread in self.threads:
            thread.start()
        while not self.failures and (self.guests or self.workers or self.stepping()):
            time.sleep(0.25)
            faulthandler.dump_traceback_later(2 * SILENCE, exit=True)  # if this loop itself hangs
            self.note(time.monotonic() - self.start)
            self.look_for_silence()
            self.look_after_workers()
            self.look_after_guests()
        faulthandler.cancel_dump_traceback_later()
        return self.failures + self.growths()

    def stepping(self) -> bool:
        return any(thread.is_alive() for thread in self.threads)

    def note(self, passed: float) -> None:
        """Measure memory, print a line and invite a guest, each in its time."""
        if time.monotonic() > self.deadline:
            return
        if passed > 5 * len(self.memory):
            self.memory.append([resident(pid) for pid in self.processes])
        if passed > 60 * (self.minutes + 1):
            self.minutes += 1
            print(self.line(), flush=True)
        if passed > 20 * self.options.minutes + self.visits * min(20.0, 10 * self.options.minutes):
            self.invite()

    def invite(self) -> None:
        """Fork a guest from the running process; every other one is killed in the middle."""
        self.visits += 1
        seed, kill = self.draw.getrandbits(32), self.visits % 2 == 1
        guest = fork(lambda: visit(seed))
        limit = self.draw.uniform(0.1, 3.0) if kill else SILENCE
        self.guests[guest] = time.monotonic() + limit, kill

    def look_for_silence(self) -> None:
        """Notice who hangs, and let everyone say where they are."""
        busy = {number for number, thread in enumerate(self.threads) if thread.is_alive()}
        if silent := (busy | set(self.workers.values())) & self.board.silent():
            self.failures.append(f"{silent} have not reported for {SILENCE} seconds")
            faulthandler.dump_traceback(all_threads=True)
            for pid in self.workers:
                os.kill(pid, signal.SIGUSR1)
            time.sleep(1)

    def look_after_workers(self) -> None:
        """Notice who has ended."""
        for worker in list(self.workers):
            ended, status = os.waitpid(worker, os.WNOHANG)
            if ended:
                del self.workers[worker]
                if status or time.monotonic() < self.deadline:
                    self.failures.append(f"worker {worker} ended with status {status}")

    def look_after_guests(self) -> None:
        """Kill those whose time has come, and notice who has ended."""
        for guest, (limit, kill) in list(self.guests.items()):
            late = time.monotonic() > limit
            if late:
                os.kill(guest, signal.SIGKILL)
            ended, status = os.waitpid(guest, 0 if late else os.WNOHANG)
            if ended:
                del self.guests[guest]
                if status and not kill:
                    self.failures.append(f"a guest ended with status {status}")

    def line(self) -> str:
        """Say how far everyone is."""
        _, steps, comparisons, worst = self.board.rows.T
        memory = ", ".join(f"{size:.0f}" for size in self.memory[-1])
        return (
            f"{self.minutes:3} min: {steps.sum():9,.0f} steps, {comparisons.sum():6,.0f} "
            f"comparisons, worst {worst.max():.0e}; {self.visits} guests; resident MB {memory}"
        )

    def growths(self) -> list[str]:
        """Return how much the memory of processes has grown at the end of a run long enough."""
        if len(self.memory) < 15 * WINDOW:
            print("memory is judged in runs of half an hour")
            return []
        rows = np.array(self.memory)[-12 * WINDOW :]
        quarter = len(rows) // 4
        growth = np.median(rows[-quarter:], axis=0) / np.median(rows[:quarter], axis=0) - 1
        print("memory has grown by " + ", ".join(f"{100 * x:.2f} %" for x in growth))
        return [f"memory has grown by {100 * x:.1f} %" for x in growth if x > GROWTH]


def strangers(folder: Path) -> list[str]:
    """Return what is neither a kernel's source nor made of one."""
    known = {path.stem for path in folder.glob("cache/agrlib/*.py") if path.stat().st_size}
    kinds = (".py", ".pyc", ".nbi", ".nbc", ".sums")
    made = {
        path
        for path in folder.glob("cache/agrlib/**/*")
        if path.is_dir() or (path.name.split(".")[0] in known and path.suffix in kinds)
    }
    found = {*folder.glob("cache/**/*"), *folder.glob("tmp/*")} - made - {folder / "cache/agrlib"}
    return sorted(str(path.relative_to(folder)) for path in found)


def inside(options: argparse.Namespace) -> int:
    """Soak in this process."""
    faulthandler.enable()
    soak = Soak(options)
    failures = soak.run()
    print(soak.line())
    for failure in failures:
        print(f"FAILED: {failure}")
    sys.stdout.flush()
    os._exit(len(failures) > 0)  # threads that hang are not waited for


def let_an_hour_pass(cache: Path) -> None:
    """Make what killed processes have left half-written, and a file more, older than it is."""
    for kept in list(cache.glob("agrlib/*.py"))[:1]:
        kept.with_name(f"{kept.name}.tmp.0").touch()
    for half in cache.glob("**/*.tmp.*"):
        os.utime(half, (0, 0))


def outside(arguments: Sequence[str]) -> list[str]:
    """Soak in a process with a cache and a temporary folder of its own; return what went wrong."""
    with tempfile.TemporaryDirectory(prefix="agrlib-soak-") as name:
        folder, wrong = Path(name), []
        for part in ("cache", "tmp"):
            (folder / part).mkdir()
        own = dict(XDG_CACHE_HOME=str(folder / "cache"), TMPDIR=str(folder / "tmp"))
        own |= dict(OMP_NUM_THREADS="2", OMP_WAIT_POLICY="passive")
        own |= dict(TORCHINDUCTOR_CACHE_DIR=str(folder / "torch"))  # made by an import of torch's
        own |= dict(PYTHONPATH=os.pathsep.join([str(ROOT), *sys.path[1:]]))
        for command in ([__file__, "--inside", *arguments], ["-c", NEXT_START]):
            let_an_hour_pass(folder / "cache")
            done = subprocess.run([sys.executable, *command], env={**os.environ, **own})
            if done.returncode:
                wrong.append(f"status {done.returncode} of {command[0]}")
        return wrong + [f"left behind: {path}" for path in strangers(folder)]


def main(arguments: Sequence[str]) -> int:
    """Read the options, soak, and print the verdict."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.inside:
        return inside(options)
    wrong = outside(arguments)
    print("\n".join(wrong) or "passed")
    return len(wrong) > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
