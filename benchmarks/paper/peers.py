"""``python -m benchmarks peers``: APO and AdaptiveLR at their defaults beside the optimizers that people use.

Each of these is run at five rates on one seed, and at the best of them on the other seeds. AdaptiveLR starts at the
best rate of the optimizer that it is over, and on half of the seeds at 1e-4 and at 1. Times are taken of one run of
each, made in one process by turns of 50 steps: they are the clock of all other runs, which may have been made side by
side or elsewhere. Those whose steps cost the same from first to last, all but APO and AdaptiveLR, take a fifth of the
steps there. Each task has a file, ``peers/TASK.json``, written after every run. What it holds isn't run again. All runs
on one thread. With ``--rates`` nothing is searched: each rate is the one that ended best in the files of that folder.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import machine, results
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
COOLED = "+cooldown"
OTHER_SIZE = 64  # the most examples of APO's B′
BATCH_SIZES = {"mnist-autoencoder": 100}
"""Of tasks that are run at a smaller one than the paper's, so that all of this takes hours and not days."""
SEEDS = {"pinn": 8}  # where the losses of seeds lie far apart; 2 elsewhere

EVERY = 50
JUDGED = 2000
"""The most training examples, and test examples, that a loss is taken on."""

Run = dict[str, Any]
Runs = dict[str, Run]
Rates = Mapping[str, float | None]
"""By optimizer; None: its own."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--tasks", type=names_of(TASKS), default=[*TASKS], help=f"of {', '.join(TASKS)} (default: all)")
    add("--data", type=Path, metavar="DIR", help="folder with the files of data sets")
    add("--rates", type=Path, metavar="DIR", help="folder of files as these: run no other rates than were best there")
    add("--steps", type=at_least_1, help="of each run (default: 1000, with --quick 20)")
    add("--seeds", type=at_least_1, help="runs of each setting (default: 2, of pinn 8, with --quick 1)")


def run(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Run what the files lack; their contents, by task."""
    try:
        with cpu_threads(1):
            return {name: _on_task(_short(named(name)), options) for name in options.tasks}
    except (FileNotFoundError, ImportError, MissingData, ValueError) as error:
        sys.exit(f"python -m benchmarks peers: {error}")


def _short(task: Task) -> Task:
    """With fewer examples in a batch, and judged on fewer."""
    batch_size = BATCH_SIZES.get(task.name, task.batch_size)
    return replace(task, batch_size=batch_size, evaluated=min(task.evaluated, JUDGED))


