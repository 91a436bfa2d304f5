"""The examples that the README shows train, and print what they say."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def printed(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    torch.manual_seed(0)
    runpy.run_path(str(EXAMPLES / f"{name}.py"))
    return capsys.readouterr().out


def test_learning_rate(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed("learning_rate", capsys)
    losses = [float(x) for x in re.findall(r"loss (\S+)", out)]
    rates = [float(x) for x in re.findall(r"learned rate (\S+)", out)]
    assert len(losses) == len(rates) == 9
    assert losses[0] > 2
    assert losses[-1] < 0.05
    assert all(1e-4 < rate < 0.1 for rate in rates[1:])


def test_preconditioner(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed("preconditioner", capsys)
    assert re.search(r"2\.weight \+ bias +256 x 257 +5 x 64 +4 x 64", out)
    losses = [float(x) for x in re.findall(r"loss (\S+)", out)]
    assert losses[0] > 2
    assert losses[-1] < 0.1
