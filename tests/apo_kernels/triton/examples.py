"""Models for the tests of the kernels, and how far a result may be from float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apo_kernels import reference

ODD = ((1, 1), (7, 13), (33, 65), (0, 5), (130, 257), (4, 0))
"""Sides below, at and above those of tiles, none a multiple of 8 but 0."""

EVEN = ((64, 64), (128, 72), (8, 136))
"""Sides that the loads can use as they lie."""

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Of the norm: a few roundings of the dtype between products, the inputs taken as they are."""

DTYPES = tuple(TOLERANCE)

FORMS = ((None, None), (64, 64), (16, 16), (1, 1), (30, 8), (None, 64), (1, None), (100, 33))
"""Sides of the squares of ``A`` and of ``B``: full, of a tile, several a tile, diagonal, odd, and mixed."""

FORMS_BY_DTYPE = [
    (dtype, *form) for dtype in DTYPES for form in FORMS if dtype != torch.bfloat16 or form in (FORMS[0], FORMS[4])
]
"""In the interpreter bfloat16 takes float32's way, but for a rounding."""


@dataclass
class Model:
    """Operands of a call, four lists and a fifth of cotangents."""

    Gs: list[Tensor]
    As: list[Tensor]
    Bs: list[Tensor]
    Ss: list[Tensor]
    Vs: list[Tensor]

    @property
    def operands(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        return self.Gs, self.As, self.Bs, self.Ss

    def expected(self) -> list[Tensor]:
        """``P(G)`` in float64 of the operands as they are."""
        return [reference.precondition(*(x.double() for x in each)) for each in zip(*self.operands, strict=True)]

    def expected_vjp(self, *, relative: bool = False) -> list[dict[str, Tensor]]:
        """All derivatives, by letter, in float64."""
        wide = ([x.double() for x in each] for each in zip(*self.operands, self.Vs, strict=True))
        return [dict(zip("GABS", reference.precondition_vjp(*each, relative=relative), strict=True)) for each in wide]


def block(side: int, b: int | None, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    if b is None:
        return (torch.randn(side, side, device=device) * max(side, 1) ** -0.5).to(dtype)
    return (torch.randn(-(-side // b), b, b, device=device) * b**-0.5).to(dtype)


def model(
    shapes: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    *,
    A: int | None = None,
    B: int | None = None,
    block_dtype: torch.dtype | None = None,
    scale: float = 1e-2,
    spread: float = 1.0,
    device: str = "cpu",
) -> Model:
    """Layers of ``shapes``; ``A`` and ``B`` say the sides of their squares (None: full).

    Args:
        block_dtype: of ``A``, ``B`` and ``S``; None for ``dtype``.
        scale: of ``G`` and ``V``.
        spread: entries of ``S`` are ``spread`` to a power drawn from a normal distribution, with signs.
    """
    blocks = block_dtype or dtype

    def matrix(m: int, n: int) -> Tensor:
        return (torch.randn(m, n, device=device) * scale).to(dtype)

    def scaling(m: int, n: int) -> Tensor:
        return (torch.randn(m, n, device=device).sign() * spread ** torch.randn(m, n, device=device)).to(blocks)

    return Model(
        Gs=[matrix(m, n) for m, n in shapes],
        As=[block(n, A, blocks, device) for _, n in shapes],
        Bs=[block(m, B, blocks, device) for m, _ in shapes],
        Ss=[scaling(m, n) for m, n in shapes],
        Vs=[matrix(m, n) for m, n in shapes],
    )


def assert_close(
    found: Tensor, expected: Tensor, dtype: torch.dtype, what: str = "", terms: Sequence[Tensor] = ()
) -> None:
    """Within :data:`TOLERANCE` in norm, plus half of the least step of the dtype of ``found`` in each entry.

    The norm is that of ``expected`` and of the ``terms`` that it is a sum of, which may cancel.
    """
    assert found.shape == expected.shape, what
    if not expected.numel():
        return
    assert found.isfinite().all(), f"{what}: not finite"
    error = (found.double() - expected).norm().item()
    step = torch.finfo(found.dtype).smallest_normal * torch.finfo(found.dtype).eps / 2
    size = sum(x.norm().item() for x in (expected, *terms))
    allowed = TOLERANCE[dtype] * size + step * expected.numel() ** 0.5
    assert error <= allowed, f"{what}: error {error:.2e}, allowed {allowed:.2e}"
