"""A whole model's step, trial and slopes on the tile kernels: the host's side of :mod:`~apo_kernels.triton.tile_model`
and :mod:`~apo_kernels.triton.tile_slopes`.

What doesn't change from call to call is laid down when a preconditioner is bound: tiles, shapes, where blocks lie. A
call compares where its tensors lie with where they lay in the last one; where nothing has moved it only launches.
Two small tables go to the device, asynchronously, each only when it has changed: addresses, and the layers' numbers.

**Launches.** A step that keeps a promise has three: the directions with a number per tile, the sum of these, and the
momentum and weights; one that needn't, and a trial, have one; slopes have one or two and the sums of their parts.
Layers whose operands have other dtypes have launches of their own; so do, in a model of many tiles, those whose
matrices can't be moved 16 bytes at a time (:func:`apo_kernels.triton.config.model_split`).

**Memory.** Directions, ``M`` and slopes lie in one piece each, rows apart in multiples of 8; nothing of them outlives
the call but what it returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apo_kernels.given import Given
from apo_kernels.slopes import ModelEnergies, ModelSlopes, Parts
from apo_kernels.triton import config
from apo_kernels.triton import plan as plans
from apo_kernels.triton.errors import Interrupted
from apo_kernels.triton.graphs import keep_for_graph
from apo_kernels.triton.launch import current_stream, note_written, on_device
from apo_kernels.triton.model_plan import ModelLaunch, ModelPlan, ModelPlanner, ModelRun
from apo_kernels.triton.model_wide import WideLayers
from apo_kernels.triton.plan_builder import Operands, Operation, to_device
from apo_kernels.triton.table_layout import Number

__all__ = ["KeptM", "TritonModel"]

Tensors = Sequence[Tensor]
Buffers = Sequence[Tensor | None]
RunOperation = Callable[[Operation, Operands], None]

PLANS = 32
"""Of one preconditioner, for as many forms of operands."""
TABLES = 4
"""Of a plan: gradients that are made anew in every step lie at a few places in turn."""


class KeptM(NamedTuple):
    """``M`` of a trial: of the layers that took part, in the preconditioner's layout."""

    flat: Tensor
    layers: tuple[int, ...]
    matrices: Callable[[Tensor, tuple[int, ...]], dict[int, Tensor]]

    def by_layer(self) -> dict[int, Tensor]:
        """As the ATen path keeps it."""
        return self.matrices(self.flat, self.layers)


