"""The host's side of relative steps (:mod:`apo_kernels.triton.relative`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apo_kernels.aten import relative_steps as on_aten
from apo_kernels.aten.relative_steps import EPS
from apo_kernels.targets import Target
from apo_kernels.triton import plan as plans
from apo_kernels.triton.errors import Interrupted
from apo_kernels.triton.graphs import keep_for_graph
from apo_kernels.triton.launch import Launch, current_stream, note_written, on_device
from apo_kernels.triton.plan_builder import to_device
from apo_kernels.triton.relative import average_scalings, step_diagonals, step_scalings, step_squares
from apo_kernels.triton.table_layout import ALIGN

__all__ = [
    "diagonals_constants",
    "relative_step_scalings_",
    "relative_step_squares_",
    "scalings_constants",
    "squares_constants",
    "squares_warps",
]

Numbers = float | Tensor

WIDEST = 64
DIAGONALS = 1024
CHUNK = 4096
LANES = 1024
WARPS = 8


def squares_warps(target: Target, side: int) -> int:
    """8 where 4 have too few registers for squares of 64; not on sm_90."""
    return WARPS if side == WIDEST and target.name != "sm_90" else 4


def squares_constants(b: int, each: bool, wide: bool, precision: str) -> dict[str, Any]:
    """What :func:`step_squares` is compiled for."""
    side = next(side for side in (16, 32, 64) if b <= side)
    return {"EACH": each, "PRECISION": precision, "SIDE": side, "WIDE": wide}


def diagonals_constants(each: bool) -> dict[str, Any]:
    return {"EACH": each, "CHUNK": DIAGONALS}


def scalings_constants(each: bool) -> dict[str, Any]:
    """What :func:`average_scalings` is compiled for; :func:`step_scalings` has ``LANES`` besides."""
    return {"EACH": each, "CHUNK": CHUNK}


class _Run:
    """As of :class:`apo_kernels.triton.launch.Launch`: the arguments in order."""

    def __init__(self, stream: int, *arguments: Any) -> None:
        self.stream, self.arguments = stream, arguments


class _Launch(Launch):
    host: Tensor | None = None
    """That its table was copied from: a replay of a graph copies again."""

    def _arguments(self, run: Any) -> tuple[Any, ...]:
        return (*self.tables, *run.arguments)


def relative_step_squares_(
    precision: str | None,
    X: Tensor,
    slope: Tensor,
    size: Tensor,
    new_slope: Tensor,
    new_size: Tensor,
    rate: Numbers,
    betas: tuple[float, float],
    correction: Numbers,
    floor: float,
    longest: float,
    active: Tensor | None,
) -> None:
    count, b = X.shape[:2]
    squares, rows = (X, slope), (size,)
    dense = all(x.stride()[1:] == (b, 1) or b == 1 for x in squares) and all(x.stride(-1) == 1 or b == 1 for x in rows)
    new_slope = new_slope if new_slope.stride()[1:] == (b, 1) else new_slope.contiguous()
    starts = (X, slope, new_slope)
    wide = b > 1 and b % ALIGN == 0 and not any(x.stride(0) % ALIGN or x.data_ptr() % 16 for x in starts)
    # Squares of more than 32 that can't be moved 16 bytes at a time would spill.
    if b > (WIDEST if wide else WIDEST // 2) or not dense or X.dtype != torch.float32:
        on_aten.relative_step_squares_(
            X, slope, size, new_slope, new_size, rate, betas, correction, floor, longest, active
        )
        return
    new_size = new_size if new_size.stride(-1) == 1 else new_size.contiguous()
    each, numbers = _each(X, count, rate, correction, active)
    apart = tuple(x.stride(0) for x in (X, slope, new_slope, size, new_size))
    with on_device(X.device):
        stream = current_stream(X.device)
        launch = _made(_squares, X.device)(X.device, stream, (*apart, b, count), each, wide, precision)
        weights = 1 - betas[0], 1 - betas[1]
        scalars = (*numbers[3:], *weights, floor, EPS[X.dtype], longest)
        run: Any = _Run(stream, X, slope, size, new_slope, new_size, *numbers[:3], *scalars)
        _keep(X.device, stream, launch)
        launch.compile(run)
        note_written((X, slope, size))
        launch(run)


def relative_step_scalings_(
    _precision: str | None,
    S: Tensor,
    slope: Tensor,
    size: Tensor,
    new_slope: Tensor,
    new_size: Tensor,
    lengths: Sequence[int],
    entries: Sequence[int],
    rate: Numbers,
    betas: tuple[float, float],
    correction: Numbers,
    floor: float,
    active: Tensor | None,
    total: Callable[[Tensor], None] | None,
) -> None:
    flat = (S, slope, size)
    if total is not None or S.dtype != torch.float32 or not all(x.is_contiguous() for x in flat):
        on_aten.relative_step_scalings_(
            S, slope, size, new_slope, new_size, lengths, entries, rate, betas, correction, floor, active, total
        )
        return
    each, (rates, corrections, takes_part, one_rate, one_correction) = _each(S, len(lengths), rate, correction, active)
    with on_device(S.device):
        stream = current_stream(S.device)
        average, step = _made(_scalings, S.device)(S.device, stream, tuple(lengths), tuple(entries), each)
        sums = torch.empty(average.programs, dtype=torch.float32, device=S.device)
        weights = 1 - betas[0], 1 - betas[1]
        first: Any = _Run(
            stream, slope, size, new_slope.contiguous(), new_size.contiguous(), takes_part, sums, *weights
        )
        second: Any = _Run(
            stream, S, slope, size, rates, corrections, takes_part, sums, one_rate, one_correction, floor, EPS[S.dtype]
        )
        _keep(S.device, stream, average, step)
        average.compile(first)
        step.compile(second)
        note_written((S, slope, size))
        average(first)
        try:
            step(second)
        except Exception as error:
            raise Interrupted(f"a launch failed after running means had been written: {error}") from error


def _each(
    like: Tensor, count: int, rate: Numbers, correction: Numbers, active: Tensor | None
) -> tuple[bool, tuple[Tensor, Tensor, Tensor, float, float]]:
    """Whether there are numbers of each, and these: rates, corrections, which take part; and the one rate and
    correction of all else."""
    if not isinstance(rate, Tensor) and not isinstance(correction, Tensor) and active is None:
        return False, (like, like, like.view(torch.int32), float(rate), float(correction))
    found = [
        x.to(torch.float32)
        if isinstance(x, Tensor)
        else torch.full((count,), x, dtype=torch.float32, device=like.device)
        for x in (rate, correction)
    ]
    takes_part = torch.ones(count, dtype=torch.int32, device=like.device)
    if active is not None:
        takes_part = active.to(torch.int32)
    return True, (found[0].contiguous(), found[1].contiguous(), takes_part.contiguous(), 0.0, 0.0)


def _made(make: Any, device: torch.device) -> Any:
    """``make``, of launches that are made once. Those that are made in a capture are its graph's alone."""
    return make.__wrapped__ if plans._capturing(device) else make


