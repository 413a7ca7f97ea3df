"""Every rule in the form that the compilers take: numba on the CPU, Triton on the GPU.

The rules and the transforms' declarations are collected in rules.py from the classes and from the
modules; a new method needs no line here.
"""

import ast
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import rules
import torch

import agrlib

RULES = rules.collect()
every_rule = pytest.mark.parametrize("name", RULES)


def test_the_collection_is_complete():
    """All functions of agrlib are annotated, except the rules."""
    bare = set()
    for module in rules.MODULES:
        for node in ast.parse(inspect.getsource(module)).body:
            if isinstance(node, ast.FunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                if arguments and not any(a.annotation for a in arguments):
                    bare.add(f"{module.__name__}.{node.name}")
    assert bare == set(RULES)
    assert len(RULES) >= 10
    classes = {v for v in vars(agrlib).values() if isinstance(v, type)}
    for cls in classes:  # one rule at least of each method
        if issubclass(cls, agrlib.GradientMethod) and cls is not agrlib.GradientMethod:
            assert any(entry.cls is cls for entry in rules.OPTIMIZERS)


@every_rule
def test_a_rule_is_plain_arithmetic(name):
    """No number literals, no calls but the primitives, no branches, one return at the end."""
    node = rules.tree(RULES[name].function)
    *body, last = node.body
    assert all(isinstance(line, ast.Assign) for line in body)
    assert isinstance(last, ast.Return)
    arguments = {argument.arg for argument in node.args.args}
    assert not node.args.defaults
    assert not node.args.kwonlyargs
    local = {target.id for line in body for target in line.targets}
    assert all(len(line.targets) == 1 for line in body), "Triton takes no chained assignment"
    for part in ast.walk(ast.Module(node.body, [])):
        assert not isinstance(part, ast.Constant), f"the literal {part.value} promotes to float64"
        assert not isinstance(part, ast.Attribute | ast.Subscript | ast.IfExp | ast.BoolOp)
        if isinstance(part, ast.operator):
            assert isinstance(part, ast.Add | ast.Sub | ast.Mult | ast.Div)
        if isinstance(part, ast.Call):
            assert part.func.id in rules.PRIMITIVES
        if isinstance(part, ast.Name):
            assert part.id in arguments | local | rules.PRIMITIVES


@every_rule
def test_a_rule_is_pure(name):
    rule = RULES[name]
    inputs = rule.inputs(torch.float32)
    before = [tensor.clone() for tensor in inputs]
    outputs = rule.eager(inputs, rule.scalars[0])
    assert all(map(torch.equal, inputs, before))
    assert all(value.dtype == torch.float32 and value.shape == (257,) for value in outputs)


# --- numba --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def numba():
    return pytest.importorskip("numba", reason="numba has no wheel for this platform")


@pytest.fixture(scope="module")
def scalar_primitives(numba):
    jit = numba.njit(error_model="numpy")
    return dict(
        sqrt=np.sqrt,
        power=np.power,
        abs=abs,
        maximum=np.maximum,  # which hands NaN on, as torch's does
        where=jit(lambda condition, x, y: x if condition else y),
        __builtins__={},
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_rule
def test_numba(numba, scalar_primitives, name, dtype):
    rule = RULES[name]
    scalar = {torch.float32: np.float32, torch.float64: np.float64}[dtype]
    rebuilt = types.FunctionType(rule.function.__code__, dict(scalar_primitives), "rebuilt")
    compiled = numba.njit(error_model="numpy")(rebuilt)
    inputs = rule.inputs(dtype)
    for scalars in rule.scalars:
        expected = rule.eager(inputs, scalars)
        fixed = [scalar(value) for value in scalars]
        elements = zip(*(tensor.numpy() for tensor in inputs), strict=True)
        rows = [compiled(*element, *fixed) for element in elements]
        columns = zip(*(row if isinstance(row, tuple) else (row,) for row in rows), strict=True)
        for column, reference in zip(columns, expected, strict=True):
            result = torch.tensor(np.array(column, dtype=scalar))
            tolerance = 1e-6 if dtype == torch.float32 else 1e-14
            torch.testing.assert_close(  # where terms of size 1 cancel, one rounding stays
                result, reference, rtol=tolerance, atol=tolerance / 4, equal_nan=True
            )
    [signature] = compiled.nopython_signatures
    returned = getattr(signature.return_type, "types", (signature.return_type,))
    precision = getattr(numba, f"float{8 * scalar().itemsize}")
    assert set(returned) == {precision}, "something promotes"


def test_a_literal_would_be_seen(numba):
    """The check of the return type can fail: this is what a literal does."""
    compiled = numba.njit(error_model="numpy")(lambda x, beta: (1.0 - beta) * x)
    compiled(np.float32(1), np.float32(0.5))
    [signature] = compiled.nopython_signatures
    assert signature.return_type == numba.float64


# --- Triton -------------------------------------------------------------------------------------


def report(mode, folder):
    if importlib.util.find_spec("triton") is None:
        assert not (sys.platform == "linux" and os.uname().machine == "x86_64"), "install triton"
        pytest.skip("triton has no wheel for this platform")
    out = folder / f"{mode}.json"
    home = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, str(Path(rules.__file__)), mode, str(out)]
    done = subprocess.run(command, env=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    return report("interpret", tmp_path_factory.mktemp("interpret"))


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory):
    return report("compile", tmp_path_factory.mktemp("compile"))


@every_rule
def test_triton_interpreter(interpreted, name):
    assert "failed" not in interpreted[name], interpreted[name]["failed"]
    assert interpreted[name]["error"] <= 1e-6
    assert interpreted[name]["calls"] == len(RULES[name].scalars)


@every_rule
def test_triton_compiles_for_sm90_in_float32_with_exact_roots_and_quotients(machine_code, name):
    made = machine_code[name]
    assert "failed" not in made, made["failed"]
    assert made["cubin"] > 0
    source = ast.unparse(rules.tree(RULES[name].function))
    expected = {"div.rn.f32"} if "/" in source else set()
    expected |= {"sqrt.rn.f32"} if "sqrt(" in source else set()
    assert set(made["words"]) == expected
