"""What the searches found: how many trials, the best of them, and KFAC's losses by damping."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import results
from benchmarks.paper.report.tables import Table
from benchmarks.paper.training.search_files import best


def searches(folders: Sequence[Path]) -> Table:
    """A row for each task and optimizer."""
    rows = []
    for path in _files(folders):
        content = results.load(path)
        for optimizer, trials in content["trials"].items():
            chosen = best(content, optimizer)
            hyper = "none came through" if chosen is None else ", ".join(f"{k}={v}" for k, v in chosen["hyper"].items())
            diverged = sum(trial["status"] == "diverged" for trial in trials)
            loss = "–" if chosen is None else f"{float(chosen['loss']):.4g}"
            length = f"{content['steps']} steps" if content["steps"] else f"{content['epochs']} epochs"
            rows.append([path.stem, optimizer, str(len(trials)), str(diverged), loss, hyper, length])
    header = ["task", "optimizer", "trials", "diverged", "loss of the best", "its hyperparameters", "of"]
    return Table("Searches", header, rows)


def sweep(folders: Sequence[Path], task: str) -> Table | None:
    """KFAC's trials on a task by damping; None without any."""
    for path in _files(folders):
        content = results.load(path)
        trials = content["trials"].get("kfac")
        if content["task"] == task and trials:
            ordered = sorted(trials, key=lambda trial: float(trial["hyper"]["damping"]))
            rows = [
                [
                    f"{t['hyper']['damping']:.2g}",
                    f"{t['hyper']['lr']:.2g}",
                    str(t["hyper"].get("kl_clip")),
                    "diverged" if t["status"] == "diverged" else f"{float(t['loss']):.3g}",
                ]
                for t in ordered
            ]
            return Table(f"KFAC on {task}, every trial", ["damping", "lr", "kl_clip", "loss"], rows)
    return None


def _files(folders: Sequence[Path]) -> list[Path]:
    """The search files, a later folder's in place of an earlier's."""
    return sorted({path.name: path for folder in folders for path in (folder / "search").glob("*.json")}.values())
