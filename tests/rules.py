"""Every function of agrlib that a compiler must take, collected with arguments to call it with.

Run as a program it compiles them all with Triton: `rules.py interpret OUT` calls them in Triton's
interpreter and `rules.py compile OUT` makes machine code for sm_90, which needs no GPU. Each way
has a process of its own, because Triton reads TRITON_INTERPRET when it decorates a function.
"""

import ast
import importlib
import importlib.util
import inspect
import itertools
import json
import os
import pkgutil
import re
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from contract import OPTIMIZERS, TRANSFORMS, options

import agrlib
from agrlib import Transform, arithmetic, gpu, optimizer, program

PRIMITIVES = {"sqrt", "abs", "maximum", "where", "power"}
SIZE = 257
MODULES = [
    importlib.import_module(f"agrlib.{m.name}") for m in pkgutil.iter_modules(agrlib.__path__)
]


class Rule(NamedTuple):
    function: Callable[..., Any]
    tensors: int  # how many of the arguments are tensors: the first ones
    scalars: list[tuple[float, ...]]  # several values for the others

    @property
    def name(self) -> str:
        return f"{self.function.__module__}.{self.function.__name__}"

    @property
    def arguments(self) -> list[str]:
        return list(inspect.signature(self.function).parameters)

    def inputs(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """Random vectors, with some zeros; second moments are not negative."""
        generator = torch.Generator().manual_seed(0)
        names = self.arguments[: self.tensors]
        values = [torch.randn(SIZE, generator=generator, dtype=torch.float32) for _ in names]
        for name, value in zip(names, values, strict=True):
            value[::50] = 0
            if name.endswith("_sq") or name in ("square_avg", "total"):
                value.abs_()
        return [value.to(dtype) for value in values]

    def eager(self, inputs: list[torch.Tensor], scalars: tuple[float, ...]) -> list[torch.Tensor]:
        result = self.function(*inputs, *scalars)
        return list(result) if isinstance(result, tuple) else [result]


def variants(entry: Any) -> Iterator[dict[str, Any]]:
    """The options of an entry with every flag both ways, and every number also at its default."""
    known = options(entry.cls)
    method = [k for k in known if k not in options(optimizer.GradientMethod)]
    flags = [k for k in method if isinstance(known[k], bool)]
    numbers = [{}] + [{key: known[key]} for key in entry.kwargs if key not in flags]
    for values, number in itertools.product(
        itertools.product([False, True], repeat=len(flags)), numbers
    ):
        yield {**entry.kwargs, **dict(zip(flags, values, strict=True)), **number}


def update_rules() -> Iterator[Rule]:
    for entry in OPTIMIZERS:
        for kwargs in variants(entry):
            try:
                built = entry.cls([torch.nn.Parameter(torch.ones(2))], **kwargs)
            except ValueError:  # flags that exclude each other
                continue
            [group] = built.param_groups
            function, keys = built.update_rule(group)
            scalars = [tuple(map(float, built.scalars(group, group["lr"], t))) for t in (1, 7)]
            yield Rule(function, 2 + len(keys), scalars)


def declared(transform: Transform) -> Iterator[Rule]:
    if transform.over is None:
        yield Rule(transform.apply, 1, [transform.constants])
        return
    yield Rule(transform.apply, 1, [(0.5,), (321.0,)])
    yield Rule(transform.summand, 1, [()])
    if transform.finish is not None:
        yield Rule(transform.finish, 1, [(float(n), *transform.constants) for n in (2, 1000)])


def collect() -> dict[str, Rule]:
    transforms = {t for m in MODULES for t in vars(m).values() if isinstance(t, Transform)}
    transforms.update(TRANSFORMS)  # those that a function of the library made
    found = itertools.chain(
        update_rules(),
        *map(declared, sorted(transforms, key=repr)),
        [Rule(program.decay_gradient, 2, [(0.1,)]), Rule(program.decay_parameter, 1, [(0.1,)])],
    )
    rules: dict[str, Rule] = {}
    for rule in found:
        first = rules.setdefault(rule.name, rule)
        assert (first.function, first.tensors) == (rule.function, rule.tensors), rule.name
        first.scalars.extend(s for s in rule.scalars if s not in first.scalars)
    return rules


def tree(function: Callable[..., Any]) -> ast.FunctionDef:
    """The function's syntax, without decorators and docstring."""
    [node] = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(node, ast.FunctionDef)
    node.decorator_list = []
    if ast.get_docstring(node) is not None:
        del node.body[0]
    return node


def triton_source(rules: dict[str, Rule]) -> str:
    """The rules as agrlib.program writes them, each with a kernel of its own around it."""
    parts = [gpu.GPU_HEADER.format(**gpu.GPU_FLOAT32), gpu.GPU_POWER]
    for name, rule in rules.items():
        flat = name.replace(".", "_")
        result = rule.function(*rule.inputs(torch.float32), *rule.scalars[0])
        tensors, scalars = rule.arguments[: rule.tensors], rule.arguments[rule.tensors :]
        results = [f"out{i}" for i in range(len(result) if isinstance(result, tuple) else 1)]
        target = ", ".join(results) + ("," if isinstance(result, tuple) else "")
        loads = [f"tl.load({t} + i, mask=i < size, other=1.0)" for t in tensors]
        stores = [f"    tl.store({r}_ptr + i, {r}, mask=i < size)" for r in results]
        pointers = [*tensors, *(f"{r}_ptr" for r in results)]
        parts.append(arithmetic.text_of(rule.function, flat, "@triton.jit", exact_division=True))
        parts.append(
            f"@triton.jit\ndef run_{flat}({', '.join(pointers + scalars)}, size, "
            "BLOCK: tl.constexpr):\n    i = tl.arange(0, BLOCK)\n"
            f"    {target} = {flat}({', '.join(loads + scalars)})\n" + "\n".join(stores)
        )
    return "\n\n\n".join(parts) + "\n"


def interpret(rule: Rule, kernel: Any) -> dict[str, Any]:
    """The largest error of the interpreted kernel against the eager rule, |a - b| / (|b| + 1/4)."""
    worst = 0.0
    for scalars in rule.scalars:
        inputs = rule.inputs(torch.float32)
        expected = rule.eager(inputs, scalars)
        outputs = [torch.full_like(value, torch.nan) for value in expected]
        kernel[(1,)](*inputs, *outputs, *scalars, SIZE, BLOCK=512)
        for a, b in zip(outputs, expected, strict=True):
            assert torch.equal(a.isfinite(), b.isfinite())
            error = (a.double() - b.double()).abs() / (b.double().abs() + 0.25)
            worst = max(worst, error.nan_to_num().max().item())
    return dict(error=worst, calls=len(rule.scalars))


def compile_for_sm90(rule: Rule, kernel: Any) -> dict[str, Any]:
    """What the machine code consists of, as far as precision is concerned."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(inspect.signature(kernel.fn).parameters)
    tensors = [n for n in names if n in rule.arguments[: rule.tensors] or n.endswith("_ptr")]
    signature = {n: "*fp32" if n in tensors else "fp32" for n in names}
    signature |= {"size": "i32", "BLOCK": "constexpr"}
    source = ASTSource(fn=kernel, signature=signature, constexprs={"BLOCK": 512})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    ptx = made.asm["ptx"]
    words = sorted(set(re.findall(r"\b(?:div|sqrt)\.[.\w]*|\b\w+\.f64\b", ptx)))
    return dict(cubin=len(made.asm["cubin"]), words=words)


def main(mode: str, out: str) -> None:
    os.environ["TRITON_INTERPRET"] = "1" if mode == "interpret" else "0"
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"
    rules = collect()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rules_for_triton.py")  # Triton reads the source of its functions
        path.write_text(triton_source(rules))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        report, examine = {}, interpret if mode == "interpret" else compile_for_sm90
        for name, rule in rules.items():
            kernel = getattr(module, "run_" + name.replace(".", "_"))
            try:
                report[name] = examine(rule, kernel)
            except Exception as error:
                report[name] = dict(failed=f"{type(error).__name__}: {error}"[-2000:])
    Path(out).write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
