"""The registered operators ``torch.ops.apo_kernels.*``: schema, implementation, fake, autograd, FLOP count.

They are what ``torch.compile``, ``torch.export`` and other front ends call; :mod:`apo_kernels.functional` is
the interface for people. Backends are chosen when an operator runs, so a compiled graph holds no choice.

Autograd: the gradients are section by section those of :mod:`apo_kernels.reference`; under
``create_graph=True`` they are computed by its differentiable definitions, so derivatives of any order exist.
"""

# Annotations stay real objects here: torch.library reads the schemas from them.
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from apo_kernels import checks, reference
from apo_kernels.aten import Kept, accumulation_dtype, aligned_empty
from apo_kernels.autocast import without_autocast
from apo_kernels.differentiable import differentiable, transformed
from apo_kernels.dispatch import serving
from apo_kernels.flops import precondition_flops, precondition_vjp_flops

__all__ = [
    "foreach_precondition",
    "foreach_precondition_keep",
    "foreach_precondition_step_",
    "foreach_precondition_vjp",
    "precondition",
]


_TAGS = (torch.Tag.cudagraph_unsafe,)
"""What a plan allocates outlives the call, and must not come from the pool of a graph that ``torch.compile`` captures
with ``mode="reduce-overhead"``: such graphs end before these operators and begin again after them."""


@torch.library.custom_op("apo_kernels::precondition", mutates_args=(), tags=_TAGS)
@without_autocast
def precondition(G: Tensor, A: Tensor, B: Tensor, S: Tensor, backend: str | None = None) -> Tensor:
    """``P(G)``. Its backward recomputes the forward's products: the least memory."""
    checks.operands(G, A, B, S)
    return serving(backend, [G]).foreach_precondition([G], [A], [B], [S])[0]


@torch.library.custom_op("apo_kernels::foreach_precondition", mutates_args=(), tags=_TAGS)
@without_autocast
def foreach_precondition(
    Gs: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    Ss: Sequence[Tensor],
    backend: str | None = None,
) -> list[Tensor]:
    """``P(G)`` of each. Its backward recomputes the forward's products: the least memory."""
    checks.foreach_operands(Gs, As, Bs, Ss)
    return serving(backend, Gs).foreach_precondition(Gs, As, Bs, Ss)


@torch.library.custom_op("apo_kernels::foreach_precondition_keep", mutates_args=(), tags=_TAGS)
@without_autocast
def foreach_precondition_keep(
    Gs: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    Ss: Sequence[Tensor],
    backend: str | None = None,
) -> list[Tensor]:
    """``P(G)`` of each, then ``U, M, W`` of each (:class:`apo_kernels.Kept`), which its backward reuses: the
    least time. Differentiable in the former only."""
    checks.foreach_operands(Gs, As, Bs, Ss)
    Ys, kept = serving(backend, Gs).foreach_precondition_keep(Gs, As, Bs, Ss)
    return [*Ys, *flatten_kept(kept)]


@torch.library.custom_op("apo_kernels::foreach_precondition_vjp", mutates_args=(), tags=_TAGS)
@without_autocast
def foreach_precondition_vjp(
    Gs: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    Ss: Sequence[Tensor],
    Vs: Sequence[Tensor],
    kept: Sequence[Tensor],
    wanted: str,
    backend: str | None = None,
    relative: bool = False,
) -> list[Tensor]:
    """The derivatives named by ``wanted`` of each, one operand after the other: ``len(wanted)`` tensors each;
    ``AᵀdA`` and ``BᵀdB`` for ``dA`` and ``dB`` if ``relative``.

    ``kept`` is empty, or ``U, M, W`` of each as :func:`foreach_precondition_keep` returns them.
    """
    checks.wanted_letters(wanted)
    checks.foreach_operands(Gs, As, Bs, Ss, Vs)
    held = unflatten_kept(kept, Gs)
    grads = serving(backend, Gs).foreach_precondition_vjp(Gs, As, Bs, Ss, Vs, held, wanted, relative)
    return [each[letter] for each in grads for letter in wanted]


