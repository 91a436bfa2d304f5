"""The networks of the paper's experiments. A file an architecture; each names the published count of parameters."""

from benchmarks.paper.models.alexnet import alexnet
from benchmarks.paper.models.lenet import lenet
from benchmarks.paper.models.mlp import autoencoder, linear_network, mlp
from benchmarks.paper.models.resnet import resnet18, resnet32, resnet34
from benchmarks.paper.models.transformer import Transformer
from benchmarks.paper.models.vgg import vgg16
from benchmarks.paper.models.wide_resnet import wide_resnet_28_10

__all__ = [
    "Transformer",
    "alexnet",
    "autoencoder",
    "lenet",
    "linear_network",
    "mlp",
    "resnet18",
    "resnet32",
    "resnet34",
    "vgg16",
    "wide_resnet_28_10",
]
