# Exported from book/bench.md: edit the chapter, not this file.
"""How fast is a step, and how fast could it be: ``python -m agrlib.bench``.

Derived in the chapter "The roofline".
"""

import argparse
import ast
import ctypes
import datetime
import gc
import importlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import agrlib
from agrlib.experiment import COLORS
from agrlib.optimizer import GradientMethod
from agrlib.precision import state_dtype
from agrlib.transforms import Transform

Step = Callable[[], Any]


def rereads(transform: Any) -> bool:
    """Whether a transform's sum must have read a whole gradient before the update can begin.

    A row is summed and used while it is in the cache. A tensor, or all of them, may not fit.

    Raises:
        TypeError: the transform is a plain function, which does not say what it sums.

    Source: chapter "The roofline".
    """
    if not isinstance(transform, Transform):
        raise TypeError(f"{transform!r} does not say what it sums: make a Transform of it")
    return transform.over in ("tensor", "all")


def step_bytes(optimizer: GradientMethod) -> int:
    """Return the bytes that one step must move between memory and cache.

    Gradient, parameter and state are read, parameter and state are written, each once, and the
    gradient is read once more for each sum over whole tensors. Tensors that fit into the cache
    can do with less.

    Args:
        optimizer: of this library; its rules, transforms and types of numbers are looked at.

    Returns:
        Bytes, for all parameters, whether or not they have a gradient.

    Raises:
        TypeError: a transform is a plain function.

    Example:
        >>> weights = [torch.zeros(10, 10), torch.zeros(10)]
        >>> step_bytes(agrlib.SGD(weights)), step_bytes(agrlib.SGD(weights, momentum=0.9))
        (1320, 2200)

    Source: chapter "The roofline".
    """
    total = 0
    for group in optimizer.param_groups:
        _, keys = optimizer.update_rule(group)
        for param in group["params"]:
            again = sum(rereads(f) and f.covers(param) for f in group["transforms"])
            state = len(keys) * state_dtype(group, param).itemsize
            total += param.numel() * ((3 + again) * param.element_size() + 2 * state)
    return total


