"""``python -m benchmarks search TASK[,TASK…]``: hyperparameters of every optimizer, by as many trials for each."""

from __future__ import annotations

import argparse
from typing import Any

from rich.table import Table

from benchmarks.common.console import console, progress, wrote
from benchmarks.paper.tasks import Task
from benchmarks.paper.training.command_options import (
    add_shared,
    epochs_of,
    given,
    names,
    precision_for,
    refusing,
    tasks_of,
    threads_for,
)
from benchmarks.paper.training.run_spec import RunSpec
from benchmarks.paper.training.search import Search
from benchmarks.paper.training.search_files import best


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tasks", metavar="TASK[,TASK…]", help="see train --list")
    parser.add_argument(
        "--optimizer",
        default="sgdm,adam,kfac,shampoo,apo,apo-lr",
        metavar="NAME[,NAME…]",
        help="(default: %(default)s)",
    )
    parser.add_argument(
        "--trials", type=int, help="of each optimizer, those of earlier calls included (default: 8, with --quick 2)"
    )
    parser.add_argument("--seeds", type=int, default=1, help="of each trial (default: %(default)s)")
    add_shared(parser)


def run(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Search every task; the contents of the files, by task. What a file already holds isn't run again."""
    found = {}
    with refusing("search"):
        for task in tasks_of(options.tasks):
            with threads_for(task, options.threads):
                found[task.name] = _search(task, options)
    return found


def _search(task: Task, options: argparse.Namespace) -> dict[str, Any]:
    optimizers = names(options.optimizer)
    precision = precision_for(task, options.precision)
    fixed = given(options.settings, optimizers)
    for optimizer in optimizers:  # refuse all before running one
        RunSpec(task.name, optimizer, fixed[optimizer], precision=precision)
    search = Search(
        task.name,
        options.out,
        trials=options.trials or (2 if options.quick else 8),
        epochs=epochs_of(task, options),
        steps=options.steps,
        seeds=options.seeds,
        precision=precision,
        device=options.device,
        limit_seconds=options.limit_seconds,
    )
    with progress() as bar:
        entry = bar.add_task(f"search {task.name}", total=None)

        def tell(optimizer: str, trial: dict[str, Any]) -> None:
            bar.update(entry, description=f"{task.name} {optimizer} loss {trial['loss']:.4g} {trial['hyper']}")

        content = search.run(optimizers, task.data(options.data), fixed, tell)
    console.print(_table(task, content, optimizers))
    wrote(search.path)
    return content


def _table(task: Task, content: dict[str, Any], optimizers: list[str]) -> Table:
    by = "training loss" if content["judged_by"] == "loss" else f"{task.loss.metric}, held out"
    table = Table(title=f"{task.name}: best by {by}", caption=content["data"])
    for column in ("optimizer", "trials", "diverged", "loss", task.loss.metric, "seconds", "hyperparameters"):
        table.add_column(
            column, justify="left" if column in ("optimizer", "hyperparameters") else "right", overflow="fold"
        )
    for optimizer in optimizers:
        trials, chosen = content["trials"][optimizer], best(content, optimizer)
        diverged = sum(trial["status"] == "diverged" for trial in trials)
        row = [optimizer, str(len(trials)), str(diverged)]
        if chosen is None:
            table.add_row(*row, "–", "–", "–", "none came through")
            continue
        hyper = ", ".join(f"{key}={value}" for key, value in chosen["hyper"].items())
        table.add_row(*row, f"{chosen['loss']:.4g}", f"{chosen['metric']:.4g}", f"{chosen['seconds']:.3g}", hyper)
    return table
