"""``python -m benchmarks search TASK[,TASK…]``: hyperparameters of every optimizer, by as many trials for each."""

import argparse
from typing import Any

from benchmarks.common.console import console, progress, wrote
from benchmarks.common.tables import Table
from benchmarks.paper.report.searches import HEADER, found
from benchmarks.paper.training.command_options import Request, add_shared, for_each_task
from benchmarks.paper.training.optimizers import method
from benchmarks.paper.training.run_spec import RunSpec
from benchmarks.paper.training.search import Search


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tasks", metavar="TASK[,TASK…]", help="see train --list")
    optimizers = "sgdm,adam,kfac,shampoo,apo,apo-lr"
    parser.add_argument("--optimizer", default=optimizers, metavar="NAME[,NAME…]", help="(default: %(default)s)")
    trials = "of each optimizer, those of earlier calls included (default: 8, with --quick 2)"
    parser.add_argument("--trials", type=int, help=trials)
    parser.add_argument("--seeds", type=int, default=1, help="of each trial (default: %(default)s)")
    add_shared(parser)


def run(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Search every task; the contents of the files, by task. What a file already holds isn't run again."""
    return for_each_task("search", options, lambda asked: _search(asked, options))


def _search(asked: Request, options: argparse.Namespace) -> dict[str, Any]:
    task = asked.task
    alike = asked.epochs, options.steps, asked.precision, options.device
    fixed = [name for name in asked.optimizers if not method(name).ranges]
    if fixed:
        raise ValueError(f"--optimizer must be ones that have something to search, but got {', '.join(fixed)}")
    # all of them, to refuse what is wrong before one runs
    likes = [RunSpec(task.name, name, asked.settings[name], "given", 0, *alike) for name in asked.optimizers]
    trials = options.trials or (2 if options.quick else 8)
    search = Search(likes[0], options.out, trials, options.seeds, options.limit_seconds)
    with progress() as bar:
        entry = bar.add_task(f"search {task.name}", total=None)

        def tell(optimizer: str, trial: dict[str, Any]) -> None:
            bar.update(entry, description=f"{task.name} {optimizer} loss {trial['loss']:.4g} {trial['hyper']}")

        content = search.run(asked.optimizers, task.data(options.data), asked.settings, tell)
    by = "training loss" if content["judged_by"] == "loss" else f"{task.loss.metric}, held out"
    rows = found(task.name, content)
    console.print(Table(f"{task.name}: best by {by}", HEADER, rows, content["data"]).shown())
    wrote(search.path)
    return content
