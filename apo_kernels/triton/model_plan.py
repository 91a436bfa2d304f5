"""The plans of a whole model: the launches of an operation on tensors of one form, and their tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apo_kernels.given import Given
from apo_kernels.triton import config
from apo_kernels.triton.launch import Launch
from apo_kernels.triton.layers import View, view_of
from apo_kernels.triton.model_layers import BLOCKS, Layout, ModelLayers, batch_strides, contiguous, lay
from apo_kernels.triton.plan_builder import TYPES
from apo_kernels.triton.table_layout import ALIGN, Column, ModelRole
from apo_kernels.triton.tile_model import model_apply, model_forward, model_sums
from apo_kernels.triton.tile_slopes import model_slopes

__all__ = [
    "ModelLaunch",
    "ModelPlan",
    "ModelPlanner",
    "ModelRun",
    "apply_constants",
    "forward_constants",
    "slopes_constants",
    "sums_constants",
]

APPLY_TILE = (16, 128)
"""What one program of :func:`model_apply` steps."""
SUM_CHUNK = (128, 8, 1024)
"""Of :func:`model_sums`: entries of a result, parts that are added at a time, and parts of one entry."""

_OPERANDS, _NUMBERS, _WORKSPACE, _KEPT, _SUMS, _RESULTS = range(6)


class ModelRun(NamedTuple):
    """What changes from one run of a plan to the next: tensors by number, the first of a kernel's arguments' order."""

    values: tuple[Tensor, ...]
    stream: int


@dataclass
class ModelLaunch(Launch):
    """A kernel of a whole model. ``takes``: which of a run's tensors it gets after its tables."""

    takes: tuple[int, ...] = ()

    def _arguments(self, run: Any) -> tuple[Any, ...]:
        return (*self.tables, *[run.values[at] for at in self.takes])


