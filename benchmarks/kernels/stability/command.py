"""The run: cases × dampings × dtypes × methods, then tables, pictures and one JSON file."""

import argparse
from collections.abc import Sequence
from typing import Any

from benchmarks.common import results
from benchmarks.common.console import console, progress, wrote
from benchmarks.common.options import above_0, at_least_1
from benchmarks.kernels.stability.aggregate import LABELS, select, summarise
from benchmarks.kernels.stability.measure import DTYPES, Measured, limit, measure
from benchmarks.kernels.stability.methods import METHODS
from benchmarks.kernels.stability.plots import plot
from benchmarks.kernels.stability.problem import Damped, LayerFactors
from benchmarks.kernels.stability.recording import NETS, record
from benchmarks.kernels.stability.synthetic import synthetic_case
from benchmarks.kernels.stability.tables import tables

DAMPINGS = (1e-12, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2, 1.0)
MOMENTS = (1, 10, 100, 1000)
QUICK_MOMENTS = (1, 20, 200)
CONDITIONS = tuple(10.0**k for k in range(2, 11))
QUICK_CONDITIONS = CONDITIONS[::2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    dampings = "dampings to sweep; synthetic factors are also taken without any (default: 1e-12 to 1)"
    parser.add_argument("--dampings", type=above_0, nargs="+", default=list(DAMPINGS), metavar="γ", help=dampings)
    moments = f"training steps to record at (default: {MOMENTS}; with --quick {QUICK_MOMENTS})"
    parser.add_argument("--moments", type=at_least_1, nargs="+", metavar="STEP", help=moments)
    conditions = "condition numbers of the synthetic factors (default: 1e2 to 1e10)"
    parser.add_argument("--conditions", type=float, nargs="+", metavar="κ", help=conditions)
    parser.add_argument("--seed", type=int, default=0, help="seed of nets, batches and synthetic factors")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, show and write everything; the payload of the JSON file."""
    moments = options.moments or (QUICK_MOMENTS if options.quick else MOMENTS)
    conditions = options.conditions or (QUICK_CONDITIONS if options.quick else CONDITIONS)
    with console.status("training the nets that are recorded"):
        cases = [case for net in NETS for case in record(net, moments, options.seed)]
    cases += [synthetic_case(condition, seed=options.seed) for condition in conditions]
    rows = measure_all([case.to(options.device) for case in cases], options.dampings)

    for table in tables(rows):
        console.print(table)
    settings = {"dampings": options.dampings, "moments": moments, "conditions": conditions, "seed": options.seed}
    payload = {
        "settings": settings,
        "methods": LABELS,
        "cases": [_describe(case) for case in cases],
        "summary": {source: summarise(select(rows, source=source)) for source in ("recorded", "synthetic")},
        "rows": [_plain(row) for row in rows],
    }
    wrote(*plot(rows, options.out), results.write(options.out, "stability", options.device, payload))
    return payload


def measure_all(cases: Sequence[LayerFactors], dampings: Sequence[float]) -> list[Measured]:
    """Every case at every damping, in every dtype, by every method; synthetic factors also undamped."""
    rows = []
    with progress() as bar:
        for case in bar.track(cases, description="measuring"):
            undamped = [0.0] if case.source == "synthetic" else []
            for damping in sorted({*undamped, *dampings}):
                problem = Damped(case, damping)
                for dtype in DTYPES:
                    rows.append(limit(problem, dtype))
                    rows += [measure(problem, method, dtype) for method in METHODS]
    return rows


def _describe(case: LayerFactors) -> dict[str, Any]:
    values_A, values_B = case.eigen_A.values, case.eigen_B.values
    return {
        "name": case.name,
        "source": case.source,
        "shape": list(case.G.shape),
        "condition": case.condition,
        "largest_gradient_entry": case.G.abs().max().item(),
        "eigenvalues_A": [values_A[0].item(), values_A[-1].item()],
        "eigenvalues_B": [values_B[0].item(), values_B[-1].item()],
    }


def _plain(row: Measured) -> dict[str, Any]:
    """A row as JSON values, without what its case says already, what is missing and what is zero."""
    inside = {name: dict(+counts) for name, counts in row.intermediates.items() if +counts}
    plain = {**vars(row), "result": dict(+row.result), "intermediates": inside}
    known = ("source", "condition", "entries")
    return {name: value for name, value in plain.items() if name not in known and value not in ({}, None)}
