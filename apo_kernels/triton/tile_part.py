"""The host's side of the tile kernel: which tiles there are, and where parts of sums go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from apo_kernels.triton import config
from apo_kernels.triton.draft import TYPES, Draft, Operation
from apo_kernels.triton.launch import Launch
from apo_kernels.triton.layers import Squares
from apo_kernels.triton.roles import Role
from apo_kernels.triton.tile import sum_parts, tile_backward, tile_forward

__all__ = ["SUM_CHUNK", "TilePart", "backward_constants", "forward_constants"]

SUM_CHUNK = 1024
"""Entries of a derivative that one program of :func:`sum_parts` adds up."""


class TilePart:
    """The layers at ``indices`` of a draft, all of their squares at most ``limit`` wide.

    One launch forward, and at most three for the derivatives.
    """

    def __init__(self, draft: Draft, indices: Sequence[int], limit: int) -> None:
        self.draft = draft
        self.sides: dict[int, tuple[Squares, Squares]] = {}
        for at in indices:
            layer = draft.layers[at]
            B, A = layer.B.grouped_for_tile(limit), layer.A.grouped_for_tile(limit)
            self.sides[at] = B, A
            draft.set_squares(at, B, A)
        self.sums = self._parts() if draft.operation.wanted else []

    def _parts(self) -> list[tuple[int, ...]]:
        """Where several tiles add to one square, let them write parts; the jobs that sum these."""
        draft = self.draft
        parts: list[tuple[int, Role, int, int]] = []
        for at, (B, A) in self.sides.items():
            for letter, role, squares, count in (("A", Role.DA, A, B.groups), ("B", Role.DB, B, A.groups)):
                if letter in draft.operation.wanted and count > 1:
                    parts.append((at, role, squares.count * squares.side**2, count))
        if not parts:
            return []
        jobs: list[tuple[int, ...]] = []
        offsets = draft.workspace([4 * length * count for _, _, length, count in parts])
        for (at, role, length, count), offset in zip(parts, offsets, strict=True):
            draft.made[at].parts[role] = offset, length
            source, result = draft.single(offset), draft.single(draft.layers[at].views[role])
            jobs += [(source, result, first, length, count) for first in range(0, length, SUM_CHUNK)]
        return jobs

    def launches(self, layers: Tensor) -> list[Launch]:
        if not self.sides:
            return []
        draft, op = self.draft, self.draft.operation
        tiles = [(at, i, j, 0) for at, (B, A) in self.sides.items() for i in range(B.groups) for j in range(A.groups)]
        tables = draft.table(tiles, np.int32), layers
        if not op.wanted:
            return [self._forward(tables, "tile_update" if op.update else "tile_forward", of_V=False)]
        found: list[Launch] = []
        if set(op.wanted) & set("ABS"):
            chosen, types = self._config(backward=True), self._types()
            types.insert(1, draft.type_of(Role.V))
            every = backward_constants(
                chosen, op.wanted, compute=TYPES[draft.compute], precision=draft.precision, types=types
            )
            found += [
                Launch("tile_backward", tile_backward, len(tiles), tables, constants, chosen.warps, chosen.stages)
                for constants in every
            ]
        if self.sums:
            jobs = draft.table(self.sums)
            found.append(Launch("sum_parts", sum_parts, len(self.sums), (jobs,), {"CHUNK": SUM_CHUNK}, 4, 1))
        if "G" in op.wanted:
            found.append(self._forward(tables, "tile_dG", of_V=True))
        return found

    def _config(self, backward: bool) -> config.TileConfig:
        draft = self.draft
        widest = max(squares.group * squares.side for pair in self.sides.values() for squares in pair)
        keep = draft.operation.keep
        return config.tile_config(draft.target, draft.compute, draft.precision, backward, widest, keep)

    def _types(self) -> list[Any]:
        return [self.draft.type_of(role) for role in (Role.G, Role.A, Role.B, Role.S)]

    def _forward(self, tables: tuple[Tensor, Tensor], name: str, *, of_V: bool) -> Launch:
        draft, op = self.draft, self.draft.operation
        chosen, types = self._config(backward=False), self._types()
        if of_V:
            types[0] = draft.type_of(Role.V)
        types += [draft.type_of(Role.OUT), draft.type_of(Role.MOMENTUM)]
        constants = forward_constants(
            chosen, op, compute=TYPES[draft.compute], precision=draft.precision, types=types, of_V=of_V
        )
        return Launch(
            name, tile_forward, len(tables[0]), tables, constants, chosen.warps, chosen.stages, scalars=True,
            updates=op.update,
        )  # fmt: skip


def forward_constants(
    chosen: config.TileConfig,
    operation: Operation,
    *,
    compute: Any,
    precision: str,
    types: Sequence[Any],
    of_V: bool,
) -> dict[str, Any]:
    """What :func:`tile_forward` is compiled for.

    Args:
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
    }


def backward_constants(
    chosen: config.TileConfig, wanted: str, *, compute: Any, precision: str, types: Sequence[Any]
) -> list[dict[str, Any]]:
    """What the launches of :func:`tile_backward` are compiled for: one, or with ``dB`` apart two.

    Args:
        types: Triton's, of ``G``, ``V``, ``A``, ``B`` and ``S``.
    """
    names = ("TYPE_G", "TYPE_V", "TYPE_A", "TYPE_B", "TYPE_S")
    common = {
        **dict(zip(names, types, strict=True)),
        "COMPUTE": compute,
        "PRECISION": precision,
        "SIDE": chosen.side,
        "SLAB": chosen.slab,
    }
    shares = ["AS", "B"] if chosen.split else ["ABS"]
    found = [{f"WANT_{x}": x in share and x in wanted for x in "ABS"} for share in shares]
    return [{**common, **wants} for wants in found if any(wants.values())]
