"""Blocks that start from the second moments of a few gradients."""

from __future__ import annotations

import torch
from torch import Tensor

import apo
import apo_kernels as ak
from benchmarks.common.fisher.damping import inverse_root
from benchmarks.paper.training.training import Setting

DAMPING = 1e-4
"""Of the moments, relative to their mean eigenvalue."""


def blocks_from_moments(optimizer: apo.APO, setting: Setting, count: int = 10) -> None:
    """Start P as Shampoo's: ``AAᵀ = R^(−1/4)`` and ``BBᵀ = L^(−1/4)``.

    The moments ``R = Σ GᵀG`` and ``L = Σ GGᵀ`` are of ``count`` batches at the first weights, cut into the blocks'
    squares. S is such that P keeps the gradients' length.
    """
    gradients = [_gradients(optimizer, setting, step) for step in range(count)]
    for place, layer in enumerate(optimizer.layers):
        own = [each[place] for each in gradients]
        for block, moments in ((layer.A, [G.mT @ G for G in own]), (layer.B, [G @ G.mT for G in own])):
            block.copy_(_root(torch.stack(moments).mean(0), block))
    before = after = 0.0
    for own in gradients:
        blocks = zip(*((layer.A, layer.B, layer.S) for layer in optimizer.layers), strict=True)
        before += sum(float(G.square().sum()) for G in own)
        after += sum(float(Y.square().sum()) for Y in ak.foreach_precondition(own, *map(list, blocks)))
    for layer in optimizer.layers:
        layer.S.mul_((before / after) ** 0.25)  # P goes with S²
        layer.refresh()


def _gradients(optimizer: apo.APO, setting: Setting, step: int) -> list[Tensor]:
    optimizer.zero_grad()
    setting.task.loss_of(setting.model, *setting.batches.batch(step)).backward()  # type: ignore[no-untyped-call]
    found = [layer.view.gather(p.grad for p in layer.view.parameters) for layer in optimizer.layers]
    optimizer.zero_grad()
    return found


def _root(moments: Tensor, block: Tensor) -> Tensor:
    """``H^(−1/8)`` of the squares of ``block`` alone; the identity where there is nothing to learn from."""
    squares = ak.blocks_from_dense(moments, block.shape[-1])
    damping = DAMPING * float(moments.diagonal().mean())
    roots = [inverse_root(H, damping, 1 / 8) for H in squares] if damping > 0 else [None] * len(squares)
    one = torch.eye(block.shape[-1], dtype=block.dtype, device=block.device)
    return torch.stack([one if root is None else root for root in roots]).reshape(block.shape)
