"""Files of a run: ``runs/TASK/NAME.json`` and ``.csv``, and ``.pt`` while it isn't finished."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import results
from benchmarks.paper.training.run_spec import Plan

COLUMNS = ("step", "epoch", "seconds", "loss", "batch_loss", "test_loss", "metric", "rate", "failed_trials")
"""Of a curve. ``seconds`` are of training alone; ``loss`` is of training examples at the weights of that step,
``batch_loss`` the mean over the batches since the row before."""


def folder(plan: Plan, out: Path) -> Path:
    return out / "runs" / plan.task


def save_result(plan: Plan, out: Path, payload: dict[str, Any]) -> Path:
    """The JSON, with the environment, and the curve as CSV too. The path of the JSON."""
    place = folder(plan, out)
    path = results.write(place, plan.file_name, plan.device, payload)
    with (place / f"{plan.file_name}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(zip(*(payload["curve"][column] for column in COLUMNS), strict=True))
    return path


def finished(plan: Plan, out: Path) -> dict[str, Any] | None:
    """The result of this very run, if it came to an end."""
    path = folder(plan, out) / f"{plan.file_name}.json"
    if not path.is_file():
        return None
    content = results.load(path)
    same = results.plain(plan.identity()) == content.get("identity")
    return content if same and content["status"] != "unfinished" else None


def save_checkpoint(plan: Plan, out: Path, state: dict[str, Any]) -> None:
    """Whole or not at all: a run may be killed while it writes."""
    place = folder(plan, out)
    place.mkdir(parents=True, exist_ok=True)
    path, new = place / f"{plan.file_name}.pt", place / f"{plan.file_name}.pt.new"
    torch.save({"identity": plan.identity(), **state}, new)
    os.replace(new, path)


def load_checkpoint(plan: Plan, out: Path) -> dict[str, Any] | None:
    """The checkpoint of this run; None where there is none.

    Raises:
        ValueError: there is one of another run of that name; what differs is named.
    """
    path = folder(plan, out) / f"{plan.file_name}.pt"
    if not path.is_file():
        return None
    state: dict[str, Any] = torch.load(path, map_location=plan.device, weights_only=True)
    own, saved = plan.identity(), state["identity"]
    for key in own:
        if own[key] != saved.get(key):
            raise ValueError(
                f"{path} must come from this run to go on with it, but its {key} is {saved.get(key)!r} and not "
                f"{own[key]!r}: start anew without --resume, or write elsewhere by --out"
            )
    return state


def discard_checkpoint(plan: Plan, out: Path) -> None:
    (folder(plan, out) / f"{plan.file_name}.pt").unlink(missing_ok=True)