class _Last:
    """What an operation used last."""

    def __init__(self) -> None:
        self.given: Given | None = None
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
        run: RunOperation,
        As: Tensors,
        Bs: Tensors,
        Ss: Tensors,
        widths: Sequence[tuple[int, ...]],
        learned: Sequence[str],
    ) -> None:
        self.planner = ModelPlanner(precision, As, Bs, Ss, widths, learned)
        self.wide = WideLayers(run, As, Bs, Ss, widths, learned)
        self._plans: dict[object, ModelPlan] = {}
        self._last = {name: _Last() for name in ("step", "update", "trial", "keep", "slopes")}
        self._one = torch.ones((), dtype=torch.float32, device=self.planner.device)
        self._seen: tuple[object, object, Given] | None = None

    def sees(self, written: Parts, read: Parts, given: Given) -> None:
        """Take what was found out about the tensors of the call that follows."""
        self._seen = written, read, given

    def _look(self, written: Parts, read: Parts, buffers: Buffers | None = None) -> Given:
        seen, self._seen = self._seen, None
        if seen is None or seen[0] is not written or seen[1] is not read:
            return Given.of(written, read, buffers)
        return seen[2]

    def _ready(
        self,
        name: str,
        given: Given,
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
        stream, overrides = current_stream(self.planner.device), config.overrides_key()
        known = last.given
        if (
            known is None or last.also != also or last.stream != stream or last.overrides != overrides
            or not known.same(given)
        ):  # fmt: skip
            self._renew(last, name, given, also)
            last.stream, last.overrides = stream, overrides
        if last.lists != lists:
            host, last.numbers = to_device(self._numbers(*numbers(*lists)), self.planner.device)
            last.lists = tuple([list(x) if isinstance(x, Sequence) else x for x in lists])
            last.hosts = last.hosts[0], host
        if plans._capturing(self.planner.device):
            keep_for_graph(stream, self, last.plan, last.operands, last.numbers, *last.hosts)
            self._last[name] = _Last()  # its tables are the graph's alone
        return last

    def _renew(self, last: _Last, name: str, given: Given, also: tuple[int, ...] | None) -> None:
        at = tuple(given.places or [0])
        there = tuple([place != 0 for place in at])
        ends = tuple([place % 16 for place in at])
        forms = tuple([tuple(each) if isinstance(each, list) else each for each in given.forms])
        key = (
            name,
            tuple(given.layers),
            tuple(given.counts),
            also,
            forms,
            there,
            ends,
            config.overrides_key(),
            last.stream,
        )
        capturing = plans._capturing(self.planner.device)
        plan = self._plans.get(key)
        if plan is None:
            plan = self.planner.plan(name, given, also)
            if not capturing:
                if len(self._plans) >= PLANS:
                    self._plans.clear()
                self._plans[key] = plan
        found = None if capturing else plan.tables.get(at)
        if found is None:
            found = to_device(plan.table(at), self.planner.device)
            if not capturing:  # else it lies in the graph's memory
                if len(plan.tables) >= TABLES:
                    plan.tables.clear()
                plan.tables[at] = found
        last.plan, last.operands = plan, found[1]
        last.given, last.also = given.forget(), also
        last.hosts = found[0], last.hosts[1]

    def _numbers(self, single: float, *each: Sequence[float]) -> NDArray[np.float32]:
        numbers = np.zeros((len(self.planner.matrices) + 1, len(Number)), np.float32)
        for column, values in enumerate(each):
            numbers[:-1, column] = np.array(values, np.float32)[self.planner.layer_of]
        numbers[-1, 0] = single
        return numbers

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
        given = self._look(thetas, Gs, momentum_buffers)
        bounded = math.isfinite(most)
        if bounded:
            last = self._ready("step", given, (lr, momentum, weight_decay, shares, most), _of_a_step)
        elif self.planner.wide:  # their directions pass through memory: that is a step with a promise of nothing
            last = self._ready("step", given, (lr, momentum, weight_decay, (), 1.0), _of_a_step)
        else:
            last = self._ready("update", given, (lr, momentum, weight_decay), _of_a_step)
        plan = last.plan
        if not plan or not plan.launches:
            return _factor(most, total, like=self._one) if bounded and total is not None else self._one
        note_written(given.tensors[given.reads :])
        if not bounded and not self.planner.wide:
            self._launch(last, plan.launches)
            return self._one
        sums = torch.zeros(2, dtype=torch.float32, device=self.planner.device)
        workspace = torch.empty(plan.sizes["workspace"], dtype=torch.float32, device=self.planner.device)
        if plan.wide:
            directions = [self.planner.views(i, workspace[plan.first :]) for i in plan.wide]
            self.wide.directions(plan.wide, Gs, directions, None)
            for k, (i, Y) in enumerate(zip(plan.wide, directions, strict=True) if bounded else ()):
                assert shares is not None
                workspace[k] = shares[i] * (self.wide.joined(Gs, i).float() * Y).sum()
        # Without a bound the sum stays 0, whatever the layers promise: one that promises NaN must not stop the others.
        launches = [each for each in plan.launches if bounded or each.name != "model_sums"]
        self._launch(last, launches, workspace=workspace, sums=sums, after_sum=total if bounded else None)
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
        given = self._look(thetas, Gs, momentum_buffers)
        last = self._ready("trial", given, (lengths, momentum, shrink), _as_they_are)
        assert last.plan is not None
        kept = torch.empty(self.planner.flat_size, dtype=torch.float32, device=self.planner.device)
        note_written(given.stepped)
        if last.plan.wide:
            found = self._keep_wide(last.plan, Gs, kept)
            self._launch(last, last.plan.launches, kept=kept)
            try:
                self.wide.trial_(last.plan.wide, thetas, Gs, found, momentum_buffers, lengths, momentum, shrink)
            except Exception as error:
                raise Interrupted(f"a trial failed after some weights had been written: {error}") from error
        else:
            self._launch(last, last.plan.launches, kept=kept)
        return KeptM(kept, tuple(last.plan.given), self._matrices)

    def keep(self, Gs: Parts) -> KeptM:
        last = self._ready("keep", self._look(Gs, Gs), (), _as_they_are)
        assert last.plan is not None
        kept = torch.empty(self.planner.flat_size, dtype=torch.float32, device=self.planner.device)
        if last.plan.wide:
            self._keep_wide(last.plan, Gs, kept)
        self._launch(last, last.plan.launches, kept=kept)
        return KeptM(kept, tuple(last.plan.given), self._matrices)

    def _keep_wide(self, plan: ModelPlan, parts: Parts, kept: Tensor) -> list[Tensor]:
        """The directions of the grouped GEMM's layers, and their ``M`` into ``kept``."""
        directions = [
            torch.empty(self.planner.Ss[i].shape, dtype=torch.float32, device=self.planner.device) for i in plan.wide
        ]
        self.wide.directions(plan.wide, parts, directions, [self.planner.views(i, kept) for i in plan.wide])
        return directions

    def _matrices(self, flat: Tensor, layers: tuple[int, ...]) -> dict[int, Tensor]:
        return {i: self.planner.views(i, flat) for i in layers}

    def slopes(self, Vs: Parts, kept: KeptM, lengths: Sequence[float]) -> ModelSlopes:
        given = self._look(Vs, Vs)
        last = self._ready("slopes", given, (lengths,), _as_they_are, kept.layers)
        assert last.plan is not None
        results = torch.zeros(last.plan.sizes["results"], dtype=torch.float32, device=self.planner.device)
        if last.plan.launches:
            self._launch(last, last.plan.launches, kept=kept.flat, results=results)
        found: list[list[Tensor | None]] = [[None] * len(self.planner.Ss) for _ in range(6)]
        for slot, i, shape, strides, start in last.plan.results:
            found[slot][i] = results.as_strided(shape, strides, start)
        for i in kept.layers:
            if not self.planner.of_layer[i]:
                self._empty_slopes(found, i)
        count = len(self.planner.Ss)
        inner, size = results[last.plan.inner : last.plan.inner + 2 * count].view(2, count)
        if last.plan.wide:
            Ms = [self.planner.views(i, kept.flat) for i in last.plan.wide]
            for i, each, *both in self.wide.slopes(last.plan.wide, Vs, Ms, lengths):
                for slot, x in enumerate(each):
                    found[slot][i] = x
                inner[i], size[i] = both
        A, B, S, size_A, size_B, size_S = found
        return ModelSlopes(A, B, S, size_A, size_B, size_S, inner, size)

    def energies(self, Gs: Parts) -> ModelEnergies:
        found = self.slopes(Gs, self.keep(Gs), [-0.5] * len(self.planner.Ss))
        return ModelEnergies(found.A, found.B, found.S)

    def _empty_slopes(self, found: list[list[Tensor | None]], i: int) -> None:
        for slot, letter, x in (
            (0, "A", self.planner.As[i]),
            (1, "B", self.planner.Bs[i]),
            (2, "S", self.planner.Ss[i]),
        ):
            if letter in self.planner.learned[i]:
                found[slot][i] = torch.zeros(x.shape, dtype=torch.float32, device=self.planner.device)
                size = x.shape if letter == "S" else x.shape[:-1]
                found[slot + 3][i] = torch.zeros(size, dtype=torch.float32, device=self.planner.device)

    def _launch(
        self,
        last: _Last,
        launches: Sequence[ModelLaunch],
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
        operands, numbers = last.operands, last.numbers
        assert operands is not None
        assert numbers is not None
        filler = numbers
        values = tuple(filler if x is None else x for x in (workspace, kept, sums, results))
        run = ModelRun((operands, numbers, *values), last.stream)
        with on_device(self.planner.device):
            for launch in launches:
                launch.compile(run)  # type: ignore[arg-type]
            begun = False
            try:
                for launch in launches:
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


def _factor(most: float, total: Callable[[Tensor], None], like: Tensor) -> Tensor:
    """What keeps the promise at ``most`` where this process has none: the others wait for its part of the sum."""
    total(promise := torch.zeros_like(like))
    return torch.where(promise <= most, 1.0, most / promise) + (promise - promise)  # NaN where it isn't finite


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
