"""The static account of the named models: FLOPs, bytes, intensity and regime of every launch, on an H100's roofline.

No timing: what ``python -m benchmarks throughput --account`` prints. The roof is that of an H100 80GB HBM3: copy
bandwidth and bfloat16 rate as measured on one, the other rates expected from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table

from apo_kernels.targets import TARGETS
from apo_kernels.triton.account import OPERATIONS, account
from benchmarks.common.console import console
from benchmarks.kernels.shapes import MODELS

H100_BANDWIDTH = 3.0e12
H100_RATES = {torch.bfloat16: 798e12, torch.float16: 798e12, torch.float32: 133e12}
"""FLOP/s of products; float32 by three TensorFloat32 products."""
LAUNCH = 4e-6
"""Seconds that a launch takes if it has nothing to do."""
FORMS = {"full blocks": None, "blocks of 64": 64}


def rows(models: Sequence[str], dtype: torch.dtype) -> list[dict[str, Any]]:
    """One row a launch of each model, form of blocks and operation."""
    found: list[dict[str, Any]] = []
    for model in models:
        for form, side in FORMS.items():
            for operation in OPERATIONS:
                for entry in account(operation, MODELS[model], side, dtype, TARGETS["sm_90"]):
                    rate = H100_RATES[dtype]
                    found.append(
                        {
                            "model": model,
                            "blocks": form,
                            "operation": operation,
                            "launch": entry.launch,
                            "flops": entry.flops,
                            "bytes": entry.bytes,
                            "intensity": entry.intensity,
                            "floor": entry.floor(rate, H100_BANDWIDTH),
                            "regime": entry.regime(rate, H100_BANDWIDTH, LAUNCH),
                        }
                    )
    return found


def show(models: Sequence[str], dtype: torch.dtype) -> dict[str, Any]:
    """Print :func:`rows`, and return them under ``"account"``."""
    found = rows(models, dtype)
    name = str(dtype).removeprefix("torch.")
    console.print(f"{name}: by formula, on the roofline of an H100; nothing here is a measurement")
    for model, form in dict.fromkeys((row["model"], row["blocks"]) for row in found):
        console.print(
            _table(f"{model}, {form}", [row for row in found if (row["model"], row["blocks"]) == (model, form)])
        )
    return {"account": found}


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("operation", "launch", "GFLOP", "MB", "FLOP/byte", "floor µs", "regime"):
        table.add_column(column, justify="right" if column[0] in "GMFf" else "left", no_wrap=True)
    for row in rows:
        table.add_row(
            row["operation"], row["launch"], f"{row['flops'] / 1e9:.3f}", f"{row['bytes'] / 1e6:.2f}",
            f"{row['intensity']:.0f}", f"{row['floor'] * 1e6:.1f}", row["regime"],
        )  # fmt: skip
    return table
