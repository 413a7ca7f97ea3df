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
import time
from pathlib import Path

import pytest
import torch
from contract import OPTIMIZERS, TRANSFORMS, every, run

import agrlib
from agrlib import bench, roofline

RESULTS = Path(__file__).resolve().parent.parent / "book" / "results"
SMALL = "--quick --sets tiny --optimizers AdamW AGR-AdamW --rounds 2 --runs 2 --threads 1"
TINY = bench.label("tiny", 1)


@pytest.fixture(scope="module")
def results():
    threads = torch.get_num_threads()
    try:
        return bench.run(bench.parse(SMALL.split()), report=lambda text: None)
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
    assert roofline.step_bytes(optimizer) == expected


def test_a_sum_over_whole_tensors_reads_them_once_more():
    weights = [torch.zeros(4, 5), torch.zeros(1)]
    plain = roofline.step_bytes(agrlib.SGD(weights))
    extra = {
        repr(t): roofline.step_bytes(agrlib.SGD(weights, transforms=[t])) - plain
        for t in TRANSFORMS
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
    assert roofline.step_bytes(agrlib.SGD(weights, transforms=chain)) - plain == 80 + 84


def test_each_group_counts_by_its_own_options():
    groups = [
        dict(params=[torch.zeros(10)], transforms=[agrlib.agr]),
        dict(params=[torch.ones(30)]),
    ]
    optimizer = agrlib.AdamW(groups)
    assert roofline.step_bytes(optimizer) == 10 * 32 + 30 * 28
    assert roofline.bytes_per_parameter(optimizer) == 29


def test_a_plain_function_cannot_be_counted():
    with pytest.raises(TypeError, match="does not say what it sums"):
        roofline.step_bytes(agrlib.SGD([torch.zeros(2)], transforms=[torch.sign]))


@pytest.mark.parametrize("cache", [0, 39, 40, 100, 10**6])
def test_a_cache_saves_its_size_twice_and_the_sums_that_fit(cache):
    sizes, chain = (1000, 10), [agrlib.agr, agrlib.clip_global_norm(1.0)]
    sums = [4000, 40, 4040]  # two tensors, then both
    optimizer = agrlib.AdamW([torch.zeros(n) for n in sizes], transforms=chain)
    expected = 28 * 1010 - 2 * cache + sum(max(0, size - cache) for size in sums)
    assert roofline.step_bytes(optimizer, cache) == max(0, expected)


def test_the_roof():
    assert [roofline.attainable(i, 100.0, 40.0) for i in (1.0, 2.5, 9.0)] == [40.0, 100.0, 100.0]
    assert roofline.intensity(agrlib.AdamW([torch.zeros(7)])) == 13 / 28


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
        assert roofline.operations(rule) == Counted.done > 0, rule.__name__


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


def test_contenders_share_their_tensors():
    tensors = bench.Tensors([(3, 4)])
    steps, _ = bench.start(bench.contenders(["AdamW", "AMSGrad"]), tensors)
    assert len(steps) == 3 + 2 + 1
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

    monkeypatch.setattr(bench, "agrlib_step", refuse)
    steps, unavailable = bench.start(bench.contenders(["AdamW"]), bench.Tensors([(5,)]))
    assert set(steps) == {f"AdamW, torch {way}" for way in bench.TORCH}
    assert unavailable["AdamW, agrlib fast"] == "no compiler"


def test_each_contender_has_its_turn_in_every_round():
    calls, rounds = [], []
    steps = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = bench.measure(steps, 4, lambda: rounds.append(len(calls)), at_least=1e-12)
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys("abc", 4)
    assert all(x > 0 for values in seconds.values() for x in values)
    assert len(rounds) == 4
    for begin, end in itertools.pairwise([*rounds, len(calls)]):
        turns = [name for name, _ in itertools.groupby(calls[begin:end])]
        assert sorted(turns) == list("abc")


def test_a_timing_is_that_of_one_step_on_the_threads_of_the_caller():
    threads, calls = [], []

    def step():
        threads.append(torch.get_num_threads())
        calls.append(time.sleep(0.002))

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert 0.002 <= bench.time_step(step, at_least=0.02) < 0.01
    finally:
        torch.set_num_threads(before)
    assert set(threads) == {2}
    assert len(calls) > 5


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
    (("schema",), 2, "the file must have schema 3, not 2"),
    (("schema",), None, "the file must have schema 3, not None"),
    (("date",), None, "fields missing or not known: date"),
    (("author",), "me", "fields missing or not known: author"),
    ((*FUSED, "seconds"), [], "torch fused must have .2, 2. positive numbers"),
    ((*FUSED, "seconds", 1, 0), -1.0, "torch fused must have"),
    ((*FUSED, "seconds", 1, 0), math.nan, "torch fused must have"),
    ((*FUSED, "seconds", 1, 0), math.inf, "torch fused must have"),
    ((*FUSED, "seconds"), [[1.0, 1.0]], "torch fused must have"),
    ((*FUSED, "seconds", 1), [1.0], "torch fused must have"),
    (("sets", TINY, "yardsticks", "add_", "seconds", 0), [1.0], "add_ must have"),
]


