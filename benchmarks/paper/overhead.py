"""``python -m benchmarks overhead``: what a step costs with each front end and with the baselines.

MLP 784-1000-1000-10, batch 100, one thread. Whole steps are timed, closure included, ``interval`` steps at a time, so
that each sample holds exactly one meta-step (with APO's defaults: one per step). Contestants take turns. The baselines
renew their factors and inverses (roots) as often.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

import apo
from benchmarks.common import results
from benchmarks.common.console import console, progress, table, wrote
from benchmarks.common.steps import take_steps
from benchmarks.common.timing import cpu_threads, interleave
from benchmarks.paper.baselines import EKFAC, KFAC, Shampoo
from benchmarks.paper.models import mlp

Make = Callable[[nn.Module, Callable[[], Tensor]], Optimizer]
"""Makes an optimizer of a model, and of what returns the inputs of B′."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, help="time for each contestant (default: 30, with --quick 3)")
    parser.add_argument("--interval", type=int, default=10, help="a meta-update every N steps (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU's (default: %(default)s)")
    parser.add_argument("--width", type=int, default=1000, help="of the hidden layers (default: %(default)s)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, write ``overhead.json``, and return its content."""
    calls = {name: _period(make, options) for name, make in _contestants(options.interval).items()}
    with cpu_threads(options.threads), progress() as bar:
        task = bar.add_task("overhead", total=1.0)
        samples = interleave(
            calls,
            seconds=options.seconds or (3.0 if options.quick else 30.0),
            advance=lambda share: bar.update(task, completed=share),
        )
    found = {
        name: {
            "step_seconds": sample.median / options.interval,
            "spread": [x / options.interval for x in sample.spread],
            "periods": len(sample.times),
            "ratio": sample.median / samples["SGDm"].median,
        }
        for name, sample in samples.items()
    }
    title = f"MLP 784-{options.width}-{options.width}-10, batch 100, a meta-update every {options.interval} steps"
    columns = ("optimizer", "ms per step", "quartiles", "÷ SGDm")
    console.print(table(title, columns, map(_row, found.items()), text=("optimizer",)))
    settings = {"interval": options.interval, "width": options.width, "threads": options.threads}
    payload = {**settings, "contestants": found}
    wrote(results.write(options.out, "overhead", options.device, payload))
    return payload


def _row(entry: tuple[str, dict[str, Any]]) -> list[str]:
    name, row = entry
    quartiles = " to ".join(f"{1e3 * seconds:.1f}" for seconds in row["spread"])
    return [name, f"{1e3 * row['step_seconds']:.1f}", quartiles, f"{row['ratio']:.2f}"]


def _contestants(interval: int) -> dict[str, Make]:
    def sgdm(model: nn.Module, inputs: Callable[[], Tensor]) -> Optimizer:
        return SGD(model.parameters(), lr=0.01, momentum=0.9)

    def adaptive(model: nn.Module, inputs: Callable[[], Tensor]) -> Optimizer:
        objective = apo.ProximalObjective(model, inputs, "kl")
        return apo.AdaptiveLR(sgdm(model, inputs), objective, interval=interval, warmup=0)

    def preconditioned(**settings: Any) -> Make:
        return lambda model, inputs: apo.APO(model, apo.ProximalObjective(model, inputs, "kl"), lr=0.01, **settings)

    def kfac(kind: type[KFAC] | type[EKFAC]) -> Make:
        rare: dict[str, Any] = {"factor_interval": interval, "inverse_interval": interval, "warmup": 0}
        return lambda model, inputs: kind(model, lr=0.01, damping=0.1, **rare)

    return {
        "SGDm": sgdm,
        "Adam": lambda model, inputs: Adam(model.parameters(), lr=1e-3),
        "AdaptiveLR on SGDm": adaptive,
        "APO, blocks of 64": preconditioned(block_size=64, interval=interval, warmup=0),
        "APO, defaults: a meta-update at every step": preconditioned(),
        "APO, full blocks": preconditioned(block_size=None, interval=interval, warmup=0),
        "KFAC": kfac(KFAC),
        "EKFAC": kfac(EKFAC),
        "Shampoo": lambda model, inputs: Shampoo(
            model.parameters(), lr=0.01, grafting=True, interval=interval, warmup=0
        ),
    }


def _period(make: Make, options: argparse.Namespace) -> Callable[[], None]:
    """``interval`` steps on batches of its own, from a model of its own."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 784, generator=generator).to(options.device)
    t = torch.randint(10, (4000,), generator=generator).to(options.device)
    torch.manual_seed(0)
    model = mlp(784, options.width, options.width, 10).to(options.device)

    def batch() -> Tensor:
        return torch.randint(len(x), (100,), generator=generator).to(options.device)

    def loss_at(step: int) -> Callable[[], Tensor]:
        here = batch()
        return lambda: F.cross_entropy(model(x[here]), t[here])

    optimizer = make(model, lambda: x[batch()])

    def period() -> None:
        for _ in take_steps(optimizer, loss_at, range(options.interval)):
            pass

    return period
