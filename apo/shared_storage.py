"""Storage that like tensors of φ share, so that one operation steps all of them, whatever the number of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from apo.meta_optimizer import Learned
from apo.sharding import Over, sum_over

__all__ = ["Numbers", "SharedScalings", "SharedSquares", "matrices_of_one", "shared"]

ALIGNMENT = 8
"""Elements: every view starts at a multiple, and every row of a matrix, so that kernels may read 16 bytes at a time."""
SHORT = 16
"""Elements: shorter rows lie close together."""
SQUARES_AT_A_TIME = 64
SCALINGS_AT_A_TIME = 2**15
"""On a CPU: as many as stay in its cache."""

Numbers = float | Tensor
"""One number for all, where it is the same, or one for each in a shape that broadcasts."""


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
        self._counts = [own.tensor.numel() // (b * b) for own in learned]
        apart = _aligned(b * b)
        count, like = sum(self._counts), learned[0].tensor
        self.tensor, self.slope = (like.new_zeros(count, apart).as_strided((count, b, b), (apart, b, 1)) for _ in "12")
        self.size = like.new_zeros(count, b)
        first = 0
        for own, squares in zip(self.learned, self._counts, strict=True):
            here = slice(first, first + squares)
            stacks = zip((self.tensor, self.slope, self.size), _held(own), strict=True)
            _move(own, *(stack[here].view(x.shape) for stack, x in stacks))
            first += squares

    def each(self, number: Callable[[Learned], float]) -> Numbers:
        """A number of each tensor's, in the shape ``(count, 1, 1)`` where they differ."""
        found = _one_or_each([number(own) for own in self.learned], self._counts, self.size)
        return found[:, None, None] if isinstance(found, Tensor) else found

    def parts(self) -> Iterator[slice]:
        """All squares at once, or, on a CPU, in parts that stay in its cache."""
        count = max(len(self.size), 1)
        step = SQUARES_AT_A_TIME if self.size.device.type == "cpu" else count
        return (slice(first, first + step) for first in range(0, count, step))


class SharedScalings:
    """The entries of all scalings S, one after the other, with zeros between them that stay zero."""

    def __init__(self, learned: Sequence[Learned]) -> None:
        self.learned = list(learned)
        shapes = [own.tensor.shape for own in learned]
        self._counts = [_padded(shape) for shape in shapes]
        like = learned[0].tensor
        storage = [matrices_of_one(shapes, like.dtype, like.device) for _ in "123"]
        self.tensor, self.slope, self.size = (flat for flat, _ in storage)
        self._lengths = torch.tensor(self._counts, device=like.device)
        entries = [own.tensor.numel() if own.entries is None else own.entries for own in learned]
        self._entries = torch.tensor(entries, dtype=like.dtype, device=like.device)
        for own, *views in zip(self.learned, *(matrices for _, matrices in storage), strict=True):
            _move(own, *views)

    def each(self, number: Callable[[Learned], float]) -> Numbers:
        """A number of each tensor's, one for every entry where they differ."""
        return _one_or_each([number(own) for own in self.learned], self._counts, self.size)

    def mean_sizes(self) -> Tensor:
        """The mean of each tensor's sizes, one per tensor; of a part of one, over the whole."""
        sums = torch.stack(torch._foreach_norm([own.buffers["size"] for own in self.learned], ord=1))
        return sum_over(sums, [own.over for own in self.learned]) / self._entries

    def parts(self, numbers: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """All entries, each with its tensor's number: at once, or, on a CPU, in parts that stay in its cache."""
        if self.size.device.type != "cpu":
            yield slice(None), numbers.repeat_interleave(self._lengths, output_size=len(self.size))
            return
        first = 0
        for count, number in zip(self._counts, numbers, strict=True):
            for part in range(first, first + count, SCALINGS_AT_A_TIME):
                yield slice(part, min(part + SCALINGS_AT_A_TIME, first + count)), number
            first += count


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
