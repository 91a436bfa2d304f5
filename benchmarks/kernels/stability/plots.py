"""The pictures: what breaks down, and how far off the rest is, by damping and by condition number."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

from benchmarks.kernels.stability.aggregate import LABELS, broken_share, dampings, median_error, select
from benchmarks.kernels.stability.measure import LIMIT, Measured

PANELS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
LOWEST, HIGHEST = 1e-8, 1e3  # of the errors drawn
GREY = "#DDDDDD"
EXPLAINED = "Above: against unrounded float64. Below: against float64 on the same rounded operands."


def _style(colour: str, marker: str, size: float, width: float, dashes: str, order: float) -> dict[str, Any]:
    line = {"linewidth": width, "linestyle": dashes, "zorder": order}
    return {"color": colour, "marker": marker, "markersize": size, **line}


# Okabe and Ito's colours, for colour-blind readers too. Thin over thick, where lines coincide.
STYLES = {
    "inverse": _style("#D55E00", "s", 5, 1.6, "-", 4),
    "eigen": _style("#CC79A7", "D", 4.5, 1.6, "-", 4),
    "chain": _style("#009E73", "v", 5, 1.4, "--", 5),
    "chain_balanced": _style("#009E73", ".", 5, 1.2, ":", 6),
    "ours": _style("#0072B2", "o", 6.5, 3, "-", 3),
    "ours_balanced": _style("#0072B2", ".", 6.5, 2, ":", 2),
}


def plot(rows: Sequence[Measured], out: Path) -> list[Path]:
    """Write the PNGs that the rows allow for into ``out``; their paths."""
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    if recorded := select(rows, source="recorded"):
        groups = {x: select(recorded, damping=x) for x in dampings(recorded)}
        snapshots = f"{len({row.case for row in recorded})} snapshots of layers in training"
        paths.append(_breakdowns(groups, snapshots, out / "stability-breakdowns.png"))
        titles = "Error by damping, on recorded layers", f"Median over {snapshots}. {EXPLAINED}"
        paths.append(_errors(groups, "damping", titles, out / "stability-damping.png"))
    if synthetic := select(rows, source="synthetic"):
        least = dampings(synthetic)[0]
        here = select(synthetic, damping=least)
        groups = {x: select(here, condition=x) for x in sorted({row.condition for row in here})}
        damped = f"damping {least:g}" if least else "no damping"
        titles = f"Error by condition number, on synthetic factors with {damped}", EXPLAINED
        paths.append(_errors(groups, "condition number of each factor", titles, out / "stability-condition.png"))
    return paths


def _breakdowns(groups: dict[float, list[Measured]], snapshots: str, path: Path) -> Path:
    figure, grid = _figure(
        1,
        "Breakdowns by damping, on recorded layers",
        f"{snapshots}. Broken down: decomposition failed, entries not finite, not a direction of descent, or error "
        "above 100%",
    )
    for axes, (dtype, title) in zip(grid[0], PANELS.items(), strict=True):
        lines = {
            key: [broken_share(select(group, dtype=dtype, method=key)) for group in groups.values()] for key in LABELS
        }
        axes.fill_between([*groups], lines[LIMIT], color=GREY, lw=0, zorder=0)
        for key, style in STYLES.items():
            axes.plot([*groups], lines[key], **style)
        axes.set(xscale="log", title=title, xlabel="damping", ylim=(-0.04, 1.04))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    grid[0][0].set_ylabel("broken down")
    return _save(figure, path, crosses=False)


def _errors(groups: dict[float, list[Measured]], xlabel: str, titles: tuple[str, str], path: Path) -> Path:
    """Total error above, error of the arithmetic below; a cross at the top where there is no result."""
    figure, grid = _figure(2, *titles)
    xs = [*groups]
    for axes_row, kind in zip(grid, ("error", "arithmetic"), strict=True):
        for axes, dtype in zip(axes_row, PANELS, strict=True):
            lines = {
                key: [median_error(select(group, dtype=dtype, method=key), kind) for group in groups.values()]
                for key in LABELS
            }
            if kind == "error":
                floor = [min(y, 10 * HIGHEST) for y in lines[LIMIT]]
                axes.fill_between(xs, floor, LOWEST, color=GREY, lw=0, zorder=0)
            _curves(axes, xs, {key: lines[key] for key in STYLES})
            axes.axhline(1, color="#444444", lw=0.8, zorder=1)
            axes.set(xscale="log", yscale="log", ylim=(LOWEST, HIGHEST))
            axes.yaxis.set_major_locator(LogLocator(numticks=6))
            axes.yaxis.set_minor_formatter(NullFormatter())
    grid[0][0].text(xs[0], 1.3, "100%", ha="left", va="bottom", fontsize=8, color="#444444")
    for axes, title in zip(grid[0], PANELS.values(), strict=True):
        axes.set_title(title)
    for axes in grid[1]:
        axes.set_xlabel(xlabel)
    grid[0][0].set_ylabel("error against exact")
    grid[1][0].set_ylabel("error of arithmetic alone")
    return _save(figure, path, crosses=True)


def _curves(axes: Axes, xs: list[float], lines: dict[str, list[float]]) -> None:
    crossed: dict[str, set[float]] = {}
    for key, ys in lines.items():
        colour = STYLES[key]["color"]
        axes.plot(xs, [y if math.isfinite(y) else math.nan for y in ys], **STYLES[key])
        missing = {x for x, y in zip(xs, ys, strict=True) if math.isinf(y)}
        if fresh := sorted(missing - crossed.get(colour, set())):  # one cross for both forms of a method
            crossed[colour] = missing | crossed.get(colour, set())
            height = 1.02 - 0.06 * len(crossed)
            across = axes.get_xaxis_transform()  # x as the data, y as a share of the axes
            ys = [height] * len(fresh)
            axes.plot(fresh, ys, "x", color=colour, markersize=5.5, mew=1.8, transform=across)


def _figure(rows: int, title: str, subtitle: str) -> tuple[Figure, list[list[Axes]]]:
    height = 1.9 + 2.3 * rows
    layout = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - 0.6 / height))  # 0.6 inches for the titles
    figure = Figure(figsize=(10, height), layout=layout, dpi=150)
    figure.text(0.5, 1 - 0.1 / height, title, ha="center", va="top", fontsize=13, fontweight="bold")
    figure.text(0.5, 1 - 0.36 / height, subtitle, ha="center", va="top", fontsize=9.5, color="#444444")
    grid = figure.subplots(rows, len(PANELS), sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat:
        axes.grid(color="#EEEEEE")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid.tolist()


def _save(figure: Figure, path: Path, *, crosses: bool) -> Path:
    handles: list[Any] = [Line2D([], [], color=GREY, lw=9, label="beyond any method in this dtype")]
    handles += [Line2D([], [], label=LABELS[key], **style) for key, style in STYLES.items()]
    if crosses:
        handles.append(Line2D([], [], color="#444444", ls="", marker="x", mew=1.8, label="no finite result"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)
    return path
