"""LeNet for 32 × 32 images (LeCun et al. 1998, reference [40]), with ReLU and max-pooling as is now usual."""

from __future__ import annotations

from torch import nn


def lenet(classes: int = 10, channels: int = 3) -> nn.Sequential:
    """Convolutions 5 × 5 of 6 and 16 channels, layers of 120 and 84.

    62,006 parameters with 10 classes and colour, 61,706 for grey images: the count commonly given for LeNet-5.
    """
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, classes),
    )