@torch.library.custom_op(
    "apo_kernels::foreach_precondition_step_", mutates_args=("thetas", "momentum_buffers"), tags=_TAGS
)
@without_autocast
def foreach_precondition_step_(
    thetas: Sequence[Tensor],
    Gs: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    Ss: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    lr: float,
    lr_tensor: Tensor | None,
    momentum: float,
    weight_decay: float,
    backend: str | None = None,
) -> None:
    """``v ← μ v + P(G)``, ``θ ← (1 − lr·λ) θ − lr·v`` in place, for each.

    ``momentum_buffers`` may be empty; ``lr_tensor``, if given, stands in ``lr``'s place.
    """
    rate = lr if lr_tensor is None else lr_tensor
    buffers = momentum_buffers if len(momentum_buffers) else None
    checks.step(thetas, Gs, As, Bs, Ss, buffers, rate, momentum, weight_decay)
    checks.no_shared_memory(thetas, momentum_buffers, Gs=Gs, As=As, Bs=Bs, Ss=Ss)
    serving(backend, Gs).foreach_precondition_step_(
        thetas, Gs, As, Bs, Ss, momentum_buffers, rate, momentum, weight_decay
    )


def flatten_kept(kept: Sequence[Kept]) -> list[Tensor]:
    return [x for each in kept for x in each]


def unflatten_kept(flat: Sequence[Tensor], Gs: Sequence[Tensor]) -> list[Kept] | None:
    if not len(flat):
        return None
    if len(flat) != 3 * len(Gs):
        raise ValueError(f"kept must hold 3 tensors for each of the {len(Gs)} matrices, but holds {len(flat)}")
    kept = [Kept(*flat[i : i + 3]) for i in range(0, len(flat), 3)]
    checks.kept_list(kept, Gs)
    return kept


# Fakes: shapes, dtypes and the same refusals, without data.


@precondition.register_fake
def _(G: Tensor, A: Tensor, B: Tensor, S: Tensor, backend: str | None = None) -> Tensor:
    checks.operands(G, A, B, S)
    return G.new_empty(G.shape)


@foreach_precondition.register_fake
def _(Gs, As, Bs, Ss, backend=None):  # type: ignore[no-untyped-def]
    checks.foreach_operands(Gs, As, Bs, Ss)
    return [G.new_empty(G.shape) for G in Gs]


@foreach_precondition_keep.register_fake
def _(Gs, As, Bs, Ss, backend=None):  # type: ignore[no-untyped-def]
    checks.foreach_operands(Gs, As, Bs, Ss)
    Ys = [G.new_empty(G.shape) for G in Gs]
    kept = [aligned_empty(G.shape, accumulation_dtype(G.dtype), G.device) for G in Gs for _ in range(3)]
    return [*Ys, *kept]


@foreach_precondition_vjp.register_fake
def _(Gs, As, Bs, Ss, Vs, kept, wanted, backend=None, relative=False):  # type: ignore[no-untyped-def]
    checks.wanted_letters(wanted)
    checks.foreach_operands(Gs, As, Bs, Ss, Vs)
    unflatten_kept(kept, Gs)
    each = (dict(zip("GABS", operands, strict=True)) for operands in zip(Gs, As, Bs, Ss, strict=True))
    return [
        operands[letter].new_empty(operands[letter].shape, dtype=accumulation_dtype(operands["G"].dtype))
        for operands in each
        for letter in wanted
    ]


@foreach_precondition_step_.register_fake
def _(thetas, Gs, As, Bs, Ss, momentum_buffers, lr, lr_tensor, momentum, weight_decay, backend=None):  # type: ignore[no-untyped-def]
    rate = lr if lr_tensor is None else lr_tensor
    buffers = momentum_buffers if len(momentum_buffers) else None
    checks.step(thetas, Gs, As, Bs, Ss, buffers, rate, momentum, weight_decay)
    checks.no_shared_memory(thetas, momentum_buffers, fake=True, Gs=Gs, As=As, Bs=Bs, Ss=Ss)


# Autograd.


def _vjp(
    operands: Sequence[Sequence[Tensor]],
    Vs: Sequence[Tensor],
    kept: Sequence[Tensor],
    wanted: str,
    backend: str | None,
) -> list[dict[str, Tensor]]:
    """The derivatives by name. In grad mode (``create_graph=True``), and of what is mapped over or has a tangent, they
    are the definitions'."""
    # `torch.autograd.grad(is_grads_batched=True)` maps in a way of its own.
    mapped = any(map(torch._C._functorch.is_legacy_batchedtensor, Vs)) or transformed(*operands, Vs)
    if not (mapped or torch.is_grad_enabled()):
        flat = foreach_precondition_vjp(*operands, Vs, kept, wanted, backend)
        step = len(wanted)
        return [dict(zip(wanted, flat[i : i + step], strict=True)) for i in range(0, len(flat), step)]
    results = []
    for each in zip(*operands, Vs, strict=True):
        wide = [x.to(accumulation_dtype(x.dtype)) for x in each]
        results.append(dict(zip("GABS", differentiable(reference.precondition_vjp, *wide), strict=True)))
    return results


