"""The benchmark: what it counts, whom it leaves out, what it writes and what it refuses to read."""

import ast
import copy
import importlib.util
import inspect
import itertools
import json
import math
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from contract import OPTIMIZERS, TRANSFORMS, every, run

import agrlib
from agrlib import bench

RESULTS = Path(__file__).resolve().parent.parent / "book" / "results"
SMALL = dict(sets=["tiny"], methods=["AdamW", "AGR-AdamW"], rounds=2, quick=True)
TINY = bench.label("tiny", 1)


@pytest.fixture(scope="module")
def results():
    threads = torch.get_num_threads()
    try:
        return bench.run(bench.Settings(**SMALL, runs=2), report=lambda text: None)
    finally:
        torch.set_num_threads(threads)


# --- bytes and operations -----------------------------------------------------------------------


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state", [None, torch.float32], ids=str)
def test_bytes_are_those_of_the_state_that_a_step_leaves(entry, dtype, state):
    optimizer, _ = run(entry, dtype, steps=2, state_dtype=state)
    expected = 0
    for group in optimizer.param_groups:
        for param in group["params"]:
            tensors = [v for k, v in optimizer.state[param].items() if k != "step"]
            expected += 3 * param.nbytes + 2 * sum(tensor.nbytes for tensor in tensors)
    assert bench.step_bytes(optimizer) == expected


def test_a_sum_over_whole_tensors_reads_them_once_more():
    weights = [torch.zeros(4, 5), torch.zeros(1)]
    plain = bench.step_bytes(agrlib.SGD(weights))
    extra = {
        repr(t): bench.step_bytes(agrlib.SGD(weights, transforms=[t])) - plain for t in TRANSFORMS
    }
    assert extra == {
        "clip_value(0.7)": 0,
        "clip_norm(1.1)": 84,
        "clip_global_norm(2.3)": 84,
        "normalize": 84,
        "centralize": 0,
        "agr": 80,  # it leaves a tensor of one element alone
    }
    chain = [agrlib.centralize, agrlib.agr, agrlib.centralize, agrlib.clip_norm(1.0)]
    assert bench.step_bytes(agrlib.SGD(weights, transforms=chain)) - plain == 80 + 84


def test_each_group_counts_by_its_own_options():
    groups = [
        dict(params=[torch.zeros(10)], transforms=[agrlib.agr]),
        dict(params=[torch.ones(30)]),
    ]
    optimizer = agrlib.AdamW(groups)
    assert bench.step_bytes(optimizer) == 10 * 32 + 30 * 28
    assert bench.bytes_per_parameter(optimizer) == 29


def test_a_plain_function_cannot_be_counted():
    with pytest.raises(TypeError, match="does not say what it sums"):
        bench.step_bytes(agrlib.SGD([torch.zeros(2)], transforms=[torch.sign]))


class Counted:
    """A number that counts what is done with it."""

    done = 0

    def __operation__(self, *others):
        Counted.done += 1
        return Counted()

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __operation__
    __neg__ = __abs__ = __lt__ = __gt__ = __operation__

    @classmethod
    def __torch_function__(cls, function, kinds, args=(), kwargs=None):
        return cls().__operation__()


def test_operations_are_those_that_a_rule_does():
    rules = {}
    for entry in OPTIMIZERS:
        optimizer = entry.cls([torch.zeros(2)], **entry.kwargs)
        rule, _ = optimizer.update_rule(optimizer.param_groups[0])
        rules[rule.__name__] = rule
    rules["agr"] = agrlib.agr.apply
    assert len(rules) >= 10
    for rule in rules.values():
        Counted.done = 0
        rule(*(Counted() for _ in inspect.signature(rule).parameters))
        assert bench.operations(rule) == Counted.done > 0, rule.__name__


# --- what is measured ---------------------------------------------------------------------------


def test_unknown_set():
    with pytest.raises(ValueError, match="no set of parameters is called 'bert'"):
        bench.shapes("bert")


def test_numbers_are_drawn_anew_and_none_is_zero():
    tensors = bench.Tensors([(3, 4), (2**20 + 5,)])
    tensors.lend_state(agrlib.AdamW(tensors.params), ["exp_avg", "exp_avg_sq"])
    every = [*(p.detach() for p in tensors.params), *tensors.grads]
    every += list(itertools.chain(*tensors.state.values()))
    for tensor in every:
        tensor.zero_()
    tensors.refresh()
    assert all((tensor != 0).all() for tensor in every)
    assert all((tensor > 0).all() for state in tensors.state.values() for tensor in state)
    assert tensors.size == 12 + 2**20 + 5


