"""Which layers have Kronecker factors, and the second moments of their inputs and output gradients.

A layer of weight ``(m, n)``, the bias as its last column, sees inputs ``ā (n)``, a one appended for the bias, and
output gradients ``Ds (m)`` at *positions*: the examples of a batch, the places of a convolution, the tokens of a
sequence, the calls of a layer that is called more than once. With ``M`` terms in the mean that is the loss ::

    F_A = mean over positions of ā āᵀ,    F_B = 1/M · sum over positions of Ds Dsᵀ

For a linear layer on vectors this is Martens & Grosse 2015; on sequences, "KFAC-expand" of Eschenhagen et al. 2023.
For a convolution it is Grosse & Martens 2016 but for the number of positions, which they divide ``F_B`` by and leave
in ``F_A``: the product, and what factored damping makes of it, is the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apo.matrix_view import MatrixView

KINDS = (nn.Linear, nn.Conv2d)
MAX_DIM = 8192
CHUNK = 1 << 24  # numbers in the per-example gradients that are held at a time


@dataclass(frozen=True, eq=False)
class FactoredLayer:
    """A weight with its bias, and the modules that use it.

    Attributes:
        view: how they are read as one matrix.
        modules: Linear or Conv2d; more than one where the weight is tied.
        group: index of the param group.
    """

    view: MatrixView
    modules: tuple[nn.Module, ...]
    group: int

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
        if self.view.bias is not None:
            a = torch.cat([a, a.new_ones(*a.shape[:-1], 1)], -1)
        return a, Ds


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


def sort_out(
    model: nn.Module, views: Iterable[MatrixView], group: int
) -> Iterator[tuple[MatrixView, FactoredLayer | str]]:
    """Each view with its layer, or with the reason why it has none."""
    users: dict[int, list[tuple[str, nn.Module]]] = {}
    for _, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is not None:
                users.setdefault(id(p), []).append((name, module))
    uncalled = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    for view in views:
        using = users[id(view.weight)]
        reason = _reason(view, using, uncalled)
        yield view, reason or FactoredLayer(view, tuple(module for _, module in using), group)


def _reason(view: MatrixView, using: list[tuple[str, nn.Module]], uncalled: set[int]) -> str:
    """Why a matrix gets the plain gradient; empty where it needn't."""
    kinds = {type(module) if not isinstance(module, nn.Linear) else nn.Linear for _, module in using}
    for name, module in using:
        if not isinstance(module, KINDS) or name != "weight":
            return f"{type(module).__name__}.{name} has no factors here"
        if id(module) in uncalled:
            return "the attention uses its weight without calling the layer"
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            return "a convolution with groups"
        if (module.bias is None) != (view.bias is None):
            return "its bias is frozen, tied otherwise or in another param group"
    if len(kinds) > 1:
        return "a weight tied between layers of different kinds"
    if max(view.shape) > MAX_DIM:
        return f"a side longer than {MAX_DIM}"
    return ""


def _patches(module: nn.Conv2d, x: Tensor) -> Tensor:
    """``(N, in · ∏kernel, T)``: what the kernel sees at each place."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)  # "same" and "circular" are resolved in it
    return F.unfold(x, module.kernel_size, module.dilation, 0, module.stride)
