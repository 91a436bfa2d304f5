"""The costs of the kernels' launches on the named models, by formula."""

from __future__ import annotations

import re

import pytest

from benchmarks.__main__ import main
from benchmarks.kernels import shapes


def test_launch_costs(capsys: pytest.CaptureFixture[str]) -> None:
    """By formula, of any model, in no time; the MLP's right-hand products come to twice its gradients' sides."""
    assert main(["throughput", "--account", "--models", "mlp", "--dtypes", "bf16"]) == 0
    out = capsys.readouterr().out
    assert "nothing here is a measurement" in out
    flops = sum(2 * (-(-m // 8) * 8) * (-(-n // 8) * 8) ** 2 for m, n in shapes.MODELS["mlp"])
    assert re.search(rf"forward\W+right\W+{flops / 1e9:.3f}", out)
    assert re.search(r"step\W+tile_update.*memory|step\W+tile_update.*launch", out)
