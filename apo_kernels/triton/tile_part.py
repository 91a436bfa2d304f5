"""The host's side of the tile kernel: which tiles there are, and where parts of sums go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from apo_kernels.triton import config
from apo_kernels.triton.draft import TYPES, Draft
from apo_kernels.triton.launch import Launch
from apo_kernels.triton.layers import Squares
from apo_kernels.triton.roles import Role
from apo_kernels.triton.tile import sum_parts, tile_backward, tile_forward

__all__ = ["SUM_CHUNK", "TilePart"]

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
        addresses = draft.workspace([4 * length * count for _, _, length, count in parts])
        for (at, role, length, count), address in zip(parts, addresses, strict=True):
            draft.made[at].parts[role] = address, length
            result = draft.single(draft.layers[at].views[role])
            jobs += [(address, result, first, length, count) for first in range(0, length, SUM_CHUNK)]
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
            constants, chosen = self._constants(backward=True)
            for wanted in _shares(op.wanted, bool(chosen.split)):
                wants = {f"WANT_{x}": x in wanted for x in "ABS"}
                each = {**constants, "TYPE_V": draft.type_of(Role.V), **wants}
                found.append(
                    Launch("tile_backward", tile_backward, len(tiles), tables, each, chosen.warps, chosen.stages)
                )
        if self.sums:
            jobs = draft.table(self.sums)
            found.append(Launch("sum_parts", sum_parts, len(self.sums), (jobs,), {"CHUNK": SUM_CHUNK}, 4, 1))
        if "G" in op.wanted:
            found.append(self._forward(tables, "tile_dG", of_V=True))
        return found

    def _constants(self, backward: bool) -> tuple[dict[str, Any], config.TileConfig]:
        """What both kernels take, and the configuration."""
        draft = self.draft
        widest = max(squares.group * squares.side for pair in self.sides.values() for squares in pair)
        chosen = config.tile_config(draft.target, draft.compute, draft.precision, backward, widest)
        constants: dict[str, Any] = {
            **{f"TYPE_{role.name}": draft.type_of(role) for role in (Role.G, Role.A, Role.B, Role.S)},
            "COMPUTE": TYPES[draft.compute],
            "PRECISION": draft.precision,
            "SIDE": chosen.side,
            "SLAB": chosen.slab,
        }
        return constants, chosen

    def _forward(self, tables: tuple[Tensor, Tensor], name: str, *, of_V: bool) -> Launch:
        draft, op = self.draft, self.draft.operation
        constants, chosen = self._constants(backward=False)
        if of_V:
            constants["TYPE_G"] = draft.type_of(Role.V)
        constants |= {
            "TYPE_OUT": draft.type_of(Role.OUT),
            "TYPE_MOMENTUM": draft.type_of(Role.MOMENTUM),
            "KEEP": op.keep,
            "UPDATE": op.update,
            **op.flags,
            "OF_V": of_V,
        }
        return Launch(name, tile_forward, len(tables[0]), tables, constants, chosen.warps, chosen.stages, scalars=True)


def _shares(wanted: str, split: bool) -> list[str]:
    """The derivatives of each launch: all, or ``dB`` apart."""
    shares = ["".join(x for x in "AS" if x in wanted), "B" if "B" in wanted else ""] if split else [wanted]
    return [share for share in shares if share]
