"""``python -m benchmarks peers``: APO and AdaptiveLR at their defaults beside the optimizers that people use.

Each of these is run at five rates on one seed, and at the best of them on the other seeds. AdaptiveLR starts at the
best rate of the optimizer that it is over, at 1e-4 and at 1. Each task has a file, ``peers/TASK.json``, written after
every run. Runs that it holds aren't run again. Everything runs on one thread. On a CPU the seconds are the process's
own, so several may run side by side.
"""

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common import results
from benchmarks.common.console import console
from benchmarks.common.options import at_least_1, names_of
from benchmarks.common.timing import cpu_threads
from benchmarks.paper.baselines.packages import versions
from benchmarks.paper.data import Dataset, MissingData
from benchmarks.paper.tasks import Task, named
from benchmarks.paper.training.optimizers import method
from benchmarks.paper.training.training import Training, some

TASKS = ("gpt", "cifar10-cnn", "cifar10-lenet", "mnist-autoencoder", "protein", "pinn")
RATES = {
    "adamw": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "sgdm": (1e-4, 6e-4, 3e-3, 2e-2, 1e-1),
    "muon": (2e-3, 6e-3, 2e-2, 6e-2, 2e-1),
    "soap": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "schedule-free": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
}
"""The rates that are tried, evenly in log around what is usual; SGDm's, which has no scale of its own, more widely."""

LEARNED = {"apo-lr:adamw": "adamw", "apo-lr:sgdm": "sgdm"}
"""Learned rates, and whose they are."""

STARTS = (1e-4, 1.0)
BATCH_SIZES = {"mnist-autoencoder": 100}
"""Of tasks that are run at a smaller one than the paper's, so that all of this takes hours and not days."""

EVERY = 50
JUDGED = 2000
"""The most training examples, and test examples, that a loss is taken on."""

Runs = dict[str, dict[str, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--tasks", type=names_of(TASKS), default=[*TASKS], help=f"of {', '.join(TASKS)} (default: all)")
    add("--data", type=Path, metavar="DIR", help="folder with the files of data sets")
    add("--steps", type=at_least_1, help="of each run (default: 1000, with --quick 20)")
    add("--seeds", type=at_least_1, help="runs of each setting (default: 2, with --quick 1)")


def run(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Run what the files lack; their contents, by task."""
    try:
        with cpu_threads(1):
            return {name: _on_task(_short(named(name)), options) for name in options.tasks}
    except (ImportError, MissingData, ValueError) as error:
        sys.exit(f"python -m benchmarks peers: {error}")


def _short(task: Task) -> Task:
    """With fewer examples in a batch, and judged on fewer."""
    batch_size = BATCH_SIZES.get(task.name, task.batch_size)
    return replace(task, batch_size=batch_size, evaluated=min(task.evaluated, JUDGED))


def _on_task(task: Task, options: argparse.Namespace) -> dict[str, Any]:
    data = task.data(options.data)
    steps, seeds = options.steps or (20 if options.quick else 1000), options.seeds or (1 if options.quick else 2)
    content = _begun(options.out / "peers" / f"{task.name}.json", task, data, steps)
    runs: Runs = content["runs"]

    def each_seed(optimizer: str, lr: float | None, seeds: int = seeds) -> None:
        for key, seed in ((key_of(optimizer, lr, seed), seed) for seed in range(seeds)):
            if key not in runs:
                runs[key] = one_run(task, data, optimizer, lr, seed, steps, options.device)
                results.write(options.out / "peers", task.name, options.device, content)
                seconds = runs[key]["seconds"][-1]
                console.print(f"{task.name} {key}: {loss_at(runs[key], steps):.4g}, {seconds:.1f} s", highlight=False)

    each_seed("apo", None)
    for optimizer, rates in RATES.items():
        for lr in rates:
            each_seed(optimizer, lr, seeds=1)
        for step in judged_at(steps):
            each_seed(optimizer, best_rate(runs, optimizer, step))
    for optimizer, base in LEARNED.items():
        each_seed(optimizer, best_rate(runs, base, steps))
        for lr in STARTS:
            each_seed(optimizer, lr, seeds=1)
    return content


def key_of(optimizer: str, lr: float | None, seed: int) -> str:
    return f"{optimizer}/{'default' if lr is None else format(lr, 'g')}/{seed}"


def _begun(path: Path, task: Task, data: Dataset, steps: int) -> dict[str, Any]:
    """What the file holds, or no runs yet; ValueError where its runs are of another length, or on other data."""
    loss = task.loss
    settings = {
        "data": data.label,
        "batch_size": task.batch_size,
        "steps": steps,
        "loss": loss.name,
        "metric": loss.metric,
        "higher_is_better": loss.higher_is_better,
        "packages": versions(),
    }
    return {"runs": {}, **results.begun(path, settings, "runs")}


def one_run(
    task: Task, data: Dataset, optimizer: str, lr: float | None, seed: int, steps: int, device: str = "cpu"
) -> dict[str, Any]:
    """The curve of a run, a row every 50 steps, and how it ended. A rate of None is the optimizer's own."""
    chosen = method(optimizer)
    hyper = chosen.hyper({} if lr is None else {"lr": lr}, "fp32")
    data = replace(data, test=some(data.test, JUDGED))
    training = Training(
        task, data, lambda setting: chosen.make(setting, hyper), seed=seed, steps=steps, every=EVERY, device=device
    )
    training.train()
    columns = ("step", "seconds", "loss", "test_loss", "metric", "rate")
    return {"status": training.status, "hyper": hyper, **{column: training.curve[column] for column in columns}}


def judged_at(steps: int) -> tuple[int, ...]:
    """After a fifth of the steps, and at the end."""
    return steps // 5, steps


def loss_at(run: dict[str, Any], step: int) -> float:
    """The training loss after a step, or at the first row from there on; infinite where there is none."""
    losses = (float(loss) for at, loss in zip(run["step"], run["loss"], strict=True) if at >= step)
    return next(filter(math.isfinite, losses), math.inf)


def best_rate(runs: Runs, optimizer: str, step: int) -> float:
    """Of those that were tried, after a step of the first seed's run."""
    return min(RATES[optimizer], key=lambda lr: loss_at(runs[key_of(optimizer, lr, 0)], step))
