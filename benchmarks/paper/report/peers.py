"""The tables of ``python -m benchmarks peers``, one per task, from its results files."""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.common import results
from benchmarks.common.tables import markdown, short
from benchmarks.paper.peers import LEARNED, RATES, STARTS, TASKS, judged_at, loss_at
from benchmarks.paper.tasks import named
from benchmarks.paper.training.optimizers import METHODS

Run = dict[str, Any]
Settings = dict[str, list[Run]]
"""The runs of an optimizer by rate, the first seed's first."""
LABELS = {"apo": "APO"} | {name: f"AdaptiveLR on {METHODS[base].label}" for name, base in LEARNED.items()}
LABELS |= {name: METHODS[name].label for name in RATES}


def tables(folder: Path) -> str:
    """Where the runs were made, then a table for each task that has a file."""
    contents = {name: results.load(path) for name in TASKS if (path := folder / f"{name}.json").is_file()}
    places = (each["environment"] for each in contents.values())
    machines = sorted({f"{e['device']}, torch {e['packages']['torch']}, Python {e['python']}" for e in places})
    parts = [f"Measured on {'; '.join(machines)}; 1 thread." if machines else "Not run yet."]
    for name, content in contents.items():
        network = f"{named(name).model_name}, {named(name).parameters():,} parameters"
        parts.append(f"{network}; {content['data']}, batches of {content['batch_size']}; {content['loss']}:")
        parts.append(table(name, content))
    return "\n\n".join(parts)


def table(task: str, content: dict[str, Any]) -> str:
    """A row per optimizer whose runs are complete; none before AdamW's and SGDm's are."""
    early, end = (partial(loss_at, step=step) for step in judged_at(content["steps"]))
    found = complete(content["runs"])
    finals = {name: best(own, end)[1] for name, own in found.items()}
    step_time = {name: fmean(run["seconds"][-1] / run["step"][-1] for run in runs) for name, runs in finals.items()}
    rows = []
    for name, own in found.items() if finals.keys() >= {"adamw", "sgdm"} else ():
        at = [(_mean([*map(measure, runs)]), lr) for measure in (early, end) for lr, runs in [best(own, measure)]]
        starts = [lr for lr in map("{:g}".format, STARTS) if name in LEARNED and lr in own]
        cells = [LABELS[name], *(loss if lr == "default" else f"{loss} at {lr}" for loss, lr in at)]
        cells.append(", ".join([_spread(own, end), *(f"{_mean([end(own[lr][0])])} from {lr}" for lr in starts)]))
        cells.append(_mean([run["metric"][-1] for run in finals[name]]))
        cells += [_in_time_of(finals[base], own) for base in ("adamw", "sgdm")]
        rows.append([*cells, f"{step_time[name] / step_time['adamw']:.2f}"])
    header = [task, *(f"loss at {step:,}" for step in judged_at(content["steps"])), "worst ÷ best"]
    header += [f"test {content['metric']}", "loss in AdamW's time", "in SGDm's time", "time ÷ AdamW's"]
    return markdown(header, rows, numbers=True)


def complete(runs: dict[str, Run]) -> dict[str, Settings]:
    """The optimizers that were run at all of their rates."""
    found: dict[str, Settings] = {name: {} for name in LABELS}
    for key, run in runs.items():
        name, lr, _ = key.split("/")
        found[name].setdefault(lr, []).append(_read(run))
    needed = {name: {f"{lr:g}" for lr in RATES.get(name, ())} for name in LABELS}
    return {name: own for name, own in found.items() if own and own.keys() >= needed[name]}


def best(settings: Settings, measure: Callable[[Run], float]) -> tuple[str, list[Run]]:
    """Of the settings that were run on every seed, the one that does best on the first: its rate and its runs."""
    most = max(map(len, settings.values()))
    return min((each for each in settings.items() if len(each[1]) == most), key=lambda each: measure(each[1][0]))


def after_seconds(run: Run, seconds: float) -> float:
    """The loss after this time, evenly in log between two rows; the last one where the run was over before."""
    times, losses = run["seconds"], run["loss"]
    if (after := bisect_right(times, seconds)) == len(times):
        return float(losses[-1])
    share = (seconds - times[after - 1]) / (times[after] - times[after - 1])
    return float(losses[after - 1] ** (1 - share) * losses[after] ** share)


def _in_time_of(others: Sequence[Run], settings: Settings) -> str:
    """The loss after as many seconds as the same seed of ``others`` took, at the setting that is best then."""
    budgets = [run["seconds"][-1] for run in others]
    _, runs = best(settings, lambda run: after_seconds(run, budgets[0]))
    return _mean([after_seconds(run, seconds) for run, seconds in zip(runs, budgets, strict=False)])


def _spread(settings: Settings, end: Callable[[Run], float]) -> str:
    """The worst setting's loss over the best's, on the first seed; or how many settings diverged."""
    losses = [end(runs[0]) for runs in settings.values()]
    if lost := losses.count(math.inf):
        return f"{lost} of {len(losses)} diverged"
    return short(max(losses) / min(losses)) if len(losses) > 1 else "–"


def _read(run: Run) -> Run:
    """Files hold infinities as strings. Here a run that diverged ends with them, whatever its last row says."""
    ends = [math.inf] if run["status"] == "diverged" else []
    return {**run, **{key: [*map(float, run[key][: len(run[key]) - len(ends)]), *ends] for key in ("loss", "metric")}}


def _mean(values: Sequence[float]) -> str:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "diverged"
    lost = len(values) - len(finite)
    return short(fmean(finite)) + (f" ({lost} of {len(values)} diverged)" if lost else "")
