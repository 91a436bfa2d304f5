"""The storage of derivatives of S, one for all layers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Scalings"]

ALIGNMENT = 8
"""Elements: a matrix starts at a multiple."""


class Scalings:
    """Matrices of the shapes of S that lie in one storage: as the S do, where these lie in one, with zeros between
    them, and else one after the other."""

    def __init__(self, Ss: Sequence[Tensor], dtype: torch.dtype) -> None:
        self._like = Ss[0] if Ss else torch.empty(0)
        self._dtype = dtype
        self._forms = _mirrored(Ss) or _packed(Ss)
        self._count = max((offset + _reach(shape, strides) for shape, strides, offset in self._forms), default=0)
        self._dense = sum(S.numel() for S in Ss) == self._count

    def empty(self, present: Sequence[int]) -> list[Tensor]:
        """Such matrices; those of layers that aren't ``present`` are zero."""
        dense = self._dense and len(present) == len(self._forms)
        new = self._like.new_empty if dense else self._like.new_zeros
        flat = new(self._count, dtype=self._dtype)
        return [flat.as_strided(shape, strides, offset) for shape, strides, offset in self._forms]


_Forms = list[tuple[tuple[int, ...], tuple[int, ...], int]]


def _mirrored(Ss: Sequence[Tensor]) -> _Forms | None:
    """As they lie, where that takes little more than their own room."""
    if len({S.untyped_storage().data_ptr() for S in Ss}) != 1 or not all(S.numel() for S in Ss):
        return None
    base = min(S.storage_offset() for S in Ss)
    forms = [(tuple(S.shape), S.stride(), S.storage_offset() - base) for S in Ss]
    end = 0
    for shape, strides, offset in sorted(forms, key=lambda form: form[2]):
        if offset < end:
            return None
        end = offset + _reach(shape, strides)
    return forms if end <= 2 * sum(S.numel() for S in Ss) and all(map(_plain, Ss)) else None


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
