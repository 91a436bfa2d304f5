"""Full and block-diagonal blocks: what the shapes of ``A`` and ``B`` mean.

A block on a side of length ``n`` takes one of two forms, told apart by its rank:

* **full**: ``(*batch, n, n)``, of the gradient's rank;
* **block-diagonal**: a stack ``(*batch, ceil(n / b), b, b)``, of one rank more. The stack's square
  matrices lie along the diagonal. Where ``b`` doesn't divide ``n`` the last of them is read only in its
  leading ``(n mod b, n mod b)`` part; the rest of it has no effect and a zero gradient.

``b = 1`` is a diagonal, ``b >= n`` a full block in a stack of one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "block_count",
    "blocks_from_dense",
    "blocks_to_dense",
    "by_square",
    "identity_block",
    "is_stack",
    "relative_derivative",
]


def block_count(size: int, block_size: int) -> int:
    """``ceil(size / block_size)``: how many blocks cover a side of length ``size``."""
    return -(-size // block_size)


def is_stack(block: Tensor, matrix: Tensor) -> bool:
    """Whether ``block`` is block-diagonal (a stack) with respect to ``matrix``."""
    return block.ndim == matrix.ndim + 1


def width(block: Tensor, matrix: Tensor, side: int) -> int:
    """The side of the largest square that is multiplied: ``b`` for a stack, ``side`` for a full block."""
    return min(block.shape[-1], side) if is_stack(block, matrix) else side


def identity_block(
    size: int,
    block_size: int | None = None,
    *,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """``scale · I`` for a side of length ``size``.

    Args:
        size: length of the side, at least 0.
        block_size: ``None`` for a full block ``(size, size)``; otherwise the side ``b >= 1`` of the squares
            of a stack ``(ceil(size / b), b, b)``.
        scale: the value on the diagonal.
        dtype, device: as for :func:`torch.eye`.

    Raises:
        TypeError: ``size`` or ``block_size`` is not an integer, or ``scale`` not a number.
        ValueError: ``size`` is negative, ``block_size`` is below 1, or ``scale`` isn't finite.
    """
    check_size("size", size, least=0)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number, but got {scale!r} of type {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, but is {scale}")
    if block_size is None:
        return torch.eye(size, dtype=dtype, device=device).mul_(scale)
    check_size("block_size", block_size, least=1)
    eye = torch.eye(block_size, dtype=dtype, device=device).mul_(scale)
    return eye.repeat(block_count(size, block_size), 1, 1)


def blocks_to_dense(stack: Tensor, size: int) -> Tensor:
    """The ``(*batch, size, size)`` matrix that a stack ``(*batch, ceil(size / b), b, b)`` stands for.

    Differentiable. Raises ValueError where the stack doesn't cover ``size``.
    """
    check_size("size", size, least=0)
    count, b = _stack_shape("stack", stack)
    if count != (expected := block_count(size, b)):
        raise ValueError(
            f"stack must hold {expected} blocks of side {b} for size {size}, but got shape {tuple(stack.shape)}"
        )
    batch = stack.shape[:-3]
    dense = stack.new_zeros(*batch, count, b, count, b)
    # The block diagonal is the diagonal over the two block indices; torch puts that axis last.
    dense = dense.diagonal_scatter(stack.movedim(-3, -1), dim1=-4, dim2=-2)
    return dense.reshape(*batch, count * b, count * b)[..., :size, :size]


def blocks_from_dense(dense: Tensor, block_size: int) -> Tensor:
    """The stack of squares of side ``block_size`` along the diagonal of ``dense`` ``(*batch, n, n)``.

    What lies outside the squares is dropped; a last square that sticks out is padded with zeros.
    Raises ValueError where ``dense`` isn't square.
    """
    check_size("block_size", block_size, least=1)
    _check_tensor("dense", dense)
    if dense.ndim < 2 or dense.shape[-1] != dense.shape[-2]:
        raise ValueError(f"dense must be square, (*batch, n, n), but got shape {tuple(dense.shape)}")
    size = dense.shape[-1]
    count = block_count(size, block_size)
    pad = count * block_size - size
    padded = torch.nn.functional.pad(dense, (0, pad, 0, pad))
    tiles = padded.reshape(*dense.shape[:-2], count, block_size, count, block_size)
    return tiles.diagonal(dim1=-4, dim2=-2).movedim(-1, -3).contiguous()


def by_square(side: Tensor, block: Tensor) -> Tensor:
    """A number for each entry of a side ``(*batch, n)``, in the shape of ``block[..., 0]``, with zeros for what sticks
    out of the side."""
    if not is_stack(block, side.unsqueeze(-1)):
        return side
    count, width = block.shape[-3:-1]
    if block_count(side.shape[-1], width) != count:
        raise ValueError(
            f"side must be of a length that {count} squares of {width} cover, but its shape is {tuple(side.shape)}"
        )
    padded = torch.nn.functional.pad(side, (0, count * width - side.shape[-1]))
    return padded.reshape(*side.shape[:-1], count, width)


def relative_derivative(block: Tensor, derivative: Tensor, size: int) -> Tensor:
    """``XᵀdX`` of a block ``X`` of a side of this length and its derivative ``dX``, in ``dX``'s dtype.

    It is the derivative with respect to ``E`` at ``X (I + E)``. Of a last square that sticks out, only what has an
    effect is read.
    """
    b = max(block.shape[-1], 1)
    if rest := size % b:  # it may hold anything there: NaN times zero is NaN
        last = torch.nn.functional.pad(block[..., -1:, :rest, :rest], (0, b - rest, 0, b - rest))
        block = torch.cat((block[..., :-1, :, :], last), -3)
    return block.mT.to(derivative.dtype) @ derivative


def check_size(name: str, value: object, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, but got {value!r} of type {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, but got {value}")


def _stack_shape(name: str, stack: Tensor) -> tuple[int, int]:
    _check_tensor(name, stack)
    if stack.ndim < 3 or stack.shape[-1] != stack.shape[-2] or stack.shape[-1] < 1:
        raise ValueError(f"{name} must be a stack of squares, (*batch, k, b, b), but got {tuple(stack.shape)}")
    return stack.shape[-3], stack.shape[-1]


def _check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, but got {x!r} of type {type(x).__name__}")
