"""The run: every contestant on every model, operation and dtype, interleaved; tables, plots and a JSON file."""

import argparse
import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import Progress

from benchmarks.common import results
from benchmarks.common.console import console, progress, wrote
from benchmarks.common.dtypes import DTYPES
from benchmarks.common.machine import device_name
from benchmarks.common.options import names_of
from benchmarks.common.timing import Sample, cpu_threads, interleave
from benchmarks.kernels import launch_costs, machine_peaks
from benchmarks.kernels.shapes import MODELS, QUICK_MODELS
from benchmarks.kernels.throughput import plots, tables
from benchmarks.kernels.throughput.contestants import (
    CHAIN,
    COMPILED,
    EIGEN,
    NAMES,
    OPERATIONS,
    OURS,
    Workload,
    contestants,
    estimate,
)

Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for option, known in (("--models", MODELS), ("--dtypes", DTYPES), ("--operations", OPERATIONS)):
        parser.add_argument(option, type=names_of(known), metavar="NAME,…", help=f"of {', '.join(known)}")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; 1 compares best (default: %(default)s)")
    parser.add_argument("--seconds", type=float, help="to time each contestant for (default: 4, with --quick 0.25)")
    limit = "leave out calls that may take more seconds (default: 60, with --quick 1)"
    parser.add_argument("--limit", type=float, help=limit)
    account = "time nothing: print the FLOPs, bytes and regime of every launch of the kernels on an H100"
    parser.add_argument("--account", action="store_true", help=account)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    bases = "leave KFAC's eigenbases out, which take a GPU many seconds"
    graphs = "time replays of captured graphs on a GPU: its own time, without the host's (throughput-graphs.json)"
    parser.add_argument("--graphs", action="store_true", help=graphs)
    parser.add_argument("--no-eigenbases", action="store_true", help=bases)


