"""The body of a residual network: stages of blocks, the first block of each but the first stage halving the sides."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn


def stages(
    n: int, depths: Sequence[int], widths: Sequence[int], block: Callable[[int, int, int], nn.Module]
) -> nn.Sequential:
    """``block(channels in, channels out, stride)`` so many times a stage, from ``n`` channels to ``widths[-1]``."""
    blocks: list[nn.Module] = []
    for stage, (depth, m) in enumerate(zip(depths, widths, strict=True)):
        for place in range(depth):
            blocks.append(block(n, m, 2 if stage and not place else 1))
            n = m
    return nn.Sequential(*blocks)