@dataclass
class ModelPlan:
    """The launches of one operation on tensors of one form, and its table of addresses, not yet filled in."""

    given: list[int]
    launches: list[ModelLaunch]
    values: NDArray[np.int64]
    at: NDArray[np.int64]
    which: NDArray[np.int64]
    offsets: NDArray[np.int64]
    sizes: dict[str, int]
    wide: list[int] = field(default_factory=list)
    """The layers that the grouped GEMM serves."""
    first: int = 0
    """Where in the workspace directions begin."""
    results: list[tuple[int, int, tuple[int, ...], tuple[int, ...], int]] = field(default_factory=list)
    """Of a slope: which of :class:`ModelSlopes`, its layer, shape, strides and offset."""
    inner: int = 0
    """Where in them the inner products begin, and behind these the sizes."""
    hosts: list[Tensor] = field(default_factory=list)
    tables: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Filled in: the host's copy and the device's, by addresses."""

    def table(self, places: Sequence[int]) -> NDArray[np.int64]:
        filled = self.values.copy()
        filled.reshape(-1)[self.at] = np.array(places, np.int64)[self.which] + self.offsets
        return filled


class ModelPlanner(ModelLayers):
    """The layers of a preconditioner, and plans for them."""

    def plan(self, name: str, given: Given, also: tuple[int, ...] | None) -> ModelPlan:
        placed = self._placed(given)
        layers = sorted(placed) if also is None else list(also)
        matrices = [at for i in layers for at in self.of_layer[i]]
        values = self.static.copy()
        moving: list[tuple[int, int, int]] = []
        views: dict[int, dict[ModelRole, View]] = {}
        for at in matrices:
            own = self.matrices[at]
            views[at] = {ModelRole.S: own.views[ModelRole.S]}
            for role, (number, x) in placed.get(own.layer, {}).items():
                view = view_of(x, number, own.index, False)
                if role is ModelRole.MOMENTUM and x.dtype != torch.float32:
                    raise TypeError(f"momentum buffers must be float32, but one is {x.dtype}")
                if x.data_ptr() == 0 and x.numel():
                    raise TypeError(f"backend triton needs tensors that lie in memory, but a {type(x).__name__} has no "
                                    "address")  # fmt: skip
                views[at][role] = view
                lay(values[at, role], view)
                moving.append((int(np.ravel_multi_index((at, role, 0), values.shape)), number, view.offset))
        at_, which, offsets = np.array(moving, np.int64).reshape(-1, 3).T
        plan = ModelPlan(layers, [], values, at_, which, offsets, {})
        groups: dict[tuple[Any, ...], list[int]] = {}
        by_theta: dict[tuple[Any, ...], list[int]] = {}
        for at in matrices:
            types = self._types(at, placed)
            by_theta.setdefault(types[5:], []).append(at)
            if self.matrices[at].layer not in self.wide:
                groups.setdefault(types, []).append(at)
        plan.wide = [i for i in layers if i in self.wide and self.of_layer[i]]
        if name == "slopes":
            self._plan_slopes(plan, groups, views)
            return plan
        stage = {"step": "model_direction"}.get(name, f"model_{name}")
        count = len(plan.wide) if name == "step" else 0
        for types, group in groups.items():
            found, rows = self._forward(stage, types, group, views, count)
            plan.launches += found
            count += rows
        # The numbers of the promise come first: their places are counted in 32 bits.
        values[:, ModelRole.P, Column.ADDRESS] += Layout.rounded(count)
        plan.sizes["workspace"] = Layout.rounded(count) + self.flat_size
        plan.first = Layout.rounded(count)
        if name == "step" and by_theta:
            plan.launches.append(self._sums([(0, 0, 0, 1, count)], (_WORKSPACE, _SUMS)))
            plan.launches += [self._apply(types, own) for types, own in by_theta.items()]
        return plan

    def _types(self, at: int, placed: dict[int, dict[ModelRole, tuple[int, Tensor]]]) -> tuple[Any, ...]:
        """The dtypes by which layers share launches: of ``G`` and its bias, ``A``, ``B``, ``S``, the weight and its
        bias. A part that isn't there has the other one's."""
        own, views = placed.get(self.matrices[at].layer, {}), self.matrices[at].views
        found: list[torch.dtype] = []
        for role in (ModelRole.G, ModelRole.THETA):
            pair = [own[each][1].dtype for each in (role, ModelRole(role + 1)) if each in own]
            pair = pair or [views[ModelRole.A].dtype]
            found += [pair[0], pair[-1]]
        blocks = [views[role].dtype for role in (ModelRole.A, ModelRole.B, ModelRole.S)]
        return (*found[:2], *blocks, *found[2:])

    def _way(self, at: int, j: int, views: dict[ModelRole, View]) -> tuple[bool, bool]:
        """Whether 16 bytes can be moved at a time of a tile's matrices, and of its squares."""
        own = self.matrices[at]
        B, A = own.B, own.A
        part = min(max(own.n1 - A.start(j), 0), A.extent(j))
        weights = [view for role, view in views.items() if role not in (ModelRole.G_BIAS, ModelRole.THETA_BIAS)]
        matrices = A.start(j) % ALIGN == part % ALIGN == own.pitch_S % ALIGN == 0 and all(x.wide for x in weights)
        squares = A.group == B.group == 1 and A.side % ALIGN == B.side % ALIGN == 0
        return matrices, squares and all(own.views[role].wide for role in BLOCKS)

    def _tiles(
        self, stage: str, side: int, matrices: Sequence[int], views: dict[int, dict[ModelRole, View]]
    ) -> dict[tuple[bool, bool], list[tuple[int, int, int]]]:
        """The tiles of a stage's launches, by what can be moved 16 bytes at a time."""
        served = config.model_ways(stage, side, self.limit)
        found: dict[tuple[bool, bool], list[tuple[int, int, int]]] = {}
        for at in matrices:
            own = self.matrices[at]
            for i, j in product(range(own.B.groups), range(own.A.groups)):
                has = self._way(at, j, views[at])
                way = max(way for way in served if way[0] <= has[0] and way[1] <= has[1])
                found.setdefault(way, []).append((at, i, j))
        best = max(found)
        rest = [way for way in found if way != best]
        if not rest:
            return found
        least = (all(way[0] for way in rest), all(way[1] for way in rest))
        others = [tile for way in rest for tile in found[way]]
        if not config.model_split(len(found[best])):
            least = (least[0] and best[0], least[1] and best[1])
            return {max(way for way in served if way <= least): sorted(found[best] + others)}
        return {best: found[best], least: others}

    def _config(self, stage: str, compute: torch.dtype, matrices: Sequence[int], way: tuple[bool, bool]) -> Any:
        precision = self.target.precision(self.precision, compute)
        sides = [x.group * x.side for at in matrices for x in (self.matrices[at].A, self.matrices[at].B)]
        return precision, config.model_config(self.target, compute, precision, stage, max(sides), way)

    def _forward(
        self,
        stage: str,
        types: tuple[Any, ...],
        matrices: Sequence[int],
        views: dict[int, dict[ModelRole, View]],
        first: int,
    ) -> tuple[list[ModelLaunch], int]:
        compute = _promoted(types[:4])
        _, chosen = self._config(stage, compute, matrices, (True, True))
        launches, count = [], 0
        for way, tiles in self._tiles(stage, chosen.side, matrices, views).items():
            precision, chosen = self._config(stage, compute, matrices, way)
            constants = forward_constants(stage, chosen, types=types, compute=compute, precision=precision, way=way)
            rows = [(*tile, first + count + k) for k, tile in enumerate(tiles)]
            count += len(rows)
            launches.append(
                ModelLaunch(
                    stage, model_forward, len(rows), (self.table(rows, np.int32), self.shapes), constants,
                    chosen.warps, chosen.stages, updates=constants["UPDATE"],
                    takes=(_OPERANDS, _NUMBERS, _WORKSPACE, _KEPT),
                )
            )  # fmt: skip
        return launches, count

    def _apply(self, types: tuple[Any, ...], matrices: Sequence[int]) -> ModelLaunch:
        last = len(self.matrices)
        rows = [
            (at, row, col, last)
            for at in matrices
            for row in range(0, self.matrices[at].m, APPLY_TILE[0])
            for col in range(0, self.matrices[at].n, APPLY_TILE[1])
        ]
        return ModelLaunch(
            "model_apply", model_apply, len(rows), (self.table(rows, np.int32), self.shapes),
            apply_constants(types), 4, 1, updates=True, takes=(_OPERANDS, _NUMBERS, _WORKSPACE, _SUMS),
        )  # fmt: skip

    def _sums(self, jobs: list[tuple[int, ...]], takes: tuple[int, int]) -> ModelLaunch:
        table = self.table(jobs, np.int64)
        return ModelLaunch("model_sums", model_sums, len(jobs), (table,), sums_constants(), 4, 1, takes=takes)

    def _plan_slopes(
        self,
        plan: ModelPlan,
        groups: dict[tuple[Any, ...], list[int]],
        views: dict[int, dict[ModelRole, View]],
    ) -> None:
        layout = Layout()
        jobs: list[tuple[int, ...]] = []
        plan.inner = layout.take(2 * len(self.Ss))
        partials: dict[int, list[int]] = {}
        tiled = [i for i in plan.given if i not in self.wide]
        for i in tiled:  # first: their places are counted in 32 bits
            tiles = sum(self.matrices[at].B.groups * self.matrices[at].A.groups for at in self.of_layer[i])
            partials[i] = [layout.take(tiles) for _ in "12"]
            totals = plan.inner + i, plan.inner + len(self.Ss) + i
            jobs += [(own, total, 0, 1, tiles) for own, total in zip(partials[i], totals, strict=True)]
        for role, slot in ((ModelRole.DS, 2), (ModelRole.SIZE_S, 5)):
            for i in tiled:
                for at in self.of_layer[i]:
                    own = self.matrices[at]
                    entry = plan.values[at, role]
                    entry[Column.ADDRESS], entry[Column.ROW] = layout.take(own.m * own.pitch_S), own.pitch_S
                if self.of_layer[i]:
                    first = self.matrices[self.of_layer[i][0]]
                    start = int(plan.values[self.of_layer[i][0], role, Column.ADDRESS])
                    shape = tuple(self.Ss[i].shape)
                    apart = layout.rounded(first.m * first.pitch_S)
                    plan.results.append((slot, i, shape, (*batch_strides(shape[:-2], apart), first.pitch_S, 1), start))
        self._lay_blocks(plan, layout, jobs)
        for types, group in groups.items():
            plan.launches += self._slopes(types, group, views, partials)
        if jobs:
            plan.launches.append(self._sums(jobs, (_RESULTS, _RESULTS)))
        plan.sizes["results"] = layout.size

    def _lay_blocks(self, plan: ModelPlan, layout: Layout, jobs: list[tuple[int, ...]]) -> None:
        """Where slopes and sizes of blocks go, squares of one side one after the other; and the parts that they are
        sums of, where there are several."""
        sides = (("A", 0, ModelRole.DA, ModelRole.SIZE_A), ("B", 1, ModelRole.DB, ModelRole.SIZE_B))
        tiled = [i for i in plan.given if i not in self.wide and self.of_layer[i]]
        wanted = [(i, *each) for i in tiled for each in sides if each[0] in self.learned[i]]
        wanted.sort(key=lambda each: (self.As, self.Bs)[each[2]][each[0]].shape[-1])
        for size in (False, True):
            for i, _letter, which, slope_role, size_role in wanted:
                block, role = (self.As, self.Bs)[which][i], size_role if size else slope_role
                shape = tuple(block.shape[:-1] if size else block.shape)
                inner = len(shape) - (self.Ss[i].ndim - 2)
                length = math.prod(shape[len(shape) - inner :])
                start = layout.take(length * len(self.of_layer[i]))
                plan.results.append(((3 if size else 0) + which, i, shape, contiguous(shape), start))
                for k, at in enumerate(self.of_layer[i]):
                    own = self.matrices[at]
                    parts = (own.B if which == 0 else own.A).groups
                    entry = plan.values[at, role]
                    result = start + k * length
                    entry[Column.ROW], entry[Column.SQUARE] = block.shape[-1], block.shape[-1] ** 2
                    entry[Column.ADDRESS], entry[Column.PART] = result, layout.rounded(length)
                    if parts > 1:
                        entry[Column.ADDRESS] = layout.later(length * parts)
                        entry[Column.PART] = length
                        chunks = range(0, length, SUM_CHUNK[0]) if length > 1 else (0,)
                        jobs += [(int(entry[Column.ADDRESS]), result, e, length, parts) for e in chunks]
        layout.settle(plan.values, jobs)

    def _slopes(
        self,
        types: tuple[Any, ...],
        matrices: Sequence[int],
        views: dict[int, dict[ModelRole, View]],
        partials: dict[int, list[int]],
    ) -> list[ModelLaunch]:
        compute = _promoted(types[:4])
        _, chosen = self._config("model_slopes", compute, matrices, (True, True))
        launches = []
        for way, tiles in self._tiles("model_slopes", chosen.side, matrices, views).items():
            precision, chosen = self._config("model_slopes", compute, matrices, way)
            rows = []
            for tile in tiles:
                layer = self.matrices[tile[0]].layer
                rows.append((*tile, *partials[layer]))
                partials[layer] = [place + 1 for place in partials[layer]]
            table = self.table(rows, np.int32)
            every = slopes_constants(chosen, types=types[:5], compute=compute, precision=precision, way=way)
            launches += [
                ModelLaunch(
                    "model_slopes", model_slopes, len(rows), (table, self.shapes), constants, chosen.warps,
                    chosen.stages, takes=(_OPERANDS, _NUMBERS, _KEPT, _RESULTS),
                )
                for constants in every
            ]  # fmt: skip
        return launches

    def _placed(self, given: Given) -> dict[int, dict[ModelRole, tuple[int, Tensor]]]:
        """By layer and role: which of the given tensors it is. A layer without any part is left out."""
        roles = (ModelRole.G, ModelRole.THETA) if given.weights else (ModelRole.G,)
        names = [(i, ModelRole(role + k)) for role in roles for i in given.layers for k in range(len(self.widths[i]))]
        names += [(i, ModelRole.MOMENTUM) for i in given.layers[: len(given.tensors) - len(names)]]
        found: dict[int, dict[ModelRole, tuple[int, Tensor]]] = {}
        for number, ((i, role), x) in enumerate(zip(names, given.tensors, strict=True)):
            if x is not None and (number < given.reads or i in found):
                found.setdefault(i, {})[role] = number, x
        return found