def _keep(device: torch.device, stream: int, *launches: Launch) -> None:
    if plans._capturing(device):
        keep_for_graph(stream, *launches)


@cache
def _squares(
    device: torch.device, stream: int, shape: tuple[int, ...], each: bool, wide: bool, precision: str | None
) -> Launch:
    *_, b, count = shape
    host, table = to_device(np.array(shape, np.int64), device)
    if b == 1:
        kernel, programs = step_diagonals, -(-count // DIAGONALS)
        constants, warps = diagonals_constants(each), WARPS
    else:
        target = plans.target_of(device)
        chosen = target.precision(precision, torch.float32)
        kernel, programs = step_squares, count
        constants = squares_constants(b, each, wide, chosen)
        warps = squares_warps(target, constants["SIDE"])
    launch = _Launch("relative_squares", kernel, programs, (table,), constants, warps, 1)
    launch.host = host
    return launch


@cache
def _scalings(
    device: torch.device, stream: int, lengths: tuple[int, ...], entries: tuple[int, ...], each: bool
) -> tuple[_Launch, _Launch]:
    rows: list[tuple[int, ...]] = []
    first = 0
    for tensor, (length, true) in enumerate(zip(lengths, entries, strict=True)):
        parts = range(0, length, CHUNK)
        chunk = len(rows)
        rows += [(first + at, min(CHUNK, length - at), tensor, chunk, len(parts), max(true, 1)) for at in parts]
        first += length
    host, table = to_device(np.array(rows, np.int64), device)
    make: Callable[..., _Launch] = partial(_Launch, programs=len(rows), tables=(table,), warps=WARPS, stages=1)
    own = scalings_constants(each)
    average = make("relative_means", average_scalings, constants=own)
    step = make("relative_scalings", step_scalings, constants={**own, "LANES": LANES})
    average.host = host
    return average, step
