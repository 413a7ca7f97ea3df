"""Several processes train as one: FSDP2, HSDP, tensor parallel, DDP, and their checkpoints.

The processes run tests/sharded.py, all checks of a number of processes at once, since starting them
takes seconds; the tests read what they found.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sharded
import torch.distributed as dist

import agrlib

TOLERANCE = 2e-6
ROUNDS = {"none": 0, "value": 0, "gc": 0, "agr-global": 2}  # of dependent sums; otherwise 1
HERE = Path(__file__).resolve().parent


def launch(world: int, folder: Path, **environment: str) -> list[dict[str, Any]]:
    """Run the checks on a number of processes; return what each process found."""
    path = os.pathsep.join([str(HERE.parent), str(HERE)])
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environment
    command = [sys.executable, str(HERE / "sharded.py")]
    logs = [folder / f"log-{world}-{rank}" for rank in range(world)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(folder)],
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            env=variables,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        for process in processes:
            process.wait(timeout=400)
    finally:
        for process in processes:
            process.kill()
    for process, log in zip(processes, logs, strict=True):
        assert process.returncode == 0, log.read_text()[-5000:]
    return [json.loads((folder / f"{world}-{rank}.json").read_text()) for rank in range(world)]


pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def two(folder):
    return launch(2, folder)


@pytest.fixture(scope="module")
def four(two, folder):  # which loads the checkpoints of two
    return launch(4, folder)


@pytest.fixture
def found(request):
    """A function that returns the dicts of all processes for a check, where it did not raise."""

    def look(world: int, name: str) -> list[dict[str, Any]]:
        results = [
            process[name] for process in request.getfixturevalue({2: "two", 4: "four"}[world])
        ]
        for result in results:
            assert not isinstance(result, str), result
        return results

    return look


def assert_equal_to_one_process(results, way=None, rounds=None):
    for result in results:
        assert result["error"] < TOLERANCE, result
        if way:
            assert result["way"] == way
        if rounds is not None:
            assert result["counts"] == ({"allreduce_": rounds} if rounds else {})


def kernels_of(fused):
    return ["CPUBatch"] if fused else ["eager"]


either = pytest.mark.parametrize("fused", [True, False], ids=["fused", "eager"])
both = pytest.mark.parametrize("world", [2, 4])


# --- FSDP2 ----------------------------------------------------------------------------------------

SOME = [(4, "AdamW", chain) for chain in ("agr", "gc", "gc-agr", "agr-global")]
ALL = [(2, "AdamW", chain) for chain in sharded.CHAINS]


@either
@pytest.mark.parametrize(("world", "method", "chain"), ALL + SOME)
def test_shards_train_as_one_process(found, world, method, chain, fused):
    results = found(world, f"fsdp {method} {chain} {fused}")
    rounds = ROUNDS.get(chain, 1) if fused else None
    assert_equal_to_one_process(results, kernels_of(fused), rounds)


@pytest.mark.parametrize("chain", ["agr", "gc-agr", "agr-global"])
@pytest.mark.parametrize(("world", "fused"), [(2, True), (2, False), (4, True)])
def test_shards_train_adan_as_one_process(found, world, chain, fused):
    results = found(world, f"fsdp Adan {chain} {fused}")
    rounds = ROUNDS.get(chain, 1) if fused else None
    assert_equal_to_one_process(results, kernels_of(fused), rounds)


def test_some_parts_are_uneven_and_some_are_empty(found):
    sizes = [result["sizes"] for result in found(4, "fsdp AdamW agr True")]
    assert [sum(column) for column in zip(*sizes, strict=True)] == [35, 7, 21, 3]
    assert sizes[0] == [10, 2, 7, 1] and sizes[3] == [5, 1, 0, 0]


@both
@either
def test_parameters_without_gradients(found, world, fused):
    """A sharded and a plain one; the totals of the others still find their places."""
    results = found(world, f"missing {fused}")
    assert_equal_to_one_process(results, kernels_of(fused), 2 if fused else None)


@both
@either
def test_sums_of_different_groups_travel_together(found, world, fused):
    results = found(world, f"groups {fused}")
    assert_equal_to_one_process(results, kernels_of(fused), 1 if fused else None)


def test_kernels_and_eager_steps_in_one_optimizer(found):
    assert_equal_to_one_process(found(2, "mixed"), ["CPUBatch", "eager"])


@pytest.mark.parametrize("function", sharded.USERS)
def test_a_users_function_before_a_kernel(found, function):
    """One of them returns its gradient placed otherwise than its parameter."""
    assert_equal_to_one_process(found(2, f"user {function}"), ["CPUBatch", "eager"])


def test_attached_to_a_torch_optimizer(found):
    assert_equal_to_one_process(found(2, "attached"))


@either
def test_a_scaler_skips_the_step_everywhere_if_one_process_overflows(found, fused):
    for result in found(2, f"overflow {fused}"):
        assert result["skipped"] == 0.0 and result["scale"] == 4.0
        assert result["error"] < TOLERANCE


# --- other ways to lay out a model ----------------------------------------------------------------


@either
@pytest.mark.parametrize("chain", ["agr", "gc-agr", "agr-global"])
def test_copies_are_not_counted_twice(found, chain, fused):
    results = found(4, f"hsdp {chain} {fused}")
    rounds = ROUNDS.get(chain, 1) if fused else None
    assert_equal_to_one_process(results, kernels_of(fused), rounds)


@pytest.mark.parametrize("chain", ["agr", "global"])
@pytest.mark.parametrize("fused", [True, False, None])
def test_tensor_parallel(found, chain, fused):
    rounds = None if fused is False else 1
    way = kernels_of(fused is not False)
    assert_equal_to_one_process(found(2, f"tp {chain} {fused}"), way, rounds)


@pytest.mark.parametrize(("world", "name"), [(2, "tp gc"), (4, "2d gc"), (4, "2d columns")])
def test_rows_that_are_split_have_no_kernel(found, world, name):
    """Every process refuses, before anything is written; left to itself the step goes eager."""
    for result in found(world, f"{name} True"):
        assert "the rows of a parameter are split between" in result["refused"]
        assert result.get("error", 0) == result.get("state", 0) == 0
    assert_equal_to_one_process(found(world, f"{name} None"), ["CPUBatch", "eager"])


def test_partial_gradients_of_a_sequence_parallel_norm(found):
    for result in found(2, "sp True"):
        assert ": a gradient is Partial" in result["refused"]
    for fused in (False, None):
        results = found(2, f"sp {fused}")
        assert_equal_to_one_process(results)
        assert all(any(result["partial"]) for result in results)


@either
def test_two_dimensions_take_two_all_reduces(found, fused):
    """The last layer's mesh is a slice of that of the others; its sums join theirs."""
    results = found(4, f"2d agr {fused}")
    assert_equal_to_one_process(results, kernels_of(fused), 2 if fused else None)


