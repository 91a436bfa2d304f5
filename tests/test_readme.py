"""README keeps its word: the examples run as written, and every table is what the results files hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks import readme

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
DIGITS, LEARNING_RATE, PRECONDITIONER, KERNELS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def printed(capsys: pytest.CaptureFixture[str], *codes: str) -> str:
    torch.manual_seed(0)
    scope: dict[str, object] = {}
    for code in codes:
        exec(compile(code, "README.md", "exec"), scope)
    return capsys.readouterr().out


@pytest.mark.parametrize("code", [KERNELS, LEARNING_RATE, PRECONDITIONER])
def test_examples_are_about_ten_lines(code: str) -> None:
    assert len([line for line in code.splitlines() if line.strip()]) <= 12


def test_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    assert "512, 4609" in printed(capsys, KERNELS)


def test_learning_rate(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, DIGITS, LEARNING_RATE)
    losses = [float(x) for x in re.findall(r"loss (\S+)", out)]
    rates = [float(x) for x in re.findall(r"learned rate (\S+)", out)]
    assert len(losses) == len(rates) == 9
    assert losses[0] > 2
    assert losses[-1] < 0.05
    assert all(1e-4 < rate < 0.1 for rate in rates[1:])


def test_preconditioner(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, DIGITS, PRECONDITIONER)
    assert re.search(r"2\.weight \+ bias +256 x 257 +5 x 64 +4 x 64", out)
    losses = [float(x) for x in re.findall(r"loss (\S+)", out)]
    assert losses[0] > 2
    assert losses[-1] < 0.1


def test_tables_are_those_of_the_results_files() -> None:
    assert readme.render(TEXT) == TEXT


def test_pictures_and_pages_exist() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", TEXT)
    assert len(links) >= 5
    assert all((ROOT / link).is_file() for link in links)


def test_the_two_commands_are_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", TEXT, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert "make test" in (ROOT / ".ci" / "run").read_text()
