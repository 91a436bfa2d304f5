"""``python -m benchmarks targets``: what the compilers make of every default configuration.

For GPUs that need not be here: for each target and dtype, each kernel's registers, spills, shared memory and matrix
instructions. A fault (a spill, too much shared memory, no matrix instruction where there should be one) is marked and
listed.
"""

import os
import sys
from argparse import ArgumentParser, Namespace
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import chain, product
from multiprocessing import get_context
from typing import Any

import torch
from rich.table import Table

from apo_kernels.targets import TARGETS, Target
from benchmarks.common import results
from benchmarks.common.console import console, progress, table, wrote

DTYPES = ("bfloat16", "float16", "float32")
TOGETHER = 8  # kernels that are compiled before they are disassembled


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="only this one; may be repeated")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="only this one; may be repeated")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes that compile (default: %(default)s)"
    )
    parser.add_argument("--precision", choices=("ieee", "tf32", "tf32x3", "bf16x6"), help="of float32 products")


def run(options: Namespace) -> dict[str, Any]:
    """Compile, print a table per target, and write ``targets.json``. A fault ends the process with an error.

    With ``--quick`` in bfloat16 alone: about a minute on two cores.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("python -m benchmarks targets: nothing is compiled under TRITON_INTERPRET=1; unset it")
    import triton

    from apo_kernels.triton.tools.compile_ahead import cases

    names = options.target or list(TARGETS)
    dtypes = options.dtype or list(DTYPES[:1] if options.quick else DTYPES)
    work = [
        (target, dtype, options.precision, at)
        for target, dtype in product(names, dtypes)
        for at in range(0, len(list(cases(TARGETS[target], getattr(torch, dtype), options.precision))), TOGETHER)
    ]
    # A process of its own, also where there is one: it must know nothing of this one's device.
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool, progress() as bar:
        compiled = pool.map(compile_some, *zip(*work, strict=True))
        rows = list(chain.from_iterable(bar.track(compiled, total=len(work), description="compiling")))
    for name in names:
        console.print(_table(TARGETS[name], [row for row in rows if row["target"] == name]))
    faults = [f"{row['target']} {row['dtype']} {row['stage']} {row['size']}: {'; '.join(row['faults'])}"
              for row in rows if row["faults"]]  # fmt: skip
    found = {"triton": triton.__version__, "kernels": rows, "faults": faults}
    wrote(results.write(options.out, "targets", "cpu", found))
    if faults:
        sys.exit("\n".join(["python -m benchmarks targets: found to be at fault:", *faults]))
    return found


def compile_some(target_name: str, dtype_name: str, precision: str | None, first: int) -> list[dict[str, Any]]:
    """The rows of some of :func:`apo_kernels.triton.tools.compile_ahead.cases`, from the first on."""
    from apo_kernels.triton.tools.compile_ahead import cases, compile_cases

    target = TARGETS[target_name]
    chosen = list(cases(target, getattr(torch, dtype_name), precision))[first : first + TOGETHER]
    return [
        {
            "target": target.name,
            "dtype": dtype_name,
            "tile": tile(case.constants),
            **{name: getattr(case, name) for name in ("precision", "stage", "size", "warps", "stages")},
            **asdict(report),
            "faults": report.faults(case, target),
        }
        for case, report in zip(chosen, compile_cases(chosen, target), strict=True)
    ]


def tile(constants: dict[str, Any]) -> str:
    """A configuration's tile, in short."""
    if "BM" in constants:
        return f"{constants['BM']}×{constants['BN']}×{constants['BK']}"
    if "SIDE" in constants:
        return f"{constants['SIDE']}×{constants['SIDE']}/{constants.get('SLAB', constants['SIDE'])}"
    return "×".join(str(constants[name]) for name in ("ROWS", "COLS", "CHUNK") if name in constants)


def _table(target: Target, rows: list[dict[str, Any]]) -> Table:
    columns = ("dtype", "stage", "size", "tile", "warps", "regs", "spills", "KB", "matrix")
    title = f"{target.name}: {target.shared // 1024} KB of shared memory a program"
    found = table(title, columns, text=("stage", "matrix"))
    for row in rows:
        numeric = f"{row['dtype']} {row['precision']}" if row["dtype"] == "float32" else row["dtype"]
        figures = (str(row[name]) for name in ("stage", "size", "tile", "warps", "registers", "spills"))
        matrix = ", ".join(f"{count} {name.strip('._')}" for name, count in row["matrix"].items()) or "-"
        style = "red" if row["faults"] else None
        found.add_row(numeric, *figures, f"{row['shared'] / 1024:.0f}", matrix, style=style)
    return found
