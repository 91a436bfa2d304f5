"""What a bound model is made of, and the lists that its calls take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from apo_kernels.aten import accumulation_dtype
from apo_kernels.checks.describe import LISTS, described, kind_of, length_text
from apo_kernels.checks.layers import foreach_operands
from apo_kernels.checks.scalars import at_least_0, check_list, check_number
from apo_kernels.checks.tensors import Tensors, dense, not_negated, plain, tensor_lists, untransformed, writable
from apo_kernels.slopes import Parts

__all__ = ["buffers", "model", "parts", "plain_parts", "promise"]


def model(As: Tensors, Bs: Tensors, Ss: Tensors, widths: Sequence[Sequence[int]], learned: Sequence[str]) -> None:
    """Refuse what is no preconditioner of a model."""
    tensor_lists(As=As, Bs=Bs, Ss=Ss)
    foreach_operands(Ss, As, Bs, Ss)
    not_negated(As=As, Bs=Bs, Ss=Ss)
    plain(As=As, Bs=Bs, Ss=Ss)
    for name, each in (("widths", widths), ("learned", learned)):
        if not isinstance(each, LISTS) or len(each) != len(Ss):
            raise ValueError(f"{name} must be a list with an entry for each of {len(Ss)} layers, but got {each!r}")
    for i, (S, own, letters) in enumerate(zip(Ss, widths, learned, strict=True)):
        whole = isinstance(own, LISTS) and all(isinstance(x, int) and not isinstance(x, bool) for x in own)
        if not whole or not 1 <= len(own) <= 2 or sum(own) != S.shape[-1] or min(own) < 0:
            raise ValueError(f"widths[{i}] must be one or two ints that add up to {S.shape[-1]}, but is {own!r}")
        if not isinstance(letters, str) or "S" not in letters or sorted(letters) != sorted(set("ABS") & set(letters)):
            raise ValueError(f"learned[{i}] must be different letters of 'ABS', with 'S', but is {letters!r}")


def parts(written: Parts, read: Parts, shapes: Sequence[Sequence[tuple[int, ...]]], like: Tensor) -> None:
    """Refuse parts that don't fit the layers, whose own have these shapes, and weights that can't be written."""
    for name, all_parts in (("Gs", read), ("thetas", written)):
        if not isinstance(all_parts, LISTS) or len(all_parts) != len(shapes):
            raise ValueError(
                f"{name} must be a list with an entry for each of {len(shapes)} layers, but is {length_text(all_parts)}"
            )
    for i, (thetas, Gs, own) in enumerate(zip(written, read, shapes, strict=True)):
        if Gs is None:
            continue
        for name, each in (("Gs", Gs), ("thetas", thetas)):
            if not isinstance(each, LISTS) or len(each) != len(own):
                raise ValueError(
                    f"{name}[{i}] must be a list of {len(own)} parts, of shapes {own}, but is {length_text(each)}"
                )
        assert thetas is not None
        for k, (theta, G, shape) in enumerate(zip(thetas, Gs, own, strict=True)):
            if G is None:
                continue
            for name, x in (("Gs", G), ("thetas", theta)):
                _part(f"{name}[{i}][{k}]", x, shape, like)
            assert theta is not None
            if theta is not G:
                writable(f"thetas[{i}][{k}]", theta)


def plain_parts(lists: Mapping[str, Any]) -> None:
    """Refuse what ``torch.func`` or forward-mode AD is at work on, in lists of tensors or of parts."""
    for name, each in lists.items():
        if isinstance(each, Tensor):
            untransformed(name, each)
        elif isinstance(each, LISTS):
            plain_parts({f"{name}[{i}]": x for i, x in enumerate(each)})


def _part(name: str, x: object, shape: tuple[int, ...], like: Tensor) -> None:
    dense(name, x)
    assert isinstance(x, Tensor)
    if x.shape != shape or x.device != like.device:
        raise ValueError(f"{name} must be a tensor of shape {shape} on {like.device}, but got {described(x)}")
    if (x.dtype == torch.float64) != (like.dtype == torch.float64):
        raise TypeError(f"{name} must be float64 exactly if the blocks are, but is {x.dtype}, they {like.dtype}")
    if x.is_neg():
        raise ValueError(f"{name} must be read as it lies in memory, but is lazily negated: resolve it")


def buffers(tensors: Sequence[Tensor | None], shapes: Sequence[tuple[int, ...]], like: Tensor) -> None:
    """Refuse momentum buffers that don't fit the layers."""
    dtype = accumulation_dtype(like.dtype)
    if not isinstance(tensors, LISTS) or len(tensors) != len(shapes):
        raise ValueError(
            f"momentum_buffers must be a list with an entry for each of {len(shapes)} layers, but is "
            f"{length_text(tensors)}"
        )
    for i, (v, shape) in enumerate(zip(tensors, shapes, strict=True)):
        if v is None:
            continue
        dense(f"momentum_buffers[{i}]", v)
        if v.shape != shape or v.dtype is not dtype or v.device != like.device:
            raise ValueError(
                f"momentum_buffers[{i}] must be a {dtype} tensor of shape {tuple(shape)} on {like.device}, "
                f"but got {described(v)}"
            )
        writable(f"momentum_buffers[{i}]", v)


def promise(count: int, most: float, shares: Sequence[float] | None, total: object) -> None:
    """Refuse what no promise can be kept with. A share may be infinite: then the step isn't taken."""
    at_least_0("most", most)
    if total is not None and not callable(total):
        raise TypeError(f"total must be None or a function of the sum, but got {kind_of(total)}")
    if not math.isfinite(most):
        return
    check_list("shares", shares, count)
    if shares and set(map(type, shares)) <= {float} and not math.isnan(sum(shares)):
        return
    for i, x in enumerate(shares or ()):
        check_number(f"shares[{i}]", x)
        if math.isnan(x):
            raise ValueError(f"shares[{i}] must be a number, but is {x}")
