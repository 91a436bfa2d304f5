"""FLOPs, bytes, intensity and regime of every launch on the named models, by formula, on an H100's roofline.

Nothing is timed. ``python -m benchmarks throughput --account`` prints it. The roof is that of an H100 80GB HBM3: copy
bandwidth and bfloat16 rate as measured on one, the other rates expected from it.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch

from apo_kernels.targets import TARGETS
from apo_kernels.triton.tools.cost_model import OPERATIONS, launch_costs
from benchmarks.common.console import console, table
from benchmarks.kernels.shapes import MODELS

H100_BANDWIDTH = 3.0e12
H100_RATES = {torch.bfloat16: 798e12, torch.float16: 798e12, torch.float32: 133e12}
"""FLOP/s of products; float32 by three TensorFloat32 products."""
LAUNCH = 4e-6  # seconds that an empty launch takes
FORMS = {"full blocks": None, "blocks of 64": 64}


def show(models: Sequence[str], dtype: torch.dtype) -> dict[str, Any]:
    """Print a row per launch, for each model, form of blocks and operation; return them under ``"account"``."""
    rate = H100_RATES[dtype]
    found: list[dict[str, Any]] = [
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
        for model, (form, side), operation in product(models, FORMS.items(), OPERATIONS)
        for entry in launch_costs(operation, MODELS[model], side, dtype, TARGETS["sm_90"])
    ]
    name = str(dtype).removeprefix("torch.")
    console.print(f"{name}: by formula, on the roofline of an H100; nothing here is a measurement")
    columns = ("operation", "launch", "GFLOP", "MB", "FLOP/byte", "floor µs", "regime")
    for model, form in product(models, FORMS):
        shown = table(f"{model}, {form}", columns, text=("launch", "regime"))
        for row in found:
            if (row["model"], row["blocks"]) == (model, form):
                figures = f"{row['flops'] / 1e9:.3f}", f"{row['bytes'] / 1e6:.2f}", f"{row['intensity']:.0f}"
                shown.add_row(row["operation"], row["launch"], *figures, f"{row['floor'] * 1e6:.1f}", row["regime"])
        console.print(shown)
    return {"account": found}
