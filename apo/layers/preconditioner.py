"""The structured preconditioner of a layer: blocks A and B and a scaling S (Eq. 9 and 10)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import apo_kernels as ak
from apo.layers.matrix_view import MatrixView, Side
from apo.phi.meta_optimizer import Learned
from apo.phi.shared_storage import matrices_of_one

__all__ = ["PreconditionedLayer", "start_momentum"]


@dataclass(eq=False)
class PreconditionedLayer:
    """A matrix of the model's with its preconditioner, which starts as the identity.

    Attributes:
        view: the parameters, and how they are read.
        parts: A, B and S, of which those in :attr:`learned` are learned.
        sides: of A and of B.
        whole_sides: the same of the whole matrix, where this rank holds a part of it.
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
    whole_sides: tuple[Side, Side] = field(kw_only=True)
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
    ) -> PreconditionedLayer:
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
        of_A, of_B = (view.column_over, view.row_over) if view.owner is None else (view.over, view.over)
        parts = {
            "A": Learned(block(sides[0]), count=count, block=True, over=of_A, alike=view.row_over),
            "B": Learned(block(sides[1]), count=count, block=True, over=of_B, alike=view.column_over),
            "S": Learned(S, count=count, over=view.over, entries=view.entries),
        }
        whole_sides = (view.whole or view).sides(block_size, max_dim)
        layer = cls(view, sides, parts, dtype or master, group, whole_sides=whole_sides)
        if layer.dtype != master:
            layer.working = layer.A.to(dtype), layer.B.to(dtype), layer.S.to(dtype)
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

    def copies(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The working copies, each with what it is a copy of."""
        return zip(self.working or (), (self.A, self.B, self.S), strict=False)

    @property
    def outdated(self) -> bool:
        """Whether the weight has another dtype or device than the blocks were made for."""
        weight = self.view.weight
        return self.S.device != weight.device or self.S.dtype != torch.promote_types(weight.dtype, torch.float32)

    def momentum_parts(self) -> tuple[Tensor, ...]:
        """The momentum buffer as matrices side by side, like :meth:`~apo.layers.matrix_view.MatrixView.matrices`."""
        assert self.momentum is not None
        widths = self.view.widths
        return (self.momentum,) if len(widths) == 1 else torch.split(self.momentum, list(widths), -1)

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.working or (self.A, self.B, self.S)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold: under the weight all of it, under a joined bias the count alone."""
        held = {"step": self.count, **{name: getattr(self, name) for name in self.learned}}
        if self.momentum is not None:
            held["momentum_buffer"] = self.momentum
        for name, side in zip("AB", self.sides, strict=True):
            if side.learned:
                held |= {f"{name}_place": side.places(self.S.device), f"{name}_ones": self.parts[name].ones}
        for name, own in zip(self.learned, self.phi, strict=True):
            held |= {f"{name}_{buffer}": tensor for buffer, tensor in own.buffers.items()}
        return held

    def load(self, state: dict[str, Any]) -> None:
        """Take up :meth:`state`, in place."""
        if self.momentum is None and "momentum_buffer" in state:
            self.momentum = torch.zeros_like(self.S)
        for name, tensor in self.state().items():
            if name in state and tensor.shape == state[name].shape:
                tensor.copy_(torch.as_tensor(state[name]))
        for copy, own in self.copies():
            copy.copy_(own)


def start_momentum(layers: Iterable[PreconditionedLayer]) -> None:
    """Momentum of 0, in storage that like layers share."""
    alike = defaultdict[Any, list[PreconditionedLayer]](list)
    for layer in layers:
        alike[layer.S.dtype, layer.S.device].append(layer)
    for kind, those in alike.items():
        _, views = matrices_of_one([layer.S.shape for layer in those], *kind)
        for layer, view in zip(those, views, strict=True):
            layer.momentum = view
