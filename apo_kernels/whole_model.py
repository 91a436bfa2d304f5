"""The preconditioner of a whole model, bound to the tensors that hold it: its steps, trials and slopes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import is_

import torch
from torch import Tensor

from apo_kernels import checks
from apo_kernels.autocast import without_autocast
from apo_kernels.dispatch import serving
from apo_kernels.slopes import ModelEnergies, ModelSlopes, Parts

__all__ = ["ModelPreconditioner"]

Tensors = Sequence[Tensor]


class ModelPreconditioner:
    """``P(G) = B (S² ⊙ BᵀGA) Aᵀ`` of every layer of a model, on blocks that stay where they are.

    What is given once is checked and planned once; the blocks may be written between calls. Gradients, weights and
    cotangents are given in parts, a weight and its bias as they are, with no copy of the two joined.

    Args:
        As, Bs, Ss: as for :func:`apo_kernels.foreach_precondition`.
        widths: for each layer the widths of the parts, which add up to ``n``: ``(n,)`` or, with a bias,
            ``(n - 1, 1)``. At most two.
        learned: for each layer which of ``"ABS"`` :meth:`slopes` are wanted of; always with ``"S"``.
        backend: as for :func:`apo_kernels.foreach_precondition`.

    Raises:
        TypeError, ValueError: as :func:`apo_kernels.foreach_precondition`; at a call also for parts that don't fit.
            Nothing has been written then.
    """

    def __init__(
        self,
        As: Tensors,
        Bs: Tensors,
        Ss: Tensors,
        *,
        widths: Sequence[Sequence[int]],
        learned: Sequence[str] | None = None,
        backend: str | None = None,
    ) -> None:
        learned = ["ABS"] * len(Ss) if learned is None else learned
        checks.model(As, Bs, Ss, widths, learned)
        own = [tuple(each) for each in widths]
        self._shapes = [tuple(S.shape) for S in Ss]
        self._parts = [[(*S.shape[:-1], width) for width in each] for S, each in zip(Ss, own, strict=True)]
        self._like = Ss[0] if Ss else torch.empty(0)
        self._bound = serving(backend, Ss).bind_model(As, Bs, Ss, own, list(learned))
        self._knows = getattr(self._bound, "knows", None)
        self._buffers: tuple[list[Tensor | None], list[int]] = [], []

    @without_autocast
    def step_(
        self,
        thetas: Parts,
        Gs: Parts,
        momentum_buffers: Sequence[Tensor | None],
        *,
        lr: Sequence[float],
        momentum: Sequence[float],
        weight_decay: Sequence[float],
        most: float = math.inf,
        shares: Sequence[float] | None = None,
        total: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """A step of every layer, with numbers for each::

            v ← momentum · v + lr · f · P(G)
            θ ← (1 − lr · weight_decay) θ − v

        where ``f <= 1`` keeps ``Σ share · ⟨G, P(G)⟩`` at ``most``, if that is finite. Where the sum itself isn't, for a
        gradient that has an infinite entry or NaN, nothing is written, and f is NaN.

        Args:
            thetas: the weights, in parts like ``Gs``; written where the part of G isn't None.
            Gs: the gradients. A part that is None counts as zeros; a layer that is None is left out.
            momentum_buffers: the ``v``, of S's shape and float32 (float64) or None, which counts as zeros and isn't
                written.
            shares: needed where ``most`` is finite.
            total: called with the sum, 0-d, before it is compared, even where no layer has a gradient: to add it up
                over processes, in place. On a CPU it is called with the sum's terms, one float64 for each layer.

        Returns:
            f, 0-d, on the device: nothing waits for it.
        """
        self._check(thetas, Gs, momentum_buffers, lr=lr, momentum=momentum, weight_decay=weight_decay)
        if math.isfinite(most):
            checks.numbers(len(self._shapes), shares=() if shares is None else shares)
        with torch.no_grad():
            return self._bound.step_(thetas, Gs, momentum_buffers, lr, momentum, weight_decay, most, shares, total)

    @without_autocast
    def trial_(
        self,
        thetas: Parts,
        Gs: Parts,
        momentum_buffers: Sequence[Tensor | None],
        *,
        lengths: Sequence[float],
        momentum: Sequence[float],
        shrink: Sequence[float],
    ) -> object:
        """The weights at a trial, ``θ ← shrink·θ − length·P(G) − momentum·v``, with numbers for each layer.

        The arguments are as for :meth:`step_`; no buffer is written.

        Returns:
            What :meth:`slopes` needs of it: a matrix of G's size for each layer.
        """
        self._check(thetas, Gs, momentum_buffers, lengths=lengths, momentum=momentum, shrink=shrink)
        with torch.no_grad():
            return self._bound.trial_(thetas, Gs, momentum_buffers, lengths, momentum, shrink)

    @without_autocast
    def slopes(self, Vs: Parts, kept: object, *, lengths: Sequence[float]) -> ModelSlopes:
        """The slopes of an objective at a trial.

        Args:
            Vs: its gradient at the trial's weights, in parts; a part that is None counts as zeros.
            kept: what :meth:`trial_` returned, on the same blocks.
            lengths: those of the trial.
        """
        self._check(Vs, Vs, lengths=lengths)
        with torch.no_grad():
            return self._bound.slopes(Vs, kept, lengths)

    @without_autocast
    def keep(self, Gs: Parts) -> object:
        """What :meth:`slopes` needs of gradients that no trial is made with."""
        self._check(Gs, Gs)
        with torch.no_grad():
            return self._bound.keep(Gs)

    @without_autocast
    def energies(self, Gs: Parts) -> ModelEnergies:
        """How far ``S ⊙ BᵀGA`` is from white, for gradients that no trial is made with."""
        self._check(Gs, Gs)
        with torch.no_grad():
            return self._bound.energies(Gs)

    def _check(
        self,
        thetas: Parts,
        Gs: Parts,
        momentum_buffers: Sequence[Tensor | None] | None = None,
        **lists: Sequence[float],
    ) -> None:
        if self._knows is None or not self._knows(thetas, Gs):
            checks.parts(thetas, Gs, self._parts, self._like)
        checks.numbers(len(self._shapes), **lists)
        if momentum_buffers is not None and not self._knows_buffers(momentum_buffers):
            checks.buffers(momentum_buffers, self._shapes, self._like)
            self._buffers = list(momentum_buffers), checks.addresses(momentum_buffers)

    def _knows_buffers(self, momentum_buffers: Sequence[Tensor | None]) -> bool:
        """Whether they are those of the last call, where they were."""
        known, places = self._buffers
        if type(momentum_buffers) is not list or len(momentum_buffers) != len(known):
            return False
        return all(map(is_, momentum_buffers, known)) and checks.addresses(momentum_buffers) == places