@either
def test_data_parallel(found, fused):
    assert_equal_to_one_process(found(2, f"ddp {fused}"), kernels_of(fused), 0)


@either
def test_optimizers_of_some_of_the_tensors(found, fused):
    results = found(2, f"zero {fused}")
    assert_equal_to_one_process(results)
    for result in results:
        assert len(result["refused"]) == 2
        assert all("of which ZeroRedundancyOptimizer" in text for text in result["refused"])


def test_a_partial_total_is_only_local_for_item(found):
    for result in found(2, "wrong totals"):
        assert result["item"] == 3.0 and result["full"] == 6.0
        assert "Partial" in result["refused"]


# --- stochastic rounding --------------------------------------------------------------------------


@both
@either
def test_copies_round_alike_and_parts_do_not(request, world, fused):
    parts = [
        process[f"rounded {fused}"]
        for process in request.getfixturevalue({2: "two", 4: "four"}[world])
    ]
    assert all(isinstance(part, list) and len(part) == 256 for part in parts), parts
    assert len({tuple(part) for part in parts}) == 2
    assert parts[: world // 2] + parts[: world // 2] == parts if world == 4 else True
    assert len(set(parts[0])) > 1


@both
def test_kernels_round_as_eager_steps(request, world):
    for process in request.getfixturevalue({2: "two", 4: "four"}[world]):
        assert process["rounded True"] == process["rounded False"]


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sharded.METHODS)
def test_checkpoints_record_the_transforms(two, method):
    records = {"AdamW": "centralize, agr", "Adan": "agr, clip_global_norm(0.05)"}
    assert [process[f"save {method}"] for process in two] == [records[method]] * 2


@either
@pytest.mark.parametrize("method", sharded.METHODS)
def test_checkpoint_of_two_processes_continues_on_four(found, method, fused):
    for result in found(4, f"load {method} {fused}"):
        assert result["error"] < TOLERANCE and result["steps"] == [6.0] * 6


@pytest.mark.parametrize("method", sharded.METHODS)
def test_plain_state_dict_of_two_processes_continues_on_four(found, method):
    for result in found(4, f"load plain {method}"):
        assert result["error"] < TOLERANCE and result["steps"] == [6.0] * 6


@either
@pytest.mark.parametrize("method", sharded.METHODS)
@pytest.mark.filterwarnings("ignore")
def test_checkpoint_of_two_processes_continues_alone(two, folder, method, fused):
    result = sharded.load(sharded.network(), folder, method, fused, sharded.data())
    assert result["error"] < TOLERANCE and result["steps"] == [6.0] * 6


@pytest.mark.filterwarnings("ignore")
def test_checkpoint_of_other_transforms_is_refused(two, folder, monkeypatch):
    chain = ("Adan", [agrlib.agr])
    monkeypatch.setattr(sharded, "broken_off", lambda name: (chain, []))
    refused = functools.partial(sharded.load, sharded.network(), folder, "Adan", True)
    with pytest.raises(
        ValueError, match=r"transforms \[agr, clip_global_norm\(0.05\)\].* has \[agr\]"
    ):
        refused(sharded.data())


# --- the kernels of a GPU, in Triton's interpreter ------------------------------------------------


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    pytest.importorskip("triton")
    return launch(2, tmp_path_factory.mktemp("interpreted"), TRITON_INTERPRET="1")


@pytest.mark.parametrize("chain", ["gc-agr", "agr-global"])
def test_gpu_kernels_train_as_one_process(interpreted, chain):
    for process in interpreted:
        result = process[f"fsdp AdamW {chain} True"]
        assert not isinstance(result, str), result
        assert_equal_to_one_process([result], ["GPUBatch"], ROUNDS.get(chain, 1))


def test_processes_that_sort_their_tensors_otherwise_add_up_the_same(interpreted):
    results = [process["different orders"] for process in interpreted]
    assert not any(isinstance(result, str) for result in results), results
    assert results[0]["order"] != results[1]["order"], "nothing is tested"
    assert_equal_to_one_process(results, ["GPUBatch"])
