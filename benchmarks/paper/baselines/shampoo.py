"""Shampoo: a preconditioner for each dimension of a tensor."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import checks
from benchmarks.common.fisher.damping import inverse_root, wide
from benchmarks.common.fisher.layers import MAX_DIM
from benchmarks.paper.baselines.base import Baseline, Closure


class Shampoo(Baseline):
    """``P(G) = G ×₁ (H₁ + ε I)^(−1/2k) … ×ₖ (Hₖ + ε I)^(−1/2k)`` for a tensor of k dimensions.

    ``Hᵢ`` accumulates ``G₍ᵢ₎ G₍ᵢ₎ᵀ``, the gradient unfolded along dimension i (Gupta, Koren & Singer 2018): for a
    matrix ``L^(−1/4) G R^(−1/4)``, for a vector full-matrix AdaGrad, for a convolution four small matrices.

    Args:
        damping: ε.
        decay: of ``H ← decay·H + (1 − decay)·GGᵀ``, divided by ``1 − decayᵗ`` because it starts at zero; 1.0 for the
            paper's sum.
        interval: compute the roots every N steps. ``H`` takes in every gradient.
        warmup: compute them at each of the first N steps.
        block_size: tensors are cut into blocks of at most this side, each preconditioned by itself (Anil et al.
            2020); None: uncut.
        grafting: give each parameter's step the length of the plain gradient's.
        settings: ``lr``, ``momentum`` and ``weight_decay`` of :class:`Baseline`.

    Statistics and roots are float32, float64 for float64 weights. Dimensions of length 1 are left out, and of more
    than :data:`MAX_DIM`; they don't count in k.

    Attributes:
        failed_roots: how many roots failed; the old one stays, the identity where there is none.
    """

    COUNTERS = (*Baseline.COUNTERS, "failed_roots")
    failed_roots: int

    def __init__(
        self,
        params: Iterable[Any],
        *,
        damping: float = 1e-6,
        decay: float = 1.0,
        interval: int = 10,
        warmup: int = 10,
        block_size: int | None = None,
        grafting: bool = False,
        **settings: float,
    ) -> None:
        super().__init__(params, damping=damping, **settings)
        self.decay = checks.number("decay", decay)
        if decay > 1:
            raise ValueError(f"decay must be a number in [0, 1], but got {decay!r}")
        self.interval = checks.integer("interval", interval, least=1)
        self.warmup = checks.integer("warmup", warmup, least=0)
        self.block_size = None if block_size is None else checks.integer("block_size", block_size, least=1)
        self.grafting = grafting

    def step(self, closure: Closure | None = None) -> Any:
        """One step; the loss that the closure returned, None without one (the gradients are in ``.grad`` then)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        refresh = self.steps < self.warmup or self.steps % self.interval == 0
        with torch.no_grad():
            self._step_along(lambda: self._directions(refresh))
        return loss

    def _directions(self, refresh: bool) -> dict[Tensor, Tensor]:
        return {
            p: self._direction(p, wide(p.grad), group["damping"], refresh)
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        }

    def _direction(self, p: Tensor, gradient: Tensor, damping: float, refresh: bool) -> Tensor:
        """``P(G)`` of one parameter, whose statistics take the gradient in."""
        state = self.state[p]
        G = gradient.reshape(p.shape or (1,))
        blocks = _block_slices(G.shape, self.block_size)
        if "statistics" not in state:
            state["updates"] = 0
            state["statistics"] = [_zeros(G[block]) for block in blocks]
            state["roots"] = [[] for _ in blocks]
        state["updates"] += 1
        unbias = 1.0 if self.decay == 1 else 1 - self.decay ** state["updates"]
        P = torch.empty_like(G)
        for number, block in enumerate(blocks):
            part, statistics = G[block], state["statistics"][number]
            for axis, H in statistics.items():
                unfolded = part.movedim(axis, 0).reshape(len(H), -1)
                H.addmm_(unfolded, unfolded.T, beta=self.decay, alpha=1.0 if self.decay == 1 else 1 - self.decay)
            if refresh or not state["roots"][number]:
                state["roots"][number] = self._roots(statistics, unbias, damping, state["roots"][number])
            for axis, root in state["roots"][number].items():
                part = torch.tensordot(root, part, dims=([1], [axis])).movedim(0, axis)
            P[block] = part
        P = P.reshape(p.shape)
        if self.grafting:
            P *= gradient.norm() / P.norm().clamp(min=torch.finfo(P.dtype).tiny)
        return P

    def _roots(
        self, statistics: dict[int, Tensor], unbias: float, damping: float, old: dict[int, Tensor]
    ) -> dict[int, Tensor]:
        roots = {}
        for axis, H in statistics.items():
            root = inverse_root(H / unbias, damping, 1 / (2 * len(statistics)))
            if root is None:
                self.failed_roots += 1
                root = old[axis] if axis in old else torch.eye(len(H), dtype=H.dtype, device=H.device)
            roots[axis] = root
        return roots


def _zeros(part: Tensor) -> dict[int, Tensor]:
    """A zero statistic for each dimension that gets one."""
    if part.numel() == 1:
        return {0: part.new_zeros(1, 1)}
    return {axis: part.new_zeros(side, side) for axis, side in enumerate(part.shape) if 1 < side <= MAX_DIM}


def _block_slices(shape: Sequence[int], block_size: int | None) -> list[tuple[slice, ...]]:
    """The slices of each block of a tensor."""
    cuts = [
        [slice(start, min(start + (block_size or side), side)) for start in range(0, side, block_size or side or 1)]
        for side in shape
    ]
    return list(itertools.product(*cuts))