def test_contenders_share_their_tensors():
    tensors = bench.Tensors([(3, 4)])
    steps, _ = bench.start(bench.contenders(["AdamW", "AMSGrad"]), tensors)
    assert len(steps) >= 5
    assert set(tensors.state) == {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    for name, step in steps.items():
        [param] = tensors.params
        tensors.refresh()
        before = [param.detach().clone(), tensors.state["exp_avg"][0].clone()]
        step()
        changed = [param.detach(), tensors.state["exp_avg"][0]]
        assert not any(map(torch.equal, before, changed)), f"{name} works on other tensors"
        assert param.grad is tensors.grads[0], f"{name} leaves another gradient"


def test_whoever_cannot_start_is_left_out_with_the_reason(monkeypatch):
    def refuse(*args):
        raise RuntimeError("no compiler\nand more lines")

    module = types.ModuleType("absent_minded")
    module.__spec__ = importlib.util.spec_from_loader("absent_minded", None)
    monkeypatch.setitem(sys.modules, "absent_minded", module)
    monkeypatch.setattr(bench, "OTHERS", [("AdamW", "absent_minded", "AdamW", {})])
    monkeypatch.setattr(bench, "agrlib_step", refuse)
    steps, unavailable = bench.start(bench.contenders(["AdamW"]), bench.Tensors([(5,)]))
    assert set(steps) == {f"AdamW, {way}" for way in bench.TORCH}
    assert unavailable["AdamW, agrlib fast"] == "no compiler"
    assert "has no attribute" in unavailable["AdamW, absent_minded"]


def test_other_libraries_may_drop_the_gradient(monkeypatch):
    class Dropping(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            self.zero_grad()

    module = types.ModuleType("dropping")
    module.__spec__, module.AdamW = importlib.util.spec_from_loader("dropping", None), Dropping
    monkeypatch.setitem(sys.modules, "dropping", module)
    monkeypatch.setattr(bench, "OTHERS", [("AdamW", "dropping", "AdamW", {})])
    tensors = bench.Tensors([(5,)])
    steps, unavailable = bench.start(bench.contenders(["AdamW"]), tensors)
    assert "AdamW, dropping" not in unavailable
    for _ in range(2):
        before = tensors.params[0].detach().clone()
        steps["AdamW, dropping"]()
        assert not torch.equal(before, tensors.params[0])
    bench.measure(steps, rounds=1, refresh=tensors.refresh, at_least=1e-12)


def test_each_contender_warms_up_and_has_its_turn_in_every_round():
    calls, refreshed = [], []
    steps = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = bench.measure(
        steps, rounds=4, refresh=lambda: refreshed.append(len(calls)), at_least=1e-12
    )
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys("abc", 4)
    assert refreshed == [6, 12, 18, 24]  # twice each to choose the counts, then twice in a round
    for i in refreshed:
        turns = "".join(calls[i : i + 6])
        assert sorted(turns[::2]) == list("abc")
        assert turns[::2] == turns[1::2]


def test_a_timing_lasts_long_enough():
    calls = []
    bench.measure({"a": lambda: calls.append(torch.ones(1000).sum())}, rounds=1, at_least=0.01)
    assert len(calls) > 10


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_extra_memory_is_that_of_the_temporaries():
    kept = torch.ones(2**23)

    def step():
        kept.copy_(torch.ones(2**23) + 1)  # two temporaries of 32 MiB

    found = bench.extra_memory(step)
    assert found is not None
    assert 0.9 < found / 2**26 < 1.2
    assert bench.extra_memory(lambda: kept.add_(1)) < 2**22


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="needs numba")
def test_the_first_step_is_timed_without_and_with_a_cache():
    seconds = bench.first_steps("SGD")
    assert seconds["cold"] > seconds["cached"] > 0


def test_a_first_step_that_fails_says_why():
    with pytest.raises(RuntimeError, match="KeyError: 'nothing'"):
        bench.first_steps("nothing")


# --- the file -----------------------------------------------------------------------------------


def test_a_file_is_read_as_it_was_written(results, tmp_path):
    path = tmp_path / "bench.json"
    bench.save(results, path)
    assert bench.load(path) == results
    part = results["sets"][TINY]
    rows = path.read_text().splitlines()
    assert len(rows) < 20 * len(part["contenders"]) + 100, "one line per run, not per number"
    for entry in (*part["contenders"].values(), *part["yardsticks"].values()):
        assert [len(row) for row in entry["seconds"]] == [2, 2]


def changed(results, path, value):
    """A copy with one field replaced, or removed where the value is None."""
    results = copy.deepcopy(results)
    *way, last = path
    place = results
    for key in way:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return results


FUSED = ("sets", TINY, "contenders", bench.BASELINE)
DAMAGES = [
    (("schema",), 1, "results.schema must be 2, not 1"),
    (("date",), None, "results.date is missing"),
    (("author",), "me", "results.author is not known"),
    (("device",), "tpu", "results.device must be cpu or cuda"),
    (("threads",), 2, "results.threads must be a list that is not empty, not 2"),
    (("threads", 0), 1.5, r"results.threads\[0\] must be a positive integer, not 1.5"),
    (("threads", 0), True, r"results.threads\[0\] must be a positive integer, not True"),
    (("processor", "family"), "Zen", "results.processor.family must be a number that is not neg"),
    (("processor", "L2"), None, "results.processor.L2 is missing"),
    (("load",), -1, "results.load must be a number that is not negative, or null"),
    (("versions",), [], "results.versions must be an object"),
    (("versions", "torch"), 2.4, "results.versions.torch must be a text or null"),
    (("sets", TINY, "yardsticks", "add_"), None, "1 thread.yardsticks.add_ is missing"),
    ((*FUSED, "seconds"), [], "torch fused.seconds must be a list that is not empty"),
    ((*FUSED, "seconds", 0), 3.0, r"torch fused.seconds\[0\] must be a list"),
    ((*FUSED, "seconds", 1, 0), -1.0, r"torch fused.seconds\[1\]\[0\] must be a positive number"),
    ((*FUSED, "seconds", 1, 0), math.nan, r"seconds\[1\]\[0\] must be a positive number, not nan"),
    ((*FUSED, "seconds"), [[1.0, 1.0]], "torch fused.seconds must hold 2 times 2 numbers"),
    ((*FUSED, "extra_memory"), "much", "torch fused.extra_memory must be a number"),
    ((*FUSED, "bytes"), 0, "torch fused.bytes must be a positive integer, not 0"),
]


@pytest.mark.parametrize(("path", "value", "message"), DAMAGES, ids=lambda x: str(x)[:40])
def test_a_damaged_file_is_refused_by_the_name_of_the_field(
    results, path, value, message, tmp_path
):
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(changed(results, path, value)))
    with pytest.raises(ValueError, match=message):
        bench.load(file)


