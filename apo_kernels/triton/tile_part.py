"""The host's side of the tile kernel: which tiles there are, and where parts of sums go."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from torch import Tensor

from apo_kernels.triton import config
from apo_kernels.triton.launch import Launch
from apo_kernels.triton.layers import BLOCKS, BlockLayout
from apo_kernels.triton.plan_builder import TYPES, Operation, PlanBuilder
from apo_kernels.triton.table_layout import ALIGN, Role
from apo_kernels.triton.tile import sum_parts, tile_backward, tile_forward

__all__ = ["SUM_CHUNK", "TilePart", "backward_constants", "forward_constants"]

SUM_CHUNK = 1024
"""Entries of a derivative that one program of :func:`sum_parts` adds up."""


class TilePart:
    """The layers at ``indices``, all of their squares at most ``limit`` wide.

    One launch forward where all tiles lie alike in memory, at most three where they don't; so for each part of the
    derivatives.
    """

    def __init__(self, builder: PlanBuilder, indices: Sequence[int], limit: int) -> None:
        self.builder, self.limit = builder, limit
        self.sides: dict[int, tuple[BlockLayout, BlockLayout]] = {}
        for at in indices:
            layer = builder.layers[at]
            B, A = layer.B.grouped_for_tile(limit), layer.A.grouped_for_tile(limit)
            self.sides[at] = B, A
            builder.set_squares(at, B, A)
        self.sums = self._parts() if builder.operation.wanted else []

    def _parts(self) -> list[tuple[int, ...]]:
        """Where several tiles add to one square, let them write parts; the jobs that sum these."""
        builder = self.builder
        parts: list[tuple[int, Role, int, int]] = []
        for at, (B, A) in self.sides.items():
            for letter, role, squares, count in (("A", Role.DA, A, B.groups), ("B", Role.DB, B, A.groups)):
                if letter in builder.operation.wanted and count > 1:
                    parts.append((at, role, squares.count * squares.side**2, count))
        if not parts:
            return []
        jobs: list[tuple[int, ...]] = []
        offsets = builder.workspace([4 * length * count for _, _, length, count in parts])
        for (at, role, length, count), offset in zip(parts, offsets, strict=True):
            builder.made[at].parts[role] = offset, length
            source, result = builder.single(offset), builder.single(builder.layers[at].views[role])
            jobs += [(source, result, first, length, count) for first in range(0, length, SUM_CHUNK)]
        return jobs

    def launches(self, layers: Tensor) -> list[Launch]:
        if not self.sides:
            return []
        builder, op = self.builder, self.builder.operation
        if not op.wanted:
            return self._forward(layers, "tile_update" if op.update else "tile_keep" if op.keep else "tile_forward")
        found = self._backward(layers) if set(op.wanted) & set("ABS") else []
        if self.sums:
            jobs = builder.table(self.sums)
            found.append(Launch("sum_parts", sum_parts, len(self.sums), (jobs,), {"CHUNK": SUM_CHUNK}, 4, 1))
        return found + (self._forward(layers, "tile_dG") if "G" in op.wanted else [])

    def _tiles(self, stage: str, side: int) -> dict[tuple[bool, bool], Tensor]:
        """The tables of a stage's launches, by what can be moved 16 bytes at a time (:func:`config.ways`): three at
        most, for all tiles whose matrices can share one."""
        found: dict[tuple[bool, bool], list[tuple[int, ...]]] = {}
        for at, (B, A) in self.sides.items():
            for i, j in product(range(B.groups), range(A.groups)):
                found.setdefault(self._way(at, i, j), []).append((at, i, j, 0))
        if len({way for way in found if way[0]}) == 2:
            found[True, False] += found.pop((True, True))
        served = config.ways(stage, side, self.limit)
        tables: dict[tuple[bool, bool], list[tuple[int, ...]]] = {}
        for (matrices, squares), tiles in found.items():
            way = max(way for way in served if way[0] <= matrices and way[1] <= squares)
            tables.setdefault(way, []).extend(tiles)
        return {way: self.builder.table(tiles, np.int32) for way, tiles in tables.items()}

    def _way(self, at: int, i: int, j: int) -> tuple[bool, bool]:
        """Whether 16 bytes can be moved at a time of a tile's matrices, and of its squares."""
        views, (B, A) = self.builder.layers[at].views, self.sides[at]
        if A.extent(j) % ALIGN:
            return False, False
        matrices = A.start(j) % ALIGN == 0 and all(view.wide for role, view in views.items() if role not in BLOCKS)
        alone = A.group == B.group == 1 and A.side % ALIGN == B.side % ALIGN == B.extent(i) % ALIGN == 0
        return matrices, alone and all(view.wide for role, view in views.items() if role in BLOCKS)

    def _config(self, backward: bool, way: tuple[bool, bool] = (True, True)) -> config.TileConfig:
        builder = self.builder
        widest = max(squares.group * squares.side for pair in self.sides.values() for squares in pair)
        keep = builder.operation.keep
        return config.tile_config(builder.target, builder.compute, builder.precision, backward, widest, keep, way)

    def _types(self, *roles: Role) -> list[Any]:
        return [self.builder.type_of(role) for role in roles]

    def _backward(self, layers: Tensor) -> list[Launch]:
        builder = self.builder
        types = self._types(Role.G, Role.V, Role.A, Role.B, Role.S)
        found = []
        for way, tiles in self._tiles("tile_backward", self._config(backward=True).side).items():
            chosen = self._config(backward=True, way=way)
            found += [
                Launch("tile_backward", tile_backward, len(tiles), (tiles, layers), each, chosen.warps, chosen.stages)
                for each in backward_constants(
                    chosen, builder.operation.wanted, compute=TYPES[builder.compute], precision=builder.precision,
                    types=types, way=way,
                )
            ]  # fmt: skip
        return found

    def _forward(self, layers: Tensor, stage: str) -> list[Launch]:
        builder, op = self.builder, self.builder.operation
        of_V = stage == "tile_dG"
        types = self._types(Role.V if of_V else Role.G, Role.A, Role.B, Role.S, Role.OUT, Role.MOMENTUM)
        found = []
        for way, tiles in self._tiles(stage, self._config(backward=False).side).items():
            chosen = self._config(backward=False, way=way)
            constants = forward_constants(
                chosen, op, compute=TYPES[builder.compute], precision=builder.precision, types=types, of_V=of_V, way=way
            )
            found.append(
                Launch(
                    stage, tile_forward, len(tiles), (tiles, layers), constants, chosen.warps, chosen.stages,
                    scalars=True, updates=op.update,
                )
            )  # fmt: skip
        return found