def forward_constants(
    stage: str,
    chosen: config.TileConfig,
    *,
    types: Sequence[torch.dtype],
    compute: torch.dtype,
    precision: str,
    way: tuple[bool, bool],
) -> dict[str, Any]:
    """What :func:`model_forward` is compiled for.

    Args:
        types: of ``G`` and its bias, ``A``, ``B``, ``S``, the weight and its bias.
    """
    names = ("TYPE_G", "TYPE_G_BIAS", "TYPE_A", "TYPE_B", "TYPE_S", "TYPE_THETA", "TYPE_THETA_BIAS")
    update = stage in ("model_update", "model_trial")
    found = {name: TYPES[dtype] for name, dtype in zip(names, types, strict=True)}
    if not update:  # what it has no use for is always the same
        found["TYPE_THETA"] = found["TYPE_THETA_BIAS"] = TYPES[torch.float32]
    return {
        **found,
        "COMPUTE": TYPES[compute],
        "PRECISION": precision,
        "DIRECTION": stage == "model_direction",
        "UPDATE": update,
        "WRITE_BUFFER": stage == "model_update",
        "KEEP": stage in ("model_trial", "model_keep"),
        "SIDE": chosen.side,
        "SLAB": chosen.slab,
        "WIDE_MATRICES": way[0],
        "WIDE_SQUARES": way[1],
    }