def _on_task(task: Task, options: argparse.Namespace) -> dict[str, Any]:
    data = task.data(options.data)
    steps = options.steps or (20 if options.quick else 1000)
    seeds = options.seeds or (1 if options.quick else SEEDS.get(task.name, 2))
    content = _begun(options.out / "peers" / f"{task.name}.json", task, data, steps)
    runs: Runs = content["runs"]
    tried = content["rates"] = _best_of(options.rates / f"{task.name}.json", steps) if options.rates else RATES

    def write() -> None:
        results.write(options.out / "peers", task.name, options.device, content)

    def each_seed(optimizer: str, lr: float | None, seeds: Iterable[int] = range(seeds)) -> None:
        for seed in seeds:
            if (key := key_of(optimizer, lr, seed)) not in runs:
                alone = in_turn(task, data, {optimizer: lr}, seed, {optimizer: steps}, options.device)
                runs[key] = alone[optimizer]
                del runs[key]["seconds"]  # which nobody else's compare with
                write()
                console.print(f"{task.name} {key}: {loss_at(runs[key], steps):.4g}", highlight=False)

    half = range((seeds + 1) // 2)
    for optimizer, rates in {**tried, **dict.fromkeys(LEARNED, STARTS)}.items():
        for lr in rates:
            each_seed(optimizer, lr, [0] if optimizer in tried else half)
        for step in judged_at(steps) if optimizer in tried else ():
            each_seed(optimizer, best_rate(runs, optimizer, step, rates))
    finals: dict[str, float | None] = {"apo": None}
    for name in (*LEARNED, *RATES):
        base = LEARNED.get(name, name)
        finals[name] = best_rate(runs, base, steps, tried[base])
    if "clock" not in content:
        lengths = {name: steps if name not in RATES else judged_at(steps)[0] for name in finals}
        _take_times(content, finals, in_turn(task, data, finals, 0, lengths, options.device))
        write()
    for optimizer, rate in finals.items():
        each_seed(optimizer, rate)
    for learned, base in LEARNED.items():
        for optimizer in (base, learned):
            each_seed(optimizer + COOLED, finals[base])
        for lr in STARTS:
            each_seed(learned + COOLED, lr, half)
    return content


def _take_times(content: dict[str, Any], rates: Rates, taken: Runs) -> None:
    """Put the seconds of runs that were taken in turn into the content, beyond a run's last step as they were on the
    mean; and those runs that went to the end."""
    rows, seconds = taken["apo"]["step"], {}
    for optimizer, run in taken.items():
        times = np.interp(rows, run["step"], run.pop("seconds"))
        seconds[optimizer] = (times * np.maximum(1.0, np.array(rows) / run["step"][-1])).tolist()
    content["clock"] = {"device": taken["apo"]["device"], "step": rows, "seconds": seconds}
    whole = {optimizer: run for optimizer, run in taken.items() if run["step"][-1] == rows[-1]}
    content["runs"] |= {key_of(optimizer, rates[optimizer], 0): run for optimizer, run in whole.items()}


def key_of(optimizer: str, lr: float | None, seed: int) -> str:
    return f"{optimizer}/{'default' if lr is None else format(lr, 'g')}/{seed}"


def _begun(path: Path, task: Task, data: Dataset, steps: int) -> dict[str, Any]:
    """What the file holds, or no runs yet; ValueError where its runs are of another length, or on other data."""
    loss = task.loss
    settings: dict[str, Any] = {"loss": loss.name, "metric": loss.metric, "higher_is_better": loss.higher_is_better}
    settings |= {"data": data.label, "batch_size": task.batch_size, "steps": steps, "packages": versions()}
    return {"runs": {}, **results.begun(path, settings, "runs")}


def in_turn(
    task: Task, data: Dataset, rates: Rates, seed: int, lengths: Mapping[str, int], device: str = "cpu"
) -> Runs:
    """Of each optimizer the curve of a run of so many steps, a row every 50, after which it is the next one's turn; and
    how it ended."""
    data = replace(data, test=some(data.test, JUDGED))

    def begun(optimizer: str, lr: float | None) -> tuple[dict[str, Any], Training]:
        chosen = method(optimizer)
        hyper = chosen.hyper({"other_size": OTHER_SIZE} if lr is None else {"lr": lr}, "fp32")
        make = lambda setting: chosen.make(setting, hyper)  # noqa: E731
        training = Training(task, data, make, seed=seed, steps=lengths[optimizer], every=EVERY, device=device)
        training.follow(chosen.schedule, hyper)
        return hyper, training

    trainings = {optimizer: begun(optimizer, lr) for optimizer, lr in rates.items()}
    while left := [training for _, training in trainings.values() if training.status == "unfinished"]:
        for training in left:
            training.train(limit_steps=EVERY)
    columns, place = ("step", "seconds", "loss", "test_loss", "metric", "rate"), machine.device_name(device)
    return {
        optimizer: {"status": training.status, "hyper": hyper, "device": place}
        | {column: training.curve[column] for column in columns}
        for optimizer, (hyper, training) in trainings.items()
    }


def judged_at(steps: int) -> tuple[int, ...]:
    """After a fifth of the steps, and at the end."""
    return steps // 5, steps


def loss_at(run: Run, step: int) -> float:
    """The training loss after a step, or at the first row from there on; infinite where there is none."""
    losses = (float(loss) for at, loss in zip(run["step"], run["loss"], strict=True) if at >= step)
    return next(filter(math.isfinite, losses), math.inf)


def best_rate(runs: Runs, optimizer: str, step: int, tried: Sequence[float]) -> float:
    """Of the rates that were tried, after a step of the first seed's run."""
    return min(tried, key=lambda lr: loss_at(runs[key_of(optimizer, lr, 0)], step))


def _best_of(path: Path, steps: int) -> dict[str, tuple[float, ...]]:
    """By optimizer, the rate that a file's search found."""
    content = results.load(path)
    tried = content.get("rates", RATES)
    return {name: (best_rate(content["runs"], name, steps, tried[name]),) for name in RATES}
