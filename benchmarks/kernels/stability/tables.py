"""The tables that a run shows. No wider than 80 columns, which is what a terminal that isn't one has."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from rich.table import Table

from benchmarks.common.console import table
from benchmarks.kernels.stability.aggregate import DTYPE_NAMES, dampings, median_error, select, summarise
from benchmarks.kernels.stability.measure import LIMIT, Counts, Measured

SHORT = {
    LIMIT: "limit",
    "inverse": "inverse",
    "eigen": "eigenbasis",
    "chain": "plain chain",
    "chain_balanced": "  balanced",
    "ours": "apo_kernels",
    "ours_balanced": "  balanced",
}
CODES = {"Cholesky": "chol", "eigen": "eigh", "not finite": "inf", "indefinite": "indef"}


def tables(rows: Sequence[Measured]) -> Iterator[Table]:
    """Every table of the study, in the order of its argument."""
    recorded, synthetic = (select(rows, source=source) for source in ("recorded", "synthetic"))
    if recorded:
        groups = {_short(x): select(recorded, damping=x) for x in dampings(recorded)}
        yield _grid(
            f"Recorded: how many of {len({row.case for row in recorded})} cases break down, by damping",
            "Limit: the exact operator, only G and P(G) rounded. What breaks there is beyond any method.",
            groups,
            lambda group: _count_cell(sum(row.breakdown is not None for row in group), len(group)),
        )
        yield _grid(
            "Recorded: median error against unrounded float64, by damping",
            "inf: at least half of the cases have no result to compare.",
            groups,
            lambda group: _error_cell(median_error(group)),
        )
        yield _grid(
            "Recorded: median error of the arithmetic alone, by damping",
            "Against float64 on the same rounded operands. inf: half of the cases have no result in either.",
            groups,
            lambda group: _error_cell(median_error(group, "arithmetic")),
        )
    if synthetic:
        least = dampings(synthetic)[0]
        undamped = select(synthetic, damping=least)
        yield _grid(
            f"Synthetic: error at damping {_short(least)}, by condition number",
            "chol: Cholesky failed. inf: not finite. indef: not a direction of descent.",
            {_short(x): select(undamped, condition=x) for x in sorted({row.condition for row in undamped})},
            lambda group: _outcome_cell(group[0]),
        )
    yield _range_table(rows)
    yield _summary_table(rows)


def _grid(title: str, caption: str, groups: dict[str, list[Measured]], cell: Callable[[list[Measured]], str]) -> Table:
    """``groups`` across."""

    def cells(dtype: str, method: str) -> list[str]:
        found = [select(group, dtype=dtype, method=method) for group in groups.values()]
        return [cell(rows) if rows else "" for rows in found] if any(found) else []

    return _table(title, caption, groups, cells)


def _range_table(rows: Sequence[Measured]) -> Table:
    """Entries lost to the range of the 16-bit formats, over all cases and dampings."""

    def cells(dtype: str, method: str) -> list[str]:
        found = select(rows, dtype=dtype, method=method)
        result = sum((row.result for row in found), Counts())
        inside = sum((counts for row in found for counts in row.intermediates.values()), Counts())
        lost = [result[kind] for kind in ("overflow", "zero", "subnormal")] + [inside["overflow"], inside["zero"]]
        return [f"{count:,}" if count else "·" for count in lost] if found else []

    entries = sum(row.entries for row in select(rows, dtype=DTYPE_NAMES[0], method=LIMIT))
    return _table(
        f"Range: what is lost of the {entries:,} entries of all results, and inside",
        "Entries that float64 holds. Inside: inverses, S², BᵀGA and whatever else a method lets be seen.",
        ("result\ninf/nan", "\nto zero", "\nsubnormal", "inside\ninf/nan", "\nto zero"),
        cells,
    )


def _summary_table(rows: Sequence[Measured]) -> Table:
    """The whole study, a line for each dtype and method: only problems that the dtype itself allows for."""
    records = {(record["dtype"], record["method"]): record for record in summarise(rows) if record["problems"]}

    def cells(dtype: str, method: str) -> list[str]:
        if (record := records.get((dtype, method))) is None:
            return []
        worst, arithmetic = record["worst_over_limit"], record["worst_arithmetic"]
        return [
            _count_cell(record["broken"], record["problems"]),
            str(record["problems"]),
            _short(record["saved_from"]) if record["broken"] else "",
            "" if worst is None else f"{record['median_over_limit']:.2g}",
            "" if worst is None else _short(worst) if worst >= 100 else f"{worst:.2g}",
            "" if arithmetic is None else _short(arithmetic),
        ]

    return _table(
        "In sum, over the problems that aren't beyond any method",
        "Recorded and synthetic. Saved: the damping from which on nothing breaks down. Error over that of "
        "the limit, and of the arithmetic alone, where there is a result.",
        ("broken\ndown", "of", "saved\nfrom", "error/limit\nmedian", "\nworst", "arithm.\nworst"),
        cells,
    )


def _table(title: str, caption: str, heads: Iterable[str], cells: Callable[[str, str], list[str]]) -> Table:
    """Dtypes and methods down, those left out that have no ``cells``."""
    shown = table(title, ("", "method", *heads), caption=caption, labels=("method",))
    for dtype in DTYPE_NAMES:
        label = dtype
        for method, name in SHORT.items():
            if found := cells(dtype, method):
                style = "dim" if method == LIMIT else "bold" if method.startswith("ours") else None
                shown.add_row(label, name, *found, style=style)
                label = ""
        shown.add_section()
    return shown


def _count_cell(count: int, total: int) -> str:
    return "·" if count == 0 else f"[red]{count}[/]" if 2 * count >= total else f"[yellow]{count}[/]"


def _error_cell(error: float) -> str:
    return f"[red]{_short(error)}[/]" if error > 1 else _short(error)


def _outcome_cell(row: Measured) -> str:
    if row.breakdown is None or row.breakdown == "error above 1":
        return _error_cell(math.inf if row.error is None else row.error)
    code = next((code for start, code in CODES.items() if row.breakdown.startswith(start)), row.breakdown)
    return f"[red]{code}[/]"


def _short(x: float) -> str:
    """Five characters at most: 2e-3, 1e10, 0."""
    if x == 0 or not math.isfinite(x):
        return f"{x:g}"
    mantissa, exponent = f"{x:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"
