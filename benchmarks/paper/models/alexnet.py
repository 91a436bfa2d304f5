"""AlexNet for 32 × 32 images (Krizhevsky et al. 2012, reference [37])."""

from __future__ import annotations

from torch import nn

from benchmarks.paper.models.he_init import he_


def alexnet(classes: int = 10, width: float = 1.0) -> nn.Sequential:
    """The five convolutions of AlexNet, then one linear layer in place of its three.

    2,472,266 parameters with 10 classes: the 2.47M published for AlexNet on CIFAR-10 (bearpaw/pytorch-classification).
    ``width`` scales the channels.
    """
    a, b, c, d, e = (max(int(width * channels), 1) for channels in (64, 192, 384, 256, 256))
    return he_(
        nn.Sequential(
            nn.Conv2d(3, a, 11, stride=4, padding=5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(a, b, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(b, c, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(c, d, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(d, e, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(e, classes),
        )
    )
