"""The batches of a run. They follow from the seed, so that runs can be compared and resumed to the bit."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.paper.data import Examples

Inputs = tuple[Tensor, ...]
Augment = Callable[[Inputs, torch.Generator], Inputs]


class Batches:
    """Batches B of an epoch, and B′ beside them.

    B is a pass through the shuffled examples, the incomplete last batch left out; it follows from the seed and the
    epoch alone, so that every optimizer sees the same. B′ is drawn uniformly, by a generator of its own.

    Attributes:
        latest: the inputs of the last B that was asked for.
    """

    def __init__(self, examples: Examples, size: int, seed: int, augment: Augment | None = None) -> None:
        if size > len(examples):
            raise ValueError(f"size must be at most the {len(examples)} examples, but got {size}")
        self.examples, self.size, self.seed, self.augment = examples, size, seed, augment
        self._others = torch.Generator().manual_seed(_mixed(seed, -1))
        self.latest: Inputs = ()
        self._order: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self.examples) // self.size

    def batch(self, step: int) -> tuple[Inputs, Tensor]:
        """B of a step, counted from the start of the run."""
        epoch, place = divmod(step, len(self))
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(_mixed(self.seed, epoch))
            order = torch.randperm(len(self.examples), generator=generator)
            self._order = epoch, order.to(self.examples.targets.device)
        chosen = self._order[1][place * self.size : (place + 1) * self.size]
        inputs, targets = self.examples.batch(chosen)
        if self.augment is not None:
            inputs = self.augment(inputs, torch.Generator().manual_seed(_mixed(self.seed + 1, step)))
        self.latest = inputs
        return inputs, targets

    def other(self, most: int | None = None) -> Inputs:
        """The inputs of the next B′, of as many examples as B has, or ``most``."""
        return self.other_labelled(most)[0]

    def other_labelled(self, most: int | None = None) -> tuple[Inputs, Tensor]:
        """The next B′ with its targets."""
        chosen = torch.randint(len(self.examples), (min(self.size, most or self.size),), generator=self._others)
        inputs, targets = self.examples.batch(chosen.to(self.examples.targets.device))
        return (inputs if self.augment is None else self.augment(inputs, self._others)), targets

    def state_dict(self) -> dict[str, Tensor]:
        """Where B′ stands; B needs no state."""
        return {"others": self._others.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._others.set_state(state["others"])


def _mixed(seed: int, number: int) -> int:
    """A seed for each pair; multiplying by an odd constant (that of splitmix64) spreads neighbours."""
    return ((seed * 1_000_003 + number + 1) * 0x9E3779B97F4A7C15) % 2**63
