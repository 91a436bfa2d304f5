"""Where tensors lie, and which of them share memory."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from operator import add, le

import torch
from torch import Tensor

__all__ = ["addresses", "shared", "shared_storage"]

Tensors = Sequence[Tensor]


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """Where tensors lie; 0 for what isn't there."""
    try:
        return list(map(Tensor.data_ptr, tensors))  # type: ignore[arg-type]
    except TypeError:
        return [0 if x is None else x.data_ptr() for x in tensors]


def shared(tensors: Tensors, written: int) -> tuple[int, int] | None:
    """The numbers of two that share memory, the lesser first and among the first ``written``; None if none do."""
    starts = addresses(tensors)
    plain = map(Tensor.is_contiguous, tensors)
    sizes = [x.nbytes if whole else _extent(x) for x, whole in zip(tensors, plain, strict=True)]
    found = sorted(zip(starts, map(add, starts, sizes), range(len(starts)), strict=True))
    own_starts, ends = [each[0] for each in found], [each[1] for each in found]
    if all(map(le, ends, own_starts[1:])):
        return None
    near: list[tuple[int, int, int]] = []  # those that reach beyond the start
    for start, end, k in found:
        near = [other for other in near if other[1] > start]
        for _, _, j in near:
            first, second = min(j, k), max(j, k)
            if first < written and end > start and _overlap(tensors[first], tensors[second]):
                return first, second
        if start and not (near and tensors[near[-1][2]] is tensors[k]):  # 0: empty, or on the meta device
            near.append((start, end, k))
    return None


def shared_storage(tensors: Tensors, written: int) -> tuple[int, int] | None:
    """The same of tensors without data, as far as it can be told: those that begin at one place of a storage."""
    first: dict[Hashable, int] = {}
    for k, x in enumerate(tensors):
        if x.numel():
            offset = x.storage_offset()
            place = x.untyped_storage()._cdata, offset if isinstance(offset, int) else id(x)
            if first.setdefault(place, k) < min(k, written):
                return first[place], k
    return None


def _extent(x: Tensor) -> int:
    """Bytes from the first entry to the last."""
    if x.numel() == 0:
        return 0
    steps = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return int(1 + steps) * x.element_size()


def _overlap(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors, of which ranges overlap, have a byte in common: columns of one matrix don't."""
    if x.is_contiguous() and y.is_contiguous():
        return True
    first = min(x.data_ptr(), y.data_ptr())
    unit = math.gcd(x.element_size(), y.element_size(), x.data_ptr() - first, y.data_ptr() - first)
    end = max(each.data_ptr() + _extent(each) for each in (x, y))
    taken = torch.zeros((end - first) // unit, dtype=torch.bool, device="cpu")
    mine, other = (_units(taken, each, unit, first) for each in (x, y))
    mine.fill_(True)
    return bool(other.any())


def _units(taken: Tensor, x: Tensor, unit: int, first: int) -> Tensor:
    """The flags of a tensor's memory."""
    per = x.element_size() // unit
    strides = [stride * per for stride in x.stride()]
    return taken.as_strided((*x.shape, per), (*strides, 1), (x.data_ptr() - first) // unit)
