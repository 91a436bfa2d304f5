"""Tables 2, 3 and 4: ours beside the paper's."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

from benchmarks.common.tables import Table
from benchmarks.paper.report import published
from benchmarks.paper.report.runs import SIXTEEN_BITS, Found, SeedGroup, described, grouped
from benchmarks.paper.tasks import TASKS, named
from benchmarks.paper.training.optimizers import METHODS

SMALLER = {"multi30k": "iwslt14", "multi30k-narrow": "iwslt14"}
"""Tasks that stand in Table 2 below the one of the paper that they are a smaller form of."""

FORMS = {"apo": ("apo-defaults", "apo")}
"""Names under which one of the paper's optimizers may have been run."""


def table_2(found: Found) -> Table:
    """Test accuracy, or BLEU, of the preconditioners."""
    optimizers = ("sgdm", "adam", "kfac", "apo")
    header = ["task", *(f"{METHODS[name].label}: ours / paper" for name in optimizers), "ours on"]
    rows = []
    for task in [*published.TABLE_2, *SMALLER]:
        runs = _full_precision(found.get(task, []))
        if not runs and task in SMALLER:
            continue
        theirs = published.TABLE_2.get(task, {})
        also = {"adam": ("adam", "adamw", "adamw+warmup-decay")} if task in ("iwslt14", *SMALLER) else {}
        forms = [(FORMS | also).get(name, (name,)) for name in optimizers]
        cells = [_pair(_ours(runs, each), theirs.get(name)) for each, name in zip(forms, optimizers, strict=True)]
        rows.append([_title(task), *cells, described(runs) if runs else "not run"])
    return Table("Table 2: test accuracy in %, BLEU for translation", header, rows)


def table_3(found: Found) -> Table:
    """Test accuracy of 16-bit networks, and KFAC's damping."""
    optimizers = ("sgdm", "kfac", "apo")
    figures = [f"{METHODS[name].label}: ours / paper" for name in optimizers]
    header = ["task", "precision", *figures, "KFAC's damping", "ours on"]
    rows = []
    for task, theirs in published.TABLE_3.items():
        ran = [run for run in found.get(task, []) if run["precision"] in SIXTEEN_BITS]
        for precision in sorted({run["precision"] for run in ran}) or ["16 bits"]:
            runs = [run for run in ran if run["precision"] == precision]
            damping = sorted({f"{run['hyper']['damping']:g}" for run in runs if run["optimizer"] == "kfac"})
            cells = [_pair(_ours(runs, FORMS.get(name, (name,))), theirs[name]) for name in optimizers]
            where = described(runs) if runs else "not run"
            rows.append([_title(task), precision, *cells, ", ".join(damping) or "–", where])
    return Table("Table 3: test accuracy in % of 16-bit networks", header, rows)


def table_4(found: Found) -> Table:
    """Test accuracy with a fixed, a decayed and a learned rate; the MLP of Figure 4 (right) by training loss."""
    header = ["task", "base", "fixed: ours / paper", "decay: ours / paper", "APO: ours / paper", "ours on"]
    rows = []
    for column, task in enumerate(published.TABLE_4_COLUMNS):
        runs = _full_precision(found.get(task, []))
        for base, theirs in published.TABLE_4.items():
            learned = (f"apo-lr:{base}", *(["apo-lr"] if base == "sgdm" else []))
            ours = [_ours(runs, forms) for forms in ((base,), (f"{base}+step",), learned)]
            cells = [_pair(mine, their) for mine, their in zip(ours, theirs[column], strict=True)]
            where = described(runs) if any(cell != "–" for cell in ours) else "not run"
            rows.append([_title(task), base, *cells, where])
    return Table("Table 4: test accuracy in % with the learning rate fixed, decayed and learned", header, rows)


def _full_precision(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [run for run in runs if run["precision"] not in SIXTEEN_BITS]


def _ours(runs: Sequence[dict[str, Any]], optimizers: tuple[str, ...]) -> str:
    """The mean over seeds of the first of these optimizers that was run; a run that diverged has no accuracy."""
    for group in grouped(runs):
        if group.first["optimizer"] in optimizers:
            return _figure(group)
    return "–"


def _figure(group: SeedGroup) -> str:
    if group.diverged:
        return "diverged" if group.diverged == len(group.runs) else f"{group.diverged} of {len(group.runs)} diverged"
    scores = [run["scores"].get("BLEU") for run in group.runs]
    if None not in scores:
        return f"{mean(map(float, scores)):.2f} BLEU"
    metric = named(group.first["task"]).loss.metric
    unit = "" if metric.startswith("accuracy, %") else f" ({metric})"
    return f"{mean(group.last('metric')):.2f}{unit}"


def _pair(ours: str, theirs: float | None) -> str:
    return f"{ours} / {'–' if theirs is None else f'{theirs:.2f}'}"


def _title(task: str) -> str:
    return f"{TASKS[task].source.name}, {TASKS[task].model_name}"
