"""Shampoo: a preconditioner for each dimension of a tensor."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from apo import checks
from apo.objective import Closure
from benchmarks.common.damping import wide
from benchmarks.paper.baselines.base import Baseline, all_finite
from benchmarks.paper.baselines.roots import inverse_root

GRAFTINGS = (None, "sgd", "adagrad", "rmsprop")
Grafting = Literal["sgd", "adagrad", "rmsprop"]
Slices = tuple[slice, ...]


class Shampoo(Baseline):
    """``P(G) = G ×₁ (H₁ + ε I)^(−1/2k) … ×ₖ (Hₖ + ε I)^(−1/2k)`` for a tensor of k dimensions.

    ``Hᵢ`` accumulates ``G₍ᵢ₎ G₍ᵢ₎ᵀ``, the gradient unfolded along dimension i (Gupta, Koren & Singer 2018): for a
    matrix ``L^(−1/4) G R^(−1/4)``, for a vector full-matrix AdaGrad, for a convolution four small matrices.

    Args:
        params: parameters or param groups (keys: ``lr``, ``momentum``, ``weight_decay``, ``damping``).
        lr: learning rate, >= 0.
        momentum: μ, of the preconditioned gradient, in [0, 1).
        weight_decay: λ, decoupled, >= 0.
        damping: ε, >= 0.
        decay: of ``H ← decay·H + (1 − decay)·GGᵀ``, divided by ``1 − decayᵗ`` for having started at zero; 1.0 for
            the paper's sum.
        interval: new roots every so many steps,
        warmup: and at each of the first so many. ``H`` takes in every gradient.
        block_size: tensors are cut into blocks of at most this side, each preconditioned by itself (Anil et al.
            2020); None: uncut.
        exponent: of each ``Hᵢ``, in place of ``1/2k``.
        merge_dims: neighbouring dimensions are read as one, from the last on, while their product is at most this, so
            that a 3×3 kernel isn't two matrices of side 3 (Anil et al. 2020); None: as they are.
        max_dim: a dimension (of a block) longer than this gets no preconditioner, and doesn't count in k.
        grafting: the length of each parameter's step is that of another method's: ``"sgd"``, ``"adagrad"`` (the
            sum of squares) or ``"rmsprop"`` (their running average at 0.99, started without bias). None: its own.

    Statistics and roots are float32, float64 for float64 weights. A tensor's dimensions of length 1 are left out.

    Attributes:
        failed_roots: how many roots failed; the old one stays, the identity where there is none.
        steps, skipped_steps: see :class:`Baseline`.

    Raises:
        TypeError, ValueError: an argument isn't as above.
    """

    COUNTERS = (*Baseline.COUNTERS, "failed_roots")
    failed_roots: int

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        damping: float = 1e-6,
        decay: float = 1.0,
        interval: int = 10,
        warmup: int = 10,
        block_size: int | None = None,
        exponent: float | None = None,
        merge_dims: int | None = None,
        max_dim: int = 8192,
        grafting: Grafting | None = None,
    ) -> None:
        self.decay = checks.number("decay", decay)
        if decay > 1:
            raise ValueError(f"decay must be a number in [0, 1], but got {decay!r}")
        self.interval = checks.integer("interval", interval, least=1)
        self.warmup = checks.integer("warmup", warmup, least=0)
        for name, value in (("block_size", block_size), ("merge_dims", merge_dims)):
            if value is not None:
                checks.integer(name, value, least=1)
        self.block_size, self.merge_dims = block_size, merge_dims
        self.exponent = None if exponent is None else checks.number("exponent", exponent, above=True)
        self.max_dim = checks.integer("max_dim", max_dim, least=1)
        checks.one_of("grafting", grafting, GRAFTINGS)
        self.grafting = grafting
        self._init_counters()
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "damping": damping}
        super().__init__(params, defaults)

    def step(self, closure: Closure | None = None) -> Any:
        """One step; the loss that the closure returned, None without one (the gradients are in ``.grad`` then)."""
        loss = None
        if closure is not None:
            checks.closure(closure)
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            refresh = self.steps < self.warmup or self.steps % self.interval == 0
            self.steps += 1
            if not self._gradients_finite():
                self.skipped_steps += 1
                return loss
            directions = {
                p: self._direction(p, wide(p.grad), group["damping"], refresh)
                for group in self.param_groups
                for p in group["params"]
                if p.grad is not None
            }
            if all_finite(list(directions.values())):
                self._descend(directions)
            else:
                self.skipped_steps += 1
        return loss

    def _direction(self, p: Tensor, gradient: Tensor, damping: float, refresh: bool) -> Tensor:
        """``P(G)`` of one parameter, whose statistics take the gradient in."""
        state = self.state[p]
        G = gradient.reshape(merged(p.shape, self.merge_dims))
        blocks = block_slices(G.shape, self.block_size)
        if "statistics" not in state:
            state["updates"] = 0
            state["statistics"] = [self._zeros(G[block]) for block in blocks]
            state["roots"] = [[] for _ in blocks]
        state["updates"] += 1
        unbias = 1.0 if self.decay == 1 else 1 - self.decay ** state["updates"]
        P = torch.empty_like(G)
        for number, block in enumerate(blocks):
            part, statistics = G[block], state["statistics"][number]
            for axis, H in statistics.items():
                accumulate(H, part, axis, self.decay)
            if refresh or not state["roots"][number]:
                state["roots"][number] = self._roots(statistics, unbias, damping, state["roots"][number])
            for axis, root in state["roots"][number].items():
                part = along(part, axis, root)
            P[block] = part
        P = P.reshape(p.shape)
        return P if self.grafting is None else self._graft(P, gradient, state)

    def _zeros(self, part: Tensor) -> dict[int, Tensor]:
        """A zero statistic for each dimension that gets one."""
        return {
            axis: part.new_zeros(side, side) for axis, side in enumerate(part.shape) if 1 < side <= self.max_dim
        } or ({0: part.new_zeros(1, 1)} if part.numel() == 1 else {})

    def _roots(
        self, statistics: dict[int, Tensor], unbias: float, damping: float, old: dict[int, Tensor]
    ) -> dict[int, Tensor]:
        exponent = 1 / (2 * max(len(statistics), 1)) if self.exponent is None else self.exponent
        roots = {}
        for axis, H in statistics.items():
            root = inverse_root(H / unbias, damping, exponent)
            if root is None:
                self.failed_roots += 1
                root = old[axis] if axis in old else torch.eye(len(H), dtype=H.dtype, device=H.device)
            roots[axis] = root
        return roots

    def _graft(self, P: Tensor, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        """P in the length of the other method's step."""
        step = gradient
        if self.grafting != "sgd":
            if "squares" not in state:
                state["squares"] = torch.zeros_like(gradient)
            if self.grafting == "adagrad":
                squares = state["squares"].addcmul_(gradient, gradient)
            else:
                state["squares"].mul_(0.99).addcmul_(gradient, gradient, value=0.01)
                squares = state["squares"] / (1 - 0.99 ** state["updates"])
            step = gradient / (squares.sqrt() + 1e-10)
        grafted: Tensor = P * (step.norm() / P.norm().clamp(min=torch.finfo(P.dtype).tiny))
        return grafted

    def _settings(self) -> dict[str, Any]:
        names = ("block_size", "merge_dims", "max_dim", "grafting")
        return {name: getattr(self, name) for name in names}


