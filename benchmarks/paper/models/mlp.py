"""Fully-connected networks: MLPs, the two-layer linear network, the deep autoencoder."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import nn


def mlp(*widths: int, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """``Linear`` layers of these widths, the input's first, with the activation between them.

    ``mlp(784, 1000, 1000, 10)`` is the MLP of section 6.2: 1,796,010 parameters.
    """
    layers: list[nn.Module] = []
    for n, m in pairwise(widths):
        layers += [nn.Linear(n, m), activation()]
    return nn.Sequential(*layers[:-1])


def linear_network(*widths: int) -> nn.Sequential:
    """``W₂W₁x`` and the like: no activation, no bias."""
    return nn.Sequential(*(nn.Linear(n, m, bias=False) for n, m in pairwise(widths)))


def autoencoder(widths: Sequence[int] = (784, 1000, 500, 250, 30)) -> nn.Sequential:
    """Sigmoid autoencoder with an untied, mirrored decoder, which returns logits.

    The default is the 8-layer one of Hinton & Salakhutdinov (2006) and of Martens & Grosse (2015),
    784-1000-500-250-30 and back: 2,837,314 parameters. As there, the code layer is linear and weights start sparse.
    """
    encoder, decoder = (mlp(*each, activation=nn.Sigmoid) for each in (widths, widths[::-1]))
    return sparse_init_(nn.Sequential(*encoder, *decoder))


def sparse_init_(model: nn.Sequential, connections: int = 15) -> nn.Sequential:
    """Martens' (2010) start: each unit gets ``connections`` weights from N(0, 1), zeros otherwise, biases 0.

    With Xavier's the deep sigmoid network starts on a plateau, which few optimizers leave.
    """
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Linear):
                m, n = layer.weight.shape
                count = min(connections, n)
                chosen = torch.rand(m, n).argsort(1)[:, :count]
                layer.weight.zero_().scatter_(1, chosen, torch.randn(m, count))
                layer.bias.zero_()
    return model
