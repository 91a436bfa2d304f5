"""The operands of the operator."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from apo_kernels.aten import Kept, accumulation_dtype
from apo_kernels.checks.describe import LISTS, described, kind_of
from apo_kernels.checks.tensors import DTYPES, MIXTURES, Tensors, check_block, check_like_G, check_matrix, tensor_lists

__all__ = ["foreach_operands", "kept_list", "kept_products", "operands", "plainly_matches", "wanted_letters"]

_PLAIN = (Tensor, torch.nn.Parameter)


def operands(G: Tensor, A: Tensor, B: Tensor, S: Tensor, *V: Tensor, index: int | None = None) -> None:
    """Refuse what is not one preconditioned gradient, with its cotangent if given; number ``index`` of lists
    ``Gs, As, ...`` if given."""
    if _plainly_fit((G,), (A,), (B,), (S,), V or None):
        return
    at = "" if index is None else f"s[{index}]"
    check_matrix("G" + at, G)
    check_like_G("S" + at, S, G, "G" + at)
    for cotangent in V:
        check_like_G("V" + at, cotangent, G, "G" + at)
    check_block("A" + at, A, G, -1, at)
    check_block("B" + at, B, G, -2, at)


def _plainly_fit(Gs: Tensors, As: Tensors, Bs: Tensors, Ss: Tensors, Vs: Tensors | None) -> bool:
    """Whether these are lists of equal length whose every entry is of the common case, one matrix and its blocks, full
    or in squares: what isn't is looked at closely.

    One flat loop over the attributes that are cheapest to read: looking closely takes longer than a small layer.
    """
    if not (type(Gs) in LISTS and type(As) in LISTS and type(Bs) in LISTS and type(Ss) in LISTS):
        return False
    length = len(Gs)
    if not (len(As) == length and len(Bs) == length and len(Ss) == length):
        return False
    first = Gs[0].get_device() if length and type(Gs[0]) in _PLAIN else -1
    try:
        for G, A, B, S in zip(Gs, As, Bs, Ss, strict=True):
            if not (type(G) in _PLAIN and type(A) in _PLAIN and type(B) in _PLAIN and type(S) in _PLAIN):
                return False
            shape, dtype = G.shape, G.dtype
            if len(shape) != 2:
                return False
            m, n = shape
            alike = A.dtype is dtype and B.dtype is dtype and S.dtype is dtype and dtype in DTYPES
            if not (
                (alike or frozenset((dtype, A.dtype, B.dtype, S.dtype)) in MIXTURES)
                and (
                    (A.is_cpu and B.is_cpu and S.is_cpu) if G.is_cpu and first == -1 else _on_one_gpu(G, A, B, S, first)
                )
                and (G.layout is A.layout is B.layout is S.layout is torch.strided)
                and S.shape == shape
                and (A.shape == (n, n) or _plainly_covers(A, n))
                and (B.shape == (m, m) or _plainly_covers(B, m))
            ):
                return False
    except RuntimeError:  # a nested tensor has no shape
        return False
    if Vs is None:
        return True
    return type(Vs) in LISTS and len(Vs) == length and all(map(plainly_matches, Vs, Gs))


def _plainly_covers(block: Tensor, side: int) -> bool:
    """Whether it is a stack of squares for a side of this length."""
    shape = block.shape
    return len(shape) == 3 and (b := shape[2]) > 0 and shape == (-(-side // b), b, b)


def _on_one_gpu(G: Tensor, A: Tensor, B: Tensor, S: Tensor, index: int) -> bool:
    """Whether all are on the GPU of that index."""
    return (
        (G.is_cuda and A.is_cuda and B.is_cuda and S.is_cuda)
        and G.get_device() == index
        and A.get_device() == index
        and B.get_device() == index
        and S.get_device() == index
    )


def plainly_matches(x: Tensor, G: Tensor) -> bool:
    """Whether ``x`` is a tensor like ``G`` in all that is asked of it."""
    return (
        type(x) in _PLAIN
        and not x.is_nested
        and x.dtype is G.dtype
        and x.layout is torch.strided
        and x.is_same_size(G)
        and ((x.is_cpu and G.is_cpu) or x.device == G.device)
    )


def foreach_operands(
    Gs: Tensors,
    As: Tensors,
    Bs: Tensors,
    Ss: Tensors,
    Vs: Tensors | None = None,
) -> None:
    """Refuse lists that don't match, then what :func:`operands` refuses of each entry."""
    if _plainly_fit(Gs, As, Bs, Ss, Vs):
        return
    entries: Iterable[tuple[Tensor, ...]]
    if Vs is None:
        tensor_lists(Gs=Gs, As=As, Bs=Bs, Ss=Ss)
        entries = zip(Gs, As, Bs, Ss, strict=True)
    else:
        tensor_lists(Gs=Gs, As=As, Bs=Bs, Ss=Ss, Vs=Vs)
        entries = zip(Gs, As, Bs, Ss, Vs, strict=True)
    for i, (G, *others) in enumerate(entries):
        operands(G, *others, index=i)
        if G.device != Gs[0].device:
            raise ValueError(f"Gs[{i}] must be on the device of Gs[0], {Gs[0].device}, but is on {G.device}")


def wanted_letters(wanted: str) -> None:
    if not isinstance(wanted, str):
        raise TypeError(f"wanted must be a string of letters from 'GABS', but got {kind_of(wanted)}")
    if not wanted or set(wanted) - set("GABS") or len(set(wanted)) != len(wanted):
        raise ValueError(f"wanted must be one or more different letters from 'GABS', but got {wanted!r}")


def kept_products(kept: Kept, G: Tensor, *, index: int | None = None) -> None:
    """Refuse what a forward of ``G`` can't have kept."""
    if not isinstance(kept, Kept):
        at = "" if index is None else f"[{index}]"
        raise TypeError(f"kept{at} must be the Kept that a forward with keep=True returned, but got {kind_of(kept)}")
    U, M, W = kept
    if plainly_matches(U, G) and plainly_matches(M, G) and plainly_matches(W, G) and G.element_size() >= 4:
        return
    dtype, shape, device = accumulation_dtype(G.dtype), G.shape, G.device
    for i, x in enumerate(kept):
        if not isinstance(x, Tensor) or x.shape != shape or x.dtype is not dtype or x.device != device:
            at = "" if index is None else f"[{index}]"
            name = "G" if index is None else f"Gs{at}"
            raise ValueError(
                f"kept{at}.{Kept._fields[i]} must be a {dtype} tensor of {name}'s shape {tuple(shape)} on {device}, "
                f"but got {described(x)}"
            )


def kept_list(kept: Sequence[Kept], Gs: Tensors) -> None:
    """Refuse what the forwards of ``Gs`` can't have kept. ``Gs`` have been checked."""
    if not isinstance(kept, (list, tuple)) or isinstance(kept, Kept) or len(kept) != len(Gs):
        raise ValueError(f"kept must be None or a list of {len(Gs)} Kept, one for each of Gs, but got {kind_of(kept)}")
    for i, G in enumerate(Gs):
        kept_products(kept[i], G, index=i)