@dataclass(frozen=True)
class Bench:
    """What measures: the progress bar, the device and what it does at best, and for how long each is timed."""

    bar: Progress
    device: str
    rates: dict[torch.dtype, float]
    bandwidth: float
    seconds: float
    limit: float
    left_out: tuple[str, ...]
    graphs: bool


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, show, and write ``throughput.json`` and the plots into ``options.out``."""
    if options.graphs and torch.device(options.device).type != "cuda":
        sys.exit(f"python -m benchmarks throughput: --graphs needs a GPU, --device cuda, but got {options.device!r}")
    models = options.models or list(QUICK_MODELS if options.quick else MODELS)
    dtypes = options.dtypes or list(DTYPES)
    if options.account:
        return {dtype: launch_costs.show(models, DTYPES[dtype]) for dtype in dtypes}
    operations = options.operations or list(OPERATIONS)
    seconds = options.seconds or (0.25 if options.quick else 4.0)
    limit = options.limit or (1.0 if options.quick else 60.0)
    with cpu_threads(options.threads), progress() as bar:
        task = bar.add_task("measuring the machine", total=None)
        rates = machine_peaks.matmul_rates(options.device, list(DTYPES.values()), seconds=min(seconds, 1.0))
        bandwidth = machine_peaks.copy_bandwidth(options.device, seconds=min(seconds, 1.0))
        bar.remove_task(task)
        console.print(tables.machine(device_name(options.device), options.threads, rates, bandwidth))
        left_out = COMPILED * options.no_compile, EIGEN * options.no_eigenbases
        bench = Bench(bar, options.device, rates, bandwidth, seconds, limit, left_out, options.graphs)
        rows: list[Row] = []
        for model in models:
            work = {name: Workload(MODELS[model], DTYPES[name], options.device) for name in dtypes}
            found = [row for operation in operations for row in _measure(bench, model, operation, work)]
            console.print(tables.model_table(model, found))
            rows += found
        by_shape = _shapes(bench, models)
    payload: dict[str, Any] = {
        "device_name": device_name(options.device),
        "graphs": options.graphs,
        "threads": options.threads,
        "matmul_flops_per_s": {name: rates[dtype] for name, dtype in DTYPES.items()},
        "copy_bytes_per_s": bandwidth,
        "rows": rows,
        "by_shape": by_shape,
        "ratios": tables.ratios(rows),
    }
    console.print(tables.ratio_table(payload["ratios"]))
    path = results.write(options.out, "throughput" + "-graphs" * options.graphs, options.device, payload)
    wrote(*([] if options.graphs else plots.draw(payload, options.out)), path)
    return payload


def _measure(bench: Bench, model: str, operation: str, work: dict[str, Workload]) -> Iterator[Row]:
    """One row per contestant and dtype. All dtypes are interleaved: their ratios are figures too."""
    bar, ready, rows = bench.bar, dict[str, Callable[[], object]](), dict[str, Row]()
    torch._dynamo.reset()
    task = bar.add_task(f"{model}: {operation}, preparing", total=len(work) * len(NAMES))
    for dtype, operands in work.items():
        for name, contestant in contestants(operation, operands, bench.left_out):
            bar.update(task, description=f"{model}: {operation}, preparing {name} in {dtype}", advance=1)
            row: Row = {"model": model, "operation": operation, "dtype": dtype, "contestant": name}
            row["gflop"] = None if contestant.flops is None else contestant.flops / 1e9
            row["mb"] = None if contestant.bytes is None else contestant.bytes / 1e6
            rows[f"{name} in {dtype}"] = row
            expected = estimate(operation, name, MODELS[model], DTYPES[dtype], bench.rates)
            if expected > bench.limit:
                row["note"] = f"not run: expected to take over {bench.limit:g} s a call (--limit)"
                row["expected_s"] = expected
            else:
                call, failure = _callable(name, contestant.call, bench.graphs)
                row |= {} if failure is None else {"note": failure}
                if call is not None:
                    ready[f"{name} in {dtype}"] = call
    bar.update(task, description=f"{model}: {operation}, timing", total=1.0, completed=0)
    samples = interleave(ready, seconds=bench.seconds, warm=True, advance=lambda x: bar.update(task, completed=x))
    bar.remove_task(task)
    for key, sample in samples.items():
        widened = rows[key]["contestant"] in OURS and torch.device(bench.device).type == "cpu"
        roof = bench.rates[torch.float32 if widened else DTYPES[rows[key]["dtype"]]]
        rows[key].update(_figures(rows[key], sample, roof, bench.bandwidth))
    yield from rows.values()
    gc.collect()


def _shapes(bench: Bench, models: list[str]) -> list[Row]:
    """Each distinct layer alone, applied in float32: how the rate depends on the shape."""
    shapes = sorted({shape for model in models for shape in MODELS[model]}, key=lambda shape: shape[0] * shape[1])
    rows: list[Row] = []
    for m, n in bench.bar.track(shapes, description="single layers"):
        work = Workload([(m, n)], torch.float32, bench.device)
        ready = {name: c for name, c in contestants("apply", work, (COMPILED,)) if name in (*OURS, CHAIN)}
        calls = {name: _replay(c.call) if bench.graphs else c.call for name, c in ready.items()}
        samples = interleave(calls, seconds=bench.seconds / 8)
        for name, sample in samples.items():
            row: Row = {"m": m, "n": n, "contestant": name, "gflop": (ready[name].flops or 0) / 1e9}
            rows.append(row | _figures(row, sample, bench.rates[torch.float32], None))
    return rows


def _callable(name: str, call: Callable[[], object], graphs: bool) -> tuple[Callable[[], object] | None, str | None]:
    """What is timed, or why a contestant can't be run here. Where one of torch's own can't, that is a result; ours
    must not."""
    try:
        call()
        return _replay(call) if graphs else call, None
    except Exception as error:
        if name in OURS:
            raise
        return None, f"{name} failed: {type(error).__name__}"


def _replay(call: Callable[[], object]) -> Callable[[], object]:
    """What a call launches, captured."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph.replay


def _figures(row: Row, sample: Sample, roof: float, bandwidth: float | None) -> Row:
    low, high = sample.spread
    figures: Row = {
        "median_ms": sample.median * 1e3,
        "low_ms": low * 1e3,
        "high_ms": high * 1e3,
        "rounds": len(sample.times),
    }
    if row["gflop"] is not None:
        figures["gflop_per_s"] = row["gflop"] / sample.median
        figures["share_of_matmul"] = row["gflop"] * 1e9 / sample.median / roof
    if bandwidth is not None and row.get("mb") is not None:
        figures["share_of_copy"] = row["mb"] * 1e6 / sample.median / bandwidth
    return figures
