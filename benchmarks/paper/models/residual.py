"""Residual networks for 32 × 32 images: ResNets (He et al. 2016, reference [29]) and WideResNet 28-10."""

from collections.abc import Callable, Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.paper.models.convolutional import he_init_


class ResidualBlock(nn.Module):
    """Two convolutions 3 × 3 and a shortcut: a projection 1 × 1, or, without, zeros for new channels (option A)."""

    def __init__(self, n: int, m: int, stride: int, *, projection: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(n, m, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(m)
        self.second = nn.Conv2d(m, m, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(m)
        self.stride, self.padding = stride, m - n
        self.shortcut: nn.Module | None = None
        if projection and (stride != 1 or n != m):
            self.shortcut = nn.Sequential(nn.Conv2d(n, m, 1, stride, bias=False), nn.BatchNorm2d(m))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first_norm(self.first(x)))
        y = self.second_norm(self.second(y))
        if self.shortcut is not None:
            x = self.shortcut(x)
        elif self.stride != 1 or self.padding:
            front = self.padding // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, front, self.padding - front))
        return F.relu(y + x)


class PreActivationBlock(nn.Module):
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


def resnet18(classes: int = 10, width: float = 1.0) -> nn.Sequential:
    """11,173,962 parameters with 10 classes, as published for the CIFAR form (kuangliu/pytorch-cifar)."""
    return _resnet((2, 2, 2, 2), _scaled((64, 128, 256, 512), width), classes, projection=True)


def resnet34(classes: int = 10, width: float = 1.0) -> nn.Sequential:
    """21,282,122 parameters with 10 classes: 21.28M (kuangliu/pytorch-cifar)."""
    return _resnet((3, 4, 6, 3), _scaled((64, 128, 256, 512), width), classes, projection=True)


def resnet32(classes: int = 10, width: float = 1.0) -> nn.Sequential:
    """464,154 parameters with 10 classes: the 0.46M of He et al., Table 6."""
    return _resnet((5, 5, 5), _scaled((16, 32, 64), width), classes, projection=False)


def wide_resnet_28_10(classes: int = 10, width: float = 1.0) -> nn.Sequential:
    """Zagoruyko & Komodakis 2016, reference [86]: ``28 = 6·4 + 4`` layers, three stages of 4 blocks, 10 times as wide.

    36,479,194 parameters with 10 classes: the 36.5M of the paper on it. ``width`` scales the factor of 10.
    """
    widths = _scaled((16, 32, 64), 10 * width)
    norm = nn.BatchNorm2d(widths[-1]), nn.ReLU()
    return _network(16, [_stages(16, (4, 4, 4), widths, PreActivationBlock), *norm], widths[-1], classes)


def _resnet(depths: Sequence[int], widths: Sequence[int], classes: int, *, projection: bool) -> nn.Sequential:
    """``depths`` and ``widths`` are the blocks and channels per stage."""
    n, block = widths[0], partial(ResidualBlock, projection=projection)
    return _network(n, [nn.BatchNorm2d(n), nn.ReLU(), _stages(n, depths, widths, block)], widths[-1], classes)


def _network(n: int, body: Sequence[nn.Module], m: int, classes: int) -> nn.Sequential:
    """A convolution to ``n`` channels, the body, which ends with ``m``, the mean over the image, a linear layer."""
    first, mean = nn.Conv2d(3, n, 3, padding=1, bias=False), nn.AdaptiveAvgPool2d(1)
    return he_init_(nn.Sequential(first, *body, mean, nn.Flatten(), nn.Linear(m, classes)))


def _stages(
    n: int, depths: Sequence[int], widths: Sequence[int], block: Callable[[int, int, int], nn.Module]
) -> nn.Sequential:
    """Blocks by ``block(channels in, channels out, stride)``. All stages but the first halve the image's sides."""
    blocks: list[nn.Module] = []
    for stage, (depth, m) in enumerate(zip(depths, widths, strict=True)):
        for place in range(depth):
            blocks.append(block(n, m, 2 if stage and not place else 1))
            n = m
    return nn.Sequential(*blocks)


def _scaled(widths: Sequence[int], width: float) -> list[int]:
    return [max(int(width * channels), 1) for channels in widths]
