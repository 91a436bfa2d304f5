"""Layers to test on: operands of every form, and the float64 truth about them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from apo_kernels import reference
from apo_kernels.blocks import block_count

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Relative error of a result that is rounded once from float32 sums, with room for the sums' own.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 6e-3, torch.float16: 8e-4}


@dataclass
class Layer:
    G: Tensor
    A: Tensor
    B: Tensor
    S: Tensor
    V: Tensor

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.G, self.A, self.B, self.S

    @property
    def exact(self) -> Layer:
        """The same operands in float64."""
        return Layer(*(x.double() for x in (self.G, self.A, self.B, self.S, self.V)))

    def forward(self) -> Tensor:
        """The truth: float64 from the definition."""
        return reference.precondition(*self.exact.operands)

    def derivatives(self, *, relative: bool = False) -> dict[str, Tensor]:
        exact = self.exact
        found = reference.precondition_vjp(*exact.operands, exact.V, relative=relative)
        return dict(zip("GABS", found, strict=True))


def make(
    m: int,
    n: int,
    b_A: int | None = None,
    b_B: int | None = None,
    *,
    batch: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Layer:
    """A layer with full blocks, or block-diagonal ones of side ``b_A``, ``b_B``."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*batch, *shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    def block(side: int, b: int | None) -> Tensor:
        shape = (side, side) if b is None else (block_count(side, b), b, b)
        return random(*shape, scale=max(shape[-1], 1) ** -0.5)

    return Layer(random(m, n), block(n, b_A), block(m, b_B), random(m, n), random(m, n))


def relative_error(found: Tensor, truth: Tensor) -> float:
    """In the Frobenius norm; 0 for what is empty."""
    scale = truth.double().norm().item()
    error = (found.double() - truth.double()).norm().item()
    return error if scale == 0 else error / scale
