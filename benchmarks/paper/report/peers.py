"""The tables of ``python -m benchmarks peers`` from its results files: one per task, and one of rates that fall."""

import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.common import results
from benchmarks.common.tables import markdown, short
from benchmarks.paper.peers import COOLED, LEARNED, RATES, STARTS, TASKS, best_rate, judged_at, loss_at
from benchmarks.paper.tasks import named
from benchmarks.paper.training.optimizers import METHODS

Run = dict[str, Any]
Settings = dict[str, list[Run]]
"""The runs of an optimizer by rate, the first seed's first."""
LABELS = {"apo": "APO"} | {name: f"AdaptiveLR on {METHODS[base].label}" for name, base in LEARNED.items()}
LABELS |= {name: METHODS[name].label for name in RATES}


def tables(folder: Path) -> str:
    """Where the runs were made, then a table for each task that has a file."""
    contents = _of_tasks(folder)
    parts = [_machines(contents.values()) if contents else "Not run yet."]
    for name, content in contents.items():
        network = f"{named(name).model_name}, {named(name).parameters():,} parameters"
        parts.append(f"{network}; {content['data']}, batches of {content['batch_size']}; {content['loss']}:")
        parts.append(table(name, content))
    return "\n\n".join(parts)


def cooled(folder: Path) -> str:
    """The losses of rates that fall in the end, fixed and learned, beside the best constant ones."""
    header = ["task, optimizer", "constant", "cooled down", "learned, cooled down", *(f"from {lr:g}" for lr in STARTS)]
    rows = []
    for (task, content), (learned, base) in product(_of_tasks(folder).items(), LEARNED.items()):
        lr = best_rate(content["runs"], base, content["steps"], RATES[base])
        keys = [f"{base}/{lr:g}/", *(f"{name}{COOLED}/{lr:g}/" for name in (base, learned))]
        keys += [f"{learned}{COOLED}/{start:g}/" for start in STARTS]
        found = [[_read(run) for key, run in content["runs"].items() if key.startswith(begun)] for begun in keys]
        if all(found):
            losses, metrics = ([_mean([run[of][-1] for run in own]) for own in found] for of in ("loss", "metric"))
            rows.append([f"{task}, {METHODS[base].label}", *losses, " / ".join(metrics[:3])])
    return markdown([*header, "test metric of the first three"], rows, numbers=True)


def _of_tasks(folder: Path) -> dict[str, dict[str, Any]]:
    return {name: results.load(path) for name in TASKS if (path := folder / f"{name}.json").is_file()}


def _machines(contents: Collection[dict[str, Any]]) -> str:
    """What the runs were made on, and what the times were taken on."""
    places = (content["environment"] for content in contents)
    versions = sorted({f"torch {e['packages']['torch']}, Python {e['python']}" for e in places})
    runs = sorted({run["device"] for content in contents for run in content["runs"].values()})
    clocks = sorted({content["clock"]["device"] for content in contents if "clock" in content})
    taken = f"Times are from {'; '.join(clocks) or 'nowhere yet'}"
    return f"Runs on {'; '.join(runs)}. {taken}, 1 thread, {'; '.join(versions)}."


def table(task: str, content: dict[str, Any]) -> str:
    """A row per optimizer whose runs are complete; none before the clock was taken."""
    early, end = (partial(loss_at, step=step) for step in judged_at(content["steps"]))
    found = complete(content)
    finals = {name: best(own, end)[1] for name, own in found.items()}
    clock = content.get("clock", {})
    rows = []
    for name, own in found.items() if clock else ():
        at = [(_mean([*map(measure, runs)]), lr) for measure in (early, end) for lr, runs in [best(own, measure)]]
        starts = [lr for lr in map("{:g}".format, STARTS) if name in LEARNED and lr in own]
        cells = [LABELS[name], *(loss if lr == "default" else f"{loss} at {lr}" for loss, lr in at)]
        cells.append(", ".join([_spread(own, end), *(f"{_mean([*map(end, own[lr])])} from {lr}" for lr in starts)]))
        cells.append(_mean([run["metric"][-1] for run in finals[name]]))
        cells += [_in_time_of(base, name, clock, own) for base in ("adamw", "sgdm")]
        rows.append([*cells, f"{clock['seconds'][name][-1] / clock['seconds']['adamw'][-1]:.2f}"])
    header = [task, *(f"loss at {step:,}" for step in judged_at(content["steps"])), "worst ÷ best"]
    header += [f"test {content['metric']}", "loss in AdamW's time", "in SGDm's time", "time ÷ AdamW's"]
    return markdown(header, rows, numbers=True)


def complete(content: dict[str, Any]) -> dict[str, Settings]:
    """The optimizers that were run at all of their rates."""
    found: dict[str, Settings] = {name: {} for name in LABELS}
    for key, run in content["runs"].items():
        name, lr, _ = key.split("/")
        if name in found:
            found[name].setdefault(lr, []).append(_read(run))
    rates = content.get("rates", RATES)
    needed = {name: {f"{lr:g}" for lr in rates.get(name, ())} for name in LABELS}
    return {name: own for name, own in found.items() if own and own.keys() >= needed[name]}


def best(settings: Settings, measure: Callable[[Run], float]) -> tuple[str, list[Run]]:
    """Of the settings that were run on every seed, the one that does best on the first: its rate and its runs."""
    most = max(map(len, settings.values()))
    return min((each for each in settings.items() if len(each[1]) == most), key=lambda each: measure(each[1][0]))


def steps_in_time_of(base: str, optimizer: str, clock: dict[str, Any]) -> float:
    """How many steps an optimizer takes in the time of all of another one's; at most as many."""
    return float(np.interp(clock["seconds"][base][-1], clock["seconds"][optimizer], clock["step"]))


def after_steps(run: Run, steps: float) -> float:
    """The loss after so many steps, evenly in log between two rows; the last one where the run was over before."""
    return math.exp(np.interp(steps, run["step"], np.log(run["loss"])))


def _in_time_of(base: str, optimizer: str, clock: dict[str, Any], settings: Settings) -> str:
    """The loss in the time of ``base``, at the setting that is best then."""
    of = partial(after_steps, steps=steps_in_time_of(base, optimizer, clock))
    return _mean([*map(of, best(settings, of)[1])])


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
    if not (finite := [value for value in values if math.isfinite(value)]):
        return "diverged"
    lost = len(values) - len(finite)
    return short(fmean(finite)) + (f" ({lost} of {len(values)} diverged)" if lost else "")