def merged(shape: Sequence[int], merge_dims: int | None) -> tuple[int, ...]:
    """The shape with neighbouring dimensions multiplied, from the last on, while the product is at most
    ``merge_dims``; never empty."""
    sides: list[int] = []
    for side in reversed(shape):
        if sides and merge_dims is not None and sides[-1] * side <= merge_dims:
            sides[-1] *= side
        else:
            sides.append(side)
    return tuple(reversed(sides)) or (1,)


def block_slices(shape: Sequence[int], block_size: int | None) -> list[Slices]:
    """The slices of each block of a tensor."""
    cuts = [
        [slice(start, min(start + (block_size or side), side)) for start in range(0, side, block_size or side or 1)]
        for side in shape
    ]
    return list(itertools.product(*cuts))


def accumulate(H: Tensor, G: Tensor, axis: int, decay: float) -> None:
    """``H ← decay·H + (1 − decay)·G₍ₐₓᵢₛ₎ G₍ₐₓᵢₛ₎ᵀ`` in place; the sum for a decay of 1."""
    unfolded = G.movedim(axis, 0).reshape(len(H), -1)
    H.addmm_(unfolded, unfolded.T, beta=decay, alpha=1.0 if decay == 1 else 1 - decay)


def along(G: Tensor, axis: int, matrix: Tensor) -> Tensor:
    """``G ×ₐₓᵢₛ matrix``: the matrix applied along one dimension."""
    product: Tensor = torch.tensordot(matrix, G, dims=([1], [axis]))
    return product.movedim(0, axis)
