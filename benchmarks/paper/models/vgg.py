"""VGG16 without batch norm, for 32 × 32 images (Simonyan & Zisserman 2014, reference [71])."""

from __future__ import annotations

from torch import nn

from benchmarks.paper.models.he_init import he_

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


def vgg16(classes: int = 10, width: float = 1.0) -> nn.Sequential:
    """Thirteen convolutions 3 × 3 in five stages, then one linear layer.

    14,719,818 parameters with 10 classes: the 14.7M published for VGG16's convolutions, 14,714,688, and the 5,130 of
    the last layer. ``width`` scales the channels.
    """
    layers: list[nn.Module] = []
    n = 3
    for channels, depth in STAGES:
        m = max(int(width * channels), 1)
        for _ in range(depth):
            layers += [nn.Conv2d(n, m, 3, padding=1), nn.ReLU()]
            n = m
        layers.append(nn.MaxPool2d(2))
    return he_(nn.Sequential(*layers, nn.Flatten(), nn.Linear(n, classes)))
