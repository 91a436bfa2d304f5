"""A physics-informed network (Raissi et al. 2019) for Poisson's equation in one dimension."""

from math import pi

import torch
from torch import Tensor, nn

from benchmarks.paper.models.mlp import mlp

BOUNDARY = 10.0
"""The weight of what is asked for at the ends."""


def solution(x: Tensor) -> Tensor:
    return (pi * x).sin() + (4 * pi * x).sin() / 4


def source(x: Tensor) -> Tensor:
    """What the solution's second derivative is."""
    return -(pi**2) * ((pi * x).sin() + 4 * (4 * pi * x).sin())


class Poisson(nn.Module):
    """Points ``(N, 1)`` to residuals ``(N + 2, 1)`` of u″ = :func:`source` there, then of u(0) = u(1) = 0, times 10."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.u = mlp(1, width, width, 1, activation=nn.Tanh)

    def forward(self, points: Tensor) -> Tensor:
        with torch.enable_grad():  # for the derivatives in x, in an evaluation too
            x = points.detach().requires_grad_()
            (first,) = torch.autograd.grad(self.u(x).sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
        ends = self.u(torch.tensor([[0.0], [1.0]], dtype=x.dtype, device=x.device))
        return torch.cat([second - source(x.detach()), BOUNDARY * ends])
