"""``python -m benchmarks learning_rates``: learned against fixed learning rates on the task ``digits``.

Every optimizer at seven fixed rates, and under :class:`apo.AdaptiveLR` with its defaults, from four initial rates and
from one 1000 times the best fixed one.
"""

import argparse
import math
from dataclasses import asdict, dataclass
from itertools import product
from statistics import fmean
from typing import Any

from rich.table import Table
from torch.optim import Optimizer

import apo
from benchmarks.common import results
from benchmarks.common.console import console, progress, table, wrote
from benchmarks.common.timing import cpu_threads
from benchmarks.paper.tasks import named
from benchmarks.paper.training.optimizers import METHODS
from benchmarks.paper.training.training import Setting, Training

INITIAL = (1e-4, 1e-3, 1e-2, 1e-1)
FIXED = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
EPOCHS = 100

OPTIMIZERS = {"SGD": "sgd", "SGDm": "sgdm", "RMSprop": "rmsprop", "Adam": "adam"}
"""Those of :data:`~benchmarks.paper.training.optimizers.METHODS`, by the names that the table has."""


@dataclass(frozen=True)
class Outcome:
    """The end of a run: loss on the training set, accuracy on the test set in percent, last rate, failed trials."""

    initial: float
    loss: float
    accuracy: float
    rate: float
    failed_trials: int


def train(name: str, lr: float, *, adaptive: bool, seed: int = 0, epochs: int = EPOCHS) -> Outcome:
    """One run. A run that diverged has an infinite loss, and no accuracy."""

    def make(setting: Setting) -> Optimizer:
        method = METHODS[OPTIMIZERS[name]]
        optimizer = method.make(setting, {**method.defaults, "lr": lr})
        if not adaptive:
            return optimizer
        return apo.AdaptiveLR(optimizer, setting.task.objective(setting.model, setting.batches.other))

    task = named("digits")
    training = Training(task, task.data(), make, seed=seed, epochs=epochs)
    training.train()
    last = {column: values[-1] for column, values in training.curve.items()}
    loss, accuracy = (math.inf, 0.0) if training.status == "diverged" else (last["loss"], last["metric"])
    return Outcome(lr, loss, accuracy, last["rate"], int(last["failed_trials"]))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, help="runs of each setting (default: 3, with --quick 1)")
    parser.add_argument("--epochs", type=int, help=f"(default: {EPOCHS}, with --quick {EPOCHS // 10})")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train everything, print the table, write ``learning_rates.json``, and return its content."""
    seeds = options.seeds or (1 if options.quick else 3)
    epochs = options.epochs or (EPOCHS // 10 if options.quick else EPOCHS)
    found: dict[str, Any] = {}
    with cpu_threads(1), progress() as bar:  # networks so small are slower on more threads
        task = bar.add_task("learning rates", total=len(OPTIMIZERS) * (len(FIXED) + len(INITIAL) + 1) * seeds)

        def runs(name: str, lr: float, adaptive: bool) -> list[Outcome]:
            outcomes = [train(name, lr, adaptive=adaptive, seed=seed, epochs=epochs) for seed in range(seeds)]
            bar.advance(task, seeds)
            return outcomes

        for name in OPTIMIZERS:
            fixed = {lr: runs(name, lr, False) for lr in FIXED}
            best = min(fixed, key=lambda lr: _mean(fixed[lr], "loss"))
            learned = {lr: runs(name, lr, True) for lr in (*INITIAL, 1000 * best)}
            found[name] = {"best_fixed": best, "fixed": fixed, "learned": learned}
    console.print(_table(found, f"digits, {epochs} epochs, mean of {seeds} seeds"))
    for each, kind in product(found.values(), ("fixed", "learned")):
        each[kind] = [asdict(outcome) for outcomes in each[kind].values() for outcome in outcomes]
    payload = {"epochs": epochs, "seeds": seeds, "optimizers": found}
    wrote(results.write(options.out, "learning_rates", "cpu", payload))
    return payload


def _mean(outcomes: list[Outcome], what: str) -> float:
    return fmean(getattr(outcome, what) for outcome in outcomes)


def _table(found: dict[str, Any], title: str) -> Table:
    columns = ("optimizer", "rate", "training loss", "test accuracy", "last rate", "failed trials")
    caption = (
        "A fixed rate's row: the best loss, and the best accuracy, of the seven. A one-step objective is "
        "short-sighted: that is where a learned loss is above the best fixed one."
    )
    shown = table(title, columns, labels=("rate",), caption=caption)
    for name, each in found.items():
        best = each["best_fixed"]
        accuracy = max(_mean(outcomes, "accuracy") for outcomes in each["fixed"].values())
        shown.add_row(name, f"best fixed: {best:g}", f"{_mean(each['fixed'][best], 'loss'):.2e}", f"{accuracy:.2f}")
        formats = {"loss": ".2e", "accuracy": ".2f", "rate": ".2e", "failed_trials": ".1f"}
        for lr, outcomes in each["learned"].items():
            cells = (format(_mean(outcomes, what), form) for what, form in formats.items())
            shown.add_row("", f"learned from {lr:g}", *cells)
        shown.add_section()
    return shown
