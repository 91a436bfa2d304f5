"""Steps relative to what they change, of many tensors at once: how a preconditioner's blocks and scalings are learned.

A block A steps in its own coordinates, at ``A (I + E)``. Its slope there is ``AᵀdA``; its size is the magnitude of the
slope if V equalled G (:class:`apo_kernels.ModelSlopes`). Both are averaged over steps. ``R`` is their ratio, clipped to
a greatest norm in each square::

    R_ij = c · sym(slope)_ij / √(size_i size_j),   A ← A (I − rate · R)
    r = c · slope / size, kept to ±1,              S ← S exp(−rate · r)

with sizes that are bounded from below by a share of their mean, and ``c`` the correction of the averages' bias.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from apo_kernels.autocast import without_autocast
from apo_kernels.dispatch import serving

__all__ = ["relative_step_scalings_", "relative_step_squares_"]

Numbers = float | Tensor
"""One number for all, or a tensor of one each."""


@without_autocast
@torch.no_grad()
def relative_step_squares_(
    X: Tensor,
    slope: Tensor,
    size: Tensor,
    new_slope: Tensor,
    new_size: Tensor,
    *,
    rate: Numbers,
    betas: tuple[float, float],
    correction: Numbers,
    floor: float,
    longest: float,
    active: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """A step of a stack of squares, in place.

    Args:
        X: the squares, ``(count, b, b)``, float32 or float64; written.
        slope, size: the running means, ``(count, b, b)`` and ``(count, b)``; written.
        new_slope, new_size: what is averaged in, of these shapes.
        rate, correction: a number, or a tensor of ``count`` of them.
        betas: of the running means of slope and size.
        floor: the least size, over the square's mean size.
        longest: the greatest Frobenius norm of ``R``.
        active: which squares take part, ``(count,)``, bool; None for all. The others stay as they are.
        backend: as for :func:`apo_kernels.foreach_precondition`.

    Raises:
        TypeError, ValueError: dtypes or shapes that don't fit. Nothing has been written then.
    """
    if X.ndim != 3 or X.shape[1] != X.shape[2]:
        raise ValueError(f"X must be a stack of squares (count, b, b), but its shape is {tuple(X.shape)}")
    count, b = X.shape[:2]
    _check(X, slope=(slope, X.shape), new_slope=(new_slope, X.shape), size=(size, (count, b)),
           new_size=(new_size, (count, b)))  # fmt: skip
    numbers = _numbers(X, count, rate=rate, correction=correction, active=active)
    if X.numel():
        serving(backend, [X]).relative_step_squares_(
            X, slope, size, new_slope, new_size, numbers["rate"], betas, numbers["correction"], floor, longest, active
        )


@without_autocast
@torch.no_grad()
def relative_step_scalings_(
    S: Tensor,
    slope: Tensor,
    size: Tensor,
    new_slope: Tensor,
    new_size: Tensor,
    *,
    lengths: Sequence[int],
    entries: Sequence[int] | None = None,
    rate: Numbers,
    betas: tuple[float, float],
    correction: Numbers,
    floor: float,
    active: Tensor | None = None,
    total: Callable[[Tensor], None] | None = None,
    backend: str | None = None,
) -> None:
    """A step of scalings that lie one after the other, in place.

    Args:
        S: flat, float32 or float64; written. What lies between the scalings is zero and stays so.
        slope, size: the running means of ``S ⊙ dS`` and its size, like ``S``; written.
        new_slope, new_size: what is averaged in, like ``S``, and zero where ``S`` has no entries.
        lengths: how many elements each tensor takes, which add up to those of ``S``.
        entries: how many of them it has, for the mean of its sizes; None for all.
        total: called with the sums of the tensors' sizes before their means are taken: to add them up over processes
            that hold parts of the tensors, in place.
        floor: the least size, over the tensor's mean size.
        rate, correction, active: as for :func:`relative_step_squares_`, one for each tensor.
        betas, backend: as for :func:`relative_step_squares_`.

    Raises:
        TypeError, ValueError: as :func:`relative_step_squares_`.
    """
    if S.ndim != 1 or sum(lengths) != S.numel():
        raise ValueError(f"S must be flat, of {sum(lengths)} elements, but its shape is {tuple(S.shape)}")
    if entries is not None and len(entries) != len(lengths):
        raise ValueError(f"entries must be None or one for each of {len(lengths)} tensors, but got {len(entries)}")
    _check(S, slope=(slope, S.shape), size=(size, S.shape), new_slope=(new_slope, S.shape),
           new_size=(new_size, S.shape))  # fmt: skip
    numbers = _numbers(S, len(lengths), rate=rate, correction=correction, active=active)
    if S.numel():
        serving(backend, [S]).relative_step_scalings_(
            S, slope, size, new_slope, new_size, lengths, lengths if entries is None else entries, numbers["rate"],
            betas, numbers["correction"], floor, active, total,
        )  # fmt: skip


def _check(like: Tensor, **expected: tuple[Tensor, Sequence[int]]) -> None:
    if like.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"steps are taken in float32 or float64, but the tensors are {like.dtype}")
    for name, (x, shape) in expected.items():
        if x.shape != torch.Size(shape) or x.dtype != like.dtype or x.device != like.device:
            raise ValueError(
                f"{name} must be a {like.dtype} tensor of shape {tuple(shape)} on {like.device}, but is a {x.dtype} "
                f"tensor of shape {tuple(x.shape)} on {x.device}"
            )


def _numbers(like: Tensor, count: int, **given: Numbers | None) -> dict[str, Numbers]:
    """Tensors of numbers made flat."""
    found: dict[str, Numbers] = {}
    for name, x in given.items():
        if isinstance(x, Tensor):
            if x.numel() != count or x.device != like.device:
                raise ValueError(
                    f"{name} must be a number or {count} of them on {like.device}, but its shape is "
                    f"{tuple(x.shape)}, on {x.device}"
                )
            x = x.reshape(count)
        if x is not None:
            found[name] = x
    return found