def bytes_per_parameter(optimizer: GradientMethod) -> float:
    """Return the bytes that a step must move, divided by the number of parameters.

    Example:
        >>> weights = [torch.zeros(10, 10)]
        >>> bytes_per_parameter(agrlib.AdamW(weights))
        28.0
        >>> bytes_per_parameter(agrlib.AdamW(weights, transforms=[agrlib.centralize, agrlib.agr]))
        32.0

    Source: chapter "The roofline".
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return step_bytes(optimizer) / sum(param.numel() for param in params)


def operations(rule: Callable[..., Any]) -> int:
    """Count the arithmetic operations in the source of a rule, a root or a quotient as one.

    Example:
        >>> from agrlib.adam import adam
        >>> operations(adam)
        13

    Source: chapter "The roofline".
    """
    [function] = ast.parse(textwrap.dedent(inspect.getsource(rule))).body
    assert isinstance(function, ast.FunctionDef)
    nodes = (node for line in function.body for node in ast.walk(line))
    return sum(isinstance(node, ast.BinOp | ast.UnaryOp | ast.Compare | ast.Call) for node in nodes)


Shape = tuple[int, ...]


def convolution(inputs: int, outputs: int, size: int) -> list[Shape]:
    """A convolution without bias and the scale and shift of its batch normalization."""
    return [(outputs, inputs, size, size), (outputs,), (outputs,)]


def resnet(depths: Sequence[int], bottleneck: bool) -> list[Shape]:
    """A residual network for images of 1,000 classes, with so many blocks in each stage."""
    shapes, inputs = convolution(3, 64, 7), 64
    for stage, depth in enumerate(depths):
        width = 64 * 2**stage
        outputs = 4 * width if bottleneck else width
        for _ in range(depth):
            if bottleneck:
                shapes += convolution(inputs, width, 1) + convolution(width, width, 3)
                shapes += convolution(width, outputs, 1)
            else:
                shapes += convolution(inputs, width, 3) + convolution(width, outputs, 3)
            if inputs != outputs:
                shapes += convolution(inputs, outputs, 1)  # the shortcut has to change its width
            inputs = outputs
    return [*shapes, (1000, inputs), (1000,)]


def gpt2(width: int = 768, depth: int = 12) -> list[Shape]:
    """GPT-2: embeddings of tokens and places, blocks of attention and a small network, a norm."""
    norm: list[Shape] = [(width,), (width,)]
    attention: list[Shape] = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    network: list[Shape] = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    block = norm + attention + norm + network
    return [(50257, width), (1024, width), *(depth * block), *norm]


def shapes(name: str) -> list[Shape]:
    """Return the shapes of the parameters of "resnet18", "resnet50", "gpt2" or "tiny".

    Example:
        >>> sum(math.prod(shape) for shape in shapes("resnet18"))
        11689512

    Source: chapter "The roofline".
    """
    makers: dict[str, Callable[[], list[Shape]]] = {
        "resnet18": lambda: resnet([2, 2, 2, 2], bottleneck=False),
        "resnet50": lambda: resnet([3, 4, 6, 3], bottleneck=True),
        "gpt2": gpt2,
        "tiny": lambda: [(1000,)] * 1000,
    }
    if name not in makers:
        raise ValueError(f"no set of parameters is called {name!r}; there are {', '.join(makers)}")
    return makers[name]()


SETS = ("resnet18", "resnet50", "gpt2", "tiny")


def fill(tensors: Iterable[Tensor], values: Tensor) -> None:
    """Write the values into each tensor, again and again until it is full."""
    for tensor in tensors:
        for part in tensor.view(-1).split(len(values)):
            part.copy_(values[: len(part)])


class Tensors:
    """Parameters, gradients and state tensors that the contenders of a set share.

    Args:
        shapes: of the parameters.
        device: "cpu" or "cuda".

    Source: chapter "The roofline".
    """

    def __init__(self, shapes: Iterable[Shape], device: str = "cpu") -> None:
        noise = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
        self.noise = noise.to(device)
        self.params = [torch.nn.Parameter(torch.empty(s, device=device)) for s in shapes]
        self.grads = [torch.empty_like(param) for param in self.params]
        self.state: dict[str, list[Tensor]] = {}
        self.refresh()

    @property
    def size(self) -> int:
        """How many parameters there are."""
        return sum(param.numel() for param in self.params)

    def refresh(self) -> None:
        """Write all numbers again; those of the state are positive, so that all have a root."""
        fill([param.detach() for param in self.params], 0.02 * self.noise)
        fill(self.grads, 1e-3 * self.noise)
        for tensors in self.state.values():
            fill(tensors, 1e-6 * (self.noise.abs() + 0.1))
        self.show_gradients()

    def show_gradients(self) -> None:
        """Put the gradients where optimizers look for them."""
        for param, grad in zip(self.params, self.grads, strict=True):
            param.grad = grad

    def lend_state(
        self, optimizer: torch.optim.Optimizer, keys: Iterable[str], step_device: str = "cpu"
    ) -> None:
        """Give an optimizer shared state tensors, as after its first step."""
        for key in keys:
            if key not in self.state:
                self.state[key] = [torch.full_like(p, 1e-6).detach() for p in self.params]
        for i, param in enumerate(self.params):
            step = torch.ones((), device=step_device)
            optimizer.state[param] = {"step": step, **{k: self.state[k][i] for k in keys}}


METHODS: dict[str, tuple[Callable[..., GradientMethod], dict[str, Any]]] = {
    "SGD": (agrlib.SGD, dict(momentum=0.9)),
    "Adagrad": (agrlib.Adagrad, {}),
    "RMSprop": (agrlib.RMSprop, {}),
    "Adam": (agrlib.Adam, {}),
    "AdamW": (agrlib.AdamW, {}),
    "AMSGrad": (agrlib.AMSGrad, {}),
    "Padam": (agrlib.Padam, dict(partial=1 / 8)),
    "Adan": (agrlib.Adan, {}),
    "AGR-AdamW": (agrlib.AdamW, dict(transforms=[agrlib.agr])),
    "GC-AGR-AdamW": (agrlib.AdamW, dict(transforms=[agrlib.centralize, agrlib.agr])),
}


def make(method: str, params: Iterable[Tensor], **options: Any) -> GradientMethod:
    """Return the library's optimizer for a method, with some weight decay.

    Source: chapter "The roofline".
    """
    cls, own = METHODS[method]
    return cls(params, lr=1e-3, weight_decay=0.01, **own, **options)


@dataclass(frozen=True)
class Contender:
    """A way to make the step of a method; `build` takes the tensors and returns the step."""

    method: str
    way: str
    build: Callable[[Tensors], Step]

    @property
    def name(self) -> str:
        """Method and way."""
        return f"{self.method}, {self.way}"


TORCH: dict[str, dict[str, Any]] = {
    "torch for-loop": dict(foreach=False),
    "torch foreach": dict(foreach=True),
    "torch fused": dict(fused=True),
}
OTHERS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("AdamW", "heavyball", "AdamW", {}),
    ("Padam", "pytorch_optimizer", "PAdam", dict(partial=1 / 8)),
    ("Adan", "pytorch_optimizer", "Adan", {}),
]
EAGER = ("AdamW", "AGR-AdamW")  # the others take long, and say nothing new
BASELINE = "AdamW, torch fused"


def torch_step(options: dict[str, Any], tensors: Tensors) -> Step:
    """Torch's AdamW."""
    optimizer = torch.optim.AdamW(tensors.params, lr=1e-3, weight_decay=0.01, **options)
    home = tensors.noise.device.type if "fused" in options else "cpu"
    tensors.lend_state(optimizer, ("exp_avg", "exp_avg_sq"), home)
    return optimizer.step


