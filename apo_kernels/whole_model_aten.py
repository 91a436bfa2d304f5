"""The preconditioner of a whole model on torch's own operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from apo_kernels import aten
from apo_kernels.blocks import is_stack
from apo_kernels.slopes import ModelSlopes, Parts

__all__ = ["AtenModel"]


class AtenModel:
    """See :class:`apo_kernels.ModelPreconditioner`."""

    def __init__(
        self,
        As: Sequence[Tensor],
        Bs: Sequence[Tensor],
        Ss: Sequence[Tensor],
        widths: Sequence[tuple[int, ...]],
        learned: Sequence[str],
    ) -> None:
        self.As, self.Bs, self.Ss, self.widths, self.learned = As, Bs, Ss, widths, learned

    def _joined(self, parts: Parts) -> dict[int, Tensor]:
        found = {}
        for i, own in enumerate(parts):
            if own is None or all(x is None for x in own):
                continue
            S = self.Ss[i]
            dtype = aten.accumulation_dtype(S.dtype)
            each = [
                S.new_zeros((*S.shape[:-1], width), dtype=dtype) if x is None else x.to(dtype)
                for x, width in zip(own, self.widths[i], strict=True)
            ]
            found[i] = each[0] if len(each) == 1 else torch.cat(each, -1)
        return found

    def _directions(self, Gs: Parts) -> tuple[dict[int, Tensor], dict[int, Tensor], dict[int, Tensor]]:
        G = self._joined(Gs)
        Y, M = {}, {}
        for i, g in G.items():
            Y[i], kept = aten.precondition_keep(g, self.As[i], self.Bs[i], self.Ss[i])
            M[i] = kept.M
        return G, Y, M

    def step_(
        self,
        thetas: Parts,
        Gs: Parts,
        momentum_buffers: Sequence[Tensor | None],
        lr: Sequence[float],
        momentum: Sequence[float],
        weight_decay: Sequence[float],
        most: float,
        shares: Sequence[float] | None,
        total: Callable[[Tensor], None] | None,
    ) -> Tensor:
        G, Y, _ = self._directions(Gs)
        f = torch.ones((), dtype=torch.float64 if self.Ss and self.Ss[0].dtype == torch.float64 else torch.float32)
        if G:
            f = f.to(self.Ss[0].device)
        if math.isfinite(most) and G:
            assert shares is not None
            promised = torch.stack([shares[i] * (G[i] * Y[i]).sum() for i in G]).sum()
            if total is not None:
                total(promised)
            f = most / promised.clamp_min(most)
        for i, y in Y.items():
            v = y * f * lr[i]
            buffer = momentum_buffers[i]
            if buffer is not None:
                v = buffer.mul_(momentum[i]).add_(v)
            self._write(thetas[i], Gs[i], v, 1 - lr[i] * weight_decay[i])
        return f

    def trial_(
        self,
        thetas: Parts,
        Gs: Parts,
        momentum_buffers: Sequence[Tensor | None],
        lengths: Sequence[float],
        momentum: Sequence[float],
        shrink: Sequence[float],
    ) -> dict[int, Tensor]:
        _, Y, M = self._directions(Gs)
        for i, y in Y.items():
            v = y * lengths[i]
            buffer = momentum_buffers[i]
            if buffer is not None and momentum[i]:
                v.add_(buffer, alpha=momentum[i])
            self._write(thetas[i], Gs[i], v, shrink[i])
        return M

    @staticmethod
    def _write(
        thetas: Sequence[Tensor | None] | None, Gs: Sequence[Tensor | None] | None, v: Tensor, shrink: float
    ) -> None:
        assert thetas is not None
        assert Gs is not None
        first = 0
        widths = [v.shape[-1]] if len(Gs) == 1 else [v.shape[-1] - 1, 1]
        for theta, g, width in zip(thetas, Gs, widths, strict=True):
            if g is not None and theta is not None:
                theta.copy_(theta.to(v.dtype).mul(shrink).sub_(v[..., first : first + width]))
            first += width

    def keep(self, Gs: Parts) -> dict[int, Tensor]:
        return self._directions(Gs)[2]

    def slopes(self, Vs: Parts, kept: dict[int, Tensor], lengths: Sequence[float]) -> ModelSlopes:
        V = self._joined(Vs)
        count = len(self.Ss)
        found: list[list[Tensor | None]] = [[None] * count for _ in range(6)]
        inner = [torch.zeros((), dtype=torch.float64) for _ in range(count)]
        for i, M in kept.items():
            S, A, B, length = self.Ss[i].to(M.dtype), self.As[i], self.Bs[i], lengths[i]
            v = V.get(i)
            v = torch.zeros_like(M) if v is None else v
            d = aten.precondition_vjp(v, A, B, self.Ss[i], v, aten.Kept(M, M, M), self.learned[i], relative=True)
            N = aten.precondition_keep(v, A, B, self.Ss[i])[1].M
            size = (S * M).square().mul_(2 * length)
            inner[i] = (S * S * M * N).sum()
            found[2][i] = (d["S"] * S).mul_(-length)
            found[5][i] = size
            for at, name, dim, block in ((0, "A", -2, A), (1, "B", -1, B)):
                if name in self.learned[i]:
                    found[at][i] = d[name].mul_(-length)
                    found[3 + at][i] = _by_square(size.sum(dim), block)
        return ModelSlopes(*found, torch.stack(inner) if inner else torch.zeros(0))  # type: ignore[call-arg, arg-type]


def _by_square(side: Tensor, block: Tensor) -> Tensor:
    """A number for each of a side's entries, in the shape of ``block[..., 0]``, with zeros for what sticks out."""
    if not is_stack(block, side.unsqueeze(-1)):
        return side
    count, width = block.shape[-3:-1]
    return F.pad(side, (0, count * width - side.shape[-1])).reshape(*side.shape[:-1], count, width)
