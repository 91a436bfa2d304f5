"""WideResNet 28-10 for 32 × 32 images (Zagoruyko & Komodakis 2016, reference [86])."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.paper.models.he_init import he_
from benchmarks.paper.models.residual_stages import stages


class Block(nn.Module):
    """Norm, ReLU, convolution, twice; a projection where the shape changes takes what the first norm returned."""

    def __init__(self, n: int, m: int, stride: int) -> None:
        super().__init__()
        self.first_norm = nn.BatchNorm2d(n)
        self.first = nn.Conv2d(n, m, 3, stride, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(m)
        self.second = nn.Conv2d(m, m, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(n, m, 1, stride, bias=False) if n != m else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first_norm(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        out: Tensor = self.second(F.relu(self.second_norm(self.first(y)))) + shortcut
        return out


class WideResNet(nn.Module):
    """``depth = 6k + 4`` layers in three stages of ``16, 32, 64`` channels, ``factor`` times as wide."""

    def __init__(self, depth: int, factor: float, classes: int) -> None:
        super().__init__()
        if (depth - 4) % 6:
            raise ValueError(f"depth must be 6k + 4, but got {depth}")
        self.first = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        widths = [max(int(factor * channels), 1) for channels in (16, 32, 64)]
        self.blocks = stages(16, [(depth - 4) // 6] * 3, widths, Block)
        self.norm = nn.BatchNorm2d(widths[-1])
        self.last = nn.Linear(widths[-1], classes)
        he_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.blocks(self.first(x))))
        outputs: Tensor = self.last(torch.mean(x, (2, 3)))
        return outputs


def wide_resnet_28_10(classes: int = 10, width: float = 1.0) -> WideResNet:
    """36,479,194 parameters with 10 classes: the 36.5M of the paper on it. ``width`` scales its factor of 10."""
    return WideResNet(28, 10 * width, classes)
