"""The throughput as tables, and the ratios that the README quotes."""

from typing import Any

import torch
from rich.table import Table

from benchmarks.common.console import table
from benchmarks.common.tables import short
from benchmarks.kernels.shapes import MODELS
from benchmarks.kernels.throughput.contestants import BLOCKS, CHAIN, FULL

Row = dict[str, Any]


def machine(name: str, threads: int, rates: dict[torch.dtype, float], bandwidth: float) -> str:
    """The machine and its rates, in two lines."""
    each = ", ".join(f"{str(dtype).removeprefix('torch.')} {rate / 1e9:.0f}" for dtype, rate in rates.items())
    return f"{name}, {threads} thread(s)\nmatrix products in GFLOP/s: {each}; copies {bandwidth / 1e9:.0f} GB/s\n"


def ratios(rows: list[Row]) -> list[Row]:
    """Our times over others', per model. Below 1 is faster; None where a time is missing."""
    times = {(r["model"], r["operation"], r["dtype"], r["contestant"]): r.get("median_ms") for r in rows}

    def ratio(model: str, ours: tuple[str, str, str], other: tuple[str, str, str]) -> float | None:
        over, under = times.get((model, *ours)), times.get((model, *other))
        return over / under if over and under else None

    return [
        {
            "model": model,
            "forward": ratio(model, ("apply", "fp32", FULL), ("apply", "fp32", CHAIN)),
            "with VJP": ratio(model, ("refresh", "fp32", FULL), ("refresh", "fp32", CHAIN)),
            "in bf16": ratio(model, ("apply", "bf16", FULL), ("apply", "fp32", FULL)),
            "in fp16": ratio(model, ("apply", "fp16", FULL), ("apply", "fp32", FULL)),
            "chain bf16": ratio(model, ("apply", "bf16", CHAIN), ("apply", "fp32", CHAIN)),
            "chain fp16": ratio(model, ("apply", "fp16", CHAIN), ("apply", "fp32", CHAIN)),
            "full/blocks": ratio(model, ("apply", "fp32", FULL), ("apply", "fp32", BLOCKS)),
        }
        for model in sorted({row["model"] for row in rows}, key=list(MODELS).index)
    ]


def model_table(model: str, rows: list[Row]) -> Table:
    """Every figure of one model."""
    shown = table(
        f"{model}: medians of interleaved rounds",
        ("", "dtype", "contestant", "ms", "±", "GFLOP/s", "of mm", "of copy", "÷ chain"),
        labels=("dtype", "contestant"),
        caption="\n".join(dict.fromkeys(f"– {row['note']}" for row in rows if "note" in row)),
    )
    base = {(r["operation"], r["dtype"]): r.get("median_ms") for r in rows if r["contestant"] == CHAIN}
    previous = None
    for row in rows:
        section = (row["operation"], row["dtype"])
        if previous and section != previous:
            shown.add_section()
        labels = ("", "") if section == previous else section
        previous = section
        shown.add_row(*labels, row["contestant"], *_cells(row, base.get(section)))
    return shown


def _cells(row: Row, chain_ms: float | None) -> list[str]:
    if "median_ms" not in row:
        return ["–"]
    rate, share, moved = row.get("gflop_per_s"), row.get("share_of_matmul"), row.get("share_of_copy")
    return [
        short(row["median_ms"]),
        f"{(row['high_ms'] - row['low_ms']) / 2 / row['median_ms']:.0%}",
        f"{rate:.1f}" if rate is not None else "",
        f"{share:.0%}" if share is not None else "",
        f"{moved:.0%}" if moved is not None else "",
        f"{row['median_ms'] / chain_ms:.2f}" if chain_ms else "",
    ]


def ratio_table(found: list[Row]) -> Table:
    """:func:`ratios` as a table."""
    return table(
        "Ratios of medians",
        found[0] if found else (),
        ([model, *("" if x is None else f"{x:.2f}" for x in own)] for model, *own in (row.values() for row in found)),
        caption="forward, with VJP: ours ÷ plain chain (and autograd through it), fp32. In bf16, in fp16: ours ÷ ours "
        "in fp32. chain bf16, chain fp16: the plain chain ÷ itself in fp32. full/blocks: how many times faster "
        "block-diagonal blocks are.",
    )
