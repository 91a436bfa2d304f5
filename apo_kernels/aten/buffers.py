"""The memory that a call's results live in."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Pool", "Scalings"]

ALIGNMENT = 8
"""Elements: a matrix starts at a multiple."""


class Pool:
    """Flat buffers of one size. Large ones are used again once nobody holds a view of them.

    To ask the system for that memory in every call costs as much time as a pass or two over it.
    """

    LARGE = 2**20
    """Elements."""

    def __init__(self, like: Tensor, size: int) -> None:
        self._like, self.size = like, size
        self._known: list[tuple[Tensor, int]] = []

    def take(self) -> Tensor:
        for flat, alone in self._known:
            if _users(flat) == alone:
                return flat
        with torch.inference_mode(False):  # else it couldn't be written outside of that mode
            flat = self._like.new_empty(self.size)
        if self.size >= self.LARGE and self._like.device.type == "cpu" and hasattr(torch._C, "_storage_Use_Count"):
            self._known.append((flat, _users(flat)))
        return flat


def _users(flat: Tensor) -> int:
    """How many hold its storage."""
    return int(torch._C._storage_Use_Count(flat.untyped_storage()._cdata))


class Scalings:
    """Matrices of the shapes of S that lie in one storage: as the S do, where these lie in one, with zeros between
    them, and else one after the other."""

    def __init__(self, Ss: Sequence[Tensor]) -> None:
        mirrored = _mirrored(Ss)
        self._forms = mirrored or _packed(Ss)
        self.size = max((offset + _reach(shape, strides) for shape, strides, offset in self._forms), default=0)
        if mirrored:  # to the end of the storage, so that all of it can be stepped along with the S
            first = next(S for S in Ss if S.numel())
            whole = first.untyped_storage().nbytes() // first.element_size() - _base(Ss)
            self.size = whole if whole <= 2 * self.size else self.size
        free = torch.ones(self.size, dtype=torch.bool)
        for own in self._forms:
            free.as_strided(*own).fill_(False)
        self._between = free.nonzero().squeeze(1).to(Ss[0].device) if Ss else free.nonzero()

    def on(self, flat: Tensor, present: Sequence[int]) -> list[Tensor]:
        """Such matrices, uninitialised; those of layers that aren't ``present`` are zero."""
        if len(present) < len(self._forms):
            flat.zero_()
        elif self._between.numel():
            flat[: self.size].index_fill_(0, self._between, 0)
        return [flat.as_strided(shape, strides, offset) for shape, strides, offset in self._forms]


_Forms = list[tuple[tuple[int, ...], tuple[int, ...], int]]


def _mirrored(Ss: Sequence[Tensor]) -> _Forms | None:
    """As they lie, where they are of one dtype and that takes little more than their own room."""
    if len({(S.untyped_storage().data_ptr(), S.dtype) for S in Ss if S.numel()}) != 1:
        return None
    base = _base(Ss)
    forms = [(tuple(S.shape), S.stride(), int(S.storage_offset()) - base if S.numel() else 0) for S in Ss]
    end = 0
    for shape, strides, offset in sorted(forms, key=lambda form: form[2]):
        if offset < end:
            return None
        end = offset + _reach(shape, strides)
    return forms if end <= 2 * sum(S.numel() for S in Ss) and all(map(_plain, Ss)) else None


def _base(Ss: Sequence[Tensor]) -> int:
    """Where the first of them begins in their storage."""
    return min(int(S.storage_offset()) for S in Ss if S.numel())


def _packed(Ss: Sequence[Tensor]) -> _Forms:
    forms, first = [], 0
    for S in Ss:
        strides = tuple(math.prod(S.shape[i + 1 :]) for i in range(S.ndim))
        forms.append((tuple(S.shape), strides, first))
        first += -(-S.numel() // ALIGNMENT) * ALIGNMENT
    return forms


def _reach(shape: Sequence[int], strides: Sequence[int]) -> int:
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


def _plain(S: Tensor) -> bool:
    """Whether no entry lies on another's place."""
    reach = 1
    for stride, n in sorted(zip(S.stride(), S.shape, strict=True)):
        if n > 1 and stride < reach:
            return False
        reach += (n - 1) * stride
    return True