def test_the_table_names_everyone(results):
    text = bench.table(results, TINY)
    part = results["sets"][TINY]
    assert all(name in text.replace("\n", " ") for name in part["contenders"])
    assert "nan" not in text
    left_out = changed(results, ("sets", TINY, "unavailable"), {"A, b": "why", "C, b": "why"})
    assert bench.table(left_out, TINY).endswith("not available: A, b; C, b: why")


def test_ratios_without_a_baseline_are_not_a_number(results):
    rows = bench.summarize(changed(results, FUSED, None), TINY)
    assert rows
    assert all(math.isnan(row[key]) for row in rows.values() for key in ("ratio", "best_ratio"))


def test_the_median_and_the_best_of_all_timings(results):
    """The best pair need not be of one round, nor of one run."""
    other = (*FUSED[:3], "AdamW, torch foreach")
    known = changed(results, (*FUSED, "seconds"), [[3.0, 4.0], [2.0, 8.0]])
    known = changed(known, (*other, "seconds"), [[6.0, 4.0], [4.0, 1.0]])
    row = bench.summarize(known, TINY)["AdamW, torch foreach"]
    assert (row["ms"], row["best_ms"]) == (3750.0, 1000.0)
    assert (row["ratio"], row["best_ratio"]) == ((1.5 + 1.0625) / 2, 0.5)
    known = changed(
        known, ("sets", TINY, "yardsticks", "add_"), dict(amount=10**9, seconds=[[4, 2]])
    )
    rates = [bench.rate(known, TINY, "add_", of) for of in (bench.typical, bench.best)]
    assert rates == [1 / 3, 1 / 2]


def test_the_plot_has_a_mark_and_a_bound_for_everyone(results):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure, axes = pyplot.subplots()
    bench.plot(results, TINY, axes)
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == list(results["sets"][TINY]["contenders"])
    marks = [line for line in axes.lines if len(line.get_xdata()) == 1]
    assert len(marks) == 2 * len(names)
    pyplot.close(figure)


