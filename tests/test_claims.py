"""tools/claims.py on made-up chapters: what is tight is killed, what is loose survives."""

import subprocess
import sys

from source import ROOT

PAGE = """---
kernelspec:
  name: python3
  display_name: Python 3
  language: python
---

# A chapter

```{code-cell} ipython3
unneeded = 1 / 0
```

```{code-cell} ipython3
def maximum(a, b):
    return a if a > b else b


def rule(old, new):
    return maximum(old, new)
```

```{code-cell} ipython3
---
tags: [claim, hide-cell]
---
%s
```
"""
CLAIMS = {
    "tight": "a, b = 3.0, 2.0\nupper = 2 * a + b**2\nassert 0.9 <= 10 / upper <= 1",
    "loose": "a, b = 3.0, 2.0\nupper = 2 * a + b**2\nassert 1 / upper <= 1",
    "equal": "a = 3.0\nexact = a**2\nlower_too = a + 5.9\nassert exact == 9 and lower_too <= 9",
    "largest": "exact = 5\nassert rule(5, 4) == exact",
    "wrong": "upper = 1\nassert 2 <= upper",
    "listed": "upper = 1\nassert upper > 0",
}
LISTED = """[survivors]
"listed, claim 1: upper, its constant" = "a reason"
"""


def test_loose_claims_survive_and_tight_ones_do_not(tmp_path):
    (tmp_path / "book").mkdir()
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "survivors.toml").write_text(LISTED)
    for name, claim in CLAIMS.items():
        (tmp_path / "book" / f"{name}.md").write_text(PAGE % claim)
    command = [sys.executable, ROOT / "tools" / "claims.py", "--root", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    lines = done.stdout.splitlines()
    passing = [f"claims: {name}, claim 1: nothing: passes" for name in CLAIMS if name != "wrong"]
    assert set(passing) <= set(lines)
    assert "claims: wrong, claim 1: nothing: FAILS before anything is broken" in done.stdout
    survived = {line.removesuffix(": SURVIVED") for line in lines if line.endswith("SURVIVED")}
    assert survived == {
        "claims: loose, claim 1: upper, its constant",
        "claims: loose, claim 1: upper, '2 * a + b ** 2' without its first term",
        "claims: loose, claim 1: upper, '2 * a + b ** 2' without its second term",
        "claims: loose, claim 1: upper, '2 * a' without its first factor",
        "claims: loose, claim 1: upper, '2 * a' without its second factor",
        "claims: loose, claim 1: upper, 'b ** 2' with another exponent",
        "claims: equal, claim 1: lower_too, 'a + 5.9' without its first term",
        "claims: equal, claim 1: lower_too, 'a + 5.9' without its second term",
    }
    assert done.returncode == 1
    assert "nothing" not in "".join(survived)


def test_an_entry_that_nothing_needs_is_noticed(tmp_path):
    (tmp_path / "book").mkdir()
    (tmp_path / "tools").mkdir()
    entry = '"tight, claim 1: upper, its constant" = "no reason"\n'
    (tmp_path / "tools" / "survivors.toml").write_text("[survivors]\n" + entry)
    (tmp_path / "book" / "tight.md").write_text(PAGE % CLAIMS["tight"])
    command = [sys.executable, ROOT / "tools" / "claims.py", "--root", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert "killed, though tools/survivors.toml expects it" in done.stdout
    assert done.returncode == 1
