# Exported from book/bench.md: edit the chapter, not this file.
"""How long does a step take, and how long must it: ``python -m agrlib.bench``.

Derived in the chapter "Measuring a step".
"""

import argparse
import contextlib
import ctypes
import datetime
import gc
import importlib.util
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
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.benchmark import Timer

import agrlib
from agrlib.roofline import step_bytes

Step = Callable[[], Any]
Shape = tuple[int, ...]
Results = dict[str, Any]


def resnet(depths: Sequence[int], bottleneck: bool) -> list[Shape]:
    """A residual network for images of 1,000 classes, with so many blocks in each stage."""
    convolutions, inputs = [(3, 64, 7)], 64
    for stage, depth in enumerate(depths):
        width = 64 * 2**stage
        outputs = 4 * width if bottleneck else width
        for _ in range(depth):
            three = [(inputs, width, 1), (width, width, 3), (width, outputs, 1)]
            convolutions += three if bottleneck else [(inputs, width, 3), (width, outputs, 3)]
            if inputs != outputs:  # the shortcut has to change its width
                convolutions.append((inputs, outputs, 1))
            inputs = outputs
    layers = ([(b, a, size, size), (b,), (b,)] for a, b, size in convolutions)  # with their norms
    return [*itertools.chain(*layers), (1000, inputs), (1000,)]


def gpt2(width: int = 768, depth: int = 12) -> list[Shape]:
    """GPT-2: embeddings of tokens and places, blocks of attention and a small network, a norm."""
    norm: list[Shape] = [(width,), (width,)]
    attention: list[Shape] = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    network: list[Shape] = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(50257, width), (1024, width), *(depth * (norm + attention + norm + network)), *norm]


SETS: dict[str, Callable[[], list[Shape]]] = {
    "resnet18": partial(resnet, [2, 2, 2, 2], bottleneck=False),
    "resnet50": partial(resnet, [3, 4, 6, 3], bottleneck=True),
    "gpt2": gpt2,
    "tiny": lambda: [(1000,)] * 1000,
}


def shapes(name: str, quick: bool = False) -> list[Shape]:
    """Return the shapes of a set; of a quick rehearsal, up to 20 that have up to 10,000 entries."""
    if name not in SETS:
        raise ValueError(f"no set of parameters is called {name!r}; there are {', '.join(SETS)}")
    small = [shape for shape in SETS[name]() if math.prod(shape) <= 10_000]
    return small[:20] if quick else SETS[name]()


def fill(tensors: Iterable[Tensor], values: Tensor) -> None:
    """Write the values into each tensor, again and again until it is full."""
    for tensor in tensors:
        for part in tensor.view(-1).split(len(values)):
            part.copy_(values[: len(part)])


class Tensors:
    """Parameters of these shapes, gradients and state tensors that contenders share."""

    def __init__(self, shapes: Iterable[Shape], device: str = "cpu") -> None:
        self.noise = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).to(device)
        self.params = [torch.nn.Parameter(torch.empty(s, device=device)) for s in shapes]
        self.grads = [torch.empty_like(param) for param in self.params]
        self.state: dict[str, list[Tensor]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Write all numbers again; those of the state are positive, so that all have a root."""
        fill([param.detach() for param in self.params], 0.02 * self.noise)
        fill(self.grads, 1e-3 * self.noise)
        fill(itertools.chain(*self.state.values()), 1e-6 * (self.noise.abs() + 0.1))
        self.show_gradients()

    def show_gradients(self) -> None:
        """Put the gradients where optimizers look for them."""
        for param, grad in zip(self.params, self.grads, strict=True):
            param.grad = grad

    def lend_state(self, optimizer: Any, keys: Iterable[str], step_device: str = "cpu") -> None:
        """Give an optimizer shared state tensors, as after its first step."""
        for key in set(keys) - self.state.keys():
            self.state[key] = [torch.full_like(grad, 1e-6) for grad in self.grads]
        for i, param in enumerate(self.params):
            shared = {key: self.state[key][i] for key in keys}
            optimizer.state[param] = {"step": torch.ones((), device=step_device), **shared}


METHODS: dict[str, tuple[Callable[..., agrlib.GradientMethod], dict[str, Any]]] = {
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


def make(method: str, params: Iterable[Tensor], **options: Any) -> agrlib.GradientMethod:
    """Return the library's optimizer for a method, with some weight decay."""
    cls, own = METHODS[method]
    return cls(params, lr=1e-3, weight_decay=0.01, **own, **options)


TORCH = {"for-loop": dict(foreach=False), "foreach": dict(foreach=True), "fused": dict(fused=True)}
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


def contenders(methods: Iterable[str] = METHODS) -> dict[str, partial[Step]]:
    """Return what builds the steps of the named methods; torch's AdamW is always there."""
    methods = list(methods)
    found = {f"AdamW, torch {way}": partial(torch_step, how) for way, how in TORCH.items()}
    if "AGR-AdamW" in methods:
        for way, how in TORCH.items():
            found[f"AGR-AdamW, published, torch {way}"] = partial(published_step, how)
    for method in methods:
        if method in ("AdamW", "AGR-AdamW"):  # the others take long, and say nothing new
            found[f"{method}, agrlib eager"] = partial(agrlib_step, method, False)
        found[f"{method}, agrlib fast"] = partial(agrlib_step, method, True)
    return found


def time_step(step: Step, at_least: float = 0.1) -> float:
    """Return the seconds of a step, averaged over as many in a row as take `at_least` seconds."""
    timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=at_least).mean)


