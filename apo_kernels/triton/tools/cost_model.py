"""The cost model: what each launch of a model multiplies and moves at the least, from shapes alone.

By formula; the tests hold it against a count from the tables that a plan gives to the device. Bytes are the least there
can be: each operand of a launch read once, each result written once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from apo_kernels.blocks import block_count
from apo_kernels.targets import Target
from apo_kernels.triton import config
from apo_kernels.triton.layers import BlockLayout, padded

__all__ = ["Entry", "launch_costs"]

OPERATIONS = ("forward", "step", "vjp")


@dataclass(frozen=True)
class Entry:
    """One launch.

    Attributes:
        flops: of its matrix products, pads included.
        bytes: read and written.
    """

    launch: str
    flops: int
    bytes: int

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.bytes

    def floor(self, flop_rate: float, bandwidth: float) -> float:
        """Seconds that it can't be faster than, on a roofline."""
        return max(self.flops / flop_rate, self.bytes / bandwidth)

    def regime(self, flop_rate: float, bandwidth: float, launch: float) -> str:
        """What bounds it: ``launch`` (seconds that a launch takes anyway), ``memory`` or ``compute``."""
        if self.floor(flop_rate, bandwidth) < launch:
            return "launch"
        return "compute" if self.flops / flop_rate > self.bytes / bandwidth else "memory"


@dataclass
class _Tally:
    flops: int = 0
    bytes: int = 0


def launch_costs(
    operation: str,
    shapes: Sequence[tuple[int, int]],
    block_size: int | None,
    dtype: torch.dtype,
    target: Target,
    *,
    momentum: bool = True,
) -> list[Entry]:
    """The launches of a model whose layers have ``shapes``, packing apart.

    Args:
        operation: ``forward``; ``step``, with the update fused, weights of ``dtype`` and momentum in float32; ``vjp``,
            the derivatives ``dA, dB, dS``.
        block_size: of ``A`` and ``B``; None for full blocks.
        dtype: of all operands.

    Raises:
        ValueError: ``operation`` is none of these.
    """
    if operation not in OPERATIONS:
        raise ValueError(f"operation must be one of {OPERATIONS}, but got {operation!r}")
    backward = operation == "vjp"
    limit = config.tile_limit(target, dtype, backward)
    sides = [(m, n, _squares(m, block_size), _squares(n, block_size)) for m, n in shapes if m * n]
    tiled = all(max(B.side, A.side) <= limit for _, _, B, A in sides)
    item = dtype.itemsize
    if tiled:
        return _tiles(operation, sides, dtype, target, limit, momentum)
    tallies: dict[str, _Tally] = {}

    def add(launch: str, flops: int, elements: int, wide: int = 0) -> None:
        """``elements`` of the operands' dtype and ``wide`` ones of float32."""
        tally = tallies.setdefault(launch, _Tally())
        tally.flops += flops
        tally.bytes += elements * item + 4 * wide

    for m, n, whole_B, whole_A in sides:
        B, A = whole_B.grouped_for_gemm(), whole_A.grouped_for_gemm()
        squares_A = sum(padded(A.extent(q)) ** 2 for q in range(A.groups))
        squares_B = sum(padded(B.extent(q)) ** 2 for q in range(B.groups))
        right, left, matrix = 2 * padded(m) * squares_A, 2 * padded(n) * squares_B, m * n
        if not backward:
            add("right", right, 2 * matrix + squares_A)
            add("scale", left, 3 * matrix + squares_B)
            add("left", left, 2 * matrix + squares_B)
            if operation == "forward":
                add("out", right, 2 * matrix + squares_A)
            else:
                add("update", right, 3 * matrix + squares_A, 2 * matrix * momentum)
            continue
        add("right", 2 * right, 4 * matrix + squares_A)
        add("pair", 2 * left, 5 * matrix + squares_B, matrix)  # U, U_V, S in; T, T_V and dS out
        add("left_dB", 4 * left, 6 * matrix + squares_B, squares_B)  # both W, and dB of doubled depth
        add("dA_dG", 2 * right, 4 * matrix, squares_A)
    return [Entry(launch, tally.flops, tally.bytes) for launch, tally in tallies.items()]


def _tiles(
    operation: str,
    sides: Sequence[tuple[int, int, BlockLayout, BlockLayout]],
    dtype: torch.dtype,
    target: Target,
    limit: int,
    momentum: bool,
) -> list[Entry]:
    backward = operation == "vjp"
    grouped = [(m, n, B.grouped_for_tile(limit), A.grouped_for_tile(limit)) for m, n, B, A in sides]
    widest = max(x.group * x.side for _, _, B, A in grouped for x in (B, A))
    chosen = config.tile_config(target, dtype, target.precision(None, dtype), backward, widest)
    side = chosen.side
    programs = sum(B.groups * A.groups for _, _, B, A in grouped)
    matrix = sum(m * n for m, n, _, _ in grouped)
    blocks = sum(x.count * x.side**2 for _, _, B, A in grouped for x in (B, A))
    item = dtype.itemsize
    if operation == "forward":
        return [Entry("tile_forward", 8 * side**3 * programs, (3 * matrix + blocks) * item)]
    if operation == "step":
        return [Entry("tile_update", 8 * side**3 * programs, (4 * matrix + blocks) * item + 8 * matrix * momentum)]
    parts = sum(
        A.count * A.side**2 * B.groups * (B.groups > 1) + B.count * B.side**2 * A.groups * (A.groups > 1)
        for _, _, B, A in grouped
    )
    direct = sum(
        A.count * A.side**2 * (B.groups == 1) + B.count * B.side**2 * (A.groups == 1) for _, _, B, A in grouped
    )
    # Ten products a tile; in two launches, the first four twice.
    products, read = (28, 2) if chosen.split else (20, 1)
    moved = read * (3 * matrix + blocks) * item + 4 * (matrix + parts + direct)
    found = [Entry("tile_backward", products * side**3 * programs, moved)]
    if parts:
        found.append(Entry("sum_parts", 0, 4 * (parts + blocks - direct)))
    return found


def _squares(length: int, block_size: int | None) -> BlockLayout:
    if block_size is None:
        return BlockLayout(length, length, 1)
    return BlockLayout(length, block_size, block_count(length, block_size))