def published_step(options: dict[str, Any], tensors: Tensors) -> Step:
    """AGR as published, an expression for each tensor, and then torch's AdamW."""
    inner = torch_step(options, tensors)

    def step() -> None:
        for param, grad in zip(tensors.params, tensors.grads, strict=True):
            size = grad.abs()
            param.grad = grad - grad * (size / size.sum())
        inner()
        tensors.show_gradients()

    return step


def agrlib_step(method: str, fused: bool, tensors: Tensors) -> Step:
    """The library's own optimizer."""
    optimizer = make(method, tensors.params, fused=fused)
    [group] = optimizer.param_groups
    tensors.lend_state(optimizer, optimizer.update_rule(group)[1])
    return optimizer.step


def other_step(module: str, cls: str, options: dict[str, Any], tensors: Tensors) -> Step:
    """The optimizer of another library, with a state of its own."""
    maker = getattr(importlib.import_module(module), cls)
    optimizer = maker(tensors.params, lr=1e-3, weight_decay=0.01, **options)

    def step() -> None:
        tensors.show_gradients()  # some drop the gradient at the end of a step
        optimizer.step()

    return step


def contenders(methods: Iterable[str] = METHODS) -> list[Contender]:
    """Return the ways to make the steps of the named methods; torch's AdamW is always there.

    Source: chapter "The roofline".
    """
    methods = list(methods)
    found = [Contender("AdamW", way, partial(torch_step, how)) for way, how in TORCH.items()]
    if "AGR-AdamW" in methods:
        for way, how in TORCH.items():
            found.append(Contender("AGR-AdamW", f"published, {way}", partial(published_step, how)))
    for method in methods:
        for way, fused in (("agrlib eager", False), ("agrlib fast", True)):
            if fused or method in EAGER:
                found.append(Contender(method, way, partial(agrlib_step, method, fused)))
        for name, module, cls, options in OTHERS:
            if name == method and importlib.util.find_spec(module):
                found.append(Contender(method, module, partial(other_step, module, cls, options)))
    return found


def time_steps(step: Step, count: int, device: str = "cpu") -> float:
    """Return the seconds of a step, averaged over so many in a row."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / count  # from milliseconds
    begin = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - begin) / count


def measure(
    steps: dict[str, Step],
    rounds: int,
    device: str = "cpu",
    refresh: Step = lambda: None,
    at_least: float = 0.1,
) -> dict[str, list[float]]:
    """Time several steps side by side.

    Args:
        steps: what to time; each is called several times before it counts.
        rounds: how many times each is timed.
        device: "cpu" or "cuda".
        refresh: called before each round.
        at_least: seconds that a timing should last, reached by up to 100 steps in a row.

    Returns:
        For each name one number per round, seconds per step.

    Example:
        >>> seconds = measure({"sleep": lambda: time.sleep(0.001)}, rounds=2, at_least=0.01)
        >>> len(seconds["sleep"]), min(seconds["sleep"]) >= 0.001
        (2, True)

    Source: chapter "The roofline".
    """
    counts = {}
    for name, step in steps.items():
        step()
        counts[name] = min(100, math.ceil(at_least / max(time_steps(step, 1, device), 1e-9)))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        refresh()
        for name in random.sample(list(steps), len(steps)):
            steps[name]()
            seconds[name].append(time_steps(steps[name], counts[name], device))
    return seconds


REFERENCE = {"cpu": "add_", "cuda": "copy_"}  # what a step's bandwidth is compared with


def yardsticks(device: str = "cpu", elements: int = 2**26) -> dict[str, tuple[Step, int]]:
    """Return what measures the machine, each with the bytes, or operations, that it counts for.

    "copy_" reads and writes a number: 8 bytes. "add_" reads two and writes one: 12 bytes. "mm"
    multiplies two matrices of m rows and columns: 2 m^3 operations.

    Source: chapter "The roofline".
    """
    rows = 4096 if device == "cuda" else 1024
    target, source = (torch.full((elements,), x, device=device) for x in (1.0, 1e-3))
    left, product = (torch.full((rows, rows), 1e-3, device=device) for _ in range(2))
    return {
        "copy_": (lambda: target.copy_(source), 8 * elements),
        "add_": (lambda: target.add_(source), 12 * elements),
        "mm": (lambda: torch.mm(left, left, out=product), 2 * rows**3),
    }


def process_memory(field: str) -> int:
    """Return a field of this process's status in bytes: the present "VmRSS", the peak "VmHWM"."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"this system does not tell {field}")


