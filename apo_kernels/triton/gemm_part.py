"""The host's side of the grouped GEMM: packing, workspaces, and the products of each launch, cut into tiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from triton import language as tl

from apo_kernels.triton import config
from apo_kernels.triton.gemm import grouped_gemm
from apo_kernels.triton.launch import Launch
from apo_kernels.triton.layers import BlockLayout, LayerLayout, padded
from apo_kernels.triton.pack import pack
from apo_kernels.triton.plan_builder import CODES, TYPES, Operation, PlanBuilder
from apo_kernels.triton.table_layout import ALIGN, Kind, LayerField, PackField, ProblemField, Role, row_of

__all__ = ["KEEPING", "GemmPart", "gemm_constants", "pack_constants"]

KEEPING = ("right", "scale", "left")
"""The stages whose products a forward can keep."""

PACK_TILE = (32, 128)
"""What one program of :func:`pack` copies."""

Problem = tuple[int, ...]
"""A row of :class:`ProblemField`."""
Job = tuple[int, ...]
"""A row of :class:`PackField`."""
_TOUCHED = {
    "right": (Role.KEEP_U,),
    "scale": (Role.S, Role.KEEP_M),
    "pair": (Role.S, Role.DS),
    "left": (Role.KEEP_W,),
    "left_dB": (),
    "out": (Role.OUT,),
    "update": (Role.OUT, Role.MOMENTUM),
    "dA_dG": (Role.OUT,),
}
"""Which of the caller's matrices a stage's epilogue reads or writes."""
_AMAX = {Role.G: LayerField.AMAX_G, Role.V: LayerField.AMAX_V, Role.S: LayerField.AMAX_S}


class GemmPart:
    """The layers at ``indices``: four launches forward, at most four for the derivatives, and one that packs
    what doesn't lie as the loads need it."""

    def __init__(self, builder: PlanBuilder, indices: Sequence[int]) -> None:
        self.builder, self.indices = builder, indices
        self.sides: dict[int, tuple[BlockLayout, BlockLayout]] = {}
        for at in indices:
            layer = builder.layers[at]
            self.sides[at] = layer.B.grouped_for_gemm(), layer.A.grouped_for_gemm()
            builder.set_squares(at, *self.sides[at])
        self._workspaces()
        self.jobs = self._packing()
        if indices:
            (builder.amax,) = builder.workspace([4 * max(1, len(self.jobs))])

    def _workspaces(self) -> None:
        """``U, T`` for a forward (``W`` takes ``U``'s place); ``U, T, W`` of ``G`` and of ``V`` for derivatives."""
        builder = self.builder
        roles = (Role.U, Role.UV, Role.T, Role.TV, Role.W, Role.WV) if builder.operation.wanted else (Role.U, Role.T)
        pitches = [padded(builder.layers[at].n) for at in self.indices]
        sizes = [
            padded(builder.layers[at].m) * pitch * builder.compute.itemsize
            for at, pitch in zip(self.indices, pitches, strict=True)
            for _ in roles
        ]
        offsets = iter(builder.workspace(sizes))
        for at, pitch in zip(self.indices, pitches, strict=True):
            held = builder.made[at].packed
            for role in roles:
                held[role] = next(offsets), pitch, 0
            if not builder.operation.wanted:
                held[Role.W] = held[Role.U]

    def _packing(self) -> list[Job]:
        """One job per tile of what must be copied, or looked at for its range."""
        builder = self.builder
        pending: list[tuple[int, Role, bool]] = []
        for at in self.indices:
            for role in (Role.G, Role.V, Role.A, Role.B, Role.S):
                if role not in builder.types:
                    continue
                copied = role is not Role.S and not self._lies_well(at, role)
                if copied or (builder.scaled and role in _AMAX):
                    pending.append((at, role, copied))
        copies = [(at, role) for at, role, copied in pending if copied]
        sizes = [self._packed_size(at, role) * builder.compute.itemsize for at, role in copies]
        where = dict(zip(copies, builder.workspace(sizes), strict=True)) if copies else {}
        jobs: list[Job] = []
        for at, role, copied in pending:
            first = len(jobs)
            jobs += self._pack_jobs(at, role, where[at, role] if copied else None)
            if builder.scaled and role in _AMAX:
                builder.shapes[at][_AMAX[role]] = first
                builder.shapes[at][_AMAX[role] + 1] = len(jobs) - first
        return jobs

    def _squares(self, at: int, role: Role) -> BlockLayout | None:
        """The squares of a block; None for a matrix."""
        B, A = self.sides[at]
        return {Role.A: A, Role.B: B}.get(role)

    def _lies_well(self, at: int, role: Role) -> bool:
        """Whether the GEMM can load the operand where it lies."""
        layer, squares = self.builder.layers[at], self._squares(at, role)
        view = layer.views[role]
        if view.dtype != self.builder.compute or not view.wide:
            return False
        if squares is None:
            return layer.m % ALIGN == 0 and layer.n % ALIGN == 0
        sides = [squares.extent(q) for q in range(squares.groups)]
        return squares.group == 1 and all(side % ALIGN == 0 for side in sides)

    def _packed_size(self, at: int, role: Role) -> int:
        squares = self._squares(at, role)
        if squares is None:
            return padded(self.builder.layers[at].m) * padded(self.builder.layers[at].n)
        return squares.groups * squares.pitch**2

    def _pack_jobs(self, at: int, role: Role, offset: int | None) -> Iterator[Job]:
        """Of one operand, into the workspace at ``offset``; None: only looked at."""
        builder, layer, squares = self.builder, self.builder.layers[at], self._squares(at, role)
        view = layer.views[role]
        source = {
            "SOURCE": builder.single(view),
            "CODE": CODES[builder.types[role]],
            "ROW": view.row,
            "COL": view.col,
            "SQUARE": view.square,
        }
        if squares is None:
            height, pitch = padded(layer.m), padded(layer.n)
            if offset is not None:
                builder.made[at].packed[role] = offset, pitch, 0
            yield from _cut(
                height,
                **source,
                DESTINATION=0 if offset is None else builder.single(offset),
                PITCH=pitch,
                SIDE=max(height, pitch),
                ROWS=layer.m,
                COLS=layer.n,
            )
            return
        assert offset is not None, "only S is looked at and not copied, and S has no squares"
        pitch = squares.pitch
        builder.made[at].packed[role] = offset, pitch, pitch**2
        for q in range(squares.groups):
            extent = squares.extent(q)
            yield from _cut(
                padded(extent),
                **source,
                DESTINATION=builder.single(offset + q * pitch**2 * builder.compute.itemsize),
                PITCH=pitch,
                SIDE=squares.side,
                FIRST=q * squares.group,
                ROWS=extent,
                COLS=extent,
            )

    def launches(self, layers: Tensor) -> list[Launch]:
        if not self.indices:
            return []
        builder, op = self.builder, self.builder.operation
        found: list[Launch] = []
        if self.jobs:
            constants = pack_constants(TYPES[builder.compute])
            found.append(Launch("pack", pack, len(self.jobs), (builder.table(self.jobs),), constants, 4, 1, amax=True))
        if not op.wanted:
            stages = ["right", "scale", "left", "update" if op.update else "out"]
        else:
            stages = ["right", "pair"]
            if set(op.wanted) - {"S"}:
                stages.append("left_dB")
            if set(op.wanted) & set("GA"):
                stages.append("dA_dG")
        size = config.size_class(max(min(builder.layers[at].m, builder.layers[at].n) for at in self.indices))
        for stage in stages:
            keep = op.keep and stage in KEEPING
            chosen = config.gemm_config(builder.target, builder.compute, builder.precision, stage, size, keep)
            problems = sorted(self._problems(stage), key=lambda p: -p[ProblemField.DEPTH])  # the longest first
            tiles = [
                (number, i, j, self._is_wide(stage, problem, j * chosen.cols, chosen.cols))
                for number, problem in enumerate(problems)
                for i in range(-(-problem[ProblemField.ROWS] * ALIGN // chosen.rows))
                for j in range(-(-problem[ProblemField.COLS] * ALIGN // chosen.cols))
            ]
            constants = gemm_constants(
                stage,
                chosen,
                op,
                compute=TYPES[builder.compute],
                precision=builder.precision,
                types=[builder.type_of(role) for role in (Role.S, Role.OUT, Role.MOMENTUM)],
            )
            found.append(
                Launch(
                    stage,
                    grouped_gemm,
                    len(tiles),
                    (builder.table(tiles, np.int32), builder.table(problems), layers),
                    constants,
                    chosen.warps,
                    chosen.stages,
                    scalars=True,
                    updates=stage == "update",
                    amax=True,
                )
            )
        return found

    def _is_wide(self, stage: str, problem: Problem, col: int, cols: int) -> bool:
        """Whether what the epilogue of a tile reads and writes besides workspaces can be moved 16 bytes at a time: the
        tile has the columns from ``col`` on of the problem, at most ``cols``."""
        layer = self.builder.layers[problem[ProblemField.LAYER]]
        B, A = self.sides[problem[ProblemField.LAYER]]
        if problem[ProblemField.KIND] == Kind.BLOCK:
            squares, role = (B, Role.DB) if stage == "left_dB" else (A, Role.DA)
            extent = squares.extent(problem[ProblemField.SQUARE])
            return squares.group == 1 and layer.views[role].wide and _divides(extent - col, cols)
        extent = min(layer.n - problem[ProblemField.COL0] * ALIGN, problem[ProblemField.COLS] * ALIGN)
        touched = (layer.views[role] for role in _TOUCHED[stage] if role in layer.views)
        return all(view.wide for view in touched) and _divides(extent - col, cols)

    def _problems(self, stage: str) -> Iterator[Problem]:
        wanted = self.builder.operation.wanted
        for at in self.indices:
            layer, (B, A) = self.builder.layers[at], self.sides[at]
            if stage == "right":
                yield from _on_right(at, Kind.FOR_G, layer, A)
                if wanted:
                    yield from _on_right(at, Kind.FOR_V, layer, A)
            elif stage in ("out", "update"):
                yield from _on_right(at, Kind.FOR_G, layer, A)
            elif stage in ("scale", "pair", "left"):
                yield from _on_left(at, Kind.FOR_G, layer, B)
            elif stage == "left_dB":
                if "A" in wanted:
                    yield from _on_left(at, Kind.FOR_G, layer, B)
                if "A" in wanted or "G" in wanted:
                    yield from _on_left(at, Kind.FOR_V, layer, B)
                if "B" in wanted:
                    for q in range(B.groups):
                        side = padded(B.extent(q))
                        yield _problem(at, Kind.BLOCK, side, side, padded(layer.n), B.start(q), 0, q)
            else:
                if "A" in wanted:
                    for q in range(A.groups):
                        side = padded(A.extent(q))
                        yield _problem(at, Kind.BLOCK, side, side, padded(layer.m), 0, A.start(q), q)
                if "G" in wanted:
                    yield from _on_right(at, Kind.FOR_V, layer, A)


def gemm_constants(
    stage: str, chosen: config.GemmConfig, operation: Operation, *, compute: Any, precision: str, types: Sequence[Any]
) -> dict[str, Any]:
    """What a stage is compiled for. What it has no use for is the same in every operation, so they share kernels.

    Args:
        types: Triton's, of ``S``, of the result (or weight), and of the momentum.
    """
    type_S, type_out, type_momentum = types
    update = stage == "update"
    return {
        "STAGE": stage,
        "COMPUTE": compute,
        "TYPE_S": type_S if stage in ("scale", "pair") else tl.float32,
        "TYPE_OUT": type_out if stage in ("out", "update", "dA_dG") else tl.float32,
        "TYPE_MOMENTUM": type_momentum if update else tl.float32,
        "PRECISION": precision,
        "SCALED": compute == tl.float16,
        "KEEP": operation.keep and stage in KEEPING,
        "WANT_S": stage == "pair" and "S" in operation.wanted,
        **{name: flag and update for name, flag in operation.flags.items()},
        "BM": chosen.rows,
        "BN": chosen.cols,
        "BK": chosen.depth,
    }


def pack_constants(compute: Any) -> dict[str, Any]:
    """What :func:`pack` is compiled for."""
    return {"COMPUTE": compute, "SCAN": compute == tl.float16, "ROWS": PACK_TILE[0], "COLS": PACK_TILE[1]}


def _divides(left: int, cols: int) -> bool:
    """Whether the columns that a tile of ``cols`` has of the ``left`` ones are a multiple of :data:`ALIGN`."""
    return left >= cols or left % ALIGN == 0


def _cut(height: int, **job: int) -> Iterator[Job]:
    """A job of :class:`PackField` for each tile of ``height`` rows and as many columns as the pitch."""
    for row in range(0, height, PACK_TILE[0]):
        for col in range(0, job["PITCH"], PACK_TILE[1]):
            yield row_of(PackField, **job, ROW0=row, COL0=col)


def _problem(layer: int, kind: Kind, rows: int, cols: int, depth: int, row0: int, col0: int, square: int) -> Problem:
    """Sides and beginnings in elements."""
    lengths = {"ROWS": rows, "COLS": cols, "DEPTH": depth, "ROW0": row0, "COL0": col0}
    in_units = {name: value // ALIGN for name, value in lengths.items()}
    return row_of(ProblemField, LAYER=layer, KIND=kind, SQUARE=square, **in_units)


def _on_right(at: int, kind: Kind, layer: LayerLayout, A: BlockLayout) -> Iterator[Problem]:
    """The products of an ``m × n`` matrix with each square of ``A``, or of its transpose."""
    for q in range(A.groups):
        side = padded(A.extent(q))
        yield _problem(at, kind, padded(layer.m), side, side, 0, A.start(q), q)


def _on_left(at: int, kind: Kind, layer: LayerLayout, B: BlockLayout) -> Iterator[Problem]:
    """The products of each square of ``B``, or of its transpose, with an ``m × n`` matrix."""
    for q in range(B.groups):
        side = padded(B.extent(q))
        yield _problem(at, kind, side, padded(layer.n), side, B.start(q), 0, q)
