"""What a step costs with each front end and with the baselines: MLP 784-1000-1000-10, batch 100, one thread.

Whole steps are timed, closure and all, a period of ``interval`` steps at a time, so that each sample holds exactly
one meta-step (APO's defaults: as many as steps); contestants take turns. The baselines renew their factors and inverses
(roots) as often.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import nn

import apo
from benchmarks.common.console import console, progress
from benchmarks.common.results import write
from benchmarks.common.timing import interleave
from benchmarks.paper.baselines import EKFAC, KFAC, Shampoo

BOUNDS = {"AdaptiveLR on SGDm": 1.35, "APO, blocks of 64": 5.0, "APO, full blocks": 17.0}
"""Times the cost of plain SGDm, at interval 10: what the project holds itself to on a CPU."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, help="time for each contestant (default: 30, with --quick 3)")
    parser.add_argument("--interval", type=int, default=10, help="steps to a meta-update (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU's (default: %(default)s)")
    parser.add_argument("--width", type=int, default=1000, help="of the hidden layers (default: %(default)s)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, and return ``{"step_seconds": ..., "ratio": ..., "bound": ...}`` by contestant."""
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        calls = {name: _period(make, options) for name, make in _contestants(options.interval).items()}
        with progress() as bar:
            task = bar.add_task("overhead", total=1.0)
            samples = interleave(
                calls,
                seconds=options.seconds or (3.0 if options.quick else 30.0),
                advance=lambda share: bar.update(task, completed=share),
            )
    finally:
        torch.set_num_threads(threads)
    base = samples["SGDm"]
    found = {
        name: {
            "step_seconds": sample.median / options.interval,
            "spread": [x / options.interval for x in sample.spread],
            "periods": len(sample.times),
            "ratio": sample.median / base.median,
            "bound": BOUNDS.get(name),
        }
        for name, sample in samples.items()
    }
    table = Table(
        title=f"MLP 784-{options.width}-{options.width}-10, batch 100, a meta-update every {options.interval} steps"
    )
    for column in ("optimizer", "ms a step", "quartiles", "x SGDm", "bound"):
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    for name, row in found.items():
        low, high = row["spread"]
        bound = "" if row["bound"] is None else f"{row['bound']:.2f}"
        table.add_row(
            name,
            f"{1e3 * row['step_seconds']:.1f}",
            f"{1e3 * low:.1f} to {1e3 * high:.1f}",
            f"{row['ratio']:.2f}",
            bound,
        )
    console.print(table)
    payload: dict[str, Any] = {
        "interval": options.interval,
        "width": options.width,
        "threads": options.threads,
        "contestants": found,
    }
    path = write(options.out, "overhead", options.device, payload)
    console.print(f"wrote {path}", soft_wrap=True)
    return payload


def _contestants(interval: int) -> dict[str, Callable[[nn.Module, Callable[[], torch.Tensor]], torch.optim.Optimizer]]:
    def sgdm(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def goal(model: nn.Module, inputs: Callable[[], torch.Tensor]) -> apo.ProximalObjective:
        return apo.ProximalObjective(model, inputs, "kl")

    settings: dict[str, Any] = {"interval": interval, "warmup": 0}
    rare: dict[str, Any] = {"factor_interval": interval, "inverse_interval": interval, "warmup": 0}
    return {
        "SGDm": lambda model, inputs: sgdm(model),
        "Adam": lambda model, inputs: torch.optim.Adam(model.parameters(), lr=1e-3),
        "AdaptiveLR on SGDm": lambda model, inputs: apo.AdaptiveLR(sgdm(model), goal(model, inputs), **settings),
        "APO, blocks of 64": lambda model, inputs: apo.APO(
            model, goal(model, inputs), lr=0.01, block_size=64, **settings
        ),
        "APO, defaults: a meta-update at every step": lambda model, inputs: apo.APO(
            model, goal(model, inputs), lr=0.01
        ),
        "APO, full blocks": lambda model, inputs: apo.APO(
            model, goal(model, inputs), lr=0.01, block_size=None, **settings
        ),
        "KFAC": lambda model, inputs: KFAC(model, lr=0.01, damping=0.1, **rare),
        "EKFAC": lambda model, inputs: EKFAC(model, lr=0.01, damping=0.1, **rare),
        "Shampoo": lambda model, inputs: Shampoo(
            model.parameters(), lr=0.01, grafting="sgd", interval=interval, warmup=0
        ),
    }


def _period(
    make: Callable[[nn.Module, Callable[[], torch.Tensor]], torch.optim.Optimizer], options: argparse.Namespace
) -> Callable[[], None]:
    """``interval`` steps on batches of its own, from a model of its own."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 784, generator=generator).to(options.device)
    t = torch.randint(10, (4000,), generator=generator).to(options.device)
    torch.manual_seed(0)
    width = options.width
    model = nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    model = model.to(options.device)

    def batch() -> torch.Tensor:
        return torch.randint(len(x), (100,), generator=generator).to(options.device)

    optimizer = make(model, lambda: x[batch()])

    def period() -> None:
        for _ in range(options.interval):
            here = batch()

            def closure(here: torch.Tensor = here) -> torch.Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x[here]), t[here])
                loss.backward()  # type: ignore[no-untyped-call]
                return loss

            optimizer.step(closure)  # type: ignore[arg-type]

    return period
