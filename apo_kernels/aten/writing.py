"""Momentum and weights: the last part of a step, which can't fail half-way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from apo_kernels.aten.tiles import Window
from apo_kernels.slopes import Parts

__all__ = ["Update"]


class Update:
    """``v ← μv + length·P(G)`` and ``θ ← shrink·θ − v``, or, for a trial, ``θ ← shrink·θ − length·P(G) − μv``.

    Views of weights and momentum buffers are kept for as long as these stay where they are.

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
        self._windows = parts, matrices
        self._of_part: list[list[list[tuple[int, int]]]] = [[[] for _ in own] for own in widths]
        self._of_matrix: list[list[tuple[int, int]]] = [[] for _ in widths]
        for c, windows in enumerate(parts):
            for k, w in enumerate(windows):
                self._of_part[w.layer][w.part].append((c, k))
        for c, windows in enumerate(matrices):
            for k, w in enumerate(windows):
                self._of_matrix[w.layer].append((c, k))
        self._held = [
            tuple(None if Y is None else [w.in_tiles(Y) for w in own[c]] for own in self._windows)
            for c, Y in enumerate(held)
        ]
        self._known: dict[tuple[int, int], tuple[Any, list[Tensor]]] = {}

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
        staged, direct = _Lists(), _Lists()
        rounded: list[Tensor] = []
        Y_parts, Y_matrices = self._views_of(Ys, 0), self._views_of(Ys, 1)
        for i in present:
            v = buffers[i]
            carried = carry and v is not None
            if v is not None and carry:
                direct.carry(v, momentum[i])
                views = self._views(i, -1, v, self._of_matrix[i], 1)
                direct.move(views, [Y_matrices[c][k] for c, k in self._of_matrix[i]], lengths[i])
            for k, (theta, G) in enumerate(zip(thetas[i] or (), Gs[i] or (), strict=True)):
                if G is None or theta is None:
                    continue
                lists, target, in_order = direct, theta, carried
                if theta.dtype != self._dtype:  # rounded once: computed first, copied last
                    target = theta.to(self._dtype)
                    rounded += [theta, target]
                    lists, in_order = staged, False
                lists.shrink(target, shrink[i])
                if v is not None and (in_order or momentum[i]):
                    own = self._slices(i, v)[k]
                    if in_order:
                        lists.subtract(target, own)
                    else:
                        lists.subtract_scaled([target], [own], momentum[i])
                if not in_order:
                    at = self._of_part[i][k]
                    views = self._views(i, k, target, at, 0, known=lists is direct)
                    lists.subtract_scaled(views, [Y_parts[c][j] for c, j in at], lengths[i])
        staged.run()
        direct.run()
        if rounded:
            torch._foreach_copy_(rounded[::2], rounded[1::2])

    def _views_of(self, Ys: Sequence[Tensor], which: int) -> list[list[Tensor]]:
        """The windows of parts (0) or of matrices (1) on directions in tiles."""
        return [
            held[which] or [w.in_tiles(Y) for w in self._windows[which][c]]
            for c, (Y, held) in enumerate(zip(Ys, self._held, strict=True))
        ]

    def _views(
        self, i: int, k: int, x: Tensor, at: Sequence[tuple[int, int]], which: int, *, known: bool = True
    ) -> list[Tensor]:
        """The windows on a part of a layer, or on its momentum buffer (-1)."""
        if not known:
            return [self._windows[which][c][j].of(x) for c, j in at]
        key = x.data_ptr(), x.stride(), x.dtype
        found = self._known.get((i, k))
        if found is None or found[0] != key:
            found = self._known[i, k] = key, [self._windows[which][c][j].of(x.detach()) for c, j in at]
        return found[1]

    def _slices(self, i: int, v: Tensor) -> list[Tensor]:
        """The parts of a momentum buffer."""
        key = v.data_ptr(), v.stride(), v.dtype
        found = self._known.get((i, -2))
        if found is None or found[0] != key:
            found = self._known[i, -2] = key, list(v.detach().split(list(self._widths[i]), -1))
        return found[1]


class _Lists:
    """What is done to which tensors, an operation for each kind."""

    def __init__(self) -> None:
        self._carried: list[Tensor] = []
        self._momenta: list[float] = []
        self._moved: tuple[list[Tensor], list[Tensor], list[float]] = [], [], []
        self._shrunk: list[Tensor] = []
        self._shrinks: list[float] = []
        self._subtracted: tuple[list[Tensor], list[Tensor]] = [], []
        self._scaled: tuple[list[Tensor], list[Tensor], list[float]] = [], [], []

    def carry(self, v: Tensor, momentum: float) -> None:
        self._carried.append(v)
        self._momenta.append(momentum)

    def move(self, targets: Sequence[Tensor], by: Sequence[Tensor], scale: float) -> None:
        _extend(self._moved, targets, by, scale)

    def shrink(self, x: Tensor, factor: float) -> None:
        self._shrunk.append(x)
        self._shrinks.append(factor)

    def subtract(self, x: Tensor, y: Tensor) -> None:
        self._subtracted[0].append(x)
        self._subtracted[1].append(y)

    def subtract_scaled(self, targets: Sequence[Tensor], by: Sequence[Tensor], scale: float) -> None:
        _extend(self._scaled, targets, by, scale)

    def run(self) -> None:
        zeros = [v for v, momentum in zip(self._carried, self._momenta, strict=True) if momentum == 0]
        if zeros:  # they may hold anything, NaN included
            torch._foreach_zero_(zeros)
        if len(zeros) < len(self._carried):
            _multiply(self._carried, [momentum or 1.0 for momentum in self._momenta])
        for targets, by, scale in _by_number(*self._moved):
            torch._foreach_add_(targets, by, alpha=scale)
        if any(factor != 1 for factor in self._shrinks):
            _multiply(self._shrunk, self._shrinks)
        if self._subtracted[0]:
            torch._foreach_sub_(*self._subtracted)
        for targets, by, scale in _by_number(*self._scaled):
            torch._foreach_sub_(targets, by, alpha=scale)


def _extend(
    lists: tuple[list[Tensor], list[Tensor], list[float]],
    targets: Sequence[Tensor],
    by: Sequence[Tensor],
    scale: float,
) -> None:
    lists[0].extend(targets)
    lists[1].extend(by)
    lists[2].extend([scale] * len(targets))


def _multiply(tensors: list[Tensor], factors: list[float]) -> None:
    if len(set(factors)) == 1:
        torch._foreach_mul_(tensors, factors[0])
    else:
        torch._foreach_mul_(tensors, factors)


def _by_number(
    targets: list[Tensor], by: list[Tensor], scales: list[float]
) -> Iterable[tuple[list[Tensor], list[Tensor], float]]:
    """Those of one number together."""
    numbers = dict.fromkeys(scales)
    if len(numbers) == 1:
        return [(targets, by, scales[0])]
    return [
        (
            [x for x, scale in zip(targets, scales, strict=True) if scale == number],
            [x for x, scale in zip(by, scales, strict=True) if scale == number],
            number,
        )
        for number in numbers
    ]
