"""A whole model's step, trial and slopes on the tile kernels: the host's side of :mod:`~apo_kernels.triton.tile_model`.

What doesn't change from call to call is laid down when a preconditioner is bound: tiles, shapes, where blocks lie. A
call compares where its tensors lie with where they lay in the last one; where nothing has moved it only launches.
Two small tables go to the device, asynchronously, each only when it has changed: addresses, and the layers' numbers.

**Launches.** A step that keeps a promise has three: the directions with a number a tile, the sum of these, and the
momentum and weights; one that needn't, and a trial, have one; slopes have one or two and the sums of their parts. Layers
whose operands have other dtypes have launches of their own; so do, in a model of many tiles, those whose matrices can't
be moved 16 bytes at a time (:func:`apo_kernels.triton.config.model_split`).

**Memory.** Directions, ``M`` and slopes lie in one piece each, rows apart in multiples of 8; nothing of them outlives
the call but what it returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apo_kernels.blocks import is_stack
from apo_kernels.slopes import ModelSlopes, Parts
from apo_kernels.triton import config
from apo_kernels.triton import plan as plans
from apo_kernels.triton.errors import Interrupted, Unserved
from apo_kernels.triton.graphs import keep_for_graph
from apo_kernels.triton.launch import Launch, current_stream, on_device
from apo_kernels.triton.layers import Squares, View, padded, squares_of, view_of
from apo_kernels.triton.plan_builder import TYPES, Operands, Operation, to_device
from apo_kernels.triton.table_layout import ALIGN, Column, LayerField, ModelField, ModelRole, Number, Role
from apo_kernels.triton.model_wide import WideLayers
from apo_kernels.triton.tile_model import model_apply, model_forward, model_slopes, model_sums

__all__ = ["KeptM", "TritonModel", "apply_constants", "forward_constants", "slopes_constants", "sums_constants"]

Tensors = Sequence[Tensor]
Buffers = Sequence[Tensor | None]

APPLY_TILE = (16, 128)
"""What one program of :func:`model_apply` steps."""
SUM_CHUNK = (128, 8, 1024)
"""Of :func:`model_sums`: entries of a result, parts that are added at a time, and parts of one entry."""

PLANS = 32
"""Of one preconditioner, for as many forms of operands."""

_NO_BOUND = float(np.finfo(np.float32).max)
_BLOCKS = (ModelRole.A, ModelRole.B)
_OPERANDS, _NUMBERS, _WORKSPACE, _KEPT, _SUMS, _RESULTS = range(6)


Run = Callable[[Operation, Operands], None]


class KeptM(NamedTuple):
    """``M`` of a trial: of the layers that took part, in the preconditioner's layout."""

    flat: Tensor
    layers: tuple[int, ...]
    matrices: Callable[[Tensor, tuple[int, ...]], dict[int, Tensor]]

    def by_layer(self) -> dict[int, Tensor]:
        """As the ATen path keeps it."""
        return self.matrices(self.flat, self.layers)


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


@dataclass(frozen=True)
class Matrix:
    """One matrix of a layer (a batch has several), with its blocks as squares that tiles take together."""

    layer: int
    index: tuple[int, ...]
    m: int
    n: int
    n1: int
    B: Squares
    A: Squares
    views: dict[ModelRole, View]
    pitch_S: int
    offset: int = 0

    @property
    def pitch(self) -> int:
        return padded(self.n)


class Given(NamedTuple):
    """The parts of a call, by role and layer, without the layers that are None.

    ``places`` and ``forms``: where they lie, and how those that are read do. A weight whose memory stays keeps its form.
    """

    layers: list[int]
    tensors: list[Tensor | None]
    roles: tuple[ModelRole, ...]
    places: list[int]
    forms: list[list[Any]]

    def same(self, other: Given) -> bool:
        return self is other or (self[0] == other[0] and self[2:] == other[2:])

    def forget(self) -> Given:
        """Without the tensors: these may go."""
        return self._replace(tensors=[])