def extra_memory(step: Step, device: str = "cpu") -> int | None:
    """Return by how many bytes memory grows within a step, at its peak.

    None where the system does not tell: on a CPU without Linux. There the counter is that of the
    whole process, exact to about a megabyte, and small tensors may come from memory that the
    process already holds.

    Source: chapter "The roofline".
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        give_back_memory()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now the present
        before = process_memory("VmRSS")
        step()
        return max(0, process_memory("VmHWM") - before)
    except OSError:
        return None


def give_back_memory() -> None:
    """Free what nothing refers to, and what the allocators keep for later."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
        if trim is not None:
            trim(0)


def in_new_process(code: str, *arguments: str, **variables: str) -> str:
    """Run Python code with these arguments and environment; return the last line it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip() or "no message").splitlines()[-1])
    return done.stdout.splitlines()[-1]


def time_first_step(method: str, device: str = "cpu") -> float:
    """Return the seconds of the first step of a method's fast path, compilation included."""
    params = [torch.nn.Parameter(torch.ones(s, device=device)) for s in shapes("resnet18")]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = make(method, params, fused=True)
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def first_steps(method: str, device: str = "cpu", threads: int = 1) -> dict[str, float]:
    """Time the first step in a new process, once with an empty cache folder and once again.

    Returns:
        Seconds: "cold" and "cached".

    Raises:
        RuntimeError: the process failed; the text is the last line that it wrote.

    Source: chapter "The roofline".
    """
    code = "import sys, torch; from agrlib import bench; torch.set_num_threads(int(sys.argv[3])); "
    code += "print(bench.time_first_step(sys.argv[1], sys.argv[2]))"
    with tempfile.TemporaryDirectory() as folder:
        caches = dict(XDG_CACHE_HOME=folder, TRITON_CACHE_DIR=str(Path(folder, "triton")))
        arguments = method, device, str(threads)
        return {
            name: float(in_new_process(code, *arguments, **caches)) for name in ("cold", "cached")
        }


@dataclass(frozen=True)
class Settings:
    """What a run measures; `quick` is a rehearsal on small tensors, whose numbers mean nothing."""

    sets: Sequence[str] = SETS
    methods: Sequence[str] = tuple(METHODS)
    rounds: int = 9
    runs: int = 1
    device: str = "cpu"
    threads: Sequence[int] = (1,)
    quick: bool = False

    def shapes(self, name: str) -> list[Shape]:
        """The shapes of a set; of a rehearsal, those of up to 10,000 entries, 20 of them."""
        small = [shape for shape in shapes(name) if math.prod(shape) <= 10_000]
        return small[:20] if self.quick else shapes(name)


def start(
    entrants: Iterable[Contender], tensors: Tensors
) -> tuple[dict[str, Step], dict[str, str]]:
    """Build the contenders and let each make a step; return the steps, and why others cannot."""
    steps, unavailable = {}, {}
    for contender in entrants:
        try:
            step = contender.build(tensors)
            step()
        except (ImportError, RuntimeError, TypeError, AttributeError) as error:
            text = str(error).strip() or type(error).__name__
            unavailable[contender.name] = text.splitlines()[0]
        else:
            steps[contender.name] = step
    tensors.show_gradients()
    return steps, unavailable


def measure_set(name: str, threads: int, settings: Settings) -> dict[str, Any]:
    """Measure all contenders on one set, once: a part of the results, for one run.

    Source: chapter "The roofline".
    """
    torch.set_num_threads(threads)
    tensors = Tensors(settings.shapes(name), settings.device)
    entrants = contenders(settings.methods)
    steps, unavailable = start(entrants, tensors)
    torch.set_num_threads(threads)  # loading a compiler may have changed it
    machine = yardsticks(settings.device, 2**16 if settings.quick else 2**26)
    extra = {key: extra_memory(step, settings.device) for key, step in steps.items()}
    timed = {**steps, **{key: step for key, (step, _) in machine.items()}}
    at_least = 0.001 if settings.quick else 0.1
    seconds = measure(timed, settings.rounds, settings.device, tensors.refresh, at_least)
    rounded = {key: [float(f"{x:.5g}") for x in values] for key, values in seconds.items()}
    return dict(
        tensors=len(tensors.params),
        parameters=tensors.size,
        yardsticks={k: dict(amount=n, seconds=[rounded[k]]) for k, (_, n) in machine.items()},
        contenders={
            entrant.name: dict(
                method=entrant.method,
                way=entrant.way,
                bytes=step_bytes(make(entrant.method, tensors.params)),
                extra_memory=extra[entrant.name],
                seconds=[rounded[entrant.name]],
            )
            for entrant in entrants
            if entrant.name in steps
        },
        unavailable=unavailable,
    )


