"""The one training loop. Whatever trains a network here takes its steps with :func:`take_steps`."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

LossAt = Callable[[int], Callable[[], Tensor]]
"""Given a step's number, returns the function that computes the loss of that step's batch."""


@contextmanager
def weights_to_judge(optimizer: Optimizer) -> Iterator[None]:
    """The model has the weights to evaluate within the context. Schedule-free methods train at others."""
    modes = [getattr(optimizer, name, lambda: None) for name in ("eval", "train")]
    modes[0]()
    try:
        yield
    finally:
        modes[1]()


def take_steps(optimizer: Optimizer, loss_at: LossAt, numbers: Iterable[int]) -> Iterator[Tensor]:
    """Take a step for each of these numbers, and yield its loss afterwards.

    ``loss_at`` is called once per step, before it. The function that it returns may be called more often: APO
    evaluates the loss at trial weights as well.
    """
    for number in numbers:
        loss_of_batch = loss_at(number)

        def closure(loss_of_batch: Callable[[], Tensor] = loss_of_batch) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of_batch()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        loss: Any = optimizer.step(closure)  # type: ignore[arg-type]
        yield loss.detach()
