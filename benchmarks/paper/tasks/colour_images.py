"""Classification of CIFAR-10, CIFAR-100 and SVHN (Tables 2, 3 and 4, Figure 5)."""

from collections.abc import Callable

from torch import nn

from benchmarks.paper.data import Source
from benchmarks.paper.data.cifar import CIFAR10, CIFAR100
from benchmarks.paper.data.images import shifted_and_flipped
from benchmarks.paper.data.svhn import SVHN
from benchmarks.paper.models import alexnet, lenet, resnet18, resnet32, resnet34, small_cnn, vgg16, wide_resnet_28_10
from benchmarks.paper.tasks.losses import CLASSIFICATION
from benchmarks.paper.tasks.task import Task

FIVEFOLD = (60 / 200, 120 / 200, 160 / 200)
"""Section 6.2: 5× decay at epochs 60, 120 and 160 of 200."""

TENFOLD = (150 / 400, 250 / 400)
"""Likewise: 10× decay at epochs 150 and 250 of 400, for ResNet-32."""


def _task(source: Source, model_name: str, network: Callable[..., nn.Module], place: str, classes: int = 10) -> Task:
    data, model = source.name.lower().replace("-", ""), model_name.lower().replace("resnet-", "resnet")
    return Task(
        name=f"{data}-{model}",
        title=f"classification of {source.name}, {model_name}",
        place=place,
        model_name=model_name,
        build=lambda: network(classes),
        source=source,
        loss=CLASSIFICATION,
        batch_size=128,
        epochs=200,
        milestones=TENFOLD if network is resnet32 else FIVEFOLD,
        # The digits of a house number can't be mirrored.
        augment=None if source is SVHN else shifted_and_flipped,
        evaluated=2_000,
        judged_by="metric",
    )


TASKS = (
    _task(CIFAR10, "CNN", small_cnn, ""),
    _task(CIFAR10, "LeNet", lenet, "Tables 2 and 3"),
    _task(CIFAR10, "AlexNet", alexnet, "Table 2"),
    _task(CIFAR10, "VGG16", vgg16, "Table 2"),
    _task(CIFAR10, "ResNet-18", resnet18, "Tables 2 and 3"),
    _task(CIFAR10, "ResNet-32", resnet32, "Tables 2 and 4"),
    _task(CIFAR10, "ResNet-34", resnet34, "Table 4"),
    _task(CIFAR10, "WRN-28-10", wide_resnet_28_10, "Table 4, Figure 5"),
    _task(CIFAR100, "AlexNet", alexnet, "Table 2", classes=100),
    _task(CIFAR100, "VGG16", vgg16, "Table 2", classes=100),
    _task(CIFAR100, "ResNet-18", resnet18, "Tables 2 and 3", classes=100),
    _task(CIFAR100, "ResNet-32", resnet32, "Table 2", classes=100),
    _task(CIFAR100, "WRN-28-10", wide_resnet_28_10, "Table 4", classes=100),
    _task(SVHN, "ResNet-18", resnet18, "Table 2"),
)