def measure_apart(name: str, threads: int, settings: Settings) -> dict[str, Any]:
    """Measure a set in a new process, which knows nothing of what was measured before.

    Raises:
        RuntimeError: the process failed; the text is the last line that it wrote.

    Source: chapter "The roofline".
    """
    code = "import json, sys; from agrlib.bench import Settings, measure_set; "
    code += "settings = Settings(**json.loads(sys.argv[3])); "
    code += "print(json.dumps(measure_set(sys.argv[1], int(sys.argv[2]), settings)))"
    return json.loads(in_new_process(code, name, str(threads), json.dumps(asdict(settings))))


def label(name: str, threads: int) -> str:
    """Return what the results call a set on so many threads.

    Example:
        >>> label("gpt2", 1), label("gpt2", 2)
        ('gpt2, 1 thread', 'gpt2, 2 threads')

    Source: chapter "The roofline".
    """
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def add_run(part: dict[str, Any], other: dict[str, Any]) -> None:
    """Append the timings of another run of the same set."""
    for kind in ("yardsticks", "contenders"):
        for name, entry in part[kind].items():
            entry["seconds"] += other[kind][name]["seconds"]


def run(settings: Settings, report: Callable[[str], Any] = print) -> dict[str, Any]:
    """Measure everything that the settings ask for.

    Args:
        settings: which sets, methods, device and numbers of threads, and how often.
        report: is told how far it is.

    Returns:
        Results in the form of `SCHEMA`.

    Source: chapter "The roofline".
    """
    results = describe(settings)
    if (results["load"] or 0) > 0.5:
        report(f"other programs are running (load {results['load']}): the numbers will be wrong")
    for number in range(1, settings.runs + 1):
        for name, threads in itertools.product(settings.sets, settings.threads):
            key = label(name, threads)
            report(f"run {number} of {settings.runs}: {key}")
            part = measure_apart(name, threads, settings)
            if number == 1:
                results["sets"][key] = part
            else:
                add_run(results["sets"][key], part)
    parts = results["sets"].values()
    for method in settings.methods:
        if not settings.quick and any(f"{method}, agrlib fast" in p["contenders"] for p in parts):
            report(f"first call: {method}")
            most = max(settings.threads)
            results["first_call"][method] = first_steps(method, settings.device, most)
    return results


ANY = "*"  # in the schema: under any name
COUNT, POSITIVE, TEXT = "a positive integer", "a positive number", "a text"
OPTIONAL_TEXT, OPTIONAL_NUMBER = "a text or null", "a number that is not negative, or null"
YARDSTICK = {"amount": COUNT, "seconds": [[POSITIVE]]}
CONTENDER = {
    "method": TEXT,
    "way": TEXT,
    "bytes": COUNT,
    "extra_memory": OPTIONAL_NUMBER,
    "seconds": [[POSITIVE]],
}
SCHEMA: dict[str, Any] = {
    "schema": COUNT,
    "command": TEXT,
    "date": TEXT,
    "device": TEXT,
    "device_name": TEXT,
    "processor": {
        "vendor": OPTIONAL_TEXT,
        **dict.fromkeys(("family", "model", "stepping", "L1d", "L2", "L3"), OPTIONAL_NUMBER),
    },
    "system": TEXT,
    "cores": COUNT,
    "threads": [COUNT],
    "load": OPTIONAL_NUMBER,
    "rounds": COUNT,
    "runs": COUNT,
    "versions": {ANY: OPTIONAL_TEXT},
    "sets": {
        ANY: {
            "tensors": COUNT,
            "parameters": COUNT,
            "yardsticks": {ANY: YARDSTICK},
            "contenders": {ANY: CONTENDER},
            "unavailable": {ANY: TEXT},
        }
    },
    "first_call": {ANY: {"cold": POSITIVE, "cached": POSITIVE}},
}
SCHEMA_VERSION = 2
KINDS: dict[str, Callable[[Any], bool]] = {
    COUNT: lambda x: type(x) is int and x > 0,
    POSITIVE: lambda x: type(x) in (int, float) and 0 < x < math.inf,
    TEXT: lambda x: isinstance(x, str),
    OPTIONAL_TEXT: lambda x: x is None or isinstance(x, str),
    OPTIONAL_NUMBER: lambda x: x is None or (type(x) in (int, float) and 0 <= x < math.inf),
}


