"""tools/soak.py for a few seconds, and that each of its checks can fail."""

import argparse
import os
import random
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from tools import soak

pytest.importorskip("numba", reason="numba has no wheel for this platform")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def test_a_few_seconds():
    options = ["--minutes", "0.15", "--threads", "2", "--workers", "2"]
    command = [sys.executable, soak.__file__, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    *_, line, verdict = done.stdout.splitlines()
    assert verdict == "passed"
    counts = re.search(r"(\S+) steps, +(\S+) comparisons", line)
    assert counts and counts[1] != "0" and counts[2] != "0"


@pytest.fixture
def pair():
    made = soak.Pair(soak.CASES[0], random.Random(0))
    for _ in range(5):
        made.step()
    return made


def test_a_pair_is_compared_in_all_its_parameters_and_states(pair):
    assert pair.compare() <= soak.TOLERANCE
    for i in range(len(soak.members(pair.fast))):
        for key in ("param", "exp_avg", "exp_avg_sq", "step"):
            param = soak.members(pair.fast)[i]
            value = param.data if key == "param" else pair.fast.state[param][key]
            value.view(-1)[-1] += 1e-11 if key == "param" else 1
            with pytest.raises(AssertionError, match="from its twin"):
                pair.compare()
            pair.fast = pair.renewed(pair.fast, pair.twin.state_dict())
    pair.fast.state.clear()
    with pytest.raises(AssertionError, match="other states"):
        pair.compare()


def test_an_eager_step_is_noticed(pair):
    pair.fast.param_groups[0]["fused"] = False
    with pytest.raises(AssertionError, match="went the eager way"):
        pair.step()


def test_a_pair_sees_all_changes():
    made = soak.Pair(soak.CASES[0], random.Random(0))
    for change in (made.add_group, made.change_options, made.freeze_or_thaw, made.reload):
        before = str(made.fast), len(made.frozen), id(made.fast)
        change()
        assert (str(made.fast), len(made.frozen), id(made.fast)) != before
        made.step()
    assert made.compare() <= soak.TOLERANCE


@pytest.fixture(autouse=True)
def one_kernel(monkeypatch):
    """Enough for what is tested in this process."""
    monkeypatch.setattr(soak, "prepare", lambda draw, until: soak.CASES[:1])


def options(**changes):
    return argparse.Namespace(**dict(minutes=30.0, threads=1, workers=0, seed=0) | changes)


def test_growing_memory_is_noticed(capsys):
    run = soak.Soak(options())
    run.memory = [[500.0, 300.0 + 0.02 * i] for i in range(360)]
    [failure] = run.growths()
    assert failure == "memory has grown by 1.2 %"
    run.memory = [[500.0, 300.0 + 0.01 * i] for i in range(360)]
    assert run.growths() == []
    run.memory = run.memory[:200]
    assert run.growths() == []
    assert "judged in runs of half an hour" in capsys.readouterr().out


def test_silence_and_failing_workers_are_noticed(monkeypatch):
    def fail(*arguments):
        raise ArithmeticError("no such number")

    monkeypatch.setattr(soak, "train", fail)
    assert "ended with status 256" in soak.Soak(options(threads=0, workers=1)).run()[0]
    run = soak.Soak(options())
    assert "ArithmeticError: no such number" in run.run()[0]
    run.threads[0] = type("Busy", (), dict(is_alive=lambda self: True))()
    run.board.rows[:, 0] = time.monotonic() - 2 * soak.SILENCE
    run.workers, run.failures = {}, []
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    run.look_for_silence()
    assert "{0} have not reported" in run.failures[0]


def test_files_that_nobody_knows_are_noticed(tmp_path):
    known = ["cache/agrlib/adam_12.py", "cache/agrlib/__pycache__/adam_12.run-3.py311.1.nbc"]
    left = ["cache/agrlib/tmpx1", "cache/agrlib/__pycache__/adam_12.run-3.py311.nbi.tmp.7", "tmp/x"]
    for name in known + left:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    assert soak.strangers(tmp_path) == sorted(left)
    assert np.isnan(soak.resident(-1))
