"""What a run shows, in sentences made from its rows alone."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from benchmarks.kernels.stability.aggregate import LABELS, dampings, saved_from, select, within_reach
from benchmarks.kernels.stability.measure import Row
from benchmarks.kernels.stability.methods import METHODS

LOW = ("fp32", "bf16", "fp16")
OURS = ("ours", "ours_balanced")
NOTABLE = 1.1  # ratios of errors within a tenth of one are rounding luck


def findings(rows: Sequence[Row]) -> list[str]:
    """Plain sentences, for us or against us."""
    return [
        *_agreement(rows),
        *(line for dtype in LOW for line in _breakdowns(select(rows, source="recorded", dtype=dtype), dtype)),
        *(line for dtype in LOW for line in _arithmetic(select(rows, dtype=dtype), dtype)),
        *(line for dtype in LOW for line in _against_us(select(rows, dtype=dtype), dtype)),
    ]


def _agreement(rows: Sequence[Row]) -> Iterator[str]:
    errors = [row.error for row in select(rows, source="recorded", dtype="fp64") if row.error is not None]
    if errors:
        yield f"In fp64 all methods agree on every recorded problem: the largest error is {max(errors):.0e}."


def _breakdowns(rows: Sequence[Row], dtype: str) -> Iterator[str]:
    total = len({row.pair for row in rows})
    if not total:
        return
    reachable = within_reach(rows)
    reached = len({row.pair for row in reachable})
    broken, sound = [], []
    for method in METHODS:
        own = select(reachable, method=method.key)
        reasons = Counter(re.sub(" of F_.", "", row.breakdown) for row in own if row.breakdown)
        if not reasons:
            sound.append(method.label)
            continue
        saved = saved_from(own)
        cure = f"saved by damping of {saved:.0e}" if math.isfinite(saved) else "not saved by any damping"
        why = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
        broken.append(f"{method.label} breaks down on {reasons.total()} ({why}; {cure})")
    if sound:
        broken.append(f"no breakdown at any damping, down to {min(dampings(rows)):.0e}: {', '.join(sound)}")
    yield (
        f"{dtype}: on {total - reached} of {total} recorded problems (layer, step and damping) rounding G "
        f"and P(G) alone loses the result, whatever the method. On the other {reached}: {'; '.join(broken)}."
    )


def _arithmetic(rows: Sequence[Row], dtype: str) -> Iterator[str]:
    worst = []
    for method in METHODS:
        own = select(within_reach(rows), method=method.key)
        if errors := [row.arithmetic for row in own if row.arithmetic is not None]:
            worst.append(f"{method.label} {max(errors):.0e}")
    if worst:
        yield f"{dtype}: worst error of the arithmetic alone, where there is a result: {', '.join(worst)}."


def _against_us(rows: Sequence[Row], dtype: str) -> Iterator[str]:
    """Where a method that isn't ours had the smaller error, or a result where we had none."""
    said: set[str] = set()
    for key in OURS:
        ours = {row.pair: row for row in select(rows, method=key)}
        parts = []
        for method in METHODS:
            others = [row for row in select(rows, method=method.key) if row.pair in ours and not row.breakdown]
            if method.key in OURS or not others:
                continue
            alone = sum(ours[row.pair].breakdown is not None for row in others)
            ratios = [_ratio(ours[row.pair], row) for row in others if not ours[row.pair].breakdown]
            better = [ratio for ratio in ratios if ratio > NOTABLE]
            if alone:
                parts.append(f"{method.label} has a result on {alone} where it has none")
            if better:
                parts.append(f"{method.label} is more accurate on {len(better)}, by up to {max(better):.1f} times")
        line = f"of all {len(ours)} problems {'; '.join(parts)}."
        if parts and line not in said:  # the balanced form differs in fp16 only
            yield f"Against {LABELS[key]} in {dtype}: {line}"
            said.add(line)


def _ratio(ours: Row, other: Row) -> float:
    return ours.error / other.error if ours.error and other.error else math.nan