def test_committed_results_are_complete_and_no_rehearsal():
    files = sorted(RESULTS.glob("bench_*.json"))
    assert any(file.name.startswith("bench_cpu") for file in files)
    for file in files:
        found = bench.load(file)
        sets = {key.split(",")[0] for key in found["sets"]}
        assert {"resnet18", "gpt2", "tiny"} <= sets
        assert set(found["sets"]) == {bench.label(s, n) for s in sets for n in found["threads"]}
        for key, part in found["sets"].items():
            shapes = bench.shapes(key.split(",")[0])
            assert part["parameters"] == sum(map(math.prod, shapes))
            for method in bench.METHODS:
                assert f"{method}, agrlib fast" in part["contenders"]


# --- the machine --------------------------------------------------------------------------------

CPUINFO = """processor	: 0
vendor_id	: GenuineIntel
cpu family	: 6
model		: 207
model name	: INTEL(R) XEON(R) PLATINUM 8581C CPU @ 2.10GHz
stepping	: 2

processor	: 1
vendor_id	: another
"""


def test_a_processor_is_told_by_its_numbers(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda path: CPUINFO)
    found = bench.processor()
    assert [found[key] for key in ("vendor", "family", "model", "stepping")] == [
        "GenuineIntel",
        6,
        207,
        2,
    ]
    name = bench.device_name("cpu")
    assert name.startswith("INTEL(R) XEON(R)")
    results = dict(device="cpu", device_name=name, processor=found)
    assert bench.file_name(results) == "bench_cpu_genuineintel_6_207.json"
    results["device"], results["device_name"] = "cuda", "NVIDIA H100 80GB"
    assert bench.file_name(results) == "bench_gpu_nvidia_h100_80gb.json"


def test_caches_are_those_of_data(tmp_path):
    kinds = [("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "2048K")]
    for i, row in enumerate([*kinds, ("3", "Unified", "much"), ("4", "Unified", "1K")]):
        folder = tmp_path / f"index{i}"
        folder.mkdir()
        for name, text in zip(("level", "type", "size"), row, strict=True):
            (folder / name).write_text(text + "\n")
    (tmp_path / "index9").mkdir()
    assert bench.caches(tmp_path) == {"L1d": 48 * 1024, "L2": 2**21, "L3": None}


def test_a_system_that_tells_nothing(monkeypatch, tmp_path):
    def refuse(path, *args):
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert set(bench.caches(tmp_path / "none").values()) == {None}
    found = bench.processor()
    assert {found[key] for key in ("vendor", "family", "model", "stepping")} == {None}
    results = dict(device="cpu", device_name=bench.device_name("cpu") or "?", processor=found)
    assert bench.file_name(results).startswith("bench_cpu_")


# --- the command --------------------------------------------------------------------------------


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True)


def test_the_command_measures_and_writes(tmp_path):
    options = ["--quick", "--sets", "tiny", "--optimizers", "AdamW", "--rounds", "2"]
    done = python("-m", "agrlib.bench", *options, "--threads", "1", "2", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "AdamW, torch fused" in done.stdout
    [out] = tmp_path.iterdir()
    found = bench.load(out)
    assert out.name == bench.file_name(found)
    assert list(found["sets"]) == ["tiny, 1 thread", "tiny, 2 threads"]
    assert found["rounds"] == 2
    assert found["command"].startswith("python -m agrlib.bench --quick --sets tiny")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "0"], "'0' is no positive integer"),
        (["--sets", "bert"], "invalid choice: 'bert'"),
        (["--optimizers", "Adam W"], "invalid choice: 'Adam W'"),
        (["--out", "no/such/folder/file.json"], "there is no folder no/such/folder"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_wrong_options_are_refused_before_anything_is_measured(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(options)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said_so(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--device", "cuda"])
    assert "torch sees no GPU here" in capsys.readouterr().err


def test_importing_measures_nothing_and_loads_nothing_heavy():
    code = "import sys, agrlib.bench; print({'matplotlib', 'numba', 'scipy'} & set(sys.modules))"
    done = python("-c", code)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_a_notebook_measures_nothing():
    last = ast.parse(inspect.getsource(bench)).body[-1]
    assert isinstance(last, ast.If)
    condition = compile(ast.Expression(last.test), "condition", "eval")
    names = {"__name__": "__main__", "__spec__": None}  # as in a notebook
    assert not eval(condition, names)
    assert eval(condition, {**names, "__spec__": importlib.util.find_spec("agrlib.bench")})
