"""The kernels that Triton makes for a GPU: interpreted beside eager steps, and compiled."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
import triton_runs
from contract import OPTIMIZERS, TRANSFORMS
from fast import CHAINS, ENTRIES, STEPS, name_of, near

CASES = dict(triton_runs.cases())
TARGETS = list(triton_runs.TARGETS)
ROOTS = {"AdamW", "Adan", "double", "half", "float16", "Padam"}


def report(mode, folder):
    """Run triton_runs.py in its own process; a hundred seconds or two."""
    if importlib.util.find_spec("triton") is None:
        assert not (sys.platform == "linux" and os.uname().machine == "x86_64"), "install triton"
        pytest.skip("triton has no wheel for this platform")
    out = folder / f"{mode}.json"
    own = dict(TRITON_INTERPRET="1" if mode == "interpret" else "0")
    own |= dict(TRITON_CACHE_DIR=str(folder / "triton"), XDG_CACHE_HOME=str(folder))
    command = [sys.executable, triton_runs.__file__, mode, str(out)]
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    print(mode, sum(run["seconds"] for run in found.values()), "seconds")
    return found


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    return report("interpret", tmp_path_factory.mktemp("interpret"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return report("compile", tmp_path_factory.mktemp("compile"))


def result(found, name):
    assert "failed" not in found[name], found[name]["failed"]
    return found[name]


# --- values -------------------------------------------------------------------------------------


def test_every_rule_runs_for_100_steps_and_every_pair_behind_some_rule():
    assert all(CASES[name_of(entry, [])].steps == STEPS for entry in OPTIMIZERS)
    for pair in itertools.permutations(TRANSFORMS, 2):
        assert any(f" {list(pair)} float32" in name for name in CASES if "many" not in name)
    assert all(name_of(ENTRIES[n], chain) in CASES for n in CHAINS for chain in CHAINS[n])


def test_the_report_holds_what_was_asked_and_nothing_else(interpreted):
    assert set(interpreted) == set(triton_runs.runs())
    assert set(CASES) < set(interpreted)


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels_equal_eager_steps(interpreted, name):
    CASES[name].check(result(interpreted, name))


@pytest.mark.parametrize("name", dict(triton_runs.special_values()))
def test_values_that_are_no_ordinary_numbers(interpreted, name):
    assert result(interpreted, name)["wrong"] == []
    assert interpreted[name]["patterns"] == 9


@pytest.mark.parametrize("dtype", ["torch.bfloat16", "torch.float16"])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_half_precision_is_computed_in_float32_and_rounded_once(interpreted, name, dtype):
    assert result(interpreted, f"halves {name} {dtype}")["exact"]


def test_stochastic_rounding_is_that_of_eager_steps_and_of_resumed_ones(interpreted):
    for name in ("SGD-heavy-ball", "AdamW"):
        rounding = result(interpreted, f"rounding {name}")
        assert rounding["resumed"]
        assert rounding["params"] <= near(torch.bfloat16)
    assert interpreted["rounding SGD-heavy-ball"]["exact"]
    beside = result(interpreted, "beside eager")
    assert beside["worst"] <= near(torch.bfloat16)
    assert beside["equal"] > 0.999


def test_powers_of_all_numbers(interpreted):
    """Subnormal ones too, and powers that are subnormal or infinite."""
    assert max(result(interpreted, "powers")[key] for key in ("0.3125", "0.75")) < 3
    assert max(interpreted["powers"][key] for key in ("1.625", "3.0")) < 8


@pytest.mark.parametrize("name", ["SGD-heavy-ball", "AdamW"])
def test_a_gradient_scaler_never_waits_for_the_device(interpreted, name):
    """The kernel itself unscales, and writes nothing where an infinity was found."""
    scaled = result(interpreted, f"overflow {name}")
    assert scaled["skipped"]
    assert scaled["plain"]


# --- machine code -------------------------------------------------------------------------------


def names(compiled, *words):
    found = [name for name in compiled if set(words) <= set(name.split())]
    assert found, words
    return found


def moves(counted):
    """How many of the instructions move 16 bytes, and how many move less."""
    wide = sum(n for word, n in counted.items() if word.endswith(("v4.b32", "v2.b64", "dwordx4")))
    return wide, sum(counted.values()) - wide


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_without_a_gpu(compiled, target):
    made = names(compiled, target)
    assert len(made) > len(triton_runs.PROGRAMS)
    for name in made:
        assert result(compiled, name)["binary"] > 1000, name


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("program", ["SGD", "AdamW", "Adan", "Padam", "double"])
def test_aligned_tensors_are_moved_16_bytes_at_a_time(compiled, program, target):
    """A block is 8 entries for each of 128 threads, or 4 for 256, in a loop and at its end."""
    state = {"SGD": 0, "Padam": 3, "Adan": 4}.get(program, 2)
    each = (2 if target == "gfx942" else 4) * (2 if program == "double" else 1)
    made = result(compiled, f"{program} update {target} True")
    assert moves(made["load"])[0] >= each * (2 + state)
    assert moves(made["store"]) == (each * (1 + state), 0)
    for name in names(compiled, program, target, "True"):
        assert moves(result(compiled, name)["load"])[0] > 0, name


def test_without_alignment_no_load_is_wide(compiled):
    """So that the check above can fail."""
    for name in names(compiled, "sm_90", "False"):
        made = result(compiled, name)
        assert moves(made["load"])[0] == moves(made["store"])[0] == 0, name


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_a_maximum_hands_nan_on(compiled, target):
    """As torch's does; the interpreter would show no difference."""
    assert set(result(compiled, f"Padam update {target} True")["maximum"]) == {"max.NaN.f32"}


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_roots_and_quotients_are_exact_and_nothing_is_contracted(compiled, target):
    for program in triton_runs.PROGRAMS:
        made = result(compiled, f"{program} update {target} True")
        kind = "f64" if program == "double" else "f32"
        exact = {f"div.rn.{kind}", f"sqrt.rn.{kind}"} if program in ROOTS else set()
        words = {word for word in made["arithmetic"] if not word.startswith("fma")}
        assert words == exact, program
        fused = {word for word in made["arithmetic"] if word.startswith("fma")}
        assert not fused or program == "Padam", "the series of a power may contract, no rule may"