def forward_constants(
    chosen: config.TileConfig,
    operation: Operation,
    *,
    compute: Any,
    precision: str,
    types: Sequence[Any],
    of_V: bool,
    way: tuple[bool, bool],
) -> dict[str, Any]:
    """What :func:`tile_forward` is compiled for.

    Args:
        way: what can be moved 16 bytes at a time, one of :func:`config.ways`.
        types: Triton's, of ``G`` (or ``V``), ``A``, ``B``, ``S``, the result (or weight), and the momentum.
    """
    names = ("TYPE_G", "TYPE_A", "TYPE_B", "TYPE_S", "TYPE_OUT", "TYPE_MOMENTUM")
    return {
        **dict(zip(names, types, strict=True)),
        "COMPUTE": compute,
        "PRECISION": precision,
        "KEEP": operation.keep,
        "UPDATE": operation.update,
        **operation.flags,
        "OF_V": of_V,
        "SIDE": chosen.side,
        "SLAB": chosen.slab,
        "WIDE_MATRICES": way[0],
        "WIDE_SQUARES": way[1],
    }


def backward_constants(
    chosen: config.TileConfig,
    wanted: str,
    *,
    compute: Any,
    precision: str,
    types: Sequence[Any],
    way: tuple[bool, bool],
) -> list[dict[str, Any]]:
    """What the launches of :func:`tile_backward` are compiled for: one, or with ``dB`` apart two.

    Args:
        way: what can be moved 16 bytes at a time, one of :func:`config.ways`.
        types: Triton's, of ``G``, ``V``, ``A``, ``B`` and ``S``.
    """
    names = ("TYPE_G", "TYPE_V", "TYPE_A", "TYPE_B", "TYPE_S")
    common = {
        **dict(zip(names, types, strict=True)),
        "COMPUTE": compute,
        "PRECISION": precision,
        "SIDE": chosen.side,
        "SLAB": chosen.slab,
        "WIDE_MATRICES": way[0],
        "WIDE_SQUARES": way[1],
    }
    shares = ["AS", "B"] if chosen.split else ["ABS"]
    found = [{f"WANT_{x}": x in share and x in wanted for x in "ABS"} for share in shares]
    return [{**common, **wants} for wants in found if any(wants.values())]
