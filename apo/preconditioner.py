"""The structured preconditioner of a model: a block A, B and a scaling S for each matrix (Eq. 9 and 10).

All products go through :mod:`apo_kernels`' foreach operations, a whole model a call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import apo_kernels as ak
from apo.matrix_view import MatrixView, Side
from apo.meta_optimizer import Learned

__all__ = ["Layer", "apply", "apply_and_keep", "block_gradients", "by_square", "root_mean_squares", "sizes"]


@dataclass(eq=False)
class Layer:
    """A matrix of the model's with its preconditioner, which starts as the identity.

    Attributes:
        view: the parameters, and how they are read.
        parts: A, B and S, of which those in :attr:`learned` are learned.
        sides: of A and of B.
        dtype: what the products read A, B and S as.
        group: index of the param group.
        working: A, B and S in the dtype that the products read, where that isn't their own.
        momentum: the momentum buffer, a matrix like S; None where the group has no momentum.
    """

    view: MatrixView
    sides: tuple[Side, Side]
    parts: dict[str, Learned]
    dtype: torch.dtype
    group: int = 0
    working: tuple[Tensor, Tensor, Tensor] | None = None
    momentum: Tensor | None = None

    @classmethod
    def start(
        cls,
        view: MatrixView,
        block_size: int | None,
        max_dim: int | None,
        dtype: torch.dtype | None = None,
        group: int = 0,
    ) -> Layer:
        """The identity, with masters in float32 (float64 for float64 weights) and products that read ``dtype``."""
        master = torch.promote_types(view.weight.dtype, torch.float32)
        device = view.weight.device
        sides = view.sides(block_size, max_dim)

        def block(side: Side) -> Tensor:
            one = ak.identity_block(side.length, side.block_size, dtype=master, device=device)
            return one.expand(*view.batch, *one.shape).contiguous()

        S, count = (
            torch.ones(view.shape, dtype=master, device=device),
            torch.zeros((), dtype=torch.float32, device="cpu"),
        )
        parts = {
            "A": Learned(block(sides[0]), count=count, block=True),
            "B": Learned(block(sides[1]), count=count, block=True),
            "S": Learned(S, count=count),
        }
        layer = cls(view, sides, parts, dtype or master, group)
        layer.refresh()
        return layer

    @property
    def A(self) -> Tensor:
        """The block of the ``n`` side, full or a stack; ones on the diagonal where it has none, never changed."""
        return self.parts["A"].tensor

    @property
    def B(self) -> Tensor:
        """The block of the ``m`` side, likewise."""
        return self.parts["B"].tensor

    @property
    def S(self) -> Tensor:
        """``(*batch, m, n)``."""
        return self.parts["S"].tensor

    @property
    def count(self) -> Tensor:
        """How many meta-updates it had: 0-d float32 on the CPU."""
        return self.parts["S"].count

    @property
    def learned(self) -> str:
        """Which of ``"ABS"`` are learned."""
        return "A" * self.sides[0].learned + "B" * self.sides[1].learned + "S"

    @property
    def phi(self) -> list[Learned]:
        """What is learned, in the order of :attr:`learned`."""
        return [self.parts[name] for name in self.learned]

    def tensors(self) -> list[Tensor]:
        """Those learned, in the order of :attr:`learned`."""
        return [own.tensor for own in self.phi]

    def entrywise_rates(self, meta_lr: float) -> list[float]:
        """The meta-rate of each, for steps that go by the entry: divided by a block's side, because such a step of ε
        can move the spectral norm of a block by ε times its side."""
        widths = {"A": self.sides[0].width, "B": self.sides[1].width, "S": 1}
        return [meta_lr / widths[name] for name in self.learned]

    def refresh(self) -> None:
        """Bring the working copies up to date with what was learned."""
        if self.dtype != self.S.dtype:
            self.working = self.A.to(self.dtype), self.B.to(self.dtype), self.S.to(self.dtype)

    @property
    def outdated(self) -> bool:
        """Whether the weight has another dtype or device than the blocks were made for."""
        weight = self.view.weight
        return self.S.device != weight.device or self.S.dtype != torch.promote_types(weight.dtype, torch.float32)

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.working or (self.A, self.B, self.S)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold: under the weight all of it, under a joined bias the count alone."""
        held = {"step": self.count, **{name: getattr(self, name) for name in self.learned}}
        if self.momentum is not None:
            held["momentum_buffer"] = self.momentum
        for name, own in zip(self.learned, self.phi, strict=True):
            held |= {f"{name}_{buffer}": tensor for buffer, tensor in own.buffers.items()}
        return held

    def load(self, state: dict[str, Any]) -> None:
        """Take up :meth:`state`, in place."""
        if self.momentum is None and "momentum_buffer" in state:
            self.momentum = torch.zeros_like(self.S)
        for name, tensor in self.state().items():
            if name in state:
                tensor.copy_(torch.as_tensor(state[name]))
        self.refresh()

    def misfit(self, state: object) -> str | None:
        """Why a state can't be taken up; None where it can."""
        if not isinstance(state, dict) or not set(self.learned) <= state.keys():
            return f"{self.view.name} needs entries {', '.join(self.learned)}"
        for name, tensor in self.state().items():
            held = state.get(name)
            if isinstance(held, Tensor) and held.shape != tensor.shape:
                return f"{name} of {self.view.name} must be {tuple(tensor.shape)}, but is {tuple(held.shape)}"
        return None


