"""``python -m benchmarks tune``: times configurations of the kernels on the GPU at hand and keeps the best.

Writes ``apo_kernels/triton/tuned/<target>.json``, which is used from the next process on. A configuration that doesn't
compile, spills or needs too much shared memory isn't timed.
"""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import product
from typing import Any

import torch
from rich.table import Table

import apo_kernels as ak
from benchmarks.common.console import console, progress, table, wrote
from benchmarks.common.timing import interleave
from benchmarks.kernels.shapes import MODELS
from benchmarks.kernels.throughput.contestants import BLOCK_SIZE, Blocks, Workload

DTYPES = ("bfloat16", "float16", "float32")

Changes = dict[str, int]
Call = Callable[[], object]


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--model", default="resnet18", choices=list(MODELS), help="whose layers are timed")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="only this one; may be repeated")


def candidates(stage: str, dtype: torch.dtype) -> Iterator[Changes]:
    """The configurations of a stage that are tried."""
    if stage.startswith("tile"):
        for slab, warps in product((16, 32, 64), (4, 8)):
            yield {"slab": slab, "warps": warps}
        return
    depths = (16, 32) if dtype == torch.float32 else (32, 64)
    for (rows, cols), depth, warps, stages in product(
        ((64, 64), (128, 64), (64, 128), (128, 128), (128, 256)), depths, (4, 8), (2, 3, 4)
    ):
        if stage != "pair" or rows * cols <= 128 * 128:
            yield {"rows": rows, "cols": cols, "depth": depth, "warps": warps, "stages": stages}


def run(options: Namespace) -> dict[str, Any]:
    """Tune every stage, one after the other, and write the table. Needs a GPU."""
    if torch.device(options.device).type != "cuda" or not torch.cuda.is_available():
        sys.exit(f"python -m benchmarks tune: needs a GPU, --device cuda, but got {options.device!r}")
    from apo_kernels.targets import target_of
    from apo_kernels.triton import config

    target = target_of(torch.device(options.device))
    best: dict[str, config.GemmConfig | config.TileConfig] = {}
    rows: list[dict[str, Any]] = []
    for name in options.dtype or DTYPES:
        dtype = getattr(torch, name)
        precision = target.precision(None, dtype)
        for stage, size, default, call in _work(options, dtype, target):
            times = {"default": _time(call)}
            tried = list(candidates(stage, dtype))
            with progress() as bar:
                for changes in bar.track(tried, description=f"{name} {stage}"):
                    with config.override(**{stage: changes}):
                        if _compiles(target, dtype, stage, size):
                            times[str(changes)] = _time(call)
            fastest = min(times, key=lambda key: times[key])
            chosen = replace(default, **next((each for each in tried if str(each) == fastest), {}))
            best[f"{stage}/{name}/{precision}/{size}"] = chosen
            rows.append({"dtype": name, "stage": stage, "seconds": times, "chosen": asdict(chosen)})
    path = config.write_tuned(target, torch.cuda.get_device_name(options.device), best)
    console.print(_table(rows))
    wrote(path)
    return {"tuned": rows}


def _work(options: Namespace, dtype: torch.dtype, target: Any) -> Iterator[tuple[str, str, Any, Call]]:
    """Stage, size, its default, and a call that spends its time there."""
    from apo_kernels.triton import config

    precision = target.precision(None, dtype)
    work = Workload(MODELS[options.model], dtype, options.device)

    def forward(blocks: Blocks) -> Call:
        return lambda: ak.foreach_precondition(work.Gs, *blocks, work.Ss, backend="triton")

    def backward(blocks: Blocks) -> Call:
        return lambda: ak.foreach_precondition_vjp(work.Gs, *blocks, work.Ss, work.Vs, wanted="GABS", backend="triton")

    def update(blocks: Blocks) -> Call:
        return lambda: ak.foreach_precondition_step_(work.thetas, work.Gs, *blocks, work.Ss, lr=0.0, backend="triton")

    calls = {"update": update, "pair": backward, "left_dB": backward, "dA_dG": backward}
    for stage in config.STAGES:
        default = config.gemm_config(target, dtype, precision, stage, "large")
        yield stage, "large", default, calls.get(stage, forward)((work.As, work.Bs))
    for stage, call in (("tile_forward", update), ("tile_backward", backward)):
        is_backward = stage == "tile_backward"
        if config.tile_limit(target, dtype, is_backward) >= BLOCK_SIZE:
            chosen = config.tile_config(target, dtype, precision, is_backward, BLOCK_SIZE)
            yield stage, str(BLOCK_SIZE), chosen, call(work.stacks)


def _compiles(target: Any, dtype: torch.dtype, stage: str, size: str) -> bool:
    from apo_kernels.triton.tools.compile_ahead import cases, compile_cases

    forwards = ("tile_forward", "tile_keep", "tile_update", "tile_dG")
    stages = forwards if stage == "tile_forward" else (stage, f"{stage}_keep")
    chosen = [case for case in cases(target, dtype) if case.stage in stages and case.size.split()[0] == size]
    try:
        reports = compile_cases(chosen, target)
        return not any(report.faults(case, target) for case, report in zip(chosen, reports, strict=True))
    except Exception as error:  # a compiler's failures have no common type
        console.print(f"[dim]{chosen[0].stage} {chosen[0].constants}: {type(error).__name__}")
        return False


def _time(call: Call) -> float:
    return interleave({"call": call}, seconds=0.2)["call"].median


def _table(rows: list[dict[str, Any]]) -> Table:
    columns = ("dtype", "stage", "default ms", "best ms", "configuration")
    shown = table("fastest configurations", columns, text=("stage", "configuration"))
    for row in rows:
        milliseconds = [f"{seconds * 1e3:.3f}" for seconds in (row["seconds"]["default"], min(row["seconds"].values()))]
        shown.add_row(row["dtype"], row["stage"], *milliseconds, str(row["chosen"]))
    return shown
