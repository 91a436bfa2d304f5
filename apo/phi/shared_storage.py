"""Storage that like tensors of φ share, so that one operation steps all of them, whatever the number of layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from apo.phi.meta_optimizer import Learned
from apo.ranks.sharding import Over, sum_over

__all__ = ["Numbers", "SharedScalings", "SharedSquares", "matrices_of_one", "shared"]

ALIGNMENT = 8
"""Elements: every view starts at a multiple, and every row of a matrix, so that kernels may read 16 bytes at a time."""
SHORT = 16
"""Elements: shorter rows lie close together."""
Numbers = float | Tensor
"""One number for all, where it is the same, or one for each."""


def matrices_of_one(
    shapes: Sequence[torch.Size], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, list[Tensor]]:
    """Storage of zeros, and matrices of these shapes in it, one after the other."""
    counts = [_padded(shape) for shape in shapes]
    flat = torch.zeros(sum(counts), dtype=dtype, device=device)
    return flat, [_rows(part, shape) for part, shape in zip(torch.split(flat, counts), shapes, strict=True)]


class SharedSquares:
    """The squares of all blocks of one side: ``tensor`` and ``slope`` ``(count, b, b)``, ``size`` ``(count, b)``."""

    def __init__(self, learned: Sequence[Learned]) -> None:
        self.learned = list(learned)
        b = learned[0].tensor.shape[-1]
        self.counts = [own.tensor.numel() // (b * b) for own in learned]
        apart = _aligned(b * b)
        count, like = sum(self.counts), learned[0].tensor
        self.tensor, self.slope = (like.new_zeros(count, apart).as_strided((count, b, b), (apart, b, 1)) for _ in "12")
        self.size = like.new_zeros(count, b)
        first = 0
        for own, squares in zip(self.learned, self.counts, strict=True):
            here = slice(first, first + squares)
            stacks = zip((self.tensor, self.slope, self.size), _held(own), strict=True)
            _move(own, *(stack[here].view(x.shape) for stack, x in stacks))
            first += squares

    def numbers(self, number: Callable[[Learned], float]) -> Numbers:
        """A number of each tensor's: one, or one for each square."""
        return _one_or_each([number(own) for own in self.learned], self.counts, self.size)

    def together(self, found: Mapping[Learned, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Slopes and sizes that were found, as stacks."""
        each = [found.get(own, (None, None)) for own in self.learned]
        slopes, sizes = [slope for slope, _ in each], [size for _, size in each]
        b = self.size.shape[1]
        apart = self._apart(slopes)
        strides = None if apart == b * b else [own.tensor.stride() for own in self.learned]
        return (
            _together(slopes, _starts(self.counts, apart), self.slope.shape, (apart, b, 1), strides),
            _together(sizes, _starts(self.counts, b), self.size.shape, (b, 1)),
        )

    def _apart(self, slopes: Sequence[Tensor | None]) -> int:
        """From one square to the next: as in here, or close together."""
        b, first, second = self.size.shape[1], slopes[0], slopes[1] if len(slopes) > 1 else None
        if first is None or second is None:
            return b * b
        step = second.storage_offset() - first.storage_offset()
        return self.slope.stride(0) if step == self.counts[0] * self.slope.stride(0) else b * b


class SharedScalings:
    """The entries of all scalings S, one after the other, with zeros between them that stay zero."""

    def __init__(self, learned: Sequence[Learned]) -> None:
        self.learned = list(learned)
        shapes = [own.tensor.shape for own in learned]
        self.counts = [_padded(shape) for shape in shapes]
        self.entries = [own.tensor.numel() if own.entries is None else own.entries for own in learned]
        like = learned[0].tensor
        storage = [matrices_of_one(shapes, like.dtype, like.device) for _ in "123"]
        self.tensor, self.slope, self.size = (flat for flat, _ in storage)
        for own, *views in zip(self.learned, *(matrices for _, matrices in storage), strict=True):
            _move(own, *views)

    def numbers(self, number: Callable[[Learned], float]) -> Numbers:
        """A number of each tensor's: one, or one for each tensor."""
        return _one_or_each([number(own) for own in self.learned], [1] * len(self.learned), self.size)

    @property
    def total(self) -> Callable[[Tensor], None] | None:
        """What sums numbers of the tensors over the ranks that hold their other parts, in place."""
        over = [own.over for own in self.learned]

        def add_up(sums: Tensor) -> None:
            sums.copy_(sum_over(sums, over))

        return add_up if any(over) else None

    def together(self, found: Mapping[Learned, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Slopes and sizes that were found, flat, with zeros between them."""
        each = [found.get(own, (None, None)) for own in self.learned]
        starts = _starts(self.counts, 1)
        strides = [own.tensor.stride() for own in self.learned]
        of_each = ([x[which] for x in each] for which in (0, 1))
        slopes, sizes = (_together(x, starts, self.size.shape, (1,), strides) for x in of_each)
        return slopes, sizes


def _starts(counts: Sequence[int], unit: int) -> list[int]:
    return [unit * first for first in accumulate(counts[:-1], initial=0)]


def _together(
    found: Sequence[Tensor | None],
    starts: Sequence[int],
    shape: Sequence[int],
    strides: Sequence[int],
    own_strides: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """Tensors as one, each with its first entry at its start. Where they lie so, as they lie; else copied, with zeros
    for what isn't there."""
    if 0 in shape:
        return next(x for x in found if x is not None).new_zeros(shape)
    there = [i for i, x in enumerate(found) if x is not None]
    views = [x for x in found if x is not None]
    first = views[0]
    base = first.storage_offset() - starts[there[0]]
    end = base + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1
    storage = first.untyped_storage()
    fits = len(there) == len(found) and base >= 0 and end * first.element_size() <= storage.nbytes()
    if fits and all(
        x.storage_offset() - starts[i] == base
        and x.untyped_storage().data_ptr() == storage.data_ptr()
        and (x.is_contiguous() if own_strides is None else x.stride() == own_strides[i])
        for i, x in zip(there, views, strict=True)
    ):
        return first.as_strided(shape, strides, base)
    whole = first.new_zeros(end - base)
    targets = [
        whole[starts[i] :].as_strided(x.shape, x.contiguous().stride() if own_strides is None else own_strides[i])
        for i, x in zip(there, views, strict=True)
    ]
    torch._foreach_copy_(targets, views)
    return whole.as_strided(shape, strides)


def shared(learned: Sequence[Learned]) -> list[SharedSquares | SharedScalings]:
    """Let like tensors share storage: their ``tensor`` and ``buffers`` become views of it."""
    alike: dict[tuple[int, torch.dtype, torch.device, Over], list[Learned]] = {}
    for own in learned:
        side = own.tensor.shape[-1] if own.block else 0
        # ranks that hold the same block must step it by the same operations, to the bit
        alike.setdefault((side, own.tensor.dtype, own.tensor.device, own.alike), []).append(own)
    return [(SharedSquares if each[0].block else SharedScalings)(each) for each in alike.values()]


def _held(own: Learned) -> tuple[Tensor, Tensor, Tensor]:
    return own.tensor, own.buffers["slope"], own.buffers["size"]


def _move(own: Learned, tensor: Tensor, slope: Tensor, size: Tensor) -> None:
    """Let a tensor and its running means live in these views of the shared storage."""
    for view, x in zip((tensor, slope, size), _held(own), strict=True):
        view.copy_(x)
    own.tensor = tensor
    own.buffers |= {"slope": slope, "size": size}


def _pitch(shape: torch.Size) -> int:
    """From one row to the next."""
    n = shape[-1]
    return n if n < SHORT or len(shape) < 2 else _aligned(n)


def _padded(shape: torch.Size) -> int:
    """How many elements of storage a matrix takes."""
    return _aligned(shape.numel() // max(shape[-1], 1) * _pitch(shape))


def _rows(part: Tensor, shape: torch.Size) -> Tensor:
    strides = [_pitch(shape), 1][-len(shape) :]
    for size in reversed(shape[1:-1]):
        strides.insert(0, strides[0] * size)
    return part.as_strided(shape, strides)


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


def _one_or_each(values: list[float], counts: list[int], like: Tensor) -> Numbers:
    if len(set(values)) == 1:
        return values[0]
    each = torch.tensor(values, dtype=like.dtype, device=like.device)
    return each.repeat_interleave(torch.tensor(counts, device=like.device), output_size=sum(counts))
