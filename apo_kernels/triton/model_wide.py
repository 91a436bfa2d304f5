"""The layers of a whole model with squares wider than a tile: the grouped GEMM's products, torch's for the rest.

Their parts are joined by a copy, and their trials and slopes take operations of torch's by the layer: right, but not in
a constant number of launches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from apo_kernels.aten.operators import sum_of_products
from apo_kernels.blocks import by_square
from apo_kernels.slopes import Parts
from apo_kernels.triton.plan_builder import Operands, Operation
from apo_kernels.triton.table_layout import Role

__all__ = ["WideLayers"]

Tensors = Sequence[Tensor]


class WideLayers:
    """Products of a preconditioner's layers; ``run`` computes operations on the grouped GEMM."""

    def __init__(
        self,
        run: Callable[[Operation, Operands], None],
        As: Tensors,
        Bs: Tensors,
        Ss: Tensors,
        widths: Sequence[tuple[int, ...]],
        learned: Sequence[str],
    ) -> None:
        self.run, self.widths, self.learned = run, widths, learned
        self.As, self.Bs, self.Ss = As, Bs, Ss

    def joined(self, parts: Parts, i: int) -> Tensor:
        """A layer's matrix, with zeros in place of a part that isn't there."""
        own, S = parts[i], self.Ss[i]
        given = [] if own is None else [x for x in own if x is not None]
        dtype = given[0].dtype if given else torch.float32
        for x in given[1:]:
            dtype = torch.promote_types(dtype, x.dtype)
        each = [
            S.new_zeros((*S.shape[:-1], width), dtype=dtype) if x is None else x.to(dtype)
            for x, width in zip(own or [None] * len(self.widths[i]), self.widths[i], strict=True)
        ]
        return each[0] if len(each) == 1 else torch.cat(each, -1)

    def directions(self, layers: Sequence[int], parts: Parts, Ys: Tensors, Ms: Tensors | None) -> None:
        """``P(G)`` into ``Ys``, and if wanted ``BᵀGA`` into ``Ms``, both float32."""
        operands: dict[Role, Tensors] = {
            Role.G: [self.joined(parts, i) for i in layers],
            Role.A: [self.As[i] for i in layers],
            Role.B: [self.Bs[i] for i in layers],
            Role.S: [self.Ss[i] for i in layers],
            Role.OUT: Ys,
        }
        if Ms is not None:
            operands[Role.KEEP_U] = [torch.empty_like(Y) for Y in Ys]
            operands[Role.KEEP_M] = Ms
            operands[Role.KEEP_W] = [torch.empty_like(Y) for Y in Ys]
        self.run(Operation(keep=Ms is not None), operands)

    def trial_(
        self,
        layers: Sequence[int],
        thetas: Parts,
        Gs: Parts,
        Ys: Tensors,
        buffers: Sequence[Tensor | None],
        lengths: Sequence[float],
        momentum: Sequence[float],
        shrink: Sequence[float],
    ) -> None:
        """The weights at a trial, from the directions, which are written over."""
        for i, Y in zip(layers, Ys, strict=True):
            step, buffer = Y.mul_(lengths[i]), buffers[i]
            if buffer is not None and momentum[i]:
                step.add_(buffer, alpha=momentum[i])
            own = thetas[i], Gs[i], torch.split(step, list(self.widths[i]), -1)
            for theta, G, y in zip(*own, strict=True):  # type: ignore[arg-type]
                if theta is not None and G is not None:
                    theta.copy_(theta.float().mul_(shrink[i]).sub_(y))

    def slopes(
        self, layers: Sequence[int], Vs: Parts, Ms: Tensors, lengths: Sequence[float]
    ) -> Iterator[tuple[int, list[Tensor | None], Tensor, Tensor]]:
        """Of each layer: what :class:`apo_kernels.ModelSlopes` has of it, in that order, the inner product and the
        size."""
        Ns = [torch.empty(self.Ss[i].shape, dtype=torch.float32, device=self.Ss[i].device) for i in layers]
        self.directions(layers, Vs, [torch.empty_like(N) for N in Ns], Ns)
        for i, M, N in zip(layers, Ms, Ns, strict=True):
            S, A, B, length = self.Ss[i].float(), self.As[i].float(), self.Bs[i].float(), lengths[i]
            T, TN = (X * S * S for X in (M, N))
            found: list[Tensor | None] = [None] * 6
            size = 2 * length * T * M
            found[2], found[5] = T * N * (-2 * length), size
            if "A" in self.learned[i]:
                found[0] = sum_of_products(N.mT, T, M.mT, TN, like=A).mul_(-length)
                found[3] = by_square(size.sum(-2), A)
            if "B" in self.learned[i]:
                found[1] = sum_of_products(N, T.mT, M, TN.mT, like=B).mul_(-length)
                found[4] = by_square(size.sum(-1), B)
            yield i, found, (T * N).sum(), size.sum() / 2
