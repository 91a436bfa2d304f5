"""How many matrix-product FLOPs an operation takes: the written formula, held against a count by the tests.

A product on ``A``'s side costs ``2·m·Σ bⱼ²`` over the squares of ``A`` (``2·m·n²`` for a full block), one on
``B``'s side ``2·n·Σ bᵢ²``. A diagonal (``b = 1``) is a scaling and counts as none.
"""

from __future__ import annotations

from apo_kernels.blocks import check_size
from apo_kernels.checks import wanted_letters

__all__ = ["precondition_flops", "precondition_vjp_flops"]


def precondition_flops(
    m: int, n: int, block_size_A: int | None = None, block_size_B: int | None = None, *, batch: int = 1
) -> int:
    """FLOPs of ``P(G)`` for ``G`` ``(m, n)``: two products on each side.

    ``4mn(m + n)`` for full blocks (``block_size=None``), about ``4mn(b_A + b_B)`` for block-diagonal ones.
    """
    _check(m, n, block_size_A, block_size_B, batch)
    wide, narrow = _sides(m, n, block_size_A, block_size_B)
    return batch * 2 * (wide + narrow)


def precondition_vjp_flops(
    m: int,
    n: int,
    block_size_A: int | None = None,
    block_size_B: int | None = None,
    *,
    wanted: str = "ABS",
    kept: bool = False,
    relative: bool = False,
    batch: int = 1,
) -> int:
    """FLOPs of the derivatives named in ``wanted``, with what the forward ``kept`` or without.

    For all three of ``"ABS"`` and full blocks, ``n >= m``: ``6mn² + 8m²n`` if kept, ``8mn² + 12m²n`` if not. For
    ``relative`` ones, as ``aten`` computes them: ``6mn(m + n)`` and ``8mn(m + n)``.
    """
    _check(m, n, block_size_A, block_size_B, batch)
    wanted_letters(wanted)
    wide, narrow = _sides(m, n, block_size_A, block_size_B)
    if _turned(m, n, block_size_A, block_size_B):
        wanted = wanted.translate(str.maketrans("AB", "BA"))
    total = wide + narrow  # V's products up to N
    need_W = "A" in wanted and not relative
    if not kept:
        total += wide + narrow + narrow * need_W
    if "B" in wanted:
        total += 2 * narrow
    if need_W or "G" in wanted:
        total += narrow
    total += 2 * wide * ("A" in wanted) + wide * ("G" in wanted)
    return batch * total


def _squares(side: int, block_size: int | None) -> int:
    if block_size is None:
        return side**2
    if block_size == 1:
        return 0
    whole, rest = divmod(side, block_size)
    return whole * block_size**2 + rest**2


def _turned(m: int, n: int, block_size_A: int | None, block_size_B: int | None) -> bool:
    """Whether ``B`` is the wider side, which gets the fewer products."""
    width_A = n if block_size_A is None else min(block_size_A, n)
    width_B = m if block_size_B is None else min(block_size_B, m)
    return width_B > width_A


def _check(m: int, n: int, block_size_A: int | None, block_size_B: int | None, batch: int) -> None:
    for name, size in (("m", m), ("n", n), ("batch", batch)):
        check_size(name, size, least=0)
    for name, width in (("block_size_A", block_size_A), ("block_size_B", block_size_B)):
        if width is not None:
            check_size(name, width, least=1)


def _sides(m: int, n: int, block_size_A: int | None, block_size_B: int | None) -> tuple[int, int]:
    """FLOPs of one product on the wider side and of one on the narrower."""
    on_A = 2 * m * _squares(n, block_size_A)
    on_B = 2 * n * _squares(m, block_size_B)
    return (on_B, on_A) if _turned(m, n, block_size_A, block_size_B) else (on_A, on_B)
