"""The networks of the paper's experiments, each with its published count of parameters, and three small ones."""

from benchmarks.paper.models.convolutional import alexnet, lenet, small_cnn, vgg16
from benchmarks.paper.models.gpt import GPT
from benchmarks.paper.models.mlp import autoencoder, linear_network, mlp
from benchmarks.paper.models.poisson import Poisson
from benchmarks.paper.models.residual import resnet18, resnet32, resnet34, wide_resnet_28_10
from benchmarks.paper.models.transformer import Transformer

__all__ = [
    "GPT",
    "Poisson",
    "Transformer",
    "alexnet",
    "autoencoder",
    "lenet",
    "linear_network",
    "mlp",
    "resnet18",
    "resnet32",
    "resnet34",
    "small_cnn",
    "vgg16",
    "wide_resnet_28_10",
]