def slopes_constants(
    chosen: config.TileConfig,
    *,
    types: Sequence[torch.dtype],
    compute: torch.dtype,
    precision: str,
    way: tuple[bool, bool],
) -> list[dict[str, Any]]:
    """What the launches of :func:`model_slopes` are compiled for: one, or with A's apart two.

    Args:
        types: of ``V`` and its bias, ``A``, ``B`` and ``S``.
    """
    names = ("TYPE_V", "TYPE_V_BIAS", "TYPE_A", "TYPE_B", "TYPE_S")
    common = {
        **{name: TYPES[dtype] for name, dtype in zip(names, types, strict=True)},
        "COMPUTE": TYPES[compute],
        "PRECISION": precision,
        "SIDE": chosen.side,
        "SLAB": chosen.slab,
        "WIDE_MATRICES": way[0],
        "WIDE_SQUARES": way[1],
    }
    shares = [(False, True), (True, False)] if chosen.split else [(True, True)]
    return [{**common, "WANT_A": A, "WANT_BS": BS} for A, BS in shares]


def apply_constants(types: Sequence[torch.dtype]) -> dict[str, Any]:
    """What :func:`model_apply` is compiled for, by the dtypes of the weight and its bias."""
    names = ("TYPE_THETA", "TYPE_THETA_BIAS")
    found = {name: TYPES[dtype] for name, dtype in zip(names, types, strict=True)}
    return {**found, "ROWS": APPLY_TILE[0], "COLS": APPLY_TILE[1]}


def sums_constants() -> dict[str, Any]:
    """What :func:`model_sums` is compiled for."""
    return dict(zip(("CHUNK", "PARTS", "LANES"), SUM_CHUNK, strict=True))


def _promoted(types: Sequence[torch.dtype]) -> torch.dtype:
    """The narrowest dtype that holds every operand of a product exactly."""
    found = types[0]
    for dtype in types[1:]:
        found = torch.promote_types(found, dtype)
    return found
