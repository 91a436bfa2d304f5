"""Dense float64 Fisher matrices, and targets drawn by list, for the tests of the baselines.

A gradient ``(m, n)``, the bias as its last column, is read row by row, so that ``F_B ⊗ F_A`` is ``kron(F_B, F_A)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.paper.baselines import Categorical, Gaussian


class Listed(Categorical):
    """Classes in the order of a list, which is repeated over the examples, in place of draws."""

    def __init__(self, classes: list[int]) -> None:
        self.classes = classes

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        y = torch.tensor(self.classes * (len(outputs) // len(self.classes)))
        return outputs.detach().softmax(-1) - nn.functional.one_hot(y, outputs.shape[-1])


class ListedGaussian(Gaussian):
    """For d outputs: the examples in turn get ``√d eⱼ``, whose second moment over d draws is the identity."""

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        d = outputs.shape[-1]
        return torch.eye(d, dtype=outputs.dtype).repeat(len(outputs) // d, 1) * d**0.5


class Fixed(Categorical):
    """Given output gradients in place of drawn ones."""

    def __init__(self, cotangent: Tensor) -> None:
        self.cotangent = cotangent

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        return self.cotangent


def closure_of(opt: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        opt.zero_grad()
        value = loss()
        value.backward()
        return value

    return closure


def joined(weight: Tensor, bias: Tensor | None) -> Tensor:
    """``(m, n)``, the bias as the last column."""
    return weight.flatten(1) if bias is None else torch.cat([weight.flatten(1), bias[:, None]], 1)


def gradient_of(layer: Any, value: Tensor) -> Tensor:
    """The gradient of a scalar by a layer's weight and bias, joined, by autograd alone."""
    own = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
    found = torch.autograd.grad(value, own, retain_graph=True)
    return joined(found[0], found[1] if len(found) > 1 else None)


def example_gradients(model: nn.Module, layer: nn.Module, x: Tensor, cotangents: Tensor) -> Tensor:
    """``(N, m, n)``: for each example by itself, the gradient of ``⟨cotangent, f(x)⟩``."""
    return torch.stack([gradient_of(layer, (model(x[i : i + 1])[0] * cotangents[i]).sum()) for i in range(len(x))])


def softmax_fisher(model: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    """``E_x E_{y ~ p(·|x)} [g gᵀ]`` of one layer, all classes enumerated."""
    F = 0
    for i in range(len(x)):
        log_p = model(x[i : i + 1])[0].log_softmax(-1)
        for c in range(len(log_p)):
            g = gradient_of(layer, -log_p[c]).flatten()
            F = F + log_p[c].exp().detach() * torch.outer(g, g) / len(x)
    return F


def step_of(opt: torch.optim.Optimizer, layer: Any, loss: Callable[[], Tensor]) -> Tensor:
    """What one step subtracts from a layer's weight and bias, joined; the weights are put back."""
    own = [p for p in (layer.weight, layer.bias) if p is not None]
    before = [p.detach().clone() for p in own]
    opt.step(closure_of(opt, loss))
    moved = [b - p.detach() for b, p in zip(before, own, strict=True)]
    with torch.no_grad():
        for p, b in zip(own, before, strict=True):
            p.copy_(b)
    return joined(moved[0], moved[1] if len(moved) > 1 else None)


def relative(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def steps(opt: torch.optim.Optimizer, losses: Iterable[Callable[[], Tensor]]) -> list[float]:
    return [float(opt.step(closure_of(opt, loss))) for loss in losses]
