"""Momentum and weights: the last part of a step, which can't fail half-way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from apo_kernels.aten.tiles import Window
from apo_kernels.slopes import Parts

__all__ = ["WeightUpdate"]

At = tuple[int, int]
"""Number of a class, and of a window among its windows."""


class WeightUpdate:
    """``v ← μv + length·P(G)`` and ``θ ← shrink·θ − v``, or, for a trial, ``θ ← shrink·θ − length·P(G) − μv``.

    What is done to which views is listed once for as long as weights and momentum buffers stay where they are.

    Args:
        widths: of each layer's parts.
        parts, matrices: for each class of tiles the windows of its layers' parts, and of their matrices.
        held: for each class the buffer that its directions come in, if that stays.
        dtype: of P(G) and v.
    """

    def __init__(
        self,
        widths: Sequence[Sequence[int]],
        parts: Sequence[Sequence[Window]],
        matrices: Sequence[Sequence[Window]],
        held: Sequence[Tensor | None],
        dtype: torch.dtype,
    ) -> None:
        self._widths, self._dtype = widths, dtype
        self._parts, self._matrices = parts, matrices
        self._of_part: list[list[list[At]]] = [[[] for _ in own] for own in widths]
        self._of_matrix: list[list[At]] = [[] for _ in widths]
        for c, windows in enumerate(parts):
            for k, w in enumerate(windows):
                self._of_part[w.layer][w.part].append((c, k))
        for c, windows in enumerate(matrices):
            for k, w in enumerate(windows):
                self._of_matrix[w.layer].append((c, k))
        self._held = [
            None if Y is None else ([w.in_tiles(Y) for w in parts[c]], [w.in_tiles(Y) for w in matrices[c]])
            for c, Y in enumerate(held)
        ]
        self._known: dict[bool, tuple[Any, _Listed]] = {}

    def __call__(
        self,
        thetas: Parts,
        Gs: Parts,
        present: Sequence[int],
        buffers: Sequence[Tensor | None],
        Ys: Sequence[Tensor],
        lengths: Sequence[float],
        momentum: Sequence[float],
        shrink: Sequence[float],
        *,
        carry: bool,
    ) -> None:
        """``carry``: write v, as a step does and a trial doesn't."""
        written = _written(thetas, Gs, present)
        held = [buffers[i] for i in present]
        key = list(present), [_place(x) for own in written for x in own], [_place(v) for v in held]
        known = self._known.get(carry)
        if known is None or known[0] != key:
            known = self._known[carry] = key, self._plan(present, written, held, carry)
        numbers = lengths, momentum, shrink
        views = [
            own or ([w.in_tiles(Y) for w in self._parts[c]], [w.in_tiles(Y) for w in self._matrices[c]])
            for c, (Y, own) in enumerate(zip(Ys, self._held, strict=True))
        ]
        rounded = self._round_once(present, written, held, views, numbers)
        known[1].run(views, *numbers)
        if rounded[0]:
            torch._foreach_copy_(*rounded)

    def _plan(
        self,
        present: Sequence[int],
        written: Sequence[Sequence[Tensor | None]],
        buffers: Sequence[Tensor | None],
        carry: bool,
    ) -> _Listed:
        plan = _Listed()
        for i, thetas, v in zip(present, written, buffers, strict=True):
            slices: Sequence[Tensor | None] = [None] * len(thetas)
            if v is not None:
                v = v.detach()
                slices = torch.split(v, list(self._widths[i]), -1) if len(thetas) > 1 else [v]
            if v is not None and carry:
                at = self._of_matrix[i]
                plan.carried.add([v], i)
                plan.moved.add([self._matrices[c][k].of(v) for c, k in at], i, at)
            for k, (theta, own) in enumerate(zip(thetas, slices, strict=True)):
                if theta is None or theta.dtype != self._dtype:
                    continue
                at = self._of_part[i][k]
                self._add_part(plan, i, theta.detach(), at, own, carry)
        return plan

    def _add_part(self, plan: _Listed, i: int, theta: Tensor, at: Sequence[At], v: Tensor | None, carry: bool) -> None:
        plan.shrunk.add([theta], i)
        if v is not None:
            (plan.subtracted if carry else plan.coasted).add([theta], i, by=[v])
        if v is None or not carry:
            plan.stepped.add([self._parts[c][j].of(theta) for c, j in at], i, at)

    def _round_once(
        self,
        present: Sequence[int],
        written: Sequence[Sequence[Tensor | None]],
        buffers: Sequence[Tensor | None],
        views: Sequence[tuple[list[Tensor], list[Tensor]]],
        numbers: tuple[Sequence[float], Sequence[float], Sequence[float]],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """16-bit weights, and what is to be copied into them, computed before anything is written."""
        targets, results = [], []
        plan = _Listed()
        for i, thetas, v in zip(present, written, buffers, strict=True):
            for k, theta in enumerate(thetas):
                if theta is None or theta.dtype == self._dtype:
                    continue
                wide = theta.detach().to(self._dtype)
                own = None if v is None else torch.split(v, list(self._widths[i]), -1)[k]
                self._add_part(plan, i, wide, self._of_part[i][k], own, carry=False)
                targets.append(theta)
                results.append(wide)
        if targets:
            plan.run(views, *numbers)
        return targets, results


class _Targets:
    """Tensors that one thing is done to, each with its layer, and with what it is done with: other tensors, or windows
    on directions in tiles."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.layers: list[int] = []
        self.at: list[At] = []
        self.by: list[Tensor] = []

    def add(self, tensors: Sequence[Tensor], layer: int, at: Sequence[At] = (), by: Sequence[Tensor] = ()) -> None:
        self.tensors += tensors
        self.layers += [layer] * len(tensors)
        self.at += at
        self.by += by

    def by_number(
        self, numbers: Sequence[float], by: list[Tensor]
    ) -> Iterable[tuple[list[Tensor], list[Tensor], float]]:
        """Those of one number together."""
        own = [numbers[i] for i in self.layers]
        if len(set(own)) <= 1:
            return [(self.tensors, by, number) for number in own[:1]]
        groups: dict[float, list[int]] = {}
        for k, number in enumerate(own):
            groups.setdefault(number, []).append(k)
        return [([self.tensors[k] for k in group], [by[k] for k in group], number) for number, group in groups.items()]


class _Listed:
    """What a step does, in this order."""

    def __init__(self) -> None:
        self.carried = _Targets()
        self.moved = _Targets()
        self.shrunk = _Targets()
        self.subtracted = _Targets()
        self.coasted = _Targets()
        self.stepped = _Targets()

    def run(
        self,
        views: Sequence[tuple[list[Tensor], list[Tensor]]],
        lengths: Sequence[float],
        momentum: Sequence[float],
        shrink: Sequence[float],
    ) -> None:
        for targets, _, number in self.carried.by_number(momentum, self.carried.tensors):
            if number == 0:  # they may hold anything, NaN included
                torch._foreach_zero_(targets)
            else:
                _multiply(targets, number)
        if self.moved.tensors:
            by = [views[c][1][k] for c, k in self.moved.at]
            for targets, own, number in self.moved.by_number(lengths, by):
                torch._foreach_add_(targets, own, alpha=number)
        for targets, _, number in self.shrunk.by_number(shrink, self.shrunk.tensors):
            if number != 1:
                _multiply(targets, number)
        if self.subtracted.tensors:
            torch._foreach_sub_(self.subtracted.tensors, self.subtracted.by)
        for targets, own, number in self.coasted.by_number(momentum, self.coasted.by):
            if number != 0:
                torch._foreach_sub_(targets, own, alpha=number)
        if self.stepped.tensors:
            by = [views[c][0][k] for c, k in self.stepped.at]
            for targets, own, number in self.stepped.by_number(lengths, by):
                torch._foreach_sub_(targets, own, alpha=number)


def _written(thetas: Parts, Gs: Parts, present: Sequence[int]) -> list[list[Tensor | None]]:
    """The parts that have a gradient, of each layer that takes part."""
    return [
        [None if G is None else theta for theta, G in zip(thetas[i] or (), Gs[i] or (), strict=True)] for i in present
    ]


def _place(x: Tensor | None) -> Any:
    return None if x is None else (x.data_ptr(), x.stride(), x.dtype)


def _multiply(tensors: list[Tensor], number: float) -> None:
    factor = torch.tensor(number, dtype=tensors[0].dtype) if tensors[0].is_cpu else number
    torch._foreach_mul_(tensors, factor)  # with a number each would make such a tensor
