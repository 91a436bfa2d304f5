"""Figure 1 of the paper: the exact proximal update on a 1D regression with a batch of one.

A small network has been fitted to some points; then one more point, off the curve, is trained on, by the exact
proximal point (:func:`apo.proximal.proximal_step`). With the weight-space term alone the whole curve moves; with the
function-space term alone it grows a spike; with both it adjusts nearby.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from apo import SquaredError
from apo.proximal import flat_model, proximal_step
from benchmarks.common.console import progress, wrote
from benchmarks.common.steps import take_steps

PANELS: dict[str, tuple[tuple[float, float], ...]] = {
    "weight space": ((0, 30.0), (0, 10.0), (0, 3.0), (0, 0.3)),
    "function space": ((100.0, 1e-6), (10.0, 1e-6), (1.0, 1e-6), (0.1, 1e-6)),
    "both": ((100.0, 0.01), (10.0, 0.01), (1.0, 0.01), (0.1, 0.01)),
}
"""``(λ_FSD, λ_WSD)`` of each curve, from red to blue. The function-space panel keeps a trace of the weight-space term,
because without it the minimum isn't one point."""

POINT = (0.6, 1.5)
"""The batch of one: ``(x, t)``."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This command has no options of its own."""


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Compute the updates, draw them into ``figure1.png``, return the curves."""
    with progress() as bar:
        task = bar.add_task("figure 1", total=sum(map(len, PANELS.values())))
        curves = updates(lambda: bar.advance(task))
    path = options.out / "figure1.png"
    draw(curves, path)
    wrote(path)
    return {"figure": str(path), **{k: v for k, v in curves.items() if k != "grid"}}


def fitted() -> tuple[nn.Module, Tensor, Tensor]:
    """A network that has learned a gentle curve, and the inputs and targets it learned from, in float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(-2, 2, 60, dtype=torch.float64)[:, None]
    t = 0.5 * torch.sin(1.5 * x) + 0.02 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1)).double()
    with torch.no_grad():
        next(model.parameters()).mul_(6)  # wide enough a spectrum for a spike
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in take_steps(optimizer, lambda step: lambda: SquaredError()(model(x), t), range(600)):
        pass
    return model, x, t


def updates(advance: Any = lambda: None) -> dict[str, Any]:
    """``{"grid": [...], "before": [...], panel: {"λ_FSD=…, λ_WSD=…": curve}}``, curves over the grid."""
    model, x, _ = fitted()
    theta, f = flat_model(model)
    grid = torch.linspace(-2, 2, 401, dtype=torch.float64)[:, None]
    here, target = (torch.tensor([[value]], dtype=torch.float64) for value in POINT)
    rho, before = SquaredError(), f(theta, x)
    curves: dict[str, Any] = {"grid": grid.flatten().tolist(), "before": f(theta, grid).flatten().tolist()}
    for panel, weights in PANELS.items():
        curves[panel] = {}
        for fsd, wsd in weights:
            terms = (lambda u: rho(f(u, here), target), lambda u: rho(f(u, x), before))
            new = proximal_step(theta, *terms, fsd_weight=fsd, wsd_weight=wsd, tolerance=1e-6, iterations=60)
            curves[panel][f"λ_FSD={fsd:g}, λ_WSD={wsd:g}"] = f(new, grid).flatten().tolist()
            advance()
    return curves


def draw(curves: dict[str, Any], path: Path) -> None:
    """Three panels, red to blue."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    for axes, panel in zip(figure.subplots(1, 3, sharey=True), PANELS, strict=True):
        axes.plot(curves["grid"], curves["before"], color="black", label="before")
        for i, (label, curve) in enumerate(curves[panel].items()):
            share = i / (len(curves[panel]) - 1)
            axes.plot(curves["grid"], curve, color=(1 - share, 0.1, share), label=label, linewidth=1)
        axes.plot(*POINT, "x", color="black", markersize=9)
        axes.set(title=panel, ylim=(-1.2, 2.2))
        axes.legend(fontsize=7, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
