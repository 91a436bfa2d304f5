"""``python -m benchmarks targets``: what the compilers make of every default configuration.

For GPUs that need not be here: for each target and dtype, each kernel's registers, spills, shared memory and matrix
instructions. A fault (a spill, too much shared memory, no matrix instruction where there should be one) is marked and
listed.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

import torch
from rich.table import Table

from apo_kernels.targets import TARGETS, Target
from benchmarks.console import console, progress

__all__ = ["add_arguments", "run"]

DTYPES = ("bfloat16", "float16", "float32")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="only this one; may be repeated")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="only this one; may be repeated")
    parser.add_argument("--precision", choices=("ieee", "tf32", "tf32x3", "bf16x6"), help="of float32 products")


def run(options: Namespace) -> dict[str, Any]:
    """Compile, print one table a target, and return the rows (``"kernels"``) and what is wrong (``"faults"``).

    With ``--quick`` in bfloat16 alone: a few minutes on one core.
    """
    from apo_kernels.triton.ahead import cases, compile_case

    targets = [TARGETS[name] for name in options.target or TARGETS]
    dtypes = [getattr(torch, name) for name in options.dtype or (DTYPES[:1] if options.quick else DTYPES)]
    work = [
        (target, case) for target in targets for dtype in dtypes for case in cases(target, dtype, options.precision)
    ]
    rows: list[dict[str, Any]] = []
    with progress() as bar:
        task = bar.add_task("compiling", total=len(work))
        for target, case in work:
            bar.update(task, description=f"compiling {case.stage} for {target.name}")
            report = compile_case(case, target)
            rows.append(
                {
                    "target": target.name,
                    "dtype": str(case.dtype).removeprefix("torch."),
                    "precision": case.precision,
                    "stage": case.stage,
                    "size": case.size,
                    "tile": tile(case.constants),
                    "warps": case.warps,
                    "stages": case.stages,
                    "registers": report.registers,
                    "spills": report.spills,
                    "shared": report.shared,
                    "matrix": report.matrix,
                    "instructions": report.instructions,
                    "faults": report.faults(case, target),
                }
            )
            bar.advance(task)
    for target in targets:
        console.print(table(target, [row for row in rows if row["target"] == target.name]))
    faults = [f"{row['target']} {row['dtype']} {row['stage']} {row['size']}: {'; '.join(row['faults'])}"
              for row in rows if row["faults"]]  # fmt: skip
    for fault in faults:
        console.print(f"[red]{fault}")
    return {"kernels": rows, "faults": faults}


def tile(constants: dict[str, Any]) -> str:
    """A configuration's tile, in short."""
    if "BM" in constants:
        return f"{constants['BM']}×{constants['BN']}×{constants['BK']}"
    if "SIDE" in constants:
        return f"{constants['SIDE']}×{constants['SIDE']}/{constants['SLAB']}"
    return "×".join(str(constants[name]) for name in ("ROWS", "COLS", "CHUNK") if name in constants)


def table(target: Target, rows: list[dict[str, Any]]) -> Table:
    found = Table(title=f"{target.name}: {target.shared // 1024} KB of shared memory a program")
    for name in ("dtype", "stage", "size", "tile", "warps", "regs", "spills", "KB", "matrix"):
        found.add_column(name, justify="left" if name in ("dtype", "stage", "matrix") else "right", no_wrap=True)
    for row in rows:
        style = "red" if row["faults"] else None
        numeric = f"{row['dtype']} {row['precision']}" if row["dtype"] == "float32" else row["dtype"]
        matrix = ", ".join(f"{count} {name.strip('._')}" for name, count in row["matrix"].items()) or "-"
        found.add_row(
            numeric, row["stage"], row["size"], row["tile"], str(row["warps"]), str(row["registers"]),
            str(row["spills"]), f"{row['shared'] / 1024:.0f}", matrix, style=style,
        )  # fmt: skip
    return found
