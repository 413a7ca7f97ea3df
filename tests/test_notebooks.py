"""tools/notebooks.py on a tiny repository: two chapters, executed once for the whole module."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools import notebooks

HEAD = """---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

"""
MODULES = {
    "__init__": "from agrlib.alpha import first\nfrom agrlib.delta import fourth\n",
    "alpha": "from agrlib.beta import second\n\n\ndef first():\n    return second()\n",
    "beta": "def second():\n    return 2\n",
    "gamma": "def third():\n    return 3\n",
    "delta": "def fourth():\n    return 4\n",
}
# `one` uses alpha and, through it, beta; `two` uses gamma; nobody uses delta.
CHAPTERS = {
    "one": ["import agrlib\n\nagrlib.first()", "value = 1\nprint(value)"],
    "two": ["from agrlib import gamma\n\ngamma.third()"],
}


def write(root: Path, name: str, cells: list[str]) -> Path:
    """Write a chapter: a line of text, and cells of which the first is tagged."""
    blocks = [f"```{{code-cell}} ipython3\n{cell}\n```\n" for cell in cells]
    blocks[0] = blocks[0].replace("\n", "\n:tags: [tagged]\n\n", 1)
    page = root / "book" / f"{name}.md"
    page.write_text(HEAD + f"# Chapter {name}\n\n" + "\nSome text.\n\n".join(blocks))
    return page


def start(root: Path, *options: str) -> subprocess.Popen[str]:
    """Start the tool as the command line does, on the agrlib of the tiny repository."""
    return subprocess.Popen(
        [sys.executable, notebooks.__file__, "--root", str(root), *options],
        env=os.environ | {"PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # a shell that runs the tests in the background has switched Ctrl-C off for them
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def run(root: Path, *options: str) -> tuple[int, str]:
    tool = start(root, *options)
    out, _ = tool.communicate(timeout=120)
    return tool.returncode, out


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> tuple[Path, str]:
    """A repository whose chapters were executed, and what the tool printed."""
    root = tmp_path_factory.mktemp("executed")
    (root / "book").mkdir()
    (root / "agrlib").mkdir()
    for name, text in MODULES.items():
        (root / "agrlib" / f"{name}.py").write_text(text)
    for name, cells in CHAPTERS.items():
        write(root, name, cells)
    (root / "book" / "plain.md").write_text("# A page without code\n")
    status, out = run(root)
    assert status == 0, out
    return root, out


@pytest.fixture
def repository(executed, tmp_path: Path) -> Path:
    """A copy to break."""
    return shutil.copytree(executed[0], tmp_path / "repository")


@pytest.fixture
def check(repository, monkeypatch, capsys):
    """A function that runs --check in this process; status and what was printed."""

    def call(*options: str) -> tuple[int, str]:
        command = ["notebooks.py", "--root", str(repository), *(options or ["--check"])]
        monkeypatch.setattr("sys.argv", command)
        status = int(notebooks.main())
        return status, capsys.readouterr().out

    return call


def pairs(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((root / "book").iterdir())}


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def test_executes_with_a_line_per_chapter_and_stores_outputs(executed):
    root, out = executed
    lines = [line for line in out.splitlines() if line.startswith("notebooks: ")]
    assert [line[:17] for line in lines] == ["notebooks: [1/2] ", "notebooks: [2/2] "]
    assert "book/one.md executed in" in out and "book/two.md executed in" in out
    notebook = json.loads((root / "book" / "one.ipynb").read_text())
    first, second = (c["outputs"][0] for c in notebook["cells"] if c["cell_type"] == "code")
    assert first["data"]["text/plain"] == ["2"] and second["text"] == ["1\n"]
    assert set(notebook["metadata"]["agrlib"]) == {"alpha", "beta"}
    assert not (root / "book" / "plain.ipynb").exists()


def test_fresh_pairs_pass(check):
    assert check() == (0, "")


def test_second_execution_gives_the_same_bytes(repository):
    before = pairs(repository)
    status, out = run(repository, "--all")
    assert status == 0 and "[2/2]" in out
    assert pairs(repository) == before


def test_only_what_differs_is_executed(check, repository, monkeypatch):
    done: list[Path] = []
    monkeypatch.setattr(notebooks, "execute_all", lambda root, pages: done.extend(pages))
    check("one", "two")
    assert done == []
    edit(repository / "book" / "two.md", "gamma.third()", "gamma.third() + 1")
    monkeypatch.setattr(notebooks, "execute_all", lambda root, pages: len(done.extend(pages) or []))
    check("one", "two")
    assert [page.stem for page in done] == ["two"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("value = 1", "value = 1 + 1"),
        ("Some text.", "Some other text."),
        ("tags: [tagged]", "tags: [tagged, nbval-ignore-output]"),
        (":tags: [tagged]", ":tags: [tagged]\n:mystnb: {image: {alt: A figure}}"),
        ("print(value)\n```", "print(value)\n```\n\nA new last cell."),
    ],
    ids=["code", "markdown", "tags", "display option", "one cell more"],
)
def test_changed_cell_fails(repository, check, old, new):
    edit(repository / "book" / "one.md", old, new)
    status, out = check()
    assert status == 1 and "book/one.md" in out and "make notebooks" in out
    assert "two.md" not in out


def test_unrun_cell_fails(repository, check):
    pair = repository / "book" / "one.ipynb"
    notebook = json.loads(pair.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    code[1].update(execution_count=None, outputs=[])
    pair.write_text(json.dumps(notebook))
    status, out = check()
    assert status == 1 and "book/one.md" in out and "never run" in out


def test_missing_pair_fails(repository, check):
    (repository / "book" / "two.ipynb").unlink()
    status, out = check()
    assert status == 1 and "book/two.md has no pair" in out


@pytest.mark.parametrize(
    ("module", "stale"),
    [("alpha", ["one"]), ("beta", ["one"]), ("gamma", ["two"]), ("delta", [])],
)
def test_changed_module_makes_stale_the_chapters_that_use_it(repository, check, module, stale):
    path = repository / "agrlib" / f"{module}.py"
    path.write_text(path.read_text() + "x = 1\n")
    status, out = check()
    assert status == (len(stale) > 0)
    assert [name for name in CHAPTERS if f"book/{name}.md" in out] == stale
    assert not stale or f"{module} changed" in out


def test_unknown_name_is_refused(check):
    with pytest.raises(SystemExit, match="no chapter named three"):
        check("--check", "one", "three")


def test_seed_feeds_the_build_only_fresh_pairs(repository, check):
    cache = repository / "_build" / ".jupyter_cache"
    edit(repository / "book" / "one.md", "value = 1", "value = 2")
    assert check("--seed")[0] == 1 and not cache.exists()
    edit(repository / "book" / "one.md", "value = 2", "value = 1")
    assert check("--seed") == (0, "") and cache.exists()


def test_chapter_that_raises_is_named_and_keeps_its_pair(repository):
    before = pairs(repository)
    write(repository, "one", ["import agrlib", "raise ArithmeticError('no such number')"])
    status, out = run(repository, "one")
    assert status == 1
    assert "book/one.md FAILED" in out and "ArithmeticError: no such number" in out
    assert pairs(repository) == before | {"one.md": (repository / "book" / "one.md").read_bytes()}


@pytest.mark.parametrize(
    ("kill", "number"),
    [(os.kill, signal.SIGINT), (os.kill, signal.SIGTERM), (os.killpg, signal.SIGINT)],
    ids=["SIGINT", "SIGTERM", "Ctrl-C in a terminal"],
)
def test_interrupted_execution_ends_at_once_and_keeps_the_old_pair(repository, kill, number):
    before = pairs(repository)
    flag = repository / "running"
    cell = f"import pathlib, time\n\npathlib.Path({str(flag)!r}).touch()\ntime.sleep(300)"
    page = write(repository, "one", ["import agrlib", cell])
    tool = start(repository, "one")
    try:
        while not flag.exists():
            assert tool.poll() is None, tool.communicate()[0]
            time.sleep(0.05)
        kill(tool.pid, number)
        out, _ = tool.communicate(timeout=20)  # which waits for the worker and its kernel, too
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(tool.pid, signal.SIGKILL)
    assert tool.returncode != 0 and "interrupted" in out
    assert pairs(repository) == before | {"one.md": page.read_bytes()}
