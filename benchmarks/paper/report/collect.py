"""Results files below a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import results
from benchmarks.paper.tasks import TASKS
from benchmarks.paper.training.optimizers import names

SIXTEEN_BITS = ("bf16", "fp16")

Found = dict[str, list[dict[str, Any]]]
"""Results by task."""


def collect(folders: Sequence[Path]) -> Found:
    """Every run in ``FOLDER/runs/TASK/*.json``, in the order of the tasks. A later folder's replace an earlier's.

    Only runs of the same data, epochs and steps stand beside each other: of several lengths in a precision the one
    with the most files is taken, the longest of equals.
    """
    found: Found = {}
    for task in TASKS:
        by_file: dict[str, dict[str, Any]] = {}
        for folder in folders:
            for path in sorted((folder / "runs" / task).glob("*.json")):
                by_file[path.name] = results.load(path)
        kinds: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
        for run in by_file.values():
            kinds.setdefault((run["precision"], run["data"], run["total_steps"]), []).append(run)
        chosen: list[dict[str, Any]] = []
        for precision in {key[0] for key in kinds}:
            own = [(len(runs), key[2], runs) for key, runs in kinds.items() if key[0] == precision]
            chosen += max(own, key=lambda each: each[:2])[2]
        if chosen:
            chosen.sort(key=_place)
            found[task] = chosen
    return found


def _place(run: dict[str, Any]) -> tuple[Any, ...]:
    """First-order methods first, each with its scheduled form after it; 16 bits last."""
    known, optimizer = names(), run["optimizer"]
    base = optimizer.partition("+")[0]
    place = known.index(base) if base in known else len(known)
    return run["precision"] in SIXTEEN_BITS, place, optimizer, run["seed"]


def described(runs: Sequence[dict[str, Any]]) -> str:
    """The data, the length and the machine of the runs."""
    machines = sorted({run["environment"]["device"] for run in runs})
    unfinished = sum(run["status"] == "unfinished" for run in runs)
    cut = f", {unfinished} cut off" if unfinished else ""
    epochs = f"{runs[0]['epochs']:.3g} epochs"
    return f"{runs[0]['data']}; {epochs}{cut}; {', '.join(machines)}"