@pytest.mark.parametrize(("path", "value", "message"), DAMAGES, ids=lambda x: str(x)[:40])
def test_a_damaged_file_is_refused(results, path, value, message, tmp_path):
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
    assert bench.table(left_out, TINY).endswith(
        "A, b: not available: why\nC, b: not available: why"
    )


def test_ratios_without_a_baseline_are_not_a_number(results):
    rows = bench.summarize(changed(results, FUSED, None), TINY)
    assert rows
    assert all(math.isnan(row[key]) for row in rows.values() for key in ("x fused", "best x"))


def test_the_median_and_the_best_of_all_timings(results):
    """The best pair need not be of one round, nor of one run."""
    other = (*FUSED[:3], "AdamW, torch foreach")
    known = changed(results, (*FUSED, "seconds"), [[3.0, 4.0], [2.0, 8.0]])
    known = changed(known, (*other, "seconds"), [[6.0, 4.0], [4.0, 1.0]])
    row = bench.summarize(known, TINY)["AdamW, torch foreach"]
    assert (row["ms"], row["best ms"]) == (3750.0, 1000.0)
    assert (row["x fused"], row["best x"]) == ((1.5 + 1.0625) / 2, 0.5)
    known = changed(
        known, ("sets", TINY, "yardsticks", "add_"), dict(amount=10**9, seconds=[[4, 2]])
    )
    rates = [bench.rate(known, TINY, "add_", of) for of in (bench.typical, bench.best)]
    assert rates == [1 / 3, 1 / 2]


def test_the_bound_is_that_of_the_same_run(results):
    known = copy.deepcopy(results)
    known["cache"], part = 100, known["sets"][TINY]
    slow, fast = dict(seconds=[[2.0, 4.0], [1.0, 1.0]]), dict(seconds=[[1.0, 8.0], [5.0, 4.0]])
    part["yardsticks"] = {key: dict(amount=1200, **slow) for key in ("copy_", "add_", "mm")}
    part["contenders"] = {"a": dict(least=600, **fast), "b": dict(least=0, **fast)}
    assert bench.bandwidth(known, TINY).tolist() == [600.0, 1000.0]  # a's, then a yardstick's
    assert bench.bound_ratio(known, TINY, "a").tolist() == [1.0, 4 / 0.6]
    assert all(map(math.isnan, bench.bound_ratio(known, TINY, "b")))


def test_committed_results_are_complete_and_no_rehearsal():
    files = sorted(RESULTS.glob("bench_*.json"))
    assert any(file.name.startswith("bench_cpu") for file in files)
    for file in files:
        found = bench.load(file)
        assert found["load"] <= bench.BUSY, "other programs were running"
        sets = {key.split(",")[0] for key in found["sets"]}
        assert {"resnet18", "gpt2", "tiny"} <= sets
        assert set(found["sets"]) == {bench.label(s, n) for s in sets for n in found["threads"]}
        for key, part in found["sets"].items():
            shapes = bench.shapes(key.split(",")[0])
            assert part["parameters"] == sum(map(math.prod, shapes))
            assert all(f"{method}, agrlib fast" in part["contenders"] for method in bench.METHODS)


def test_committed_bytes_are_those_of_the_methods():
    [found] = [bench.load(RESULTS / "bench_cpu_authenticamd_25_17.json")]
    sizes = found["processor"]
    assert found["cache"] == sizes["L3"] + found["cores"] * (sizes["L2"] + sizes["L1d"])
    for key, part in found["sets"].items():
        params = [torch.empty(shape, device="meta") for shape in bench.shapes(key.split(",")[0])]
        for row in part["contenders"].values():
            optimizer = bench.make(row["method"], params)
            assert row["bytes"] == roofline.step_bytes(optimizer)
            assert row["least"] == roofline.step_bytes(optimizer, found["cache"])


def test_no_committed_row_beats_its_bound():
    for file in RESULTS.glob("bench_*.json"):
        found = bench.load(file)
        for key, part in found["sets"].items():
            ratios = [bench.bound_ratio(found, key, name) for name in part["contenders"]]
            assert all((r >= 1 - 1e-12).all() or all(map(math.isnan, r)) for r in ratios), key


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
    name = found["name"]
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


def test_caches_together_are_the_third_level_and_the_others_of_each_core(monkeypatch):
    monkeypatch.setattr(bench, "cores", lambda: 3)
    monkeypatch.setattr(bench, "caches", lambda: {"L1d": 5, "L2": 100, "L3": 10_000})
    assert bench.cache_size("cpu") == 10_315
    monkeypatch.setattr(bench, "caches", lambda: {"L1d": 5, "L2": None, "L3": None})
    assert bench.cache_size("cpu") == 15


def test_a_system_that_tells_nothing(monkeypatch, tmp_path):
    def refuse(path, *args):
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert set(bench.caches(tmp_path / "none").values()) == {None}
    found = bench.processor()
    assert {found[key] for key in ("vendor", "family", "model", "stepping")} == {None}
    results = dict(device="cpu", device_name=found["name"] or "?", processor=found)
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
        (["--rounds", "0"], "--runs and --threads must be positive, not 0"),
        (["--threads", "2", "-1"], "must be positive, not -1"),
        (["--runs", "few"], "invalid int value: 'few'"),
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
