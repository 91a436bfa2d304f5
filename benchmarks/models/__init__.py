"""The networks of the paper's experiments. A file an architecture; each names the published count of parameters."""

from benchmarks.models.alexnet import alexnet
from benchmarks.models.lenet import lenet
from benchmarks.models.mlp import autoencoder, linear_network, mlp
from benchmarks.models.resnet import resnet18, resnet32, resnet34
from benchmarks.models.transformer import Transformer
from benchmarks.models.vgg import vgg16
from benchmarks.models.wide_resnet import wide_resnet_28_10

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
