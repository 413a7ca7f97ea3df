"""The README's program runs as printed."""

import re
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def test_the_ten_lines_of_the_readme_train_a_model(capsys):
    [program] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    torch.manual_seed(0)
    scope = {}
    exec(program, scope)
    assert scope["loss"].item() < 1e-3
    assert capsys.readouterr().out.startswith("loss after 200 steps: 0.00")


def test_the_links_of_the_readme_lead_to_files():
    for name in ("README.md", "CONTRIBUTING.md"):
        links = re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / name).read_text())
        missing = [link for link in links if not (ROOT / link).exists()]
        assert not missing, f"{name} links to {missing}"