def mistakes(value: Any, form: Any, where: str = "results") -> Iterator[str]:
    """Say, field by field, where a value does not have the form."""
    if isinstance(form, list):
        if not isinstance(value, list) or not value:
            yield f"{where} must be a list that is not empty, not {value!r:.60}"
        else:
            for i, item in enumerate(value):
                yield from mistakes(item, form[0], f"{where}[{i}]")
    elif isinstance(form, dict):
        if not isinstance(value, dict):
            yield f"{where} must be an object, not {value!r:.60}"
            return
        fields = dict.fromkeys(value, form[ANY]) if ANY in form else form
        yield from (f"{where}.{key} is missing" for key in fields if key not in value)
        yield from (f"{where}.{key} is not known" for key in value if key not in fields)
        for key in fields:
            if key in value:
                yield from mistakes(value[key], fields[key], f"{where}.{key}")
    elif not KINDS[form](value):
        yield f"{where} must be {form}, not {value!r:.60}"


def validate(results: Any) -> dict[str, Any]:
    """Return the results if they have the form of `SCHEMA`.

    Raises:
        ValueError: they do not; the text names the first field that is wrong.

    Example:
        >>> try:
        ...     validate({"schema": 1, "command": 2})
        ... except ValueError as error:
        ...     print(error)
        results.date is missing

    Source: chapter "The roofline".
    """
    for mistake in mistakes(results, SCHEMA):
        raise ValueError(mistake)
    if results["schema"] != SCHEMA_VERSION:
        raise ValueError(f"results.schema must be {SCHEMA_VERSION}, not {results['schema']}")
    if results["device"] not in REFERENCE:
        raise ValueError(f"results.device must be cpu or cuda, not {results['device']!r}")
    for name, part in results["sets"].items():
        if missing := set(yardsticks("cpu", 1)) - set(part["yardsticks"]):
            raise ValueError(f"results.sets.{name}.yardsticks.{min(missing)} is missing")
        for kind in ("yardsticks", "contenders"):
            for key, entry in part[kind].items():
                found = [len(row) for row in entry["seconds"]]
                if found != results["runs"] * [results["rounds"]]:
                    raise ValueError(
                        f"results.sets.{name}.{kind}.{key}.seconds must hold {results['runs']} "
                        f"times {results['rounds']} numbers"
                    )
    return results


def load(path: str | Path) -> dict[str, Any]:
    """Read a file of results; see `validate`.

    Source: chapter "The roofline".
    """
    return validate(json.loads(Path(path).read_text()))


def save(results: dict[str, Any], path: str | Path) -> None:
    """Write results to a file, the timings of a run in one line.

    Source: chapter "The roofline".
    """
    text = json.dumps(validate(results), indent=1)
    flat = re.sub(r'\x5b[^][{}"]*\x5d', lambda numbers: " ".join(numbers[0].split()), text)
    Path(path).write_text(flat + "\n")


def describe(settings: Settings) -> dict[str, Any]:
    """Return results without any timings: the machine, the versions, the command and the date."""
    packages = ("torch", "numpy", "numba", "triton", "agrlib", "heavyball", "pytorch_optimizer")
    return dict(
        schema=SCHEMA_VERSION,
        command=" ".join(["python -m agrlib.bench", *sys.argv[1:]]),
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        device=settings.device,
        device_name=device_name(settings.device),
        processor=processor(),
        system=f"{platform.system()} {platform.machine()}",
        cores=cores(),
        threads=list(settings.threads),
        load=load_average(),
        rounds=settings.rounds,
        runs=settings.runs,
        versions={"python": platform.python_version(), **{p: version(p) for p in packages}},
        sets={},
        first_call={},
    )


