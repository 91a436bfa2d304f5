"""The search: as many trials for each optimizer, drawn evenly from its ranges, judged alike."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.quasirandom import SobolEngine

from benchmarks.common import results
from benchmarks.paper.data import Dataset
from benchmarks.paper.training.optimizers import method
from benchmarks.paper.training.run import Run
from benchmarks.paper.training.run_spec import RunSpec
from benchmarks.paper.training.search_files import file_of


def drawn(optimizer: str, count: int) -> list[dict[str, Any]]:
    """The hyperparameters of each trial: points of a scrambled Sobol sequence over the optimizer's ranges, in log.

    Even in each hyperparameter. The first of a longer search are those of a shorter one.
    """
    ranges = method(optimizer).ranges
    engine = SobolEngine(len(ranges), scramble=True, seed=zlib.crc32(optimizer.encode()))  # type: ignore[no-untyped-call]
    points = engine.draw(count).tolist()
    return [{name: r.at(share) for (name, r), share in zip(ranges.items(), point, strict=True)} for point in points]


@dataclass(frozen=True)
class Search:
    """A search of a task's hyperparameters; its file is ``search/TASK.json`` in ``out``."""

    like: RunSpec  # all runs are like this one, except for the optimizer, its hyperparameters and the seed
    out: Path
    trials: int  # of each optimizer
    seeds: int = 1  # of each trial. Losses and metrics are means over them, and one that diverged spoils the trial
    limit_seconds: float | None = None  # of training in a run; one that is cut off is judged by what it reached

    @property
    def path(self) -> Path:
        return file_of(self.out, self.like.task, self.like.precision)

    def run(
        self,
        optimizers: list[str],
        data: Dataset,
        fixed: dict[str, dict[str, Any]] | None = None,
        tell: Callable[[str, dict[str, Any]], None] = lambda optimizer, trial: None,
    ) -> dict[str, Any]:
        """Run the trials that the file lacks, write it after each, and return its content.

        A task that is judged by its metric is judged on a tenth held out of ``data``. ``fixed`` are hyperparameters
        that all trials of an optimizer share, by its name.
        """
        content = self._begun(data)
        for optimizer in optimizers:
            self._check_ranges(content, optimizer)
            done = content["trials"].setdefault(optimizer, [])
            for hyper in drawn(optimizer, self.trials)[len(done) :]:
                trial = self._trial(optimizer, {**hyper, **(fixed or {}).get(optimizer, {})}, data)
                done.append(trial)
                results.write(self.path.parent, self.path.stem, self.like.device, content)
                tell(optimizer, trial)
        return content

    def _begun(self, data: Dataset) -> dict[str, Any]:
        """What the file holds, or an empty search."""
        like, task = self.like, self.like.definition
        settings = {
            "task": like.task,
            "data": data.label,
            "stand_in": task.source.stand_in,
            "judged_by": task.judged_by,
            "epochs": like.epochs,
            "steps": like.steps,
            "seeds": self.seeds,
            "precision": like.precision,
        }
        return {"trials": {}, **results.begun(self.path, settings, "a search")}

    def _check_ranges(self, content: dict[str, Any], optimizer: str) -> None:
        ranges = results.plain({name: vars(r) for name, r in method(optimizer).ranges.items()})
        if content.setdefault("ranges", {}).setdefault(optimizer, ranges) != ranges:
            what = f"holds a search of {optimizer} in other ranges, {content['ranges'][optimizer]}"
            raise ValueError(f"{self.path} {what}: remove it under ranges and trials, or write elsewhere by --out")

    def _trial(self, optimizer: str, hyper: dict[str, Any], data: Dataset) -> dict[str, Any]:
        held_out = self.like.definition.judged_by == "metric"
        alike = replace(self.like, optimizer=optimizer, hyper=hyper, held_out=held_out)
        specs = [replace(alike, seed=seed) for seed in range(self.seeds)]
        runs = [Run(spec, data).go(limit_seconds=self.limit_seconds) for spec in specs]
        statuses = [run["status"] for run in runs]
        return {
            "hyper": hyper,
            "status": next((s for s in ("diverged", "unfinished") if s in statuses), "finished"),
            "loss": sum(run["curve"]["loss"][-1] for run in runs) / len(runs),
            "metric": sum(run["curve"]["metric"][-1] for run in runs) / len(runs),
            "seconds": sum(run["seconds"] for run in runs),
            "steps": runs[0]["steps"],
        }
