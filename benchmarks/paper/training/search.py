"""The search: as many trials for each optimizer, drawn evenly from its ranges, judged alike."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.quasirandom import SobolEngine

from benchmarks.common import results
from benchmarks.paper.data import Dataset
from benchmarks.paper.tasks import named
from benchmarks.paper.training.optimizers import method
from benchmarks.paper.training.run import Run
from benchmarks.paper.training.run_spec import Plan
from benchmarks.paper.training.search_files import file_of


def drawn(optimizer: str, count: int) -> list[dict[str, Any]]:
    """The hyperparameters of each trial.

    Points of a scrambled Sobol sequence over the optimizer's ranges, in log: even in each hyperparameter, whatever
    the number of trials, and the first of a longer search are those of a shorter one.
    """
    ranges = method(optimizer).ranges
    engine = SobolEngine(len(ranges), scramble=True, seed=zlib.crc32(optimizer.encode()))  # type: ignore[no-untyped-call]
    points = engine.draw(count).tolist()
    return [{name: r.at(share) for (name, r), share in zip(ranges.items(), point, strict=True)} for point in points]


def search(
    task: str,
    optimizers: list[str],
    data: Dataset,
    out: Path,
    *,
    trials: int,
    epochs: int,
    steps: int | None = None,
    seeds: int = 1,
    precision: str = "fp32",
    device: str = "cpu",
    limit_seconds: float | None = None,
    fixed: dict[str, dict[str, Any]] | None = None,
    tell: Callable[[str, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Run the trials that the file lacks, and write it after each.

    Args:
        task: its name.
        optimizers: their names.
        data: the task's examples. A task that is judged by its metric is judged on a tenth held out of them.
        out: the file is ``search/TASK.json`` in it.
        trials: of each optimizer.
        epochs: of each trial; ``steps`` instead, where given.
        seeds: of each trial; losses and metrics are means over them, and one that diverged spoils the trial.
        limit_seconds: of training in a run; a trial that is cut off is judged by what it reached.
        fixed: hyperparameters that all trials of an optimizer share.
        tell: called with the optimizer's name and each trial.

    Raises:
        ValueError: the file is of a search of another length: trials must be comparable.
    """
    definition = named(task)
    judged_by = definition.judged_by
    settings = {
        "task": task,
        "data": data.label,
        "stand_in": definition.source.stand_in,
        "judged_by": judged_by,
        "epochs": epochs,
        "steps": steps,
        "seeds": seeds,
        "precision": precision,
    }
    path = file_of(out, task, precision)
    content: dict[str, Any] = {**settings, "trials": {}}
    if path.is_file():
        content = results.load(path)
        for key, value in settings.items():
            if content[key] != value:
                raise ValueError(
                    f"{path} holds a search whose {key} is {content[key]!r} and not {value!r}: "
                    "remove it, or write elsewhere by --out"
                )
    for optimizer in optimizers:
        ranges = {name: vars(r) for name, r in method(optimizer).ranges.items()}
        ranges = results.plain(ranges)
        if content.setdefault("ranges", {}).setdefault(optimizer, ranges) != ranges:
            raise ValueError(
                f"{path} holds a search of {optimizer} in other ranges, {content['ranges'][optimizer]}: "
                "remove its entries under ranges and trials, or write elsewhere by --out"
            )
        done = content["trials"].setdefault(optimizer, [])
        for hyper in drawn(optimizer, trials)[len(done) :]:
            hyper = {**hyper, **(fixed or {}).get(optimizer, {})}
            runs = []
            for seed in range(seeds):
                plan = Plan(
                    task,
                    optimizer,
                    hyper,
                    seed=seed,
                    epochs=epochs,
                    steps=steps,
                    precision=precision,
                    device=device,
                    held_out=judged_by == "metric",
                )
                runs.append(Run(plan, data).go(limit_seconds=limit_seconds))
            trial = _trial(hyper, runs)
            done.append(trial)
            saved = {k: v for k, v in content.items() if k not in ("benchmark", "environment")}
            results.write(path.parent, path.stem, device, saved)
            if tell is not None:
                tell(optimizer, trial)
    return content


def _trial(hyper: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    statuses = [run["status"] for run in runs]
    worst = next((s for s in ("diverged", "unfinished") if s in statuses), "finished")
    return {
        "hyper": hyper,
        "status": worst,
        "loss": sum(run["curve"]["loss"][-1] for run in runs) / len(runs),
        "metric": sum(run["curve"]["metric"][-1] for run in runs) / len(runs),
        "seconds": sum(run["seconds"] for run in runs),
        "steps": runs[0]["steps"],
    }