@dataclass
class ModelPlan:
    """The launches of one operation on tensors of one form, and its table of addresses but for the addresses."""

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
    hosts: list[Tensor] = field(default_factory=list)

    def table(self, places: Sequence[int]) -> NDArray[np.int64]:
        filled = self.values.copy()
        filled.reshape(-1)[self.at] = np.array(places, np.int64)[self.which] + self.offsets
        return filled


class _Last:
    """What an operation used last."""

    def __init__(self) -> None:
        self.given: Given | None = None
        self.buffers: list[int] | None = None
        self.also: tuple[int, ...] | None = None
        self.plan: ModelPlan | None = None
        self.operands: Tensor | None = None
        self.stream = 0
        self.overrides = ""
        self.lists: tuple[Any, ...] | None = None
        self.numbers: Tensor | None = None
        self.hosts: tuple[Tensor | None, Tensor | None] = (None, None)


class TritonModel:
    """See :class:`apo_kernels.ModelPreconditioner`."""

    def __init__(
        self,
        precision: str | None,
        run: Run,
        As: Tensors,
        Bs: Tensors,
        Ss: Tensors,
        widths: Sequence[tuple[int, ...]],
        learned: Sequence[str],
    ) -> None:
        self.As, self.Bs, self.Ss, self.widths, self.learned = As, Bs, Ss, widths, learned
        self.precision, self.wide = precision, WideLayers(run, As, Bs, Ss, widths, learned)
        self.device = Ss[0].device if Ss else torch.device("cpu")
        self.target = plans.target_of(self.device)
        self.limit = config.tile_limit(self.target, torch.float32, backward=False)
        self.matrices: list[Matrix] = []
        self.of_layer: list[list[int]] = [[] for _ in Ss]
        self.flat_size = 0
        for i, (A, B, S) in enumerate(zip(As, Bs, Ss, strict=True)):
            self._add(i, A, B, S)
        self._layer_of = np.array([each.layer for each in self.matrices] or [0], np.int64)
        self._static = self._static_table()
        self._hosts: list[Tensor] = []
        self._shapes = self._table(self._shape_rows(), np.int64)
        self._plans: dict[object, ModelPlan] = {}
        self._last = {name: _Last() for name in ("step", "update", "trial", "keep", "slopes")}
        self._one: Tensor | None = None
        self._checked: dict[bool, Given] = {}
        self._looked: tuple[object, object, Given] | None = None

    # What is bound.

    def _add(self, i: int, A: Tensor, B: Tensor, S: Tensor) -> None:
        own = self.widths[i]
        if len(own) == 2 and own[1] != 1:
            raise Unserved(f"triton serves a weight and a bias of width 1, but widths[{i}] is {own}")
        if S.dtype == torch.float64:
            raise TypeError("backend triton serves float32, bfloat16 and float16, but Ss has float64 entries")
        if not S.numel():
            return
        m, n = S.shape[-2:]
        squares = [squares_of(X, S, side) for X, side in ((B, m), (A, n))]
        if any(each.side > self.limit for each in squares):
            self.wide.layers.add(i)
        pitch = S.stride(-2) if S.stride(-1) == 1 and n <= S.stride(-2) < n + ALIGN else n
        for x in (A, B, S):
            if x.data_ptr() == 0 or x.is_neg():
                raise TypeError(f"backend triton needs blocks that lie in memory as they are, but a {type(x).__name__}")
        for index in product(*(range(size) for size in S.shape[:-2])):
            views = {
                role: view_of(x, i, index, role in _BLOCKS and is_stack(x, S))
                for role, x in ((ModelRole.A, A), (ModelRole.B, B), (ModelRole.S, S))
            }
            B_squares, A_squares = (each.grouped_for_tile(self.limit) for each in squares)
            self.of_layer[i].append(len(self.matrices))
            self.matrices.append(Matrix(i, index, m, n, own[0], B_squares, A_squares, views, pitch, self.flat_size))
            self.flat_size += m * padded(n)

    def _static_table(self) -> NDArray[np.int64]:
        table = np.zeros((max(1, len(self.matrices)), len(Role), len(Column)), np.int64)
        for at, each in enumerate(self.matrices):
            blocks = {
                ModelRole.A: self.As[each.layer], ModelRole.B: self.Bs[each.layer], ModelRole.S: self.Ss[each.layer]
            }  # fmt: skip
            for role, x in blocks.items():
                _lay(table[at, role], each.views[role])
                table[at, role, Column.ADDRESS] = x.data_ptr() + each.views[role].offset
            for role in (ModelRole.P, ModelRole.M):
                table[at, role, Column.ADDRESS], table[at, role, Column.ROW] = each.offset, each.pitch
        return table

    def _shape_rows(self) -> list[list[int]]:
        rows = []
        for each in self.matrices:
            row = [0] * len(LayerField)
            row[LayerField.M], row[LayerField.N], row[ModelField.N1] = each.m, each.n, each.n1
            row[LayerField.SIDE_B], row[LayerField.GROUP_B], row[LayerField.COUNT_B] = (
                each.B.side, each.B.group, each.B.count
            )  # fmt: skip
            row[LayerField.SIDE_A], row[LayerField.GROUP_A], row[LayerField.COUNT_A] = (
                each.A.side, each.A.group, each.A.count
            )  # fmt: skip
            rows.append(row)
        return rows or [[0] * len(LayerField)]

    def _table(self, rows: Sequence[Sequence[int]] | NDArray[Any], dtype: Any) -> Tensor:
        host, table = to_device(np.array(rows, dtype), self.device)
        if plans._capturing(self.device):
            self._hosts.append(host)  # a replay copies from there again
        return table

    # What is given.

    def knows(self, written: Parts, read: Parts) -> bool:
        """Whether parts of this form were checked before, at these places."""
        given, known = self._parts(written, read), self._checked.get(written is read)
        found = known is not None and known.same(given)
        if found:
            assert known is not None
            given = known._replace(tensors=given.tensors)
        self._looked = written, read, given
        return found

    def _look(self, written: Parts, read: Parts) -> Given:
        """The parts of a call, which have been checked."""
        looked, self._looked = self._looked, None
        if looked is None or looked[0] is not written or looked[1] is not read:
            return self._parts(written, read)
        self._checked[written is read] = looked[2].forget()
        return looked[2]

    def _parts(self, written: Parts, read: Parts) -> Given:
        layers = [i for i, own in enumerate(read) if own is not None]
        tensors = [x for own in read if own is not None for x in own]
        there = [x for x in tensors if x is not None]
        forms: list[list[Any]] = [
            list(map(Tensor.stride, there)),
            [x.dtype for x in there],
            [*map(Tensor.is_neg, there)],
        ]
        roles: tuple[ModelRole, ...] = (ModelRole.G,)
        if written is not read:
            roles = (ModelRole.G, ModelRole.THETA)
            tensors += [x for i in layers for x in written[i] or ()]
        return Given(layers, tensors, roles, _places(tensors), forms)

    def _placed(self, given: Given, buffers: Buffers | None) -> dict[int, dict[ModelRole, tuple[int, Tensor]]]:
        """By layer and role: which of the given tensors it is. A layer without any part is left out."""
        found: dict[int, dict[ModelRole, tuple[int, Tensor]]] = {}
        number = 0
        for role in given.roles:
            for i in given.layers:
                for k in range(len(self.widths[i])):
                    x = given.tensors[number]
                    if x is not None and (role is ModelRole.G or i in found):
                        found.setdefault(i, {})[ModelRole(role + k)] = number, x
                    number += 1
        for i in given.layers if buffers is not None else ():
            if i in found and (x := buffers[i]) is not None:  # type: ignore[index]
                found[i][ModelRole.MOMENTUM] = number, x
            number += 1
        for own in found.values():  # a weight is written where the part of G is there
            for k in range(2):
                if ModelRole(ModelRole.G + k) not in own:
                    own.pop(ModelRole(ModelRole.THETA + k), None)
        return found

    def _ready(
        self,
        name: str,
        given: Given,
        buffers: Buffers | None,
        lists: tuple[Any, ...],
        numbers: Callable[..., tuple[Any, ...]],
        also: tuple[int, ...] | None = None,
    ) -> _Last:
        """The plan and the tables for a call.

        Args:
            lists: what the numbers of the layers are made of, by ``numbers``: one column after the other.
            also: of a slope: the layers of the trial.
        """
        last = self._last[name]
        stream, overrides = current_stream(self.device), config.overrides_key()
        places = None if buffers is None else _places([buffers[i] for i in given.layers])
        known = last.given
        if (
            known is None or last.buffers != places or last.also != also or last.stream != stream
            or last.overrides != overrides or not known.same(given)
        ):  # fmt: skip
            self._renew(last, name, given, buffers, places, also)
            last.stream, last.overrides = stream, overrides
        if last.lists != lists:
            host, last.numbers = to_device(self._numbers(*numbers(*lists)), self.device)
            last.lists = tuple([list(x) if isinstance(x, Sequence) else x for x in lists])
            last.hosts = last.hosts[0], host
        if plans._capturing(self.device):
            keep_for_graph(stream, self, last.plan, last.operands, last.numbers, *last.hosts)
            self._last[name] = _Last()  # its tables are the graph's alone
        return last

    def _renew(
        self,
        last: _Last,
        name: str,
        given: Given,
        buffers: Buffers | None,
        places: list[int] | None,
        also: tuple[int, ...] | None,
    ) -> None:
        if any(given.forms[2]):
            raise Unserved("parts are lazily negated")
        tensors = given.tensors if buffers is None else given.tensors + [buffers[i] for i in given.layers]
        form = [None if x is None else (x.stride(), x.dtype, x.data_ptr() % 16) for x in tensors]
        key = (name, tuple(given.layers), given.roles, also, tuple(form), config.overrides_key(), last.stream)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plan(name, given, buffers, also)
            if not plans._capturing(self.device):
                if len(self._plans) >= PLANS:
                    self._plans.clear()
                self._plans[key] = plan
        host, table = to_device(plan.table(given.places + (places or []) or [0]), self.device)
        last.plan, last.operands = plan, table
        last.given, last.buffers, last.also = given.forget(), places, also
        last.hosts = host, last.hosts[1]

    def _numbers(self, single: float, *each: Sequence[float]) -> NDArray[np.float32]:
        numbers = np.zeros((len(self.matrices) + 1, len(Number)), np.float32)
        for column, values in enumerate(each):
            numbers[:-1, column] = np.array(values, np.float32)[self._layer_of[: len(self.matrices)]]
        numbers[-1, 0] = single
        return numbers

    # Plans.

    def _plan(self, name: str, given: Given, buffers: Buffers | None, also: tuple[int, ...] | None) -> ModelPlan:
        placed = self._placed(given, buffers)
        layers = sorted(placed) if also is None else list(also)
        matrices = [at for i in layers for at in self.of_layer[i]]
        values = self._static.copy()
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
                _lay(values[at, role], view)
                moving.append((int(np.ravel_multi_index((at, role, 0), values.shape)), number, view.offset))
        plan = ModelPlan(layers, [], values, *(np.array([x[k] for x in moving], np.int64) for k in range(3)), {})
        groups: dict[tuple[Any, ...], list[int]] = {}
        by_theta: dict[tuple[Any, ...], list[int]] = {}
        for at in matrices:
            types = self._types(at, placed)
            by_theta.setdefault(types[5:], []).append(at)
            if self.matrices[at].layer not in self.wide.layers:
                groups.setdefault(types, []).append(at)
        plan.wide = [i for i in layers if i in self.wide.layers and self.of_layer[i]]
        if name == "slopes":
            self._plan_slopes(plan, groups, views)
            return plan
        stage = {"step": "model_direction"}.get(name, f"model_{name}")
        count = len(plan.wide) if name == "step" else 0
        for types, own in groups.items():
            found, rows = self._forward(stage, types, own, views, count)
            plan.launches += found
            count += rows
        # The numbers of the promise come first: their places are counted in 32 bits.
        values[:, ModelRole.P, Column.ADDRESS] += _Layout.rounded(count)
        plan.sizes["workspace"] = _Layout.rounded(count) + self.flat_size
        plan.first = _Layout.rounded(count)
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

    def _way(self, at: int, i: int, j: int, views: dict[ModelRole, View]) -> tuple[bool, bool]:
        """Whether 16 bytes can be moved at a time of a tile's matrices, and of its squares."""
        own = self.matrices[at]
        B, A = own.B, own.A
        part = min(max(own.n1 - A.start(j), 0), A.extent(j))
        weights = [view for role, view in views.items() if role not in (ModelRole.G_BIAS, ModelRole.THETA_BIAS)]
        matrices = A.start(j) % ALIGN == part % ALIGN == own.pitch_S % ALIGN == 0 and all(x.wide for x in weights)
        squares = A.group == B.group == 1 and A.side % ALIGN == B.side % ALIGN == 0
        return matrices, squares and all(own.views[role].wide for role in _BLOCKS)

    def _tiles(
        self, stage: str, side: int, matrices: Sequence[int], views: dict[int, dict[ModelRole, View]]
    ) -> dict[tuple[bool, bool], list[tuple[int, int, int]]]:
        """The tiles of a stage's launches, by what can be moved 16 bytes at a time."""
        served = config.model_ways(stage, side, self.limit)
        found: dict[tuple[bool, bool], list[tuple[int, int, int]]] = {}
        for at in matrices:
            own = self.matrices[at]
            for i, j in product(range(own.B.groups), range(own.A.groups)):
                has = self._way(at, i, j, views[at])
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
                    stage, model_forward, len(rows), (self._table(rows, np.int32), self._shapes), constants,
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
            "model_apply", model_apply, len(rows), (self._table(rows, np.int32), self._shapes),
            apply_constants(types), 4, 1, updates=True, takes=(_OPERANDS, _NUMBERS, _WORKSPACE, _SUMS),
        )  # fmt: skip

    def _sums(self, jobs: list[tuple[int, ...]], takes: tuple[int, int]) -> ModelLaunch:
        table = self._table(jobs, np.int64)
        return ModelLaunch("model_sums", model_sums, len(jobs), (table,), sums_constants(), 4, 1, takes=takes)

    def _plan_slopes(
        self,
        plan: ModelPlan,
        groups: dict[tuple[Any, ...], list[int]],
        views: dict[int, dict[ModelRole, View]],
    ) -> None:
        layout = _Layout()
        jobs: list[tuple[int, ...]] = []
        plan.inner = layout.take(len(self.Ss))
        partials = dict.fromkeys(range(len(self.Ss)), 0)
        tiled = [i for i in plan.given if i not in self.wide.layers]
        for i in tiled:  # first: their places are counted in 32 bits
            tiles = sum(self.matrices[at].B.groups * self.matrices[at].A.groups for at in self.of_layer[i])
            partials[i] = layout.take(tiles)
            jobs.append((partials[i], plan.inner + i, 0, 1, tiles))
        jobs += [(0, plan.inner + i, 0, 1, 0) for i in range(len(self.Ss)) if i not in tiled]
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
                    plan.results.append((slot, i, shape, (*_batch_strides(shape[:-2], apart), first.pitch_S, 1), start))
        self._lay_blocks(plan, layout, jobs)
        for types, own in groups.items():
            plan.launches += self._slopes(types, own, views, partials)
        plan.launches.append(self._sums(jobs, (_RESULTS, _RESULTS)))
        plan.sizes["results"] = layout.size

    def _lay_blocks(self, plan: ModelPlan, layout: _Layout, jobs: list[tuple[int, ...]]) -> None:
        """Where slopes and sizes of blocks go, squares of one side one after the other; and the parts that they are
        sums of, where there are several."""
        sides = (("A", 0, ModelRole.DA, ModelRole.SIZE_A), ("B", 1, ModelRole.DB, ModelRole.SIZE_B))
        tiled = [i for i in plan.given if i not in self.wide.layers and self.of_layer[i]]
        wanted = [(i, *each) for i in tiled for each in sides if each[0] in self.learned[i]]
        wanted.sort(key=lambda each: (self.As, self.Bs)[each[2]][each[0]].shape[-1])
        for size in (False, True):
            for i, _letter, which, slope_role, size_role in wanted:
                block, role = (self.As, self.Bs)[which][i], size_role if size else slope_role
                shape = tuple(block.shape[:-1] if size else block.shape)
                inner = len(shape) - (self.Ss[i].ndim - 2)
                length = math.prod(shape[len(shape) - inner :])
                start = layout.take(length * len(self.of_layer[i]))
                plan.results.append(((3 if size else 0) + which, i, shape, _contiguous(shape), start))
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
        layout.settle(plan, jobs)

    def _slopes(
        self,
        types: tuple[Any, ...],
        matrices: Sequence[int],
        views: dict[int, dict[ModelRole, View]],
        partials: dict[int, int],
    ) -> list[ModelLaunch]:
        compute = _promoted(types[:4])
        _, chosen = self._config("model_slopes", compute, matrices, (True, True))
        launches = []
        for way, tiles in self._tiles("model_slopes", chosen.side, matrices, views).items():
            precision, chosen = self._config("model_slopes", compute, matrices, way)
            rows = []
            for tile in tiles:
                layer = self.matrices[tile[0]].layer
                rows.append((*tile, partials[layer]))
                partials[layer] += 1
            table = self._table(rows, np.int32)
            launches += [
                ModelLaunch(
                    "model_slopes", model_slopes, len(rows), (table, self._shapes), constants, chosen.warps,
                    chosen.stages, takes=(_OPERANDS, _NUMBERS, _KEPT, _RESULTS),
                )
                for constants in slopes_constants(chosen, types=types[:5], compute=compute, precision=precision, way=way)
            ]  # fmt: skip
        return launches

    # Runs.

    def step_(
        self,
        thetas: Parts,
        Gs: Parts,
        momentum_buffers: Buffers,
        lr: Sequence[float],
        momentum: Sequence[float],
        weight_decay: Sequence[float],
        most: float,
        shares: Sequence[float] | None,
        total: Callable[[Tensor], None] | None,
    ) -> Tensor:
        if self._one is None:
            self._one = torch.ones((), dtype=torch.float32, device=self.device)
        given = self._look(thetas, Gs)
        bounded = math.isfinite(most)
        if not bounded and self.wide.layers:  # their directions pass through memory: that is a step with a promise
            most, shares = _NO_BOUND, lr
        if math.isfinite(most):
            last = self._ready("step", given, momentum_buffers, (lr, momentum, weight_decay, shares, most), _of_a_step)
        else:
            last = self._ready("update", given, momentum_buffers, (lr, momentum, weight_decay), _of_a_step)
        if not last.plan or not last.plan.launches:
            return self._one
        if not math.isfinite(most):
            self._launch(last)
            return self._one
        sums = torch.empty(2, dtype=torch.float32, device=self.device)
        workspace = torch.empty(last.plan.sizes["workspace"], dtype=torch.float32, device=self.device)
        if last.plan.wide:
            assert shares is not None
            directions = [self._views(i, workspace[last.plan.first :]) for i in last.plan.wide]
            self.wide.directions(last.plan.wide, Gs, directions, None)
            for k, (i, Y) in enumerate(zip(last.plan.wide, directions, strict=True)):
                workspace[k] = shares[i] * (self.wide.joined(Gs, i).float() * Y).sum()
        self._launch(last, workspace=workspace, sums=sums, after_sum=total if bounded else None)
        return sums[1] if bounded else self._one

    def trial_(
        self,
        thetas: Parts,
        Gs: Parts,
        momentum_buffers: Buffers,
        lengths: Sequence[float],
        momentum: Sequence[float],
        shrink: Sequence[float],
    ) -> KeptM:
        given = self._look(thetas, Gs)
        last = self._ready("trial", given, momentum_buffers, (lengths, momentum, shrink), _as_they_are)
        assert last.plan is not None
        kept = torch.empty(self.flat_size, dtype=torch.float32, device=self.device)
        if last.plan.wide:
            found = self._keep_wide(last.plan, Gs, kept)
            self._launch(last, kept=kept)
            try:
                self.wide.trial_(last.plan.wide, thetas, Gs, found, momentum_buffers, lengths, momentum, shrink)
            except Exception as error:
                raise Interrupted(f"a trial failed after some weights had been written: {error}") from error
        else:
            self._launch(last, kept=kept)
        return KeptM(kept, tuple(last.plan.given), self._matrices)

    def keep(self, Gs: Parts) -> KeptM:
        last = self._ready("keep", self._look(Gs, Gs), None, (), _as_they_are)
        assert last.plan is not None
        kept = torch.empty(self.flat_size, dtype=torch.float32, device=self.device)
        if last.plan.wide:
            self._keep_wide(last.plan, Gs, kept)
        self._launch(last, kept=kept)
        return KeptM(kept, tuple(last.plan.given), self._matrices)

    def _keep_wide(self, plan: ModelPlan, parts: Parts, kept: Tensor) -> list[Tensor]:
        """The directions of the grouped GEMM's layers, and their ``M`` into ``kept``."""
        directions = [torch.empty(self.Ss[i].shape, dtype=torch.float32, device=self.device) for i in plan.wide]
        self.wide.directions(plan.wide, parts, directions, [self._views(i, kept) for i in plan.wide])
        return directions

    def _matrices(self, flat: Tensor, layers: tuple[int, ...]) -> dict[int, Tensor]:
        return {i: self._views(i, flat) for i in layers}

    def _views(self, i: int, flat: Tensor) -> Tensor:
        """A layer's matrices in a flat piece of memory."""
        shape = self.Ss[i].shape
        if not self.of_layer[i]:
            return flat.new_zeros(shape)
        first = self.matrices[self.of_layer[i][0]]
        strides = *_batch_strides(shape[:-2], first.m * first.pitch), first.pitch, 1
        return flat[first.offset :].as_strided(shape, strides)

    def slopes(self, Vs: Parts, kept: KeptM, lengths: Sequence[float]) -> ModelSlopes:
        given = self._look(Vs, Vs)
        last = self._ready("slopes", given, None, (lengths,), _as_they_are, kept.layers)
        assert last.plan is not None
        results = torch.empty(last.plan.sizes["results"], dtype=torch.float32, device=self.device)
        if last.plan.launches:
            self._launch(last, kept=kept.flat, results=results)
        found: list[list[Tensor | None]] = [[None] * len(self.Ss) for _ in range(6)]
        for slot, i, shape, strides, start in last.plan.results:
            found[slot][i] = results.as_strided(shape, strides, start)
        for i in kept.layers:
            if not self.of_layer[i]:
                self._empty_slopes(found, i)
        inner = results[last.plan.inner : last.plan.inner + len(self.Ss)]
        if last.plan.wide:
            Ms = [self._views(i, kept.flat) for i in last.plan.wide]
            for i, each, product_ in self.wide.slopes(last.plan.wide, Vs, Ms, lengths):
                for slot, x in enumerate(each):
                    found[slot][i] = x
                inner[i] = product_
        A, B, S, size_A, size_B, size_S = found
        return ModelSlopes(A, B, S, size_A, size_B, size_S, inner)

    def _empty_slopes(self, found: list[list[Tensor | None]], i: int) -> None:
        for slot, letter, x in ((0, "A", self.As[i]), (1, "B", self.Bs[i]), (2, "S", self.Ss[i])):
            if letter in self.learned[i]:
                found[slot][i] = torch.zeros(x.shape, dtype=torch.float32, device=self.device)
                size = x.shape if letter == "S" else x.shape[:-1]
                found[slot + 3][i] = torch.zeros(size, dtype=torch.float32, device=self.device)

    def _launch(
        self,
        last: _Last,
        *,
        workspace: Tensor | None = None,
        kept: Tensor | None = None,
        sums: Tensor | None = None,
        results: Tensor | None = None,
        after_sum: Callable[[Tensor], None] | None = None,
    ) -> None:
        """Compile everything, then launch.

        Raises:
            Interrupted: a launch failed, and one before it has written weights, or the sum was shown already.
        """
        plan, operands, numbers = last.plan, last.operands, last.numbers
        assert plan is not None
        assert operands is not None
        assert numbers is not None
        filler = numbers
        values = tuple(filler if x is None else x for x in (workspace, kept, sums, results))
        run = ModelRun((operands, numbers, *values), last.stream)
        with on_device(self.device):
            for launch in plan.launches:
                launch.compile(run)  # type: ignore[arg-type]
            begun = False
            try:
                for launch in plan.launches:
                    launch(run)  # type: ignore[arg-type]
                    begun |= launch.updates
                    if after_sum is not None and launch.name == "model_sums":
                        assert sums is not None
                        begun = True
                        after_sum(sums[0])
            except Exception as error:
                if begun:
                    raise Interrupted(
                        f"a launch failed after some weights had been stepped: {type(error).__name__}: {error}"
                    ) from error
                raise


