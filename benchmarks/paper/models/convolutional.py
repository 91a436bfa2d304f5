"""Plain convolutional networks for 32 × 32 images."""

from itertools import pairwise
from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)

VGG_STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


def lenet(classes: int = 10, channels: int = 3) -> nn.Sequential:
    """LeCun et al. 1998, reference [40], with ReLU and max-pooling as is now usual.

    Convolutions 5 × 5 of 6 and 16 channels, layers of 120 and 84.

    62,006 parameters with 10 classes and colour, 61,706 for grey images: the count commonly given for LeNet-5.
    """
    return nn.Sequential(
        *(nn.Conv2d(channels, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, classes)),
    )


def small_cnn(classes: int = 10) -> nn.Sequential:
    """Three convolutions 3 × 3 of 16, 32 and 64 channels, each with batch norm, ReLU and max-pooling; one linear layer.

    33,946 parameters with 10 classes.
    """
    layers: list[nn.Module] = []
    for n, m in pairwise((3, 16, 32, 64)):
        layers += [nn.Conv2d(n, m, 3, padding=1, bias=False), nn.BatchNorm2d(m), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, classes))


def alexnet(classes: int = 10, width: float = 1.0) -> nn.Sequential:
    """The five convolutions of AlexNet, then one linear layer in place of its three.

    Krizhevsky et al. 2012, reference [37].

    2,472,266 parameters with 10 classes: the 2.47M published for AlexNet on CIFAR-10 (bearpaw/pytorch-classification).
    ``width`` scales the channels.
    """
    a, b, c, d, e = (max(int(width * channels), 1) for channels in (64, 192, 384, 256, 256))
    layers = [
        *(nn.Conv2d(3, a, 11, stride=4, padding=5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(a, b, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(b, c, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(c, d, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(d, e, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
    ]
    return he_init_(nn.Sequential(*layers, nn.Flatten(), nn.Linear(e, classes)))


def vgg16(classes: int = 10, width: float = 1.0) -> nn.Sequential:
    """Thirteen convolutions 3 × 3 in five stages, then one linear layer; no batch norm.

    Simonyan & Zisserman 2014, reference [71].

    14,719,818 parameters with 10 classes: the 14.7M published for VGG16's convolutions, 14,714,688, and the 5,130 of
    the last layer. ``width`` scales the channels.
    """
    layers: list[nn.Module] = []
    n = 3
    for channels, depth in VGG_STAGES:
        m = max(int(width * channels), 1)
        for _ in range(depth):
            layers += [nn.Conv2d(n, m, 3, padding=1), nn.ReLU()]
            n = m
        layers.append(nn.MaxPool2d(2))
    return he_init_(nn.Sequential(*layers, nn.Flatten(), nn.Linear(n, classes)))


def he_init_(model: Module) -> Module:
    """He et al.'s (2015) normal weights for convolutions, biases 0: without batch norm a deep network needs it.

    Weights on the meta device, which are there to be counted, are left: drawing them costs seconds of imports.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
