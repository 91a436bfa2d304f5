"""The study of the meta-update: ways of learning A, B and S, by loss against steps and against time.

Of the baselines every setting of an equal grid is run with the first seed, the best two with all, for the best may
diverge with another; that with the lower median counts. Runs that a results
file already holds aren't run again.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from benchmarks.common.console import console
from benchmarks.common.results import load, write
from benchmarks.paper.studies.running import TASKS, one_run
from benchmarks.paper.studies.tables import markdown
from benchmarks.paper.studies.variants import BASELINES, VARIANTS

__all__ = ["add_arguments", "run"]


FINALISTS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--study-tasks", default=",".join(TASKS), help="names, by comma (default: %(default)s)")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="names, by comma, or none (default: all)")
    parser.add_argument("--against", default=",".join(BASELINES), help="baselines, by comma, or none (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each (default: %(default)s)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run what the results file lacks; write it and the table of it, ``meta-update.md``."""
    path = options.out / "meta-update.json"
    runs: dict[str, Any] = load(path)["runs"] if path.exists() else {}

    def loss_of(task: str, name: str, seed: int, setting: dict[str, Any] | None = None) -> float:
        key = "/".join([task, name, str(seed), *(f"{k}={v:g}" for k, v in (setting or {}).items())])
        if key not in runs:
            runs[key] = one_run(task, name, setting, seed, quick=options.quick)
            write(options.out, "meta-update", options.device, {"runs": runs})
            console.print(f"{key}: {runs[key]['losses'][-1]:.3g}, {runs[key]['seconds'][-1]:.1f} s")
        value = float(runs[key]["losses"][-1])
        return value if math.isfinite(value) else math.inf

    for task in _chosen(options.study_tasks, TASKS):
        for name in _chosen(options.against, BASELINES):
            ranked = sorted(BASELINES[name].grid, key=lambda s: loss_of(task, name, 0, dict(s)))
            for setting in ranked[:FINALISTS]:
                for seed in range(1, options.seeds):
                    loss_of(task, name, seed, dict(setting))
        for name in _chosen(options.variants, VARIANTS):
            for seed in range(options.seeds):
                loss_of(task, name, seed)
    table = markdown(runs)
    Path(options.out / "meta-update.md").write_text(table)
    console.print(table, markup=False)
    return {"runs": runs}


def _chosen(text: str, known: Any) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip() and text != "none"]
    for name in names:
        if name not in known:
            raise SystemExit(f"python -m benchmarks studies: must be of {', '.join(known)}, but got {name!r}")
    return names
