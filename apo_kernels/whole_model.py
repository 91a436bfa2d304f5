"""The preconditioner of a whole model, bound to the tensors that hold it: its steps, trials and slopes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import count
from threading import RLock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apo_kernels import checks
from apo_kernels.autocast import without_autocast
from apo_kernels.differentiable import transforming
from apo_kernels.dispatch import serving
from apo_kernels.given import Given
from apo_kernels.slopes import ModelEnergies, ModelSlopes, Parts

__all__ = ["ModelPreconditioner"]

Tensors = Sequence[Tensor]

_NUMBERS = count()


class _Kept(NamedTuple):
    """What a trial kept, and the number of the preconditioner that made it, which a copy of it shares."""

    number: int
    found: object


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
        self._made_of = As, Bs, Ss, widths, learned, backend
        self._number = next(_NUMBERS)
        self._bind()

    def _bind(self) -> None:
        As, Bs, Ss, widths, learned, backend = self._made_of
        checks.tensor_lists(As=As, Bs=Bs, Ss=Ss)
        learned = ["ABS"] * len(Ss) if learned is None else learned
        checks.model(As, Bs, Ss, widths, learned)
        own = [tuple(each) for each in widths]
        self._shapes = [tuple(S.shape) for S in Ss]
        self._parts = [[(*S.shape[:-1], width) for width in each] for S, each in zip(Ss, own, strict=True)]
        self._like = Ss[0] if Ss else torch.empty(0)
        self._blocks = {"As": As, "Bs": Bs, "Ss": Ss}
        with torch.inference_mode(False), torch.no_grad():  # what is held must be writable in either mode
            self._bound = serving(backend, Ss).bind_model(As, Bs, Ss, own, list(learned))
        self._sees = getattr(self._bound, "sees", None)
        self._known: dict[tuple[str, bool], tuple[Given, object]] = {}
        self._lock = RLock()  # scratch, tables and what was seen last belong to one call at a time

    def __getstate__(self) -> dict[str, Any]:
        return {"_made_of": self._made_of, "_number": self._number}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._bind()

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
        checks.step_numbers(len(self._shapes), lr, momentum, weight_decay)
        checks.promise(len(self._shapes), most, shares, total)
        with self._lock, torch.no_grad():
            self._check("step", thetas, Gs, momentum_buffers)
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
        checks.numbers(len(self._shapes), lengths=lengths, momentum=momentum, shrink=shrink)
        with self._lock, torch.no_grad():
            self._check("trial", thetas, Gs, momentum_buffers)
            kept = self._bound.trial_(thetas, Gs, momentum_buffers, lengths, momentum, shrink)
            return _Kept(self._number, kept)

    @without_autocast
    def slopes(self, Vs: Parts, kept: object, *, lengths: Sequence[float]) -> ModelSlopes:
        """The slopes of an objective at a trial.

        Args:
            Vs: its gradient at the trial's weights, in parts; a part that is None counts as zeros.
            kept: what :meth:`trial_` returned, on the same blocks.
            lengths: those of the trial.
        """
        checks.numbers(len(self._shapes), lengths=lengths)
        if not isinstance(kept, _Kept):
            raise TypeError(
                f"kept must be what trial_ or keep returned, but got {kept!r} of type {type(kept).__name__}"
            )
        if kept.number != self._number:
            raise ValueError("kept must be what trial_ or keep of this preconditioner returned, but is another's")
        with self._lock, torch.no_grad():
            self._check("slopes", Vs, Vs)
            return self._bound.slopes(Vs, kept.found, lengths)

    @without_autocast
    def keep(self, Gs: Parts) -> object:
        """What :meth:`slopes` needs of gradients that no trial is made with."""
        with self._lock, torch.no_grad():
            self._check("keep", Gs, Gs)
            return _Kept(self._number, self._bound.keep(Gs))

    @without_autocast
    def energies(self, Gs: Parts) -> ModelEnergies:
        """How far ``S ⊙ BᵀGA`` is from white, for gradients that no trial is made with."""
        with self._lock, torch.no_grad():
            self._check("energies", Gs, Gs)
            return self._bound.energies(Gs)

    def _check(
        self, name: str, thetas: Parts, Gs: Parts, momentum_buffers: Sequence[Tensor | None] | None = None
    ) -> None:
        """Refuse tensors that don't fit; those of the last call of this name, in form and place, are known to."""
        if transforming():
            checks.plain_parts({"Gs": Gs, "thetas": thetas, "momentum_buffers": momentum_buffers, **self._blocks})
        key = name, torch.is_inference_mode_enabled()  # which says what may be written
        known, kinds = self._known.get(key, (None, None))
        try:
            given = Given.of(thetas, Gs, momentum_buffers, known)
        except (AttributeError, LookupError, RuntimeError, TypeError):  # the checks say what is wrong
            self._refuse(thetas, Gs, momentum_buffers)
            raise
        if known is not None and known.same(given):
            given = known._replace(tensors=given.tensors)
        else:
            own = given.kinds()
            if known is None or kinds != own or not known.alike(given):
                self._refuse(thetas, Gs, momentum_buffers)
            if momentum_buffers is not None:
                moved = known is None or known.written_places() != given.written_places()
                blocks = self._blocks if moved else {}
                checks.no_shared_parts(given, thetas, Gs, momentum_buffers, step=name == "step", **blocks)
            self._known[key] = given.forget(), own
        if self._sees is not None:
            self._sees(thetas, Gs, given)

    def _refuse(self, thetas: Parts, Gs: Parts, momentum_buffers: Sequence[Tensor | None] | None) -> None:
        checks.parts(thetas, Gs, self._parts, self._like)
        if momentum_buffers is not None:
            checks.buffers(momentum_buffers, self._shapes, self._like)
