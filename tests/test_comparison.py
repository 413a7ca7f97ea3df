"""The script of the long comparison: a start that was stopped goes on, other data are refused."""

import json

import pytest

from tools import comparison

SMALL = dict(
    comparison.PROTOCOL,
    epochs=1,
    step_sizes=[0.1, 30.0],
    tuning_seeds=[7],
    seeds=[0, 1],
    batch_size=512,
)


@pytest.fixture
def two_cells(monkeypatch):
    monkeypatch.setattr(comparison, "RULES", {"SGD": comparison.RULES["SGD"]})
    chains = {name: comparison.TRANSFORMS[name] for name in ("none", "agr")}
    monkeypatch.setattr(comparison, "TRANSFORMS", chains)
    monkeypatch.setattr(comparison, "OUTSIDE", {})


def test_a_stopped_start_goes_on_and_changes_nothing_that_is_there(two_cells, tmp_path):
    path = tmp_path / "results" / "comparison.json"
    whole = comparison.measure(path, SMALL)
    assert [(cell["rule"], cell["transform"]) for cell in whole["cells"]] == [
        ("SGD", "none"),
        ("SGD", "agr"),
    ]
    first = json.loads(path.read_text())
    assert first == whole
    for cell in first["cells"]:
        assert cell["lr"] == 0.1, "the other one diverges"
        assert [run["seed"] for run in cell["runs"]] == [0, 1]
        assert all(len(run["train_loss"]) == 2 for run in cell["runs"])
        assert len({run["test_loss"] for run in cell["runs"]}) == 2
    marked = dict(first["cells"][0], marked=True)
    comparison.save(path, first | dict(cells=[marked]))
    again = comparison.measure(path, SMALL)
    assert again["cells"] == [marked, first["cells"][1]]


def test_results_of_another_protocol_are_refused(two_cells, tmp_path):
    path = tmp_path / "comparison.json"
    comparison.measure(path, SMALL)
    before = path.read_text()
    with pytest.raises(SystemExit, match="another protocol"):
        comparison.measure(path, dict(SMALL, epochs=2))
    assert path.read_text() == before


def test_the_committed_results_are_those_of_the_script():
    results = json.loads(comparison.RESULTS.read_text())
    assert results["protocol"] == comparison.PROTOCOL
    assert set(results["provenance"]) == set(comparison.provenance())
    found = {(cell["rule"], cell["transform"]) for cell in results["cells"]}
    table = {(rule, name) for rule in comparison.RULES for name in comparison.TRANSFORMS}
    assert found == table | set(comparison.OUTSIDE) and len(results["cells"]) == len(found)