def version(package: str) -> str | None:
    """Return the version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load_average() -> float | None:
    """Return how many programs have lately wanted to run; None where the system does not tell."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def told_of_processor() -> dict[str, str]:
    """Return what Linux tells of the first processor; nothing on other systems."""
    try:
        text = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def caches(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> dict[str, int | None]:
    """Return the sizes of a core's caches in bytes; None where the system does not tell."""
    sizes: dict[str, int | None] = dict.fromkeys(("L1d", "L2", "L3"))
    for index in folder.glob("index*"):
        try:
            level, kind, size = ((index / x).read_text().strip() for x in ("level", "type", "size"))
            key = f"L{level}" + "d" * (level == "1")
            if kind != "Instruction" and key in sizes:
                sizes[key] = 1024 * int(size.removesuffix("K"))
        except (OSError, ValueError):
            continue
    return sizes


def processor() -> dict[str, Any]:
    """Return what tells this processor from others; None for what the system does not tell.

    Source: chapter "The roofline".
    """
    told = told_of_processor()
    fields = {"family": "cpu family", "model": "model", "stepping": "stepping"}
    numbers = {key: told.get(field, "") for key, field in fields.items()}
    found = {key: int(text) if text.isdigit() else None for key, text in numbers.items()}
    return {"vendor": told.get("vendor_id"), **found, **caches()}


def device_name(device: str) -> str:
    """Return what the processor, or the GPU, calls itself."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return told_of_processor().get("model name") or platform.processor() or platform.machine()


def file_name(results: dict[str, Any]) -> str:
    """Return the name of the file for a processor model, or a GPU.

    Source: chapter "The roofline".
    """
    model = [results["processor"][key] for key in ("vendor", "family", "model")]
    if results["device"] != "cpu" or None in model:
        model = [results["device_name"]]
    kind = "cpu" if results["device"] == "cpu" else "gpu"
    return re.sub(r"\W+", "_", "_".join(map(str, ["bench", kind, *model])).lower()) + ".json"


def typical(values: Any) -> float:
    """Return the median over runs of the medians over rounds."""
    return float(np.median(np.median(np.asarray(values), axis=1)))


def best(values: Any) -> float:
    """Return the smallest number of all runs and rounds."""
    return float(np.min(values))


def entry(results: dict[str, Any], name: str, key: str) -> dict[str, Any]:
    """Return what is stored of a contender or a yardstick of a set; KeyError if it is not there."""
    part = results["sets"][name]
    return part["contenders"][key] if key in part["contenders"] else part["yardsticks"][key]


def compare(results: dict[str, Any], name: str, first: str, second: str) -> float:
    """Return how many times as long as the second contender the first takes, round by round.

    Args:
        results: as `run` or `load` returns them.
        name: of the set of parameters.
        first: the name of a contender, such as "AGR-AdamW, agrlib fast", or a yardstick.
        second: another one.

    Returns:
        The median ratio.

    Raises:
        KeyError: there is no such contender in the results.

    Source: chapter "The roofline".
    """
    seconds = [np.array(entry(results, name, key)["seconds"]) for key in (first, second)]
    return typical(seconds[0] / seconds[1])


def compare_best(results: dict[str, Any], name: str, first: str, second: str) -> float:
    """Return the ratio of the shortest times of two contenders, or yardsticks; see `compare`.

    Source: chapter "The roofline".
    """
    shortest = [best(entry(results, name, key)["seconds"]) for key in (first, second)]
    return shortest[0] / shortest[1]


def rate(
    results: dict[str, Any], name: str, key: str, of: Callable[[Any], float] = typical
) -> float:
    """Return the billions of bytes per second at which a contender works, or a yardstick.

    For a contender the bytes are those that its method must move, whatever it does move. For the
    yardstick "mm" they are operations. The time is the median, or the shortest with ``of=best``.

    Source: chapter "The roofline".
    """
    found = entry(results, name, key)
    amount = found["bytes"] if "bytes" in found else found["amount"]
    return amount / of(found["seconds"]) / 1e9


def bound_ratio(results: dict[str, Any], name: str, key: str) -> float:
    """Return how many times as long as its bytes need a contender takes.

    The bytes are those that its method must move, at the speed of the yardstick that `REFERENCE`
    names, in the same round.

    Source: chapter "The roofline".
    """
    yardstick = REFERENCE[results["device"]]
    needed = entry(results, name, key)["bytes"] / entry(results, name, yardstick)["amount"]
    return compare(results, name, key, yardstick) / needed


def summarize(results: dict[str, Any], name: str) -> dict[str, dict[str, float]]:
    """Return what a set's timings say of each contender.

    Returns:
        For each contender: "ms" and "best_ms", the median and the shortest time; "ratio" and
        "best_ratio" to torch's fused AdamW; "bytes" per parameter; "rate" in GB/s; "bound", the
        ratio to the memory bound; "extra_mb"; "cold" and "cached" seconds. NaN where it was not
        measured.

    Source: chapter "The roofline".
    """
    part, rows = results["sets"][name], {}
    compared = BASELINE in part["contenders"]
    for key, found in part["contenders"].items():
        seconds = np.array(found["seconds"])
        first = results["first_call"].get(found["method"], {}) if "fast" in found["way"] else {}
        extra = found["extra_memory"]
        rows[key] = dict(
            ms=1e3 * typical(seconds),
            best_ms=1e3 * best(seconds),
            ratio=compare(results, name, key, BASELINE) if compared else math.nan,
            best_ratio=compare_best(results, name, key, BASELINE) if compared else math.nan,
            bytes=found["bytes"] / part["parameters"],
            rate=rate(results, name, key),
            bound=bound_ratio(results, name, key),
            extra_mb=math.nan if extra is None else extra / 1e6,
            cold=first.get("cold", math.nan),
            cached=first.get("cached", math.nan),
        )
    return rows


def table(results: dict[str, Any], name: str) -> str:
    """Return what a set's timings say as a text, one line per contender.

    Source: chapter "The roofline".
    """
    part = results["sets"][name]
    speeds = ", ".join(
        f"{key} {rate(results, name, key):.1f} (best {rate(results, name, key, best):.1f})"
        for key in part["yardsticks"]
    )
    lines = [
        f"{name}: {part['tensors']} tensors, {part['parameters']:,} parameters",
        f"1e9/s: {speeds}",
        f"{'':36}{'ms':>9} {'best':>9} {'x fused':>8} {'best':>6} {'B/par':>6} {'GB/s':>6} "
        f"{'x bound':>8} {'MB more':>8} {'first s':>8} {'cached':>7}",
    ]
    for key, row in summarize(results, name).items():
        numbers = (
            f"{key:36}{row['ms']:9.3f} {row['best_ms']:9.3f} {row['ratio']:8.2f} "
            f"{row['best_ratio']:6.2f} {row['bytes']:6.1f} {row['rate']:6.1f} {row['bound']:8.2f} "
            f"{row['extra_mb']:8.1f} {row['cold']:8.2f} {row['cached']:7.2f}"
        )
        lines.append(numbers.replace("nan", "  -"))
    for reason in dict.fromkeys(part["unavailable"].values()):
        keys = [key for key, why in part["unavailable"].items() if why == reason]
        lines += textwrap.wrap(f"not available: {'; '.join(keys)}: {reason}", 100)
    return "\n".join(lines)


def plot(results: dict[str, Any], name: str, axes: Any) -> None:
    """Draw each contender's time, and its memory bound, relative to torch's fused AdamW.

    Args:
        results: as `run` or `load` returns them.
        name: of the set of parameters.
        axes: matplotlib axes; time on a logarithmic horizontal axis.

    Source: chapter "The roofline".
    """
    from matplotlib.ticker import LogLocator

    looks = {"agrlib fast": "blue D", "agrlib eager": "green ^", "torch": "grey o"}
    looks.update({"published": "orange s", "others": "purple v"})
    rows, drawn = summarize(results, name), set()
    for place, (key, row) in enumerate(rows.items()):
        way = results["sets"][name]["contenders"][key]["way"]
        kind = next((kind for kind in looks if way.startswith(kind)), "others")
        color, mark = looks[kind].split()
        label = kind if kind not in drawn else None
        drawn.add(kind)
        bound = row["ratio"] / row["bound"]
        axes.plot([bound, row["ratio"]], [place, place], color=COLORS[color], lw=1, alpha=0.6)
        axes.plot(bound, place, "|", color=COLORS["red"], ms=9, mew=2)
        axes.plot(row["ratio"], place, mark, color=COLORS[color], ms=5, label=label)
    axes.plot([], [], "|", color=COLORS["red"], ms=9, mew=2, label="memory bound")
    axes.set_yticks(range(len(rows)), list(rows), fontsize=7.5)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="time of a step / time of torch's fused AdamW")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.legend(fontsize=8)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("python -m agrlib.bench", description=main.__doc__)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument(
        "--optimizers", nargs="+", choices=list(METHODS), default=list(METHODS), dest="methods"
    )
    parser.add_argument("--rounds", type=positive, default=9, help="timings in a run (9)")
    parser.add_argument("--runs", type=positive, default=1, help="each in new processes (1)")
    parser.add_argument("--device", choices=list(REFERENCE), default="cpu")
    parser.add_argument("--threads", type=positive, nargs="+", help="of the CPU (one, all cores)")
    parser.add_argument("--out", type=Path, help="write the timings to this file or folder")
    parser.add_argument("--quick", action="store_true", help="rehearse on small tensors")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if options.out is not None and not options.out.parent.is_dir():
        parser.error(f"--out: there is no folder {options.out.parent}")
    if options.threads is None:
        options.threads = sorted({cores()} if options.device == "cuda" else {1, cores()})
    return options


def positive(text: str) -> int:
    """Read a positive integer."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive integer")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure optimizer steps against the speed of memory, side by side."""
    options = vars(parse(arguments))
    out = options.pop("out")
    results = run(Settings(**options), lambda text: print(text, file=sys.stderr, flush=True))
    for name in results["sets"]:
        print("\n" + table(results, name))
    if out is not None:
        out = out / file_name(results) if out.is_dir() else out
        save(results, out)
        print(f"\nwritten to {out}")
    return results


if __name__ == "__main__" and __spec__ is not None:  # a notebook is "__main__", too
    main()
