"""Files of a run: ``runs/TASK/NAME.json`` and ``.csv``, and ``.pt`` while it isn't finished."""

import csv
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import results
from benchmarks.paper.training.run_spec import RunSpec
from benchmarks.paper.training.training import COLUMNS


def _path(spec: RunSpec, out: Path, suffix: str) -> Path:
    return out / "runs" / spec.task / f"{spec.file_name}{suffix}"


def save_result(spec: RunSpec, out: Path, payload: dict[str, Any]) -> Path:
    """The JSON, with the environment, and the curve as CSV too. The path of the JSON."""
    curve = payload["curve"]
    path = results.write(_path(spec, out, "").parent, spec.file_name, spec.device, payload)
    with path.with_suffix(".csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *zip(*(curve[column] for column in COLUMNS), strict=True)])
    return path


def finished(spec: RunSpec, out: Path) -> dict[str, Any] | None:
    """The result of this run, if it came to an end."""
    path = _path(spec, out, ".json")
    if not path.is_file():
        return None
    content = results.load(path)
    same = results.plain(spec.identity()) == content.get("identity")
    return content if same and content["status"] != "unfinished" else None


def save_checkpoint(spec: RunSpec, out: Path, state: dict[str, Any]) -> None:
    """Write the whole checkpoint or none of it, because a run may be killed while it writes."""
    new = _path(spec, out, ".pt.new")
    new.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"identity": spec.identity(), **state}, new)
    new.replace(_path(spec, out, ".pt"))


def load_checkpoint(spec: RunSpec, out: Path) -> dict[str, Any] | None:
    """The checkpoint of this run, None where there is none; ValueError where it is another run's."""
    path = _path(spec, out, ".pt")
    if not path.is_file():
        return None
    state: dict[str, Any] = torch.load(path, map_location=spec.device, weights_only=True)
    own, saved = spec.identity(), state["identity"]
    for key in own:
        if own[key] != saved.get(key):
            what = f"its {key} is {saved.get(key)!r} and not {own[key]!r}"
            raise ValueError(f"{path} is another run's: {what}: leave out --resume, or write elsewhere by --out")
    return state


def discard_checkpoint(spec: RunSpec, out: Path) -> None:
    _path(spec, out, ".pt").unlink(missing_ok=True)
