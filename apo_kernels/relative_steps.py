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

from apo_kernels import checks
from apo_kernels.autocast import without_autocast
from apo_kernels.blocks import check_size
from apo_kernels.dispatch import serving
from apo_kernels.memory import shared

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
    checks.dense("X", X)
    if X.ndim != 3 or X.shape[1] != X.shape[2]:
        raise ValueError(f"X must be a stack of squares (count, b, b), but its shape is {tuple(X.shape)}")
    count, b = X.shape[:2]
    _check("X", X, {"slope": (slope, X.shape), "size": (size, (count, b))},
           {"new_slope": (new_slope, X.shape), "new_size": (new_size, (count, b))})  # fmt: skip
    numbers = _numbers(X, count, rate=rate, correction=correction)
    _check_step(X, count, betas, active, floor=floor, longest=longest)
    _check_memory(X=X, slope=slope, size=size, new_slope=new_slope, new_size=new_size)
    active = None if active is None else active.reshape(count)
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
    checks.dense("S", S)
    _counts("lengths", lengths)
    if S.ndim != 1 or sum(lengths) != S.numel():
        raise ValueError(f"S must be flat, of {sum(lengths)} elements, but its shape is {tuple(S.shape)}")
    if entries is not None:
        _counts("entries", entries)
        if len(entries) != len(lengths):
            raise ValueError(f"entries must be None or one for each of {len(lengths)} tensors, but got {len(entries)}")
    if total is not None and not callable(total):
        raise TypeError(f"total must be None or a function of the sums, but got {total!r}")
    _check("S", S, {"slope": (slope, S.shape), "size": (size, S.shape)},
           {"new_slope": (new_slope, S.shape), "new_size": (new_size, S.shape)})  # fmt: skip
    numbers = _numbers(S, len(lengths), rate=rate, correction=correction)
    _check_step(S, len(lengths), betas, active, floor=floor)
    _check_memory(S=S, slope=slope, size=size, new_slope=new_slope, new_size=new_size)
    active = None if active is None else active.reshape(len(lengths))
    if S.numel():
        serving(backend, [S]).relative_step_scalings_(
            S, slope, size, new_slope, new_size, lengths, lengths if entries is None else entries, numbers["rate"],
            betas, numbers["correction"], floor, active, total,
        )  # fmt: skip


def _check(
    name: str,
    like: Tensor,
    means: dict[str, tuple[Tensor, Sequence[int]]],
    new: dict[str, tuple[Tensor, Sequence[int]]],
) -> None:
    """Refuse tensors that don't fit; the first and the means are written."""
    if like.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, but is {like.dtype}")
    checks.writable(name, like)
    for each, (x, shape) in (means | new).items():
        checks.dense(each, x)
        if x.shape != torch.Size(shape) or x.dtype != like.dtype or x.device != like.device:
            raise ValueError(
                f"{each} must be a {like.dtype} tensor of shape {tuple(shape)} on {like.device}, but is a {x.dtype} "
                f"tensor of shape {tuple(x.shape)} on {x.device}"
            )
        if each in means:
            checks.writable(each, x)
        elif x.is_neg():
            raise ValueError(f"{each} must be read as it lies in memory, but is lazily negated: resolve it")


def _check_memory(**tensors: Tensor) -> None:
    """Refuse one memory under two names; the first three are written."""
    clash = shared([*tensors.values()], 3)
    if clash is not None:
        checks.refuse_shared(clash, [*tensors])


def _numbers(like: Tensor, count: int, **given: Numbers) -> dict[str, Numbers]:
    """Tensors of numbers made flat."""
    found: dict[str, Numbers] = {}
    for name, x in given.items():
        if not isinstance(x, Tensor):
            checks.finite(name, x)
        else:
            if x.numel() != count or x.device != like.device or not x.is_floating_point():
                raise ValueError(
                    f"{name} must be a number or {count} of them, floating-point, on {like.device}, but is "
                    f"{x.dtype} of shape {tuple(x.shape)}, on {x.device}"
                )
            x = x.reshape(count)
        found[name] = x
    return found


def _check_step(like: Tensor, count: int, betas: tuple[float, float], active: Tensor | None, **bounds: float) -> None:
    """Refuse what else no step can be taken with."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers, for slope and size, but is {betas!r}")
    for i, beta in enumerate(betas):
        checks.at_least_0(f"betas[{i}]", beta, most=1.0)
    for name, x in bounds.items():
        checks.at_least_0(name, x)
    if active is not None and not isinstance(active, Tensor):
        raise TypeError(f"active must be None or a bool tensor, but got {active!r}")
    if active is not None and (active.dtype != torch.bool or active.numel() != count or active.device != like.device):
        raise ValueError(
            f"active must be None or {count} bool on {like.device}, but is {active.dtype} of shape "
            f"{tuple(active.shape)}, on {active.device}"
        )


def _counts(name: str, each: Sequence[int]) -> None:
    if not isinstance(each, (list, tuple)):
        raise TypeError(f"{name} must be a list of ints, but got {each!r}")
    for i, x in enumerate(each):
        check_size(f"{name}[{i}]", x, least=0)
