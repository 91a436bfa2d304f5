"""Which layers have Kronecker factors, and the second moments of their inputs and output gradients.

A layer of weight ``(m, n)``, the bias as its last column, sees inputs ``ā (n)``, a one appended for the bias, and
output gradients ``Ds (m)`` at *positions*: the examples of a batch, the places of a convolution, the tokens of a
sequence, the calls of a layer that is called more than once. With ``M`` terms in the mean that is the loss ::

    F_A = mean over positions of ā āᵀ,    F_B = 1/M · sum over positions of Ds Dsᵀ

For a linear layer on vectors this is Martens & Grosse 2015; on sequences, "KFAC-expand" of Eschenhagen et al. 2023.
For a convolution Grosse & Martens 2016 leave the number of positions in ``F_A`` and divide ``F_B`` by it.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common.fisher.damping import wide

MAX_DIM = 8192
CHUNK = 1 << 24  # numbers in the per-example gradients that are held at a time


@dataclass(frozen=True, eq=False)
class FactoredLayer:
    """A weight with its bias, read as a matrix ``(m, n)`` of which the bias is the last column."""

    weight: Tensor
    bias: Tensor | None
    modules: tuple[nn.Module, ...]  # Linear or Conv2d; more than one where the weight is tied

    @property
    def parameters(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def gradient(self) -> Tensor:
        """``G (m, n)``, in at least float32; a bias without a gradient counts as zero."""
        G, bias = wide(_grad(self.weight).flatten(1)), self.bias
        return G if bias is None else torch.cat([G, wide(_grad(bias))[:, None]], 1)

    def parts(self, matrix: Tensor) -> list[Tensor]:
        """The part of a matrix that belongs to each parameter."""
        if self.bias is None:
            return [matrix.reshape(self.weight.shape)]
        return [matrix[:, :-1].reshape(self.weight.shape), matrix[:, -1]]

    def positions(self, inputs: Tensor, Ds: Tensor) -> tuple[Tensor, Tensor]:
        """``ā (N, T, n)`` and ``Ds (N, T, m)`` of one call: N examples (dimension 0) with T positions each."""
        module = self.modules[0]
        if isinstance(module, nn.Conv2d):
            inputs, Ds = (x if x.ndim == 4 else x[None] for x in (inputs, Ds))
            a = _patches(module, inputs).mT
            Ds = Ds.flatten(2).mT
        else:
            a = inputs.reshape(len(inputs) if inputs.ndim > 1 else 1, -1, inputs.shape[-1])
            Ds = Ds.reshape(len(a), -1, Ds.shape[-1])
        if self.bias is not None:
            a = torch.cat([a, a.new_ones(*a.shape[:-1], 1)], -1)
        return a, Ds


def sums_of_squares(a: Tensor, Ds: Tensor) -> tuple[Tensor, Tensor, int]:
    """``Σ ā āᵀ``, ``Σ Ds Dsᵀ``, both over all positions of one call, and how many there are."""
    a, Ds = a.flatten(0, 1), Ds.flatten(0, 1)
    return a.T @ a, Ds.T @ Ds, len(a)


def second_moment_of_gradients(a: Tensor, Ds: Tensor, Q_A: Tensor, Q_B: Tensor) -> Tensor:
    """``Σ_n (Q_Bᵀ g_n Q_A)²``, squares by entry ``(m, n)``, of the examples' gradients ``g_n = Σ_t Ds_nt ā_ntᵀ``."""
    a, Ds = a @ Q_A, Ds @ Q_B
    if a.shape[1] == 1:
        squares: Tensor = Ds[:, 0].square().T @ a[:, 0].square()
        return squares
    total = a.new_zeros(Ds.shape[-1], a.shape[-1])
    step = max(CHUNK // total.numel(), 1)
    for first in range(0, len(a), step):
        total += (Ds[first : first + step].mT @ a[first : first + step]).square().sum(0)
    return total


def factored_layers(model: nn.Module) -> list[FactoredLayer]:
    """The layers whose weights are trained, each with its bias.

    Left out are layers whose weight the model uses in another way than by calling the layer, layers whose bias isn't
    trained, convolutions with groups, and sides longer than :data:`MAX_DIM`.
    """
    users: dict[nn.Parameter, list[tuple[str, nn.Module]]] = {}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if p.requires_grad:
                users.setdefault(p, []).append((name, module))
    uncalled = {m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    layers = []
    for weight, using in users.items():
        modules = tuple(module for _, module in using)
        bias: Any = getattr(modules[0], "bias", None)
        alike = len({(isinstance(m, nn.Conv2d), id(getattr(m, "bias", None))) for m in modules}) == 1
        if (
            all(name == "weight" and isinstance(m, (nn.Linear, nn.Conv2d)) for name, m in using)
            and not any(m in uncalled or getattr(m, "groups", 1) > 1 for m in modules)
            and (bias is None or len(users.get(bias, ())) == len(using))
            and alike
            and max(len(weight), weight[0].numel() + 1) <= MAX_DIM
        ):
            layers.append(FactoredLayer(weight, bias, modules))
    return layers


def _grad(p: Tensor) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad


def _patches(module: nn.Conv2d, x: Tensor) -> Tensor:
    """``(N, in · ∏kernel, T)``: what the kernel sees at each place."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)  # "same" and "circular" are resolved in it
    return F.unfold(x, module.kernel_size, module.dilation, 0, module.stride)
