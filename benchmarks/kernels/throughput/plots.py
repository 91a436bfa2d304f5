"""The throughput as pictures: each model's speed relative to the plain chain, and the rate by the size of a layer."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.kernels.shapes import MODELS
from benchmarks.kernels.throughput.contestants import BLOCKS, CHAIN, COMPILED, EIGEN, FULL, INVERSE, OPERATIONS

COLOURS = {
    FULL: "#0072b2",
    BLOCKS: "#56b4e9",
    CHAIN: "#009e73",
    COMPILED: "#8fd3bb",
    INVERSE: "#d55e00",
    EIGEN: "#cc79a7",
}
TITLES = {
    "apply": "apply: preconditioned gradients",
    "refresh": "refresh: meta-gradient, or decomposition",
    "step": "step: apply and update",
}


def draw(payload: dict[str, Any], out: Path) -> list[Path]:
    """Write one PNG per dtype, and one of single layers, into ``out``; return the paths."""
    matplotlib.use("Agg")
    out.mkdir(parents=True, exist_ok=True)
    dtypes = dict.fromkeys(row["dtype"] for row in payload["rows"])
    return [*(_relative(payload, dtype, out) for dtype in dtypes), _by_shape(payload, out)]


def _relative(payload: dict[str, Any], dtype: str, out: Path) -> Path:
    """Speed relative to the plain chain: a panel per operation, models across, contestants as bars."""
    rows = [row for row in payload["rows"] if row["dtype"] == dtype]
    operations = sorted({row["operation"] for row in rows}, key=OPERATIONS.index)
    models = sorted({row["model"] for row in rows}, key=list(MODELS).index)
    times = {(r["operation"], r["model"], r["contestant"]): r.get("median_ms") for r in rows}
    present = [name for name in COLOURS if any(row["contestant"] == name for row in rows)]
    figure = Figure(figsize=(4.2 * len(operations), 4.2), layout="constrained", dpi=110)
    axes = figure.subplots(1, len(operations), sharey=True, squeeze=False)[0]
    for ax, operation in zip(axes, operations, strict=True):
        for j, name in enumerate(present):
            for i, model in enumerate(models):
                chain, time = times.get((operation, model, CHAIN)), times.get((operation, model, name))
                if not chain or not time:
                    continue
                x = i + (j - (len(present) - 1) / 2) * 0.85 / len(present)
                ax.bar(x, chain / time - 1, bottom=1, width=0.8 / len(present), color=COLOURS[name])
        ax.axhline(1, color="#444444", linewidth=1)
        ax.set_xticks(range(len(models)), models)
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
        _style(ax, TITLES[operation])
    axes[0].set_ylabel("speed against the plain chain")
    figure.suptitle(f"Speed in {dtype}, {payload['device_name']}, {payload['threads']} thread(s)", fontsize=12)
    handles = [matplotlib.patches.Patch(color=COLOURS[name], label=name) for name in present]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    path = out / f"throughput-{dtype}.png"
    figure.savefig(path)
    return path


def _by_shape(payload: dict[str, Any], out: Path) -> Path:
    """GFLOP/s of single layers in float32, in the order of their size, below the machine's own rate."""
    rows = payload["by_shape"]
    labels = list(dict.fromkeys(f"{row['m']}×{row['n']}" for row in rows))
    figure = Figure(figsize=(max(6.0, 2 + 0.36 * len(labels)), 4.2), layout="constrained", dpi=110)
    ax = figure.subplots()
    roof = payload["matmul_flops_per_s"]["fp32"] / 1e9
    ax.axhline(roof, color="#444444", linewidth=1, linestyle="--")
    ax.annotate("matrix products as measured", (0, roof), (0, 3), textcoords="offset points", fontsize=8)
    for name in dict.fromkeys(row["contestant"] for row in rows):
        rates = [row["gflop_per_s"] for row in rows if row["contestant"] == name]
        ax.plot(labels, rates, "o-", color=COLOURS[name], label=name, markersize=4)
    ax.tick_params(axis="x", labelrotation=90)
    ax.set(xlabel="layer, m×n, by size", ylabel="GFLOP/s", ylim=(0, None))
    _style(ax, f"Rate by shape, fp32, {payload['device_name']}, {payload['threads']} thread(s)")
    ax.legend(frameon=False)
    path = out / "throughput-shapes.png"
    figure.savefig(path)
    return path


def _style(ax: Axes, title: str) -> None:
    ax.grid(axis="y", which="major", alpha=0.3)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(title, fontsize=11)