def measure(
    steps: dict[str, Step], rounds: int, refresh: Step = lambda: None, at_least: float = 0.1
) -> dict[str, list[float]]:
    """Time several steps side by side; return the seconds per step, one number per round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        refresh()
        for name in random.sample(list(steps), len(steps)):
            seconds[name].append(time_step(steps[name], at_least))
    return seconds


def yardsticks(device: str = "cpu", elements: int = 2**26) -> dict[str, tuple[Step, int]]:
    """Return what measures the machine, each with the bytes, or operations, that it counts for.

    "copy_" reads and writes a number: 8 bytes. "add_" reads two and writes one: 12 bytes. "mm"
    multiplies two matrices of m rows and columns: 2 m^3 operations.
    """
    rows = 4096 if device == "cuda" else 1024
    target, source = (torch.full((elements,), x, device=device) for x in (1.0, 1e-3))
    left, product = (torch.full((rows, rows), 1e-3, device=device) for _ in range(2))
    return {
        "copy_": (lambda: target.copy_(source), 8 * elements),
        "add_": (lambda: target.add_(source), 12 * elements),
        "mm": (lambda: torch.mm(left, left, out=product), 2 * rows**3),
    }


def memory(field: str) -> int:
    """Return a field of this process's status in bytes: the present "VmRSS", the peak "VmHWM"."""
    return 1024 * int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0])


def extra_memory(step: Step, device: str = "cpu") -> int | None:
    """Return by how many bytes memory grows within a step; None where the system does not tell.

    On a CPU the counter is that of the process, exact to about a megabyte, and small tensors may
    come from memory that the process already holds.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    try:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now the present
        getattr(ctypes.CDLL(None), "malloc_trim", lambda keep: None)(0)  # glibc's spare memory
        before = memory("VmRSS")
        step()
        return max(0, memory("VmHWM") - before)
    except OSError:
        return None


def in_new_process(function: str, *arguments: Any, **variables: str) -> Any:
    """Call a function of this module in a new process, with these environment variables."""
    code = "import json, sys; from agrlib import bench; "
    code += f"print(json.dumps(bench.{function}(*json.loads(sys.argv[1]))))"
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip() or "no message").splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def first_step(method: str, device: str, threads: int) -> float:
    """Return the seconds of the first step of a method's fast path, compilation included."""
    torch.set_num_threads(threads)
    step = make(method, Tensors(shapes("resnet18"), device).params, fused=True).step
    begin = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def first_steps(method: str, device: str = "cpu", threads: int = 1) -> dict[str, float]:
    """Time the first step in new processes, with an empty cache folder and with what it left."""
    with tempfile.TemporaryDirectory() as folder:
        caches = dict(XDG_CACHE_HOME=folder, TRITON_CACHE_DIR=str(Path(folder, "triton")))
        call = partial(in_new_process, "first_step", method, device, threads, **caches)
        return {name: call() for name in ("cold", "cached")}


