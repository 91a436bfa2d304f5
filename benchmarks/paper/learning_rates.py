"""Learned against fixed learning rates on scikit-learn's digits: MLP 64-256-256-10, batch 128.

Every optimizer at seven fixed rates, and under :class:`apo.AdaptiveLR`, with its defaults, from four initial
rates and from one 1000 times the best fixed one. The table is printed as it comes out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import apo
from benchmarks.common.console import console, progress
from benchmarks.common.results import write

INITIAL = (1e-4, 1e-3, 1e-2, 1e-1)
FIXED = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
BATCH = 128
EPOCHS = 100

OPTIMIZERS: dict[str, Callable[[Iterable[Tensor], float], torch.optim.Optimizer]] = {
    "SGD": lambda params, lr: torch.optim.SGD(params, lr=lr),
    "SGDm": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9),
    "RMSprop": lambda params, lr: torch.optim.RMSprop(params, lr=lr),
    "Adam": lambda params, lr: torch.optim.Adam(params, lr=lr),
}


@dataclass(frozen=True)
class Outcome:
    """The end of a run: loss on the training set, accuracy on the test set in percent, last rate, failed trials."""

    initial: float
    loss: float
    accuracy: float
    rate: float
    failed_trials: int


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(x, t, test x, test t)``: 1,437 and 360 images of 8 × 8, shuffled once and for all, scaled to [0, 1]."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images / 16, dtype=torch.float32)[order]
    t = torch.tensor(labels)[order]
    return x[:1437], t[:1437], x[1437:], t[1437:]


def train(name: str, lr: float, *, adaptive: bool, seed: int = 0, epochs: int = EPOCHS) -> Outcome:
    """One run."""
    x, t, test_x, test_t = digits()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    order, others = torch.Generator().manual_seed(seed + 1), torch.Generator().manual_seed(seed + 2)
    optimizer = OPTIMIZERS[name](model.parameters(), lr)
    if adaptive:
        objective = apo.ProximalObjective(model, lambda: x[torch.randint(len(x), (BATCH,), generator=others)])
        optimizer = apo.AdaptiveLR(optimizer, objective)
    for _ in range(epochs):
        for batch in torch.split(torch.randperm(len(x), generator=order), BATCH)[: len(x) // BATCH]:

            def closure(batch: Tensor = batch) -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x[batch]), t[batch])
                loss.backward()  # type: ignore[no-untyped-call]
                return loss

            optimizer.step(closure)  # type: ignore[arg-type]
    with torch.no_grad():
        loss = F.cross_entropy(model(x), t).item()
        accuracy = 100 * (model(test_x).argmax(1) == test_t).double().mean().item()
    failed = optimizer.failed_trials if isinstance(optimizer, apo.AdaptiveLR) else 0
    return Outcome(lr, loss, accuracy, float(optimizer.param_groups[0]["lr"]), failed)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, help="runs of each setting (default: 3, with --quick 1)")
    parser.add_argument("--epochs", type=int, help=f"(default: {EPOCHS}, with --quick {EPOCHS // 10})")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train everything, print the table, return every outcome."""
    seeds = options.seeds or (1 if options.quick else 3)
    epochs = options.epochs or (EPOCHS // 10 if options.quick else EPOCHS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # networks so small are slower on more
    found: dict[str, Any] = {}
    try:
        with progress() as bar:
            task = bar.add_task("learning rates", total=len(OPTIMIZERS) * (len(FIXED) + len(INITIAL) + 1) * seeds)

            def runs(name: str, lr: float, adaptive: bool) -> list[Outcome]:
                outcomes = []
                for seed in range(seeds):
                    outcomes.append(train(name, lr, adaptive=adaptive, seed=seed, epochs=epochs))
                    bar.advance(task)
                return outcomes

            for name in OPTIMIZERS:
                fixed = {lr: runs(name, lr, False) for lr in FIXED}
                best = min(fixed, key=lambda lr: _mean(fixed[lr], "loss"))
                learned = {lr: runs(name, lr, True) for lr in (*INITIAL, 1000 * best)}
                found[name] = {"fixed": fixed, "learned": learned, "best_fixed": best}
    finally:
        torch.set_num_threads(threads)
    console.print(_table(found, seeds, epochs))
    payload = {
        "epochs": epochs,
        "seeds": seeds,
        "optimizers": {
            name: {
                "best_fixed": each["best_fixed"],
                **{kind: [asdict(o) for runs in each[kind].values() for o in runs] for kind in ("fixed", "learned")},
            }
            for name, each in found.items()
        },
    }
    path = write(options.out, "learning_rates", "cpu", payload)
    console.print(f"wrote {path}", soft_wrap=True)
    return payload


def _mean(outcomes: list[Outcome], what: str) -> float:
    values = [float(getattr(o, what)) for o in outcomes]
    mean = sum(values) / len(values)
    return mean if mean == mean else float("inf")


def _table(found: dict[str, Any], seeds: int, epochs: int) -> Table:
    table = Table(
        title=f"digits, {epochs} epochs of batch {BATCH}, mean of {seeds} seeds",
        caption="A fixed rate's row: the best loss, and the best accuracy, of the seven. A one-step objective is "
        "short-sighted: that is where a learned loss is above the best fixed one.",
    )
    for column in ("optimizer", "rate", "training loss", "test accuracy", "last rate", "failed trials"):
        table.add_column(column, justify="left" if column in ("optimizer", "rate") else "right")
    for name, each in found.items():
        best = each["best_fixed"]
        accuracies = [_mean(outcomes, "accuracy") for outcomes in each["fixed"].values()]
        table.add_row(
            name, f"best fixed: {best:g}", f"{_mean(each['fixed'][best], 'loss'):.2e}", f"{max(accuracies):.2f}", "", ""
        )
        for lr, outcomes in each["learned"].items():
            cells = f"{_mean(outcomes, 'loss'):.2e}", f"{_mean(outcomes, 'accuracy'):.2f}"
            table.add_row(
                "",
                f"learned from {lr:g}",
                *cells,
                f"{_mean(outcomes, 'rate'):.2e}",
                f"{_mean(outcomes, 'failed_trials'):.1f}",
            )
        table.add_section()
    return table
