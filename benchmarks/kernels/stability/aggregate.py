"""Selections, medians and shares of rows, for tables and plots."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.common.dtypes import SHORT_NAMES
from benchmarks.kernels.stability.measure import LIMIT, Measured
from benchmarks.kernels.stability.methods import METHODS

DTYPE_NAMES = tuple(SHORT_NAMES.values())
LABELS = {LIMIT: "limit of the dtype", **{method.key: method.label for method in METHODS}}


def select(rows: Iterable[Measured], **wanted: object) -> list[Measured]:
    """The rows whose attributes have these values."""
    return [row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())]


def dampings(rows: Iterable[Measured]) -> list[float]:
    return sorted({row.damping for row in rows})


def broken_share(rows: Sequence[Measured]) -> float:
    """The share of the rows that have no usable result; NaN of no rows."""
    return sum(row.breakdown is not None for row in rows) / len(rows) if rows else math.nan


def median_error(rows: Sequence[Measured], kind: str = "error") -> float:
    """The upper median of ``kind`` ("error" or "arithmetic"), infinite where missing; NaN of no rows."""
    if not rows:
        return math.nan
    values = (getattr(row, kind) for row in rows)
    return sorted(math.inf if value is None else value for value in values)[len(rows) // 2]


def within_reach(rows: Iterable[Measured]) -> list[Measured]:
    """The rows of those problems on which the dtype's limit itself doesn't break down."""
    rows = list(rows)
    lost = {(row.pair, row.dtype) for row in rows if row.method == LIMIT and row.breakdown}
    return [row for row in rows if (row.pair, row.dtype) not in lost]


def saved_from(rows: Sequence[Measured]) -> float:
    """The least damping from which on no row breaks down; infinite if one does at the largest damping."""
    broken = [row.damping for row in rows if row.breakdown]
    above = [row.damping for row in rows if not broken or row.damping > max(broken)]
    return min(above, default=math.inf)


def summarise(rows: Sequence[Measured]) -> list[dict[str, Any]]:
    """One record per method and dtype below float64, over the problems that the dtype itself allows for.

    From the damping ``saved_from`` on nothing is ``broken``. ``…_over_limit`` are of the error over that of the limit,
    ``worst_arithmetic`` of the arithmetic alone; None where there is no result.
    """
    reachable = within_reach(rows)
    records = []
    for dtype in DTYPE_NAMES[1:]:
        limits = {row.pair: row.error for row in select(reachable, dtype=dtype, method=LIMIT)}
        for method in METHODS:
            own = select(reachable, dtype=dtype, method=method.key)
            ratios = sorted(row.error / limit for row in own if row.error and (limit := limits[row.pair]))
            arithmetic = [row.arithmetic for row in own if row.arithmetic is not None]
            records.append(
                {
                    "dtype": dtype,
                    "method": method.key,
                    "problems": len(own),
                    "broken": sum(row.breakdown is not None for row in own),
                    "saved_from": saved_from(own),
                    "median_over_limit": ratios[len(ratios) // 2] if ratios else None,
                    "worst_over_limit": ratios[-1] if ratios else None,
                    "worst_arithmetic": max(arithmetic, default=None),
                }
            )
    return records