def start(builders: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Step], dict[str, str]]:
    """Build the contenders and let each make a step; return the steps, and why others cannot."""
    steps, unavailable = {}, {}
    for name, build in builders.items():
        try:
            step = build(tensors)
            step()
            steps[name] = step
        except (ImportError, RuntimeError, TypeError) as error:
            unavailable[name] = str(error).splitlines()[0] if str(error) else type(error).__name__
    tensors.show_gradients()
    return steps, unavailable


def measure_set(
    name: str, threads: int, methods: Sequence[str], rounds: int, device: str, quick: bool
) -> dict[str, Any]:
    """Measure all contenders on one set, once: a part of the results, for one run."""
    torch.set_num_threads(threads)
    tensors = Tensors(shapes(name, quick), device)
    steps, unavailable = start(contenders(methods), tensors)
    torch.set_num_threads(threads)  # loading a compiler may have changed it
    machine = yardsticks(device, 2**16 if quick else 2**26)
    extra = {key: extra_memory(step, device) for key, step in steps.items()}
    timed = {**steps, **{key: step for key, (step, _) in machine.items()}}
    seconds = measure(timed, rounds, tensors.refresh, 0.001 if quick else 0.1)
    rows = {key: [[float(f"{x:.5g}") for x in row]] for key, row in seconds.items()}
    found = {}
    for key in steps:
        method, way = key.split(", ", 1)
        optimizer = make(method, tensors.params)
        size = dict(bytes=step_bytes(optimizer), least=step_bytes(optimizer, cache_size(device)))
        found[key] = dict(method=method, way=way, **size)
        found[key].update(extra_memory=extra[key], seconds=rows[key])
    return dict(
        tensors=len(tensors.params),
        parameters=sum(param.numel() for param in tensors.params),
        yardsticks={k: dict(amount=n, seconds=rows[k]) for k, (_, n) in machine.items()},
        contenders=found,
        unavailable=unavailable,
    )


def label(name: str, threads: int) -> str:
    """Return what the results call a set on so many threads, such as "gpt2, 1 thread"."""
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


BUSY = 0.5  # programs that want to run, on average


def run(options: argparse.Namespace, report: Callable[[str], Any] = print) -> dict[str, Any]:
    """Measure what the options of `parse` ask for, and `report` how far it is."""
    results = describe(options)
    if (results["load"] or 0) > BUSY:
        report(f"other programs are running (load {results['load']}): the numbers are worthless")
    how = options.methods, options.rounds, options.device, options.quick
    for number in range(1, options.runs + 1):
        for name, threads in itertools.product(options.sets, options.threads):
            key = label(name, threads)
            report(f"run {number} of {options.runs}: {key}")
            part = in_new_process("measure_set", name, threads, *how)
            first = results["sets"].setdefault(key, part)
            for kind in ("yardsticks", "contenders") if number > 1 else ():
                for row in first[kind]:
                    first[kind][row]["seconds"] += part[kind][row]["seconds"]
    started = {key for part in results["sets"].values() for key in part["contenders"]}
    for method in () if options.quick else options.methods:
        if f"{method}, agrlib fast" in started:
            report(f"first call: {method}")
            most = max(options.threads)
            results["first_call"][method] = first_steps(method, options.device, most)
    return results


