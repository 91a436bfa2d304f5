"""Functions in plain torch that can be differentiated in any way and to any order, whatever autocast is active.

Torch's own derivatives of a product are products that autocast lowers where it is active in a backward. And
``torch.func`` and forward-mode AD know no derivatives of our operators: the definitions serve them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from apo_kernels.autocast import without_autocast

__all__ = ["differentiable", "transformed", "transforming"]


def transforming() -> bool:
    """Whether ``torch.func`` or forward-mode AD is at work, on whatever tensors."""
    return bool(torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)


def transformed(*lists: Sequence[Tensor]) -> bool:
    """Whether ``torch.func`` transforms one of these tensors, or one has a tangent of forward-mode AD."""
    return transforming() and any(_is_transformed(x) for tensors in lists for x in tensors)


def _is_transformed(x: Tensor) -> bool:
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return True
    return forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


def differentiable(function: Callable[..., tuple[Tensor, ...]], *operands: Tensor) -> tuple[Tensor, ...]:
    """``function(*operands)``, whose derivatives are such functions too."""
    results: tuple[Tensor, ...] = _Differentiable.apply(function, *operands)  # type: ignore[no-untyped-call]
    return results


class _Differentiable(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    @without_autocast
    def forward(function: Callable[..., tuple[Tensor, ...]], *operands: Tensor) -> tuple[Tensor, ...]:
        return function(*operands)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.function, *operands = inputs
        ctx.save_for_backward(*operands)
        ctx.save_for_forward(*operands)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        function, operands = ctx.function, ctx.saved_tensors
        count = len(operands)

        def vjp(*both: Tensor) -> tuple[Tensor, ...]:
            found: tuple[Tensor, ...] = torch.func.vjp(function, *both[:count])[1](both[count:])
            return found

        return None, *differentiable(vjp, *operands, *cotangents)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        function, operands = ctx.function, ctx.saved_tensors
        count = len(operands)

        def jvp(*both: Tensor) -> tuple[Tensor, ...]:
            # By two reverse passes, the first of which is linear in u: torch doesn't nest its forward mode.
            results, vjp = torch.func.vjp(function, *both[:count])  # type: ignore[misc]
            found: tuple[Tensor, ...] = torch.func.vjp(lambda *u: vjp(u), *results)[1](both[count:])
            return found

        given = (torch.zeros_like(x) if t is None else t for x, t in zip(operands, tangents, strict=True))
        return differentiable(jvp, *operands, *given)
