"""The networks of the paper's experiments. Each function names the published count of parameters."""

from benchmarks.paper.models.convolutional import alexnet, lenet, vgg16
from benchmarks.paper.models.mlp import autoencoder, linear_network, mlp
from benchmarks.paper.models.residual import resnet18, resnet32, resnet34, wide_resnet_28_10
from benchmarks.paper.models.transformer import Transformer

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