class _Layout:
    """Offsets in elements of what slopes are written to: the results, and behind them parts of sums."""

    def __init__(self) -> None:
        self.size = 0
        self._later: list[int] = []
        self._behind = 0

    @staticmethod
    def rounded(count: int) -> int:
        return -(-count // ALIGN) * ALIGN

    def take(self, count: int) -> int:
        start = self.size
        self.size += self.rounded(count)
        return start

    def later(self, count: int) -> int:
        """Room for parts: a negative number until :meth:`settle`."""
        self._behind += self.rounded(count)
        return -self._behind

    def settle(self, plan: ModelPlan, jobs: list[tuple[int, ...]]) -> None:
        """Put the parts behind what was taken."""
        end = self.size + self._behind
        for role in (ModelRole.DA, ModelRole.DB, ModelRole.SIZE_A, ModelRole.SIZE_B):
            column = plan.values[:, role, Column.ADDRESS]
            column[column < 0] += end
        jobs[:] = [(start + end if start < 0 else start, *rest) for start, *rest in jobs]
        self.size = end


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


def _places(tensors: Sequence[Tensor | None]) -> list[int]:
    """Addresses; 0 for what isn't there."""
    try:
        return list(map(Tensor.data_ptr, tensors))  # type: ignore[arg-type]
    except TypeError:
        return [0 if x is None else x.data_ptr() for x in tensors]


def _as_they_are(*lists: Sequence[float]) -> tuple[Any, ...]:
    return 0.0, *lists


def _of_a_step(
    lr: Sequence[float],
    momentum: Sequence[float],
    weight_decay: Sequence[float],
    shares: Sequence[float] = (),
    most: float = 0.0,
) -> tuple[Any, ...]:
    shrink = [1 - rate * decay for rate, decay in zip(lr, weight_decay, strict=True)]
    return (most, lr, momentum, shrink, *([shares] if shares else []))


def _lay(entry: NDArray[np.int64], view: View) -> None:
    entry[Column.ROW], entry[Column.COL], entry[Column.SQUARE] = view.row, view.col, view.square


def _promoted(types: Sequence[torch.dtype]) -> torch.dtype:
    """The narrowest dtype that holds every operand of a product exactly."""
    found = types[0]
    for dtype in types[1:]:
        found = torch.promote_types(found, dtype)
    return found


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return (*_batch_strides(shape[:-1], shape[-1]), 1)


def _batch_strides(shape: Sequence[int], apart: int) -> tuple[int, ...]:
    strides = []
    for size in reversed(shape):
        strides.append(apart)
        apart *= size
    return tuple(reversed(strides))
