"""Examples as tensors, and batches of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Examples:
    """N examples."""

    inputs: tuple[Tensor, ...]  # what the model is called with, one tensor ``(N, ...)`` per argument
    targets: Tensor  # ``(N, ...)``
    pad: int | None = None  # of sequences: the number that fills them up. A batch is cut to its longest sequence.

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, indices: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """The inputs and targets at ``indices``, which lie on the examples' device."""
        tensors = [x[indices] for x in (*self.inputs, self.targets)]
        if self.pad is not None:
            tensors = [x[:, : max(int(x.ne(self.pad).sum(1).max()), 1)] for x in tensors]
        return tuple(tensors[:-1]), tensors[-1]

    def take(self, indices: Tensor) -> Examples:
        """These alone."""
        return replace(self, inputs=tuple(x[indices] for x in self.inputs), targets=self.targets[indices])

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Examples:
        """On a device, floating-point inputs in ``dtype``. Targets keep their own: losses are summed in it."""
        inputs = tuple(x.to(device, dtype) if x.is_floating_point() else x.to(device) for x in self.inputs)
        return replace(self, inputs=inputs, targets=self.targets.to(device))


@dataclass(frozen=True)
class Dataset:
    """Examples to train and to test on."""

    name: str  # as people call it, what it stands in for included
    train: Examples
    test: Examples
    published: tuple[int, int] | None = None  # how many of either there are where it is whole, if that is known
    extra: Any = None  # what a task needs beside tensors, such as the sentences that translations are scored against

    @property
    def label(self) -> str:
        """The name, and how many examples there are."""
        sizes = len(self.train), len(self.test)
        have = "{:,} + {:,}".format(*sizes)
        if self.published is None or self.published == sizes:
            return f"{self.name} ({have})"
        return "{} (a part: {} of {:,} + {:,})".format(self.name, have, *self.published)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Dataset:
        return replace(self, train=self.train.to(device, dtype), test=self.test.to(device, dtype))

    def held_out(self, share: float = 0.1) -> Dataset:
        """The same with ``share`` of the training examples in place of the test's: what a search is judged on."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(0))
        count = max(int(share * len(order)), 1)
        train, test = self.train.take(order[count:]), self.train.take(order[:count])
        return Dataset(f"{self.name}, held out of training", train, test)


def reconstruction(data: Dataset) -> Dataset:
    """The same with the inputs for targets."""
    (x,), (test_x,) = data.train.inputs, data.test.inputs
    return replace(data, train=Examples((x,), x), test=Examples((test_x,), test_x))


def split(count: int) -> tuple[Tensor, Tensor]:
    """Which examples are trained on and which, a fifth, are tested on; always the same."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[: count * 4 // 5], order[count * 4 // 5 :]


def standardised(train: Tensor, test: Tensor, over: tuple[int, ...] = (0,)) -> tuple[Tensor, Tensor]:
    """Both by the mean and deviation of ``train`` over these dimensions; what is constant becomes 0."""
    mean, deviation = train.mean(over, keepdim=True), train.std(over, keepdim=True)
    deviation = torch.where(deviation > 0, deviation, 1.0)
    return (train - mean) / deviation, (test - mean) / deviation