def _for_inputs(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    """One gradient per input. The dispatcher drops a trailing input that has its default, so ``backend`` may be
    there or not."""
    return (*grads, None)[: len(ctx.needs_input_grad)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    G, A, B, S, ctx.backend = inputs
    ctx.save_for_backward(G, A, B, S)


def _backward(ctx: Any, V: Tensor) -> tuple[Tensor | None, ...]:
    wanted = "".join(name for name, needed in zip("GABS", ctx.needs_input_grad, strict=False) if needed)
    operands = [[x] for x in ctx.saved_tensors]
    grads = _vjp(operands, [V.to(ctx.saved_tensors[0].dtype)], [], wanted, ctx.backend)[0]
    return _for_inputs(ctx, *(grads[name] if name in wanted else None for name in "GABS"))


precondition.register_autograd(_backward, setup_context=_setup_context)


def _foreach_setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    Gs, As, Bs, Ss, ctx.backend = inputs
    ctx.length = len(Gs)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*Gs, *As, *Bs, *Ss)


def _foreach_keep_setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    Gs, As, Bs, Ss, ctx.backend = inputs
    ctx.length = len(Gs)
    kept = output[ctx.length :]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(*Gs, *As, *Bs, *Ss, *kept)


def _foreach_backward(ctx: Any, Vs: Sequence[Tensor | None]) -> tuple[list[Tensor | None] | None, ...]:
    length = ctx.length
    saved = ctx.saved_tensors
    lists = [saved[i * length : (i + 1) * length] for i in range(4)]
    kept = saved[4 * length :]
    needed = ctx.needs_input_grad
    wanted = "".join(
        name
        for name, flags in zip("GABS", needed, strict=False)
        if (any(flags) if isinstance(flags, (list, tuple)) else flags)
    )
    # A result that nothing used has no cotangent, and costs nothing.
    used = [i for i in range(length) if Vs[i] is not None]
    operands = [[tensors[i] for i in used] for tensors in lists]
    cotangents = [V.to(lists[0][i].dtype) for i in used if (V := Vs[i]) is not None]
    held = [x for i in used for x in kept[3 * i : 3 * i + 3]] if kept else []
    found = dict(zip(used, _vjp(operands, cotangents, held, wanted, ctx.backend), strict=True)) if wanted else {}
    return _for_inputs(ctx, *([found.get(i, {}).get(name) for i in range(length)] for name in "GABS"))


foreach_precondition.register_autograd(_foreach_backward, setup_context=_foreach_setup_context)
foreach_precondition_keep.register_autograd(_foreach_backward, setup_context=_foreach_keep_setup_context)


# FLOPs, for torch.utils.flop_counter, which sees an operator as one opaque call.

Shape = Sequence[int]


def _layout(G: Shape, A: Shape, B: Shape) -> tuple[int, int, int | None, int | None, int]:
    batch = 1
    for size in G[:-2]:
        batch *= size
    sides = [X[-1] if len(X) == len(G) + 1 else None for X in (A, B)]
    return G[-2], G[-1], sides[0], sides[1], batch


def _forward_flops(G: Shape, A: Shape, B: Shape) -> int:
    m, n, b_A, b_B, batch = _layout(G, A, B)
    return precondition_flops(m, n, b_A, b_B, batch=batch)


def _register_flops(name: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    return register_flop_formula(getattr(torch.ops.apo_kernels, name))


@_register_flops("precondition")
def _(G: Shape, A: Shape, B: Shape, *_: Any, **__: Any) -> int:
    return _forward_flops(G, A, B)


@_register_flops("foreach_precondition")
@_register_flops("foreach_precondition_keep")
def _(Gs: list[Shape], As: list[Shape], Bs: list[Shape], *_: Any, **__: Any) -> int:
    return sum(map(_forward_flops, Gs, As, Bs))


@_register_flops("foreach_precondition_step_")
def _(thetas: list[Shape], Gs: list[Shape], As: list[Shape], Bs: list[Shape], *_: Any, **__: Any) -> int:
    return sum(map(_forward_flops, Gs, As, Bs))


@_register_flops("foreach_precondition_vjp")
def _(
    Gs: list[Shape],
    As: list[Shape],
    Bs: list[Shape],
    Ss: list[Shape],
    Vs: list[Shape],
    kept: list[Shape],
    wanted: str,
    backend: str | None = None,
    relative: bool = False,
    *_: Any,
    **__: Any,
) -> int:
    total = 0
    for G, A, B in zip(Gs, As, Bs, strict=True):
        m, n, b_A, b_B, batch = _layout(G, A, B)
        total += precondition_vjp_flops(m, n, b_A, b_B, wanted=wanted, kept=bool(kept), relative=relative, batch=batch)
    return total
