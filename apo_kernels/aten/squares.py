"""The squares of a model's blocks as stacks, whose tiles pick theirs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor

__all__ = ["Pick", "SquareBank"]


class SquareBank:
    """All squares of one side and dtype, in the order of the blocks ``(*, b, b)`` that hold them.

    Where the blocks lie in one storage at regular places, the stack is a view of it, and derivatives lie in a storage
    of their own as the blocks do. Otherwise the blocks are joined at each call.
    """

    def __init__(self, blocks: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.blocks = list(blocks)
        self.dtype = dtype
        first = blocks[0]
        self.b = first.shape[-1]
        places = [_places(block) for block in blocks]
        flat = [place for own in places for place in own]
        self._base, last = min(flat), max(flat)
        self._apart = math.gcd(*(place - self._base for place in flat)) or self.b * self.b
        self.count = (last - self._base) // self._apart + 1
        self._shared: Tensor | None = None
        like = (first.untyped_storage().data_ptr(), first.stride()[-2:])
        if (
            all((x.untyped_storage().data_ptr(), x.stride()[-2:]) == like for x in blocks)
            and first.stride()[-2:] == (self.b, 1)
            and self._apart >= self.b * self.b
            and self.count <= 2 * len(flat)
            and len(set(flat)) == len(flat)
        ):
            self._shared = first.as_strided((self.count, self.b, self.b), (self._apart, self.b, 1), self._base)
            self.numbers = [[(place - self._base) // self._apart for place in own] for own in places]
        else:
            self._base, self._apart, self.count = 0, self.b * self.b, len(flat)
            counter = iter(range(len(flat)))
            self.numbers = [[next(counter) for _ in own] for own in places]
        self._views = [self._view(k) for k in range(len(blocks))]

    def _view(self, k: int) -> tuple[tuple[int, ...], tuple[int, ...], int, tuple[int, ...], int]:
        """How derivatives of a block lie: its shape, strides and offset, and those of a number for each row."""
        block, apart, b = self.blocks[k], self._apart, self.b
        if self._shared is not None:
            before = tuple(s if n > 1 else 0 for s, n in zip(block.stride()[:-2], block.shape, strict=False))
        else:
            before = tuple(apart * math.prod(block.shape[i + 1 : -2]) for i in range(block.ndim - 2))
        number = self.numbers[k][0]
        return (*before, b, 1), tuple(block.shape), number * apart, (*(s // apart * b for s in before), 1), number * b

    @property
    def fixed(self) -> Tensor | None:
        """The stack, if it is a view that stays."""
        return self._shared if self._shared is not None and self._shared.dtype == self.dtype else None

    def stack(self) -> Tensor:
        """The squares as they are now, in the dtype of sums."""
        if self._shared is not None:
            return self._shared.to(self.dtype)
        return torch.cat([x.reshape(-1, self.b, self.b).to(self.dtype) for x in self.blocks])

    def square(self, number: int) -> Tensor:
        """One of them, where it lies: ``(1, b, b)``."""
        if self._shared is not None:
            return self._shared[number : number + 1]
        for block, numbers in zip(self.blocks, self.numbers, strict=True):
            if number in numbers:
                places = list(product(*map(range, block.shape[:-2])))
                return block[places[numbers.index(number)]].unsqueeze(0)
        raise IndexError(number)

    def zeros(self) -> tuple[Tensor, Tensor, Tensor]:
        """For derivatives, flat and as a stack, and a stack of rows of numbers for their sizes."""
        like = self.blocks[0]
        flat = like.new_zeros(self.count * self._apart, dtype=self.dtype)
        stack = flat.as_strided((self.count, self.b, self.b), (self._apart, self.b, 1))
        return flat, stack, like.new_zeros(self.count, self.b, dtype=self.dtype)

    def apart(self, flat: Tensor, sizes: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The derivative and the sizes of a block."""
        strides, shape, offset, size_strides, size_offset = self._views[k]
        return flat.as_strided(shape, strides, offset), sizes.as_strided(shape[:-1], size_strides, size_offset)


class Pick:
    """The leading part of a square for each of some tiles: a view of the stack where they follow a rule.

    Otherwise it is a copy, of which the last in each ``slot`` is kept in the call's ``stacks``.
    """

    def __init__(self, squares: SquareBank, numbers: Sequence[int], side: int, slot: int) -> None:
        self.squares, self.side, self.slot = squares, side, slot
        step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
        self._rule: tuple[int, int, int] | None = None
        self._numbers: Tensor | None = None
        self._single: Tensor | None = None
        fixed = squares.fixed
        if len(numbers) == 1:
            self._single = squares.square(numbers[0])[:, :side, :side]
            fixed = self._single if self._single.dtype == squares.dtype else None
        elif step >= 0 and all(b - a == step for a, b in pairwise(numbers)):
            self._rule = numbers[0], step, len(numbers)
            fixed = None if fixed is None else self._view(fixed)
        else:
            self._numbers = torch.tensor(numbers, device=squares.blocks[0].device)
            fixed = None
        self._fixed = None if fixed is None else (fixed, fixed.mT)

    def __call__(self, stacks: dict[object, Any], *, transposed: bool = False) -> Tensor:
        if self._fixed is not None:
            return self._fixed[transposed]
        found = self._found(stacks)
        return found.mT if transposed else found

    def _found(self, stacks: dict[object, Any]) -> Tensor:
        if self._single is not None:
            return self._single.to(self.squares.dtype)
        stack = stacks.get(self.squares)
        if stack is None:
            stack = stacks[self.squares] = self.squares.stack()
        if self._numbers is None:
            return self._view(stack)
        last = stacks.get(self.slot)
        if last is not None and last[0] is self:
            picked: Tensor = last[1]
            return picked
        if self.side < stack.shape[-1]:
            stack = stack[:, : self.side, : self.side]
        picked = stack.index_select(0, self._numbers)
        stacks[self.slot] = self, picked
        return picked

    def _view(self, stack: Tensor) -> Tensor:
        assert self._rule is not None
        first, step, count = self._rule
        apart, down, _ = stack.stride()
        return stack.as_strided(
            (count, self.side, self.side), (apart * step, down, 1), stack.storage_offset() + first * apart
        )


def _places(block: Tensor) -> list[int]:
    """Where the squares begin in their storage."""
    strides = block.stride()[:-2]
    return [
        int(block.storage_offset()) + sum(i * s for i, s in zip(index, strides, strict=True))
        for index in product(*map(range, block.shape[:-2]))
    ]