def caches(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> dict[str, int | None]:
    """Return the sizes of a core's caches in bytes; None where the system does not tell."""
    sizes: dict[str, int | None] = dict.fromkeys(("L1d", "L2", "L3"))
    for index in folder.glob("index*"):
        with contextlib.suppress(OSError, ValueError):
            level, kind, size = ((index / x).read_text().strip() for x in ("level", "type", "size"))
            key = f"L{level}" + "d" * (level == "1")
            if kind != "Instruction" and key in sizes:
                sizes[key] = 1024 * int(size.removesuffix("K"))
    return sizes


def processor() -> dict[str, Any]:
    """Return what tells this processor from others; None for what the system does not tell."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        first = ""
    told = dict(re.findall(r"^(.*\S)\s*: (.*)$", first, re.M))
    fields = dict(family="cpu family", model="model", stepping="stepping")
    texts = {key: told.get(field, "") for key, field in fields.items()}
    numbers = {key: int(text) if text.isdigit() else None for key, text in texts.items()}
    name = told.get("model name") or platform.machine()
    return {"name": name, "vendor": told.get("vendor_id"), **numbers, **caches()}


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_size(device: str) -> int:
    """Return how many bytes the third level holds and the other levels of each core, if told."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    level1, level2, level3 = (size or 0 for size in caches().values())
    return level3 + cores() * (level2 + level1)


SCHEMA = 3  # counts the forms that the file has had


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """Return results without any timings: the machine, the versions, the command and the date."""
    packages = ("torch", "numpy", "numba", "triton", "agrlib")
    found = {p: metadata.version(p) if importlib.util.find_spec(p) else None for p in packages}
    cpu = processor()
    name = cpu.pop("name")
    return dict(
        schema=SCHEMA,
        command=" ".join(["python -m agrlib.bench", *sys.argv[1:]]),
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        device=options.device,
        device_name=torch.cuda.get_device_name() if options.device == "cuda" else name,
        processor=cpu,
        cache=cache_size(options.device),
        system=f"{platform.system()} {platform.machine()}",
        cores=cores(),
        threads=options.threads,
        load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        rounds=options.rounds,
        runs=options.runs,
        versions={"python": platform.python_version(), **found},
        sets={},
        first_call={},
    )


def file_name(results: Results) -> str:
    """Return the name of the file for a processor model, or a GPU."""
    model = [results["processor"][key] for key in ("vendor", "family", "model")]
    if results["device"] != "cpu" or None in model:
        model = [results["device_name"]]
    kind = "cpu" if results["device"] == "cpu" else "gpu"
    return re.sub(r"\W+", "_", "_".join(map(str, ["bench", kind, *model])).lower()) + ".json"


def validate(results: Results) -> dict[str, Any]:
    """Return the results if a run can have written them, else raise ValueError."""
    if results.get("schema") != SCHEMA:
        raise ValueError(f"the file must have schema {SCHEMA}, not {results.get('schema')!r}")
    if odd := results.keys() ^ describe(parse([])).keys():
        raise ValueError(f"fields missing or not known: {', '.join(sorted(odd))}")
    form = [results["rounds"]] * results["runs"]
    for name, part in results["sets"].items():
        for key, row in {**part["yardsticks"], **part["contenders"]}.items():
            numbers = [x for times in row["seconds"] for x in times]
            whole = [len(times) for times in row["seconds"]] == form
            if not whole or not all(0 < x < math.inf for x in numbers):
                raise ValueError(f"{name}: {key} must have {form} positive numbers of seconds")
    return results


def load(path: str | Path) -> dict[str, Any]:
    """Read a file of results; see `validate`."""
    return validate(json.loads(Path(path).read_text()))


def save(results: Results, path: str | Path) -> None:
    """Write results to a file, the timings of a run in one line."""
    text = json.dumps(validate(results), indent=1)
    flat = re.sub(r'\x5b[^][{}"]*\x5d', lambda numbers: " ".join(numbers[0].split()), text)
    Path(path).write_text(flat + "\n")


def typical(values: Any) -> float:
    """Return the median over runs of the medians over rounds."""
    return float(np.median(np.median(np.asarray(values), axis=1)))


def best(values: Any) -> float:
    """Return the smallest number of all runs and rounds."""
    return float(np.min(values))


def entry(results: Results, name: str, key: str) -> dict[str, Any]:
    """Return what is stored of a contender or a yardstick of a set; KeyError if it is not there."""
    part = results["sets"][name]
    return part["contenders"][key] if key in part["contenders"] else part["yardsticks"][key]


def compare(results: Results, name: str, first: str, second: str) -> float:
    """Return how many times as long as the second contender the first takes, round by round.

    Yardsticks count as contenders; `name` is that of a set, as `label` makes it.
    """
    seconds = [np.array(entry(results, name, key)["seconds"]) for key in (first, second)]
    return typical(seconds[0] / seconds[1])


def rate(results: Results, name: str, key: str, of: Callable[[Any], float] = typical) -> float:
    """Return the billions of bytes per second of a contender or yardstick; operations for "mm".

    For a contender the bytes are those that its method must move, whatever it does move.
    """
    found = entry(results, name, key)
    return (found["bytes"] if "bytes" in found else found["amount"]) / of(found["seconds"]) / 1e9


def bandwidth(results: Results, name: str) -> np.ndarray:
    """Return the most bytes per second that anything has shown on a set, for each run."""
    part, waiting = results["sets"][name], 2 * results["cache"]
    shown = [(found["least"], found["seconds"]) for found in part["contenders"].values()]
    for found in (part["yardsticks"][key] for key in ("copy_", "add_")):
        shown.append((max(1, found["amount"] - waiting), found["seconds"]))
    return np.max([amount / np.min(seconds, axis=1) for amount, seconds in shown], axis=0)


def bound_ratio(results: Results, name: str, key: str) -> np.ndarray:
    """Return how many times its bound a contender's shortest time is, for each run.

    NaN where all that the step needs fits into the cache, so that nothing has to be moved.
    """
    found = entry(results, name, key)
    bound = found["least"] / bandwidth(results, name) if found["least"] else math.nan
    return np.min(found["seconds"], axis=1) / bound


def summarize(results: Results, name: str) -> dict[str, dict[str, float]]:
    """Return the columns of `table` for each contender; NaN is what was not measured.

    "x bound" is the ratio to the memory bound in the run in which it is smallest.
    """
    part, rows = results["sets"][name], {}
    compared = BASELINE in part["contenders"]
    base = best(entry(results, name, BASELINE)["seconds"]) if compared else math.nan
    for key, found in part["contenders"].items():
        first = results["first_call"].get(found["method"], {}) if "fast" in found["way"] else {}
        extra = found["extra_memory"]
        rows[key] = {
            "ms": 1e3 * typical(found["seconds"]),
            "best ms": 1e3 * best(found["seconds"]),
            "x fused": compare(results, name, key, BASELINE) if compared else math.nan,
            "best x": best(found["seconds"]) / base,
            "B/param": found["bytes"] / part["parameters"],
            "GB/s": rate(results, name, key),
            "x bound": best(bound_ratio(results, name, key)),
            "MB more": math.nan if extra is None else extra / 1e6,
            "first s": first.get("cold", math.nan),
            "cached s": first.get("cached", math.nan),
        }
    return rows


def table(results: Results, name: str) -> str:
    """Return a set's results as a text, one line per contender."""
    part, rows = results["sets"][name], summarize(results, name)
    rates = (
        f"{key} {rate(results, name, key):.1f} (best {rate(results, name, key, best):.1f})"
        for key in part["yardsticks"]
    )
    lines = [
        f"{name}: {part['tensors']} tensors, {part['parameters']:,} parameters",
        f"1e9/s: {', '.join(rates)}",
        "GB/s shown, by run: " + " ".join(f"{b / 1e9:.1f}" for b in bandwidth(results, name)),
        " " * 36 + "".join(f"{title:>9}" for title in next(iter(rows.values()), {})),
    ]
    for key, row in rows.items():
        lines.append(f"{key:36}" + "".join(f"{x:9.4g}" for x in row.values()).replace("nan", "  -"))
    lines += [f"{key}: not available: {why}" for key, why in part["unavailable"].items()]
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("python -m agrlib.bench", description=main.__doc__)
    add = parser.add_argument
    add("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    add("--optimizers", nargs="+", choices=list(METHODS), default=list(METHODS), dest="methods")
    add("--rounds", type=int, default=9, help="timings in a run (9)")
    add("--runs", type=int, default=1, help="each in new processes (1)")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--threads", type=int, nargs="+", help="of the CPU (one, all cores)")
    add("--out", type=Path, help="write the timings to this file or folder")
    add("--quick", action="store_true", help="rehearse on small tensors")
    options = parser.parse_args(arguments)
    if options.threads is None:
        options.threads = sorted({cores()} if options.device == "cuda" else {1, cores()})
    if (least := min(options.rounds, options.runs, *options.threads)) < 1:
        parser.error(f"--rounds, --runs and --threads must be positive, not {least}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if options.out is not None and not options.out.parent.is_dir():
        parser.error(f"--out: there is no folder {options.out.parent}")
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure optimizer steps against the speed of memory, side by side."""
    options = parse(arguments)
    results = run(options, lambda text: print(text, file=sys.stderr, flush=True))
    for name in results["sets"]:
        print("\n" + table(results, name))
    if options.out is not None:
        out = options.out / file_name(results) if options.out.is_dir() else options.out
        save(results, out)
        print(f"\nwritten to {out}")
    return results


if __name__ == "__main__" and __spec__ is not None:  # a notebook is "__main__", too
    main()
