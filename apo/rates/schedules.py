"""Which torch schedulers write an optimizer's rates, and whether they keep what was learned of them."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau, SequentialLR

__all__ = ["Schedules"]

Group = dict[str, Any]


class Schedules:
    """Finds the schedulers that were built on an optimizer, which keeps no list of them.

    Args:
        optimizers: the front end, and the optimizer that it wraps, on which a scheduler may be built as well.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = list(optimizers)
        self._last_epochs: WeakKeyDictionary[LRScheduler, int] = WeakKeyDictionary()
        self._writes = 0

    def keep_what_was_learned(self, groups: Sequence[Group]) -> bool | None:
        """Call it when something has written the rates. None: it was none of torch's schedulers."""
        self._writes += 1
        stepped = self._stepped()
        if not stepped and self._writes & (self._writes - 1) == 0:  # at the 1st, 2nd, 4th, ...: a search takes a while
            self._search()
            stepped = self._stepped()
        found = [_keeps(scheduler, since, groups) for scheduler, since in stepped]
        known = [keeps for keeps in found if keeps is not None]
        return all(known) if known else None

    def _search(self) -> None:
        kinds = {LRScheduler, *_subclasses(LRScheduler)}
        for held in gc.get_objects():
            if type(held) in kinds:
                optimizer, epoch = held.__dict__.get("optimizer"), held.__dict__.get("last_epoch")
                # a ChainedScheduler has no epoch of its own, but the schedulers that it chains have
                if epoch is not None and any(optimizer is own for own in self._optimizers):
                    self._last_epochs.setdefault(held, epoch - 1)

    def _stepped(self) -> list[tuple[LRScheduler, int]]:
        """The schedulers that were stepped since the last call, each with the epoch that it was at."""
        found = []
        for scheduler, since in list(self._last_epochs.items()):
            if scheduler.last_epoch != since:
                self._last_epochs[scheduler] = scheduler.last_epoch
                found.append((scheduler, since))
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {"_optimizers": self._optimizers, "_writes": 0}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _last_epochs=WeakKeyDictionary())


def _subclasses(kind: type) -> set[type]:
    found: set[type] = set(kind.__subclasses__())
    return found.union(*map(_subclasses, found))


def _keeps(scheduler: LRScheduler, since: int, groups: Sequence[Group]) -> bool | None:
    """Whether it computes rates from those that it finds; None where it doesn't say."""
    if isinstance(scheduler, ReduceLROnPlateau):
        return True
    if isinstance(scheduler, SequentialLR):  # at a milestone it sets the rate from its own base
        return not any(since < milestone <= scheduler.last_epoch for milestone in scheduler._milestones)
    rates = [group["lr"] for group in groups]
    try:
        with warnings.catch_warnings(), _put_back(groups, rates):
            warnings.simplefilter("ignore")  # get_lr() warns that it isn't for calling
            found = []
            for factor in (1.0, 0.5):
                for group, rate in zip(groups, rates, strict=True):
                    group["lr"] = rate * factor if float(rate) else 1.0 * factor
                found.append([float(rate) for rate in scheduler.get_lr()])
    except Exception:  # a scheduler of one's own that has another way to step
        return None
    return found[0] != found[1]


@contextmanager
def _put_back(groups: Sequence[Group], rates: Sequence[float | Tensor]) -> Iterator[None]:
    try:
        yield
    finally:
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
