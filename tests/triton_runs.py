"""The fast path through Triton, without a GPU: `interpret OUT` runs it, `compile OUT` compiles it.

Each way has a process of its own, because Triton reads TRITON_INTERPRET when it decorates a
function. The report is a JSON file: for each run a dictionary, with "failed" where it raised.
"""

import functools
import inspect
import itertools
import json
import os
import re
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from contract import OPTIMIZERS, TRANSFORMS, step
from fast import (
    CHAINS,
    CHUNK,
    ENTRIES,
    METHODS,
    SCENARIOS,
    SMALL,
    SMALLER,
    SPECIAL,
    Case,
    Way,
    beside_eager,
    compare,
    halves,
    happens,
    measure_special,
    name_of,
    parity,
    rounded_stochastically,
    stream,
    tensors,
)
from torch import pow as power

import agrlib
from agrlib import compilers, gpu, plan, program

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
LONG = (2 * CHUNK + 1,)
BOTH = [agrlib.centralize, agrlib.agr]


# --- values -------------------------------------------------------------------------------------


def cases() -> Iterator[tuple[str, Case]]:
    """Comparisons with the eager reference: 100 steps for each rule, 5 for its chains.

    Transforms keep nothing from one step to the next; together all chains are all pairs.
    """
    for entry in OPTIMIZERS:
        yield name_of(entry, []), parity(entry, [], shapes=[(17,)])
        for chain in CHAINS[entry.name]:
            yield name_of(entry, chain), parity(entry, chain, shapes=SMALLER, steps=5)
    for pair in itertools.product(TRANSFORMS, repeat=2):
        many = parity(ENTRIES["SGD"], list(pair), shapes=SMALL[:2] + SMALL[3:], steps=1)
        yield f"many {name_of(ENTRIES['SGD'], list(pair))}", many
    for name, chain in (("AdamW", BOTH), ("Padam-plain", []), ("Adan", [agrlib.normalize])):
        double = parity(ENTRIES[name], chain, torch.float64, SMALLER, 20)
        yield name_of(ENTRIES[name], chain, torch.float64), double
    for name, chain in (("SGD", BOTH), ("AdamW", [agrlib.agr])):
        long = parity(ENTRIES[name], chain, shapes=[LONG, (2, CHUNK // 2 + 1)], steps=5)
        yield f"large {name_of(ENTRIES[name], chain)}", long
    for entry, name in itertools.product(METHODS, SCENARIOS):
        yield f"{name} {entry.name}", happens(entry, name)


def special_values() -> Iterator[tuple[str, Any]]:
    for number, transform in enumerate([None, *TRANSFORMS]):
        entry = OPTIMIZERS[3 * number % len(OPTIMIZERS)]
        yield f"special values {entry.name} {transform}", (entry, [transform] if transform else [])


def rounding(name: str) -> dict[str, Any]:
    """Stochastic rounding in the interpreter, eagerly and after resuming."""
    entry = ENTRIES[name]
    fast = rounded_stochastically(entry, Way(True))
    measured = compare(fast, rounded_stochastically(entry, Way(False)))
    first, resumed = (
        tensors(o) for o in (fast, rounded_stochastically(entry, Way(True), resume=True))
    )
    measured["resumed"] = all(torch.equal(v, resumed[k]) for k, v in first.items())
    return measured


def overflow(entry: Any, fused: bool) -> dict[str, Any]:
    """A gradient scaler's step with an infinite gradient, and scaled steps beside plain ones."""
    results = []
    for scale in (1024.0, None):
        way = Way(fused)
        optimizer = way.optimizer(entry, way.parameters(torch.float32, SMALLER))
        for grads in stream(optimizer, 2):
            if scale:
                optimizer.grad_scale = torch.tensor(scale)
                optimizer.found_inf = torch.tensor(0.0)
            step(optimizer, [grad * (scale or 1.0) for grad in grads])
        results.append(tensors(optimizer))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(1.0)
    before = {name: value.clone() for name, value in tensors(optimizer).items()}
    step(optimizer, [grad.fill_(torch.inf) for grad in grads])
    skipped = all(torch.equal(v, before[k]) for k, v in tensors(optimizer).items())
    plain = all(torch.equal(v, results[1][k]) for k, v in results[0].items())
    return dict(skipped=skipped, plain=plain)


def raised(grad, param, lr, exponent):
    return (power(grad, exponent),)


class Powers(agrlib.GradientMethod):
    """Leaves the power of the gradient in the parameter."""

    counts_steps = False

    def __init__(self, params: Any, exponent: float) -> None:
        super().__init__(params, dict(lr=1.0, weight_decay=0.0, exponent=exponent), fused=True)

    def update_rule(self, group: Any) -> Any:
        return raised, ()

    def scalars(self, group: Any, lr: Any, step: Any) -> Any:
        return (lr, group["exponent"])


def powers() -> dict[str, Any]:
    """The largest relative error over all of float32, in roundings, for each exponent."""
    x = torch.logspace(-149, 127.99, 4000, base=2.0, dtype=torch.float64).float()
    found = {}
    for exponent in (0.3125, 0.75, 1.625, 3.0):  # float32 has them
        param = torch.nn.Parameter(torch.zeros_like(x))
        step(Powers([param], exponent), [x])
        exact = x.double() ** exponent
        normal = (exact > 2.0**-126) & (exact < 2.0**127.9)
        assert torch.equal(param.isinf()[exact > 2.0**128], (exact > 2.0**128)[exact > 2.0**128])
        assert (param[exact < 2.0**-126] <= 2.0**-126).all()
        off = (param.double() / exact - 1)[normal].abs().max().item()
        found[str(exponent)] = off * 2**24
    return found


def runs() -> dict[str, Callable[[], dict[str, Any]]]:
    """Everything that the interpreter is asked, by name."""
    found: dict[str, Callable[[], Any]] = {name: case.measure for name, case in cases()}
    for name, (entry, chain) in special_values():
        found[name] = lambda e=entry, c=chain: dict(
            wrong=measure_special(e, c, torch.float32), patterns=len(SPECIAL)
        )
    for name, kind in itertools.product(("SGD", "AdamW"), (torch.bfloat16, torch.float16)):
        found[f"halves {name} {kind}"] = lambda n=name, k=kind: halves(
            ENTRIES[n], k, torch.float32 if n == "AdamW" else None, [agrlib.agr]
        )
    for name in ("SGD-heavy-ball", "AdamW"):
        found[f"rounding {name}"] = lambda n=name: rounding(n)
        found[f"overflow {name}"] = lambda n=name: overflow(ENTRIES[n], True)
    found["powers"] = powers
    found["beside eager"] = lambda: beside_eager(
        ENTRIES["AdamW"], torch.bfloat16, [], stochastic_rounding=True
    )
    return found


# --- machine code -------------------------------------------------------------------------------


def program_of(name: str, chain: list[Any], **more: Any) -> program.Program:
    """What the fast path makes of an optimizer; making it launches nothing."""
    dtype = more.pop("dtype", torch.float32)
    entry = ENTRIES[name]
    param = torch.nn.Parameter(torch.ones(4, 16, dtype=dtype))
    param.grad = torch.ones_like(param)
    optimizer = entry.cls([param], transforms=chain, fused=True, **{**entry.kwargs, **more})
    [batch] = plan.Plan(optimizer, [param.grad]).batches
    return batch.program


PROGRAMS: dict[str, Callable[[], program.Program]] = {
    "SGD": lambda: program_of("SGD", []),
    "AdamW": lambda: program_of("AdamW", BOTH),
    "Adan": lambda: program_of("Adan", [agrlib.clip_global_norm(1.0), agrlib.normalize]),
    "Padam": lambda: program_of("Padam-plain", [agrlib.clip_value(1.0)]),
    "double": lambda: program_of("AdamW", BOTH, dtype=torch.float64),
    "half": lambda: program_of(
        "AdamW", BOTH, dtype=torch.bfloat16, state_dtype=torch.float32, stochastic_rounding=True
    ),
    "float16": lambda: program_of("RMSprop-centered-momentum", [], dtype=torch.float16),
}
WORDS = {
    "load": r"ld\.global(?:\.\w+)*|global_load_\w+",
    "store": r"st\.global(?:\.\w+)*|global_store_\w+",
    "maximum": r"\bmax\.[.\w]*f\d\d\b",
    "arithmetic": r"\b(?:div|sqrt|fma|rcp|rsqrt)\.[.\w]*",
}


def signature_of(kernel: Any, wide: str) -> dict[str, str]:
    """The types of a kernel's arguments, as a launch has them."""
    numbers = dict(items="*i64", table="*i64", flags="*i8", classes="*i64", seeds="*i64")
    numbers |= dict(totals="*fp64", counts="*fp64", partial="*fp64", found_inf="*fp32")
    numbers |= dict(constants=wide, scales=wide, numbers=wide, firsts="*i64")
    numbers |= dict(tensors="i32", length="i32", ALIGNED="constexpr", BLOCK="constexpr")
    return {name: numbers[name] for name in kernel.arg_names}


def examine(kernel: Any, wide: str, target: str, aligned: bool) -> dict[str, Any]:
    """Compile a kernel and count what its text is made of."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = signature_of(kernel, wide)
    known = {"ALIGNED": aligned, "BLOCK": gpu.BLOCK}
    constants = {name: value for name, value in known.items() if name in signature}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = dict(num_warps=4, enable_fp_fusion=False)
    made = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    text = made.asm.get("ptx") or made.asm["amdgcn"]
    counted = {key: dict(Counter(re.findall(words, text))) for key, words in WORDS.items()}
    return dict(binary=len(made.asm.get("cubin") or made.asm["hsaco"]), **counted)


def machine_code() -> dict[str, Callable[[], dict[str, Any]]]:
    """Every kernel of every program for every target; for one of them also without alignment."""
    compilers.takes_triton = plan.takes_triton = lambda device: (
        True
    )  # or else the programs would be made for the CPU
    found: dict[str, Callable[[], Any]] = {}
    for name, make in PROGRAMS.items():
        program = make()
        module = compilers.load(gpu.gpu_source(program), f"{name}_examined")
        wide = "*fp64" if program.wide == "float64" else "*fp32"
        names = ["update", *(f"reduce_{j}" for j in program.whole)]
        for kernel, target in itertools.product(names, TARGETS):
            for aligned in (True, False) if target == "sm_90" else (True,):
                arguments = (getattr(module, kernel), wide, target, aligned)
                found[f"{name} {kernel} {target} {aligned}"] = functools.partial(
                    examine, *arguments
                )
    for target in TARGETS:
        found[f"collect {target}"] = functools.partial(examine, module.collect, wide, target, False)
    return found


def list_builtins_once() -> None:
    """Let the interpreter look up Triton's functions once, not in every call of every function.

    It replaces them for the time of a call, all those that `inspect.getmembers` finds among a
    module's hundreds of names, which took half of the time. Their names do not change.
    """
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    @functools.cache
    def names(place: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(place) if is_builtin(member)]

    def patch(place: Any, *rest: Any) -> None:
        for name in names(place):
            if is_builtin(member := getattr(place, name)):  # or else it is replaced already
                interpreter._patch_attr(place, name, member, *rest)

    interpreter._patch_builtin = patch


def main(mode: str, out: str) -> None:
    report: dict[str, Any] = {}
    if mode == "interpret":
        list_builtins_once()
    for name, measure in (runs() if mode == "interpret" else machine_code()).items():
        begin = time.perf_counter()
        try:
            report[name] = measure()
        except Exception:
            report[name] = dict(failed=traceback.format_exc()[-3000:])
        report[name]["seconds"] = round(time.perf_counter() - begin, 2)
    Path(out).write_text(json.dumps(report))


if __name__ == "__main__":
    assert os.environ["TRITON_INTERPRET"] == ("1" if sys.argv[1] == "interpret" else "0")
    torch.set_num_threads(1)
    main(*sys.argv[1:])
