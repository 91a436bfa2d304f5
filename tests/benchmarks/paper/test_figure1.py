"""What Figure 1 shows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from apo.proximal import PROXIMAL_POINT
from benchmarks.paper import figure1
from tests.benchmarks.paper.helpers import options


def test_figure_1_shows_what_the_paper_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {panel: weights[1:3] for panel, weights in figure1.PANELS.items()}
    monkeypatch.setattr(figure1, "PANELS", few)
    assert PROXIMAL_POINT.loss == PROXIMAL_POINT.fsd == "exact"
    drawn = figure1.run(options(figure1, "--out", str(tmp_path)))
    assert (tmp_path / "figure1.png").stat().st_size > 10_000
    grid = torch.linspace(-2, 2, 401, dtype=torch.float64)
    before = torch.tensor(drawn["before"])
    x, t = figure1.POINT
    at, far = (grid - x).abs() < 0.01, (grid - x).abs() > 1
    near = ((grid - x).abs() > 0.1) & ((grid - x).abs() < 0.3)

    def moved(panel: str, where: torch.Tensor) -> float:
        last = torch.tensor(list(drawn[panel].values())[-1])
        return (last - before)[where].abs().mean().item()

    needed = t - before[at].mean().item()
    # the weight-space term alone: a global adjustment
    assert moved("weight space", far) > 0.3 * needed
    # the function-space term alone: a spike that leaves even its neighbours
    assert moved("function space", at) > 0.8 * needed
    assert moved("function space", near) < 0.2 * needed
    # both: a local adjustment, which takes the neighbours with it
    assert moved("both", at) > 0.8 * needed
    assert moved("both", far) < 0.1 * needed
    assert moved("both", near) > 1.5 * moved("function space", near)
