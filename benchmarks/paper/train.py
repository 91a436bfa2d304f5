"""``python -m benchmarks train TASK[,TASK…] --optimizer NAME[,NAME…]``: curves, a table and a figure of each task."""

import argparse
from typing import Any

from rich.markup import escape

from benchmarks.common.console import console, progress, table, wrote
from benchmarks.paper.report.comparison import comparison
from benchmarks.paper.report.curves import draw
from benchmarks.paper.tasks import TASKS
from benchmarks.paper.training.command_options import Request, add_shared, for_each_task
from benchmarks.paper.training.optimizers import METHODS, names
from benchmarks.paper.training.run import Run
from benchmarks.paper.training.run_files import finished
from benchmarks.paper.training.run_spec import RunSpec
from benchmarks.paper.training.schedules import SCHEDULES
from benchmarks.paper.training.search_files import found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tasks", nargs="?", metavar="TASK[,TASK…]", help="see --list")
    parser.add_argument("--list", action="store_true", help="list the tasks and the optimizers, and stop")
    optimizers = "sgdm,adam,apo,apo-lr"
    parser.add_argument("--optimizer", default=optimizers, metavar="NAME[,NAME…]", help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each optimizer (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on with what was begun, leave out what is finished")
    add_shared(parser)


def run(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Train every optimizer on every task; the results, by task."""
    if options.list or not options.tasks:
        _list()
        return {}
    return for_each_task("train", options, lambda asked: _train(asked, options))


def _train(asked: Request, options: argparse.Namespace) -> list[dict[str, Any]]:
    task, specs = asked.task, _specs(asked, options)
    done = [finished(spec, options.out) if options.resume else None for spec in specs]
    data = task.data(options.data)
    console.print(f"[bold]{escape(task.title)}[/]\n{escape(data.label)}; {task.parameters():,} parameters")
    with progress() as bar:
        outcomes = [held or _one(spec, data, options, bar) for spec, held in zip(specs, done, strict=True)]
    console.print(comparison(outcomes).shown())
    path = draw(outcomes, options.out / "runs" / task.name / f"{task.name}.png")
    wrote(path, path.parent / "*.json", path.parent / "*.csv")
    return outcomes


def _specs(asked: Request, options: argparse.Namespace) -> list[RunSpec]:
    """Every optimizer and seed. All are checked before the first is run."""
    specs = []
    for optimizer in asked.optimizers:
        hyper, source = found(options.out, asked.task.name, optimizer, asked.precision)
        if own := asked.settings[optimizer]:
            source += "; --set " + ", ".join(f"{key}={value}" for key, value in own.items())
        length = asked.epochs, options.steps, asked.precision, options.device
        alike = asked.task.name, optimizer, {**hyper, **own}, source
        specs += [RunSpec(*alike, seed, *length) for seed in range(options.seeds)]
    return specs


def _one(spec: RunSpec, data: Any, options: argparse.Namespace, bar: Any) -> dict[str, Any]:
    each = Run(spec, data, options.out)
    if options.resume:
        each.resume()
    title = f"{spec.optimizer} seed {spec.seed}"
    entry = bar.add_task(title, total=each.total, completed=each.step)
    metric = spec.definition.loss.metric.partition(",")[0]

    def watch(step: int, loss: float, value: float, rate: float) -> None:
        bar.update(entry, completed=step, description=f"{title}  loss {loss:.4g}  {metric} {value:.4g}  lr {rate:.3g}")

    try:
        return each.go(watch, limit_seconds=options.limit_seconds)
    finally:
        bar.remove_task(entry)


def _list() -> None:
    rows = []
    for task in TASKS.values():
        data = task.source.label + (", by --data" if task.source.files else "")
        rows.append([task.name, data, task.model_name, _short(task.parameters()), str(task.epochs), task.place or "–"])
    columns = ("task", "data", "model", "weights", "epochs", "in the paper")
    console.print(table("tasks", columns, rows, text=("data", "model", "in the paper")))
    rows = [
        [name, ", ".join(f"{k}={v}" for k, v in method.defaults.items()), ", ".join(method.ranges)]
        for name, method in METHODS.items()
    ]
    shown = ("optimizer", "defaults", "searched")
    console.print(table("optimizers", shown, rows, text=shown))
    others = ", ".join(name for name in names() if name not in METHODS)
    console.print(f"also {others} (AdaptiveLR over them), and with a manual schedule:")
    for name, text in SCHEDULES.items():
        console.print(f"  +{name}: {text}")


def _short(count: int) -> str:
    """``11.2M``, ``62.0K``."""
    return f"{count / 1e6:.3g}M" if count >= 1e6 else f"{count / 1e3:.3g}K"
