"""``python -m benchmarks studies``: runs the study, and writes its results and their table.

``meta-update`` compares ways of learning P, ``start`` what is set for the Fisher start. Each baseline runs its grid on
the first seed, and the best two settings on all seeds, because the best may diverge with another seed. The lower median
of the two counts. Runs that a results file already holds aren't run again.
"""

import argparse
import math
from functools import partial
from itertools import product
from typing import Any

from benchmarks.common import results
from benchmarks.common.console import console
from benchmarks.common.options import names_of
from benchmarks.paper.studies.tables import markdown
from benchmarks.paper.studies.variants import BASELINES, START, VARIANTS
from benchmarks.paper.tasks import named
from benchmarks.paper.training.training import Training

STUDIES = {"meta-update": VARIANTS, "start": START}
TASKS = ("ill-conditioned", "diabetes", "digits", "digits-autoencoder")
POINTS = 20  # at which the loss is taken in a run
FINALISTS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for option, known in (("--study-tasks", TASKS), ("--against", BASELINES)):
        text = "names by comma, or none (default: all)"
        parser.add_argument(option, type=names_of(known), default=",".join(known), help=text)
    parser.add_argument("--study", choices=STUDIES, default="meta-update", help="default: %(default)s")
    parser.add_argument("--variants", type=names_of(VARIANTS | START), help="likewise (default: all of the study)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each (default: %(default)s)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run what the results file lacks; write it and the table of it."""
    path = options.out / f"{options.study}.json"
    variants = STUDIES[options.study] if options.variants is None else options.variants
    runs: dict[str, Any] = results.load(path)["runs"] if path.exists() else {}

    def loss_of(task: str, name: str, seed: int, setting: dict[str, Any] | None = None) -> float:
        key = "/".join([task, name, str(seed), *(f"{k}={v:g}" for k, v in (setting or {}).items())])
        if key not in runs:
            runs[key] = one_run(task, name, setting, seed, quick=options.quick)
            results.write(options.out, options.study, options.device, {"runs": runs})
            console.print(f"{key}: {runs[key]['losses'][-1]:.3g}, {runs[key]['seconds'][-1]:.1f} s")
        value = float(runs[key]["losses"][-1])
        return value if math.isfinite(value) else math.inf

    for task in options.study_tasks:
        for name in options.against:
            ranked = sorted(BASELINES[name].grid, key=lambda setting: loss_of(task, name, 0, setting))
            for setting, seed in product(ranked[:FINALISTS], range(1, options.seeds)):
                loss_of(task, name, seed, setting)
        for name, seed in product(variants, range(options.seeds)):
            loss_of(task, name, seed)
    table = markdown(runs)
    (options.out / f"{options.study}.md").write_text(table)
    console.print(table, markup=False)
    return {"runs": runs}


def one_run(
    task_name: str, name: str, setting: dict[str, Any] | None, seed: int, *, quick: bool = False
) -> dict[str, list[float]]:
    """The training loss over all examples after some steps, and the seconds that the steps took."""
    task = named(task_name)
    data, epochs = task.data(), task.quick_epochs if quick else task.epochs
    every = max(1, epochs * (len(data.train) // task.batch_size) // POINTS)
    ways = VARIANTS | START
    make = ways[name].make if name in ways else partial(BASELINES[name].make, hyper=setting or {})
    training = Training(task, data, make, seed=seed, epochs=epochs, every=every)
    training.train()
    columns = {"steps": "step", "losses": "loss", "seconds": "seconds"}
    return {ours: training.curve[theirs][1:] for ours, theirs in columns.items()}  # without that before the first step
