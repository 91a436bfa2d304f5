"""The public functions.

Notation (Eq. 10 of Bae et al., NeurIPS 2022): a gradient ``G`` ``(*batch, m, n)``, a scaling ``S`` of ``G``'s
shape, and blocks ``A`` for the ``n`` side and ``B`` for the ``m`` side, each full or a block-diagonal stack
(:mod:`apo_kernels.blocks`). Dtypes float32, bfloat16 and float16 mix freely and are summed in float32;
float64 mixes with nothing. Any strides are taken. On every path ``S²`` and the intermediate products are
float32 (float64), and a result is rounded once. Autocast changes nothing.

Every function takes ``backend=``: ``None`` for the best that serves the tensors, or a backend's name, which may say how
float32 operands are multiplied (``"triton:tf32"``; :mod:`apo_kernels.dispatch`). See :func:`explain`.

All functions raise TypeError for arguments that aren't dense floating-point tensors (or lists of them) and for float64
mixed with narrower dtypes, and ValueError for shapes that don't fit, different devices and unknown backends. The error
names the argument, its value and what it must be; nothing has been written then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from apo_kernels import checks, ops, reference
from apo_kernels.aten import Kept, accumulation_dtype
from apo_kernels.autocast import without_autocast
from apo_kernels.differentiable import differentiable, transformed
from apo_kernels.dispatch import choose, serving

__all__ = [
    "BoundStep",
    "explain",
    "foreach_precondition",
    "foreach_precondition_step_",
    "foreach_precondition_vjp",
    "precondition",
    "precondition_vjp",
]

Tensors = Sequence[Tensor]

_KEEP = "keep=True builds no graph"


@overload
def precondition(
    G: Tensor, A: Tensor, B: Tensor, S: Tensor, *, keep: Literal[False] = ..., backend: str | None = ...
) -> Tensor: ...
@overload
def precondition(
    G: Tensor, A: Tensor, B: Tensor, S: Tensor, *, keep: Literal[True], backend: str | None = ...
) -> tuple[Tensor, Kept]: ...
@without_autocast
def precondition(
    G: Tensor, A: Tensor, B: Tensor, S: Tensor, *, keep: bool = False, backend: str | None = None
) -> Tensor | tuple[Tensor, Kept]:
    """The structured preconditioned gradient ``P(G) = B (S² ⊙ BᵀGA) Aᵀ`` (Eq. 10).

    Differentiable in all four operands, to any order, also by forward-mode AD and the transforms of ``torch.func``.
    Under these two the definition is computed, in torch's own products and on any backend.

    Args:
        G: ``(*batch, m, n)``.
        A: ``(*batch, n, n)``, or a stack ``(*batch, ceil(n/b), b, b)``.
        B: ``(*batch, m, m)``, or a stack ``(*batch, ceil(m/b), b, b)``; its ``b`` may differ from ``A``'s.
        S: ``(*batch, m, n)``.
        keep: return also what :func:`precondition_vjp` can reuse, three matrices of ``G``'s size. For calling
            the derivatives by hand: no graph is built, and operands that autograd watches are refused.
        backend: see the module's docstring.

    Returns:
        ``P(G)``, contiguous, of ``G``'s shape and dtype; with ``keep``, ``(P(G), Kept)``.

    Raises:
        TypeError, ValueError: see the module's docstring.
    """
    if torch.compiler.is_compiling():
        return _compiled_precondition(G, A, B, S, keep, backend)
    checks.operands(G, A, B, S)
    Gs, As, Bs, Ss = [G], [A], [B], [S]
    if keep:
        checks.no_graph(_KEEP, G=Gs, A=As, B=Bs, S=Ss)
        checks.plain(Gs=Gs, As=As, Bs=Bs, Ss=Ss)
        Ys, kept = serving(backend, Gs).foreach_precondition_keep(Gs, As, Bs, Ss)
        return Ys[0], kept[0]
    if transformed(Gs, As, Bs, Ss):
        return _definitions(Gs, As, Bs, Ss)[0]
    if checks.watched(Gs, As, Bs, Ss):
        results: list[Tensor] = ops.foreach_precondition_keep(Gs, As, Bs, Ss, backend)
        return results[0]
    # An operator's dispatch would cost as much as a small layer: call its body.
    return serving(backend, Gs).foreach_precondition(Gs, As, Bs, Ss)[0]


@overload
def foreach_precondition(
    Gs: Tensors,
    As: Tensors,
    Bs: Tensors,
    Ss: Tensors,
    *,
    keep: Literal[False] = ...,
    backend: str | None = ...,
) -> list[Tensor]: ...
@overload
def foreach_precondition(
    Gs: Tensors, As: Tensors, Bs: Tensors, Ss: Tensors, *, keep: Literal[True], backend: str | None = ...
) -> tuple[list[Tensor], list[Kept]]: ...
@without_autocast
def foreach_precondition(
    Gs: Tensors, As: Tensors, Bs: Tensors, Ss: Tensors, *, keep: bool = False, backend: str | None = None
) -> list[Tensor] | tuple[list[Tensor], list[Kept]]:
    """:func:`precondition` of a whole model: four lists of equal length, one entry per layer.

    Shapes, forms of blocks and dtypes may differ from layer to layer; the device may not. Returns a list of
    results; with ``keep``, a list of results and a list of :class:`Kept`.
    """
    if torch.compiler.is_compiling():
        return _compiled_foreach_precondition(Gs, As, Bs, Ss, keep, backend)
    checks.foreach_operands(Gs, As, Bs, Ss)
    if keep:
        checks.no_graph(_KEEP, Gs=Gs, As=As, Bs=Bs, Ss=Ss)
        checks.plain(Gs=Gs, As=As, Bs=Bs, Ss=Ss)
        return serving(backend, Gs).foreach_precondition_keep(Gs, As, Bs, Ss)
    if transformed(Gs, As, Bs, Ss):
        return _definitions(Gs, As, Bs, Ss)
    if checks.watched(Gs, As, Bs, Ss):
        results: list[Tensor] = ops.foreach_precondition_keep(Gs, As, Bs, Ss, backend)
        return results[: len(Gs)]
    return serving(backend, Gs).foreach_precondition(Gs, As, Bs, Ss)


@without_autocast
def precondition_vjp(
    G: Tensor,
    A: Tensor,
    B: Tensor,
    S: Tensor,
    V: Tensor,
    *,
    kept: Kept | None = None,
    wanted: str = "ABS",
    relative: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """The derivatives of ``⟨V, P(G)⟩``, by hand: no graph is built. With ``M = BᵀGA`` and ``N = BᵀVA``::

        dS = 2 S ⊙ M ⊙ N
        dB = (V A)(S² ⊙ M)ᵀ + (G A)(S² ⊙ N)ᵀ
        dA = Vᵀ B (S² ⊙ M) + Gᵀ B (S² ⊙ N)
        dG = P(V)

    In APO, ``V`` is the gradient of the proximal objective at the lookahead ``θ − P(G)``, and the meta-gradient
    of the blocks is minus this (Eq. 8 and 9).

    Args:
        G, A, B, S: as for :func:`precondition`.
        V: the cotangent, of ``G``'s shape.
        kept: what ``precondition(..., keep=True)`` returned for the same ``G, A, B, S``; saves its products
            (of a square layer 30% of the FLOPs, of ``relative`` derivatives 25%).
        wanted: which derivatives, in which order; letters of ``"GABS"``. What isn't wanted isn't computed.
        relative: ``AᵀdA`` and ``BᵀdB`` in place of ``dA`` and ``dB``: the derivatives with respect to E at
            ``A (I + E)`` and ``B (I + E)``, for steps that are relative to a block. They are
            ``Nᵀ(S² ⊙ M) + Mᵀ(S² ⊙ N)`` and ``N (S² ⊙ M)ᵀ + M (S² ⊙ N)ᵀ``, so that ``aten`` needs a product less;
            ``triton`` takes one more for each block.
        backend: see the module's docstring.

    Returns:
        One tensor for each letter of ``wanted``, of that operand's shape, in float32 (float64 for float64
        operands): never 16-bit, because ``dS`` of 16-bit gradients is often below their range.

    Raises:
        TypeError, ValueError: see the module's docstring; also where ``wanted`` or ``kept`` isn't as above.
    """
    held = None if kept is None else [kept]
    if torch.compiler.is_compiling():
        return foreach_precondition_vjp(
            [G], [A], [B], [S], [V], kept=held, wanted=wanted, relative=relative, backend=backend
        )[0]
    checks.operands(G, A, B, S, V)
    if kept is not None:
        checks.kept_products(kept, G)
    checks.wanted_letters(wanted)
    return _checked_vjp(([G], [A], [B], [S], [V]), held, wanted, relative, backend)[0]


@without_autocast
def foreach_precondition_vjp(
    Gs: Tensors,
    As: Tensors,
    Bs: Tensors,
    Ss: Tensors,
    Vs: Tensors,
    *,
    kept: Sequence[Kept] | None = None,
    wanted: str = "ABS",
    relative: bool = False,
    backend: str | None = None,
) -> list[tuple[Tensor, ...]]:
    """:func:`precondition_vjp` of a whole model: lists of equal length, one entry per layer; a list of tuples."""
    checks.wanted_letters(wanted)
    if torch.compiler.is_compiling():
        with torch.no_grad():
            flat: list[Tensor] = ops.foreach_precondition_vjp(
                Gs, As, Bs, Ss, Vs, ops.flatten_kept(kept or []), wanted, backend, relative
            )
        step = len(wanted)
        return [tuple(flat[i : i + step]) for i in range(0, len(flat), step)]
    checks.foreach_operands(Gs, As, Bs, Ss, Vs)
    if kept is not None:
        checks.kept_list(kept, Gs)
    return _checked_vjp((Gs, As, Bs, Ss, Vs), kept, wanted, relative, backend)


@without_autocast
def foreach_precondition_step_(
    thetas: Tensors,
    Gs: Tensors,
    As: Tensors,
    Bs: Tensors,
    Ss: Tensors,
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    momentum_buffers: Tensors | None = None,
    weight_decay: float = 0.0,
    backend: str | None = None,
) -> None:
    """The preconditioned step of a whole model, in place::

        v ← momentum · v + P(G)
        θ ← (1 − lr · weight_decay) θ − lr · v

    Args:
        thetas: the weights, each of its ``G``'s shape, any of the dtypes that mix; written.
        Gs, As, Bs, Ss: as for :func:`foreach_precondition`.
        lr: the learning rate, a number >= 0 or a floating-point tensor of no dimensions.
        momentum: ``0 <= momentum < 1``.
        momentum_buffers: the ``v``, each of its ``G``'s shape; needed where ``momentum`` isn't 0, written
            whenever given. At momentum 0 their old content isn't read.
        weight_decay: decoupled (Loshchilov & Hutter, 2019), a number >= 0.
        backend: see the module's docstring.

    Raises:
        TypeError, ValueError: see the module's docstring; also a weight or buffer that requires grad in grad
            mode, overlaps itself, or shares its memory with another argument. Nothing has been written then.
    """
    if torch.compiler.is_compiling():
        checks.no_graph("it is written in place", thetas=thetas, momentum_buffers=momentum_buffers or ())
        rate, rate_tensor = (0.0, lr) if isinstance(lr, Tensor) else (lr, None)
        ops.foreach_precondition_step_(
            thetas, Gs, As, Bs, Ss, momentum_buffers or [], rate, rate_tensor, momentum, weight_decay, backend
        )
        return
    checks.step(thetas, Gs, As, Bs, Ss, momentum_buffers, lr, momentum, weight_decay)
    checks.no_shared_memory(thetas, momentum_buffers, Gs=Gs, As=As, Bs=Bs, Ss=Ss)
    path = serving(backend, Gs)
    with torch.no_grad():
        path.foreach_precondition_step_(thetas, Gs, As, Bs, Ss, momentum_buffers or [], lr, momentum, weight_decay)


class BoundStep:
    """:func:`foreach_precondition_step_` on the same tensors, step after step: checked and planned once.

    A call compares where the tensors lie with where they lay, and checks and plans anew only if one has moved. So a
    tensor whose memory stays must keep its shape, strides and dtype. For the use from Python: ``torch.compile`` is
    served by the function.

    Args:
        thetas, Gs, As, Bs, Ss, momentum_buffers, backend: as for :func:`foreach_precondition_step_`.

    Raises:
        TypeError, ValueError: as :func:`foreach_precondition_step_`, here and at each call.
    """

    def __init__(
        self,
        thetas: Tensors,
        Gs: Tensors,
        As: Tensors,
        Bs: Tensors,
        Ss: Tensors,
        *,
        momentum_buffers: Tensors | None = None,
        backend: str | None = None,
    ) -> None:
        self._operands = thetas, Gs, As, Bs, Ss
        self._buffers, self._backend = momentum_buffers, backend
        self._bind()

    @without_autocast
    def __call__(self, *, lr: float | Tensor, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        """A step, with the scalars of :func:`foreach_precondition_step_`."""
        thetas, Gs, *_ = self._operands
        checks.step_scalars(Gs, self._buffers, lr, momentum, weight_decay)
        if list(map(Tensor.data_ptr, self._tensors)) != self._pointers:
            self._bind()
        checks.in_place(thetas, self._buffers)
        with torch.no_grad():
            self._step(lr, momentum, weight_decay)

    def _bind(self) -> None:
        checks.step_tensors(*self._operands, self._buffers)
        thetas, Gs, As, Bs, Ss = self._operands
        buffers = self._buffers or ()
        checks.no_shared_memory(thetas, self._buffers, Gs=Gs, As=As, Bs=Bs, Ss=Ss)
        checks.not_negated(Gs=Gs, As=As, Bs=Bs, Ss=Ss)
        self._tensors = [x for tensors in (*self._operands, buffers) for x in tensors]
        self._pointers = list(map(Tensor.data_ptr, self._tensors))
        self._step = serving(self._backend, Gs).bind_step(thetas, Gs, As, Bs, Ss, buffers)


def explain(backend: str | None = None, Gs: Tensors = ()) -> str:
    """Which path would serve a call on ``Gs``, and why, in a sentence: ``"aten: it serves …"``."""
    checks.tensor_lists(Gs=Gs)
    for i, G in enumerate(Gs):
        checks.dense(f"Gs[{i}]", G)
    choice = choose(backend, Gs)
    return f"{choice.name}: {choice.reason}"


def _checked_vjp(
    operands: tuple[Tensors, Tensors, Tensors, Tensors, Tensors],
    kept: Sequence[Kept] | None,
    wanted: str,
    relative: bool,
    backend: str | None,
) -> list[tuple[Tensor, ...]]:
    checks.plain(**dict(zip(("Gs", "As", "Bs", "Ss", "Vs"), operands, strict=True)))
    with torch.no_grad():
        grads = serving(backend, operands[0]).foreach_precondition_vjp(*operands, kept, wanted, relative)
    return [tuple(map(each.__getitem__, wanted)) for each in grads]


def _definitions(Gs: Tensors, As: Tensors, Bs: Tensors, Ss: Tensors) -> list[Tensor]:
    """``P(G)`` of each where ``torch.func`` or forward-mode AD looks on, on any backend."""

    def definition(*operands: Tensor) -> tuple[Tensor]:
        return (reference.precondition(*operands),)

    each = zip(Gs, As, Bs, Ss, strict=True)
    wide = [[x.to(accumulation_dtype(x.dtype)) for x in operands] for operands in each]
    return [differentiable(definition, *own)[0].to(G.dtype).contiguous() for own, G in zip(wide, Gs, strict=True)]


def _compiled_precondition(
    G: Tensor, A: Tensor, B: Tensor, S: Tensor, keep: bool, backend: str | None
) -> Tensor | tuple[Tensor, Kept]:
    """As operators, which check their operands themselves."""
    if keep:
        checks.no_graph(_KEEP, G=[G], A=[A], B=[B], S=[S])
    if keep or checks.watched([G], [A], [B], [S]):
        Y, *kept = ops.foreach_precondition_keep([G], [A], [B], [S], backend)
        return (Y, Kept(*kept)) if keep else Y
    result: Tensor = ops.precondition(G, A, B, S, backend)
    return result


def _compiled_foreach_precondition(
    Gs: Tensors, As: Tensors, Bs: Tensors, Ss: Tensors, keep: bool, backend: str | None
) -> list[Tensor] | tuple[list[Tensor], list[Kept]]:
    results: list[Tensor]
    if keep:
        checks.no_graph(_KEEP, Gs=Gs, As=As, Bs=Bs, Ss=Ss)
    if keep or checks.watched(Gs, As, Bs, Ss):
        results = ops.foreach_precondition_keep(Gs, As, Bs, Ss, backend)
        Ys, flat = results[: len(Gs)], results[len(Gs) :]
        return (Ys, [Kept(*flat[i : i + 3]) for i in range(0, len(flat), 3)]) if keep else Ys
    results = ops.foreach_precondition(Gs, As, Bs, Ss, backend)
    return results
