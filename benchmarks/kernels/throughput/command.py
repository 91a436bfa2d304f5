"""The run: every contestant on every model, operation and dtype, interleaved; tables, plots and a JSON file."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from rich.progress import Progress, TaskID

from benchmarks.common import results
from benchmarks.common.console import console, progress
from benchmarks.common.machine import device_name
from benchmarks.common.timing import Sample, interleave
from benchmarks.kernels import account, machine_peaks
from benchmarks.kernels.shapes import MODELS, QUICK_MODELS
from benchmarks.kernels.throughput import plots, tables
from benchmarks.kernels.throughput.contestants import (
    BLOCKS,
    CHAIN,
    FULL,
    NAMES,
    OPERATIONS,
    Contestant,
    Workload,
    contestants,
    estimate,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks throughput`` beside the common ones."""
    parser.add_argument("--models", type=_names(MODELS), metavar="NAME,…", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--dtypes", type=_names(DTYPES), metavar="NAME,…", help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--operations", type=_names(OPERATIONS), metavar="NAME,…", help=f"of {', '.join(OPERATIONS)}")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; 1 compares best (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, help="that each contestant is timed for (default: 4, with --quick 0.25)"
    )
    parser.add_argument(
        "--limit",
        type=float,
        help="seconds a call may be expected to take; what takes longer isn't run (default: 60, with --quick 1)",
    )
    parser.add_argument(
        "--add", action="store_true", help="keep the rows of an earlier run in --out that this one doesn't measure"
    )
    parser.add_argument(
        "--account",
        action="store_true",
        help="time nothing: print the FLOPs, bytes and regime of every launch of the kernels on an H100",
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, show, and write ``throughput.json`` and the plots into ``options.out``."""
    models = options.models or list(QUICK_MODELS if options.quick else MODELS)
    dtypes = options.dtypes or list(DTYPES)
    if options.account:
        return {dtype: account.show(models, DTYPES[dtype]) for dtype in dtypes}
    operations = options.operations or list(OPERATIONS)
    seconds = options.seconds or (0.25 if options.quick else 4.0)
    limit = options.limit or (1.0 if options.quick else 60.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        with progress() as bar:
            task = bar.add_task("measuring the machine", total=None)
            rates = machine_peaks.matmul_rates(options.device, list(DTYPES.values()), seconds=min(seconds, 1.0))
            bandwidth = machine_peaks.copy_bandwidth(options.device, seconds=min(seconds, 1.0))
            bar.remove_task(task)
            console.print(tables.machine(device_name(options.device), options.threads, rates, bandwidth))
            rows: list[Row] = []
            for model in models:
                found = list(_model(bar, model, operations, dtypes, rates, bandwidth, seconds, limit, options))
                console.print(tables.model_table(model, found))
                rows += found
            by_shape = _shapes(bar, models, seconds / 8, rates, options)
        earlier = _earlier(options, rows, by_shape)
        payload: dict[str, Any] = {
            "device_name": device_name(options.device),
            "threads": options.threads,
            "matmul_flops_per_s": {name: rates[dtype] for name, dtype in DTYPES.items()},
            "copy_bytes_per_s": bandwidth,
            "rows": [*rows, *earlier["rows"]],
            "by_shape": sorted([*by_shape, *earlier["by_shape"]], key=lambda row: row["m"] * row["n"]),
            "ratios": tables.ratios([*rows, *earlier["rows"]]),
            "earlier": earlier["environments"],
        }
        console.print(tables.ratio_table(payload["ratios"]))
        path = results.write(options.out, "throughput", options.device, payload)
        for written in (*plots.draw(payload, options.out), path):
            console.print(f"wrote {written}", soft_wrap=True)
    finally:
        torch.set_num_threads(threads)
    return payload


def _earlier(options: argparse.Namespace, rows: list[Row], by_shape: list[Row]) -> dict[str, Any]:
    """With ``--add``: what the file that is to be written anew holds beside these rows, so that a long run can be
    made in parts, and where it was taken."""
    path = options.out / "throughput.json"
    if not options.add or not path.exists():
        return {"rows": [], "by_shape": [], "environments": []}
    content = results.load(path)
    return {
        "rows": _without(rows, content["rows"], ("model", "operation", "dtype", "contestant")),
        "by_shape": _without(by_shape, content["by_shape"], ("m", "n", "contestant")),
        "environments": [content["environment"], *content["earlier"]],
    }


def _without(new: list[Row], old: list[Row], names: tuple[str, ...]) -> list[Row]:
    """The old rows that no new one replaces."""
    keys = {tuple(row[name] for name in names) for row in new}
    return [row for row in old if tuple(row[name] for name in names) not in keys]


def _model(
    bar: Progress,
    model: str,
    operations: list[str],
    dtypes: list[str],
    rates: dict[torch.dtype, float],
    bandwidth: float,
    seconds: float,
    limit: float,
    options: argparse.Namespace,
) -> Iterator[Row]:
    """One row a contestant, operation and dtype. All dtypes are interleaved: their ratios are figures too."""
    work = {name: Workload(MODELS[model], DTYPES[name], options.device) for name in dtypes}
    for operation in operations:
        ready: dict[str, Contestant] = {}
        rows: dict[str, Row] = {}
        torch._dynamo.reset()
        task = bar.add_task(f"{model}: {operation}, preparing", total=len(dtypes) * len(NAMES))
        for dtype in dtypes:
            for name, contestant in contestants(operation, work[dtype], compiled=not options.no_compile):
                bar.update(task, description=f"{model}: {operation}, preparing {name} in {dtype}", advance=1)
                row: Row = {"model": model, "operation": operation, "dtype": dtype, "contestant": name}
                row["gflop"] = None if contestant.flops is None else contestant.flops / 1e9
                row["mb"] = None if contestant.bytes is None else contestant.bytes / 1e6
                rows[f"{name} in {dtype}"] = row
                expected = estimate(operation, name, MODELS[model], DTYPES[dtype], rates)
                if expected > limit:
                    row["note"] = f"not run: expected to take over {limit:g} s a call (--limit)"
                    row["expected_s"] = expected
                elif (failure := _failure(name, contestant)) is not None:
                    row["note"] = failure
                else:
                    ready[f"{name} in {dtype}"] = contestant
        bar.update(task, description=f"{model}: {operation}, timing", total=1.0, completed=0)
        samples = interleave(
            {key: contestant.call for key, contestant in ready.items()},
            seconds=seconds,
            warm=True,
            advance=partial(_advance, bar, task),
        )
        bar.remove_task(task)
        for key, sample in samples.items():
            row = rows[key]
            row.update(_figures(row, sample, rates[_product_dtype(row, options.device)], bandwidth))
        yield from rows.values()
        gc.collect()


def _shapes(
    bar: Progress, models: list[str], seconds: float, rates: dict[torch.dtype, float], options: argparse.Namespace
) -> list[Row]:
    """Each distinct layer alone, applied in float32: how the rate depends on the shape."""
    shapes = sorted({shape for model in models for shape in MODELS[model]}, key=lambda shape: shape[0] * shape[1])
    task = bar.add_task("single layers", total=len(shapes))
    rows: list[Row] = []
    for m, n in shapes:
        work = Workload([(m, n)], torch.float32, options.device)
        ready = {name: c for name, c in contestants("apply", work, compiled=False) if name in (FULL, BLOCKS, CHAIN)}
        samples = interleave({name: contestant.call for name, contestant in ready.items()}, seconds=seconds)
        for name, sample in samples.items():
            row: Row = {"m": m, "n": n, "contestant": name, "gflop": (ready[name].flops or 0) / 1e9}
            rows.append(row | _figures(row, sample, rates[torch.float32], None))
        bar.advance(task)
    bar.remove_task(task)
    return rows


def _advance(bar: Progress, task: TaskID, share: float) -> None:
    bar.update(task, completed=share)


def _failure(name: str, contestant: Contestant) -> str | None:
    """Why a contestant can't be run here. Where one of torch's own can't, that is a result; ours must not."""
    try:
        contestant.call()
    except Exception as error:
        if name in (FULL, BLOCKS):
            raise
        return f"{name} failed: {type(error).__name__}"
    return None


def _product_dtype(row: Row, device: str) -> torch.dtype:
    """The dtype that a row's products are taken in: the rate to compare it with."""
    dtype = DTYPES[row["dtype"]]
    widened = row["contestant"] in (FULL, BLOCKS) and torch.device(device).type == "cpu"
    return torch.float32 if widened else dtype


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


def _names(known: Any) -> Any:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return names

    return parse
