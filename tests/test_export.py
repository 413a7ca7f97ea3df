"""tools/export.py on a tiny repository, fresh and broken in every way it must notice."""

from pathlib import Path

import pytest

from tools import export

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
DOCSTRING = '"""A module."""\n\nfrom math import sqrt'
RULE = "def rule(grad):\n    return sqrt(grad)  # (eq)"


def chapter(*cells: str) -> str:
    """Return a chapter: a page with one cell of its own and these exported cells."""
    exported = [f"```{{code-cell}} ipython3\n:tags: [export]\n\n{cell}\n```\n" for cell in cells]
    own = "```{code-cell} ipython3\nprint('not exported')\n```\n"
    return HEAD + "# A chapter\n\n" + "\nSome text.\n\n".join([own, *exported])


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "book").mkdir()
    (tmp_path / "agrlib").mkdir()
    (tmp_path / "agrlib" / "__init__.py").write_text("# no chapter exports this file\n")
    (tmp_path / "book" / "alpha.md").write_text(chapter(DOCSTRING, RULE))
    (tmp_path / "book" / "plain.md").write_text("# A page without code\n")
    for name, target in export.modules(tmp_path).items():
        name.write_text(target)
    return tmp_path


def run(root: Path, *options: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Call the tool as the command line does."""
    monkeypatch.setattr("sys.argv", ["export.py", "--root", str(root), *options])
    return int(export.main())


@pytest.fixture
def check(repository, monkeypatch, capsys):
    """A function that runs --check and returns its exit status and what it printed."""

    def call() -> tuple[int, str]:
        status = run(repository, "--check", monkeypatch=monkeypatch)
        return status, capsys.readouterr().out

    return call


def test_module_is_the_exported_cells_and_nothing_else(repository):
    text = (repository / "agrlib" / "alpha.py").read_text()
    head = "# Exported from book/alpha.md: edit the chapter, not this file.\n"
    assert text == f"{head}{DOCSTRING}\n\n\n{RULE}\n"
    assert not (repository / "agrlib" / "plain.py").exists()


def test_fresh_repository_passes(check):
    assert check() == (0, "")


def test_edited_cell_is_stale_until_exported(repository, check, monkeypatch):
    page, module = repository / "book" / "alpha.md", repository / "agrlib" / "alpha.py"
    page.write_text(page.read_text().replace("sqrt(grad)", "sqrt(grad + 1)"))
    before = module.read_text()
    status, out = check()
    assert status == 1
    assert "book/alpha.md" in out and "make export" in out
    assert "-    return sqrt(grad)" in out and "+    return sqrt(grad + 1)" in out
    assert module.read_text() == before, "--check wrote"
    assert run(repository, monkeypatch=monkeypatch) == 0
    assert check()[0] == 0
    assert "sqrt(grad + 1)" in module.read_text()


def test_module_edited_by_hand_fails_and_is_written_over(repository, check, monkeypatch):
    module = repository / "agrlib" / "alpha.py"
    module.write_text(module.read_text() + "extra = 1\n")
    status, out = check()
    assert status == 1 and "-extra = 1" in out and "agrlib/alpha.py" in out
    run(repository, monkeypatch=monkeypatch)
    assert "extra" not in module.read_text()


def test_module_that_was_never_written_fails(repository, check):
    (repository / "agrlib" / "alpha.py").unlink()
    status, out = check()
    assert status == 1 and "agrlib/alpha.py" in out


@pytest.mark.parametrize("orphan", ["left_over.py", "inner/left_over.py"])
def test_orphaned_module_fails(repository, check, orphan):
    path = repository / "agrlib" / orphan
    path.parent.mkdir(exist_ok=True)
    path.write_text("x = 1\n")
    status, out = check()
    assert status == 1 and f"agrlib/{orphan} is exported by no chapter" in out


def test_two_chapters_that_claim_one_module(repository, check):
    (repository / "book" / "part").mkdir()
    (repository / "book" / "part" / "alpha.md").write_text(chapter(DOCSTRING))
    with pytest.raises(SystemExit, match=r"(?s)book/alpha.md.*book/part/alpha.md.*claim alpha.py"):
        check()


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ((DOCSTRING, "%timeit 1"), r"beta.md: .*magic: '%timeit 1'"),
        ((DOCSTRING, "!pip install x"), r"beta.md: .*magic"),
        ((DOCSTRING, "def broken(:"), r"beta.md: the exported cells are no module"),
        (("import math",), r"beta.md: the first exported cell must begin with a docstring"),
    ],
)
def test_cells_that_are_no_module_are_refused(repository, check, cells, message):
    (repository / "book" / "beta.md").write_text(chapter(*cells))
    with pytest.raises(SystemExit, match=message):
        check()


def test_this_repository_is_fresh(monkeypatch):
    assert run(export.ROOT, "--check", monkeypatch=monkeypatch) == 0