def _operands(layers: Sequence[Layer]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    each = [layer.operands for layer in layers]
    return [A for A, _, _ in each], [B for _, B, _ in each], [S for _, _, S in each]


def apply(layers: Sequence[Layer], gradients: Sequence[Tensor]) -> list[Tensor]:
    """``P(G)`` of each layer."""
    return ak.foreach_precondition(gradients, *_operands(layers))


def apply_and_keep(layers: Sequence[Layer], gradients: Sequence[Tensor]) -> tuple[list[Tensor], list[ak.Kept]]:
    """``P(G)`` of each layer, and what :func:`block_gradients` can reuse of it."""
    return ak.foreach_precondition(gradients, *_operands(layers), keep=True)


def block_gradients(
    layers: Sequence[Layer],
    gradients: Sequence[Tensor],
    V: Sequence[Tensor],
    kept: Sequence[ak.Kept],
    *,
    relative: bool,
) -> dict[Layer, tuple[Tensor, ...]]:
    """The derivatives of ``Σ ⟨V, P(G)⟩``, a tuple a layer in the order of ``layer.learned``; with ``relative``,
    ``AᵀdA`` and ``BᵀdB`` in the blocks' place."""
    found: dict[Layer, tuple[Tensor, ...]] = {}
    for wanted in dict.fromkeys(layer.learned for layer in layers):
        at = [i for i, layer in enumerate(layers) if layer.learned == wanted]
        those = [layers[i] for i in at]
        derivatives = ak.foreach_precondition_vjp(
            [gradients[i] for i in at],
            *_operands(those),
            [V[i] for i in at],
            kept=[kept[i] for i in at],
            wanted=wanted,
            relative=relative,
        )
        found.update(zip(those, derivatives, strict=True))
    return found


def sizes(layers: Sequence[Layer], kept: Sequence[ak.Kept]) -> dict[Layer, tuple[Tensor, ...]]:
    """What :func:`block_gradients` gives, relative, for ``V = G``, a tuple a layer in the order of ``layer.learned``:
    the diagonals for blocks, in the shape of ``A[..., 0]``, and ``S dS`` for S."""
    found: dict[Layer, tuple[Tensor, ...]] = {}
    if not layers:
        return found
    of_all = torch._foreach_mul([layer.S for layer in layers], [own.M for own in kept])
    torch._foreach_mul_(of_all, list(of_all))
    torch._foreach_mul_(of_all, 2)
    for layer, of_S in zip(layers, of_all, strict=True):
        named = {"A": (-2, layer.A), "B": (-1, layer.B)}
        of_blocks = (by_square(of_S.sum(dim), block) for name, (dim, block) in named.items() if name in layer.learned)
        found[layer] = (*of_blocks, of_S)
    return found


def root_mean_squares(layers: Sequence[Layer]) -> list[tuple[float, ...]]:
    """Of each layer's learned blocks, over the identity's, and of its S; one synchronisation."""
    if not layers:
        return []
    norms = iter(torch.stack(torch._foreach_norm([x for layer in layers for x in layer.tensors()])).tolist())
    found = []
    for layer in layers:
        *blocks, S = layer.tensors()
        ones = [*(block.numel() // block.shape[-1] for block in blocks), S.numel()]
        found.append(tuple(next(norms) / math.sqrt(count) for count in ones))
    return found


def by_square(side: Tensor, block: Tensor) -> Tensor:
    """A number for each of a side's entries, in the shape of ``block[..., 0]``, with zeros for what sticks out."""
    if block.ndim == side.ndim + 1:
        return side
    count, width = block.shape[-3:-1]
    return F.pad(side, (0, count * width - side.shape[-1])).reshape(*side.shape[:-1], count, width)
