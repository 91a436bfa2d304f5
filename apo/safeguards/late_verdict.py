"""Whether a step was taken, told without waiting for the device."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["LateVerdict", "LateVerdicts"]

JUDGED_AT_ONCE = 100
"""Steps after one that left itself out: huge gradients, which are divided first, may be what there is."""


class LateVerdict:
    """What kept a step's promise, on its way from the device: NaN where the step was left out, because its promise
    wasn't finite."""

    def __init__(self, factor: Tensor) -> None:
        self._done: Any = None
        self._factor = factor.detach()
        if factor.is_cuda:
            self._factor = torch.empty((), dtype=factor.dtype, pin_memory=True).copy_(factor, non_blocking=True)
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record(torch.cuda.current_stream(factor.device))

    @property
    def taken(self) -> bool:
        """Waits for no more than that step."""
        if self._done is not None:
            self._done.synchronize()
        return not math.isnan(self._factor.item())


class LateVerdicts:
    """Which steps are judged late: one at a time, and none for a while after one that was left out."""

    def __init__(self) -> None:
        self._allowed, self._at_once = False, 0
        self._to_come: LateVerdict | None = None

    def allowed(self, possible: bool) -> bool:
        """Whether the coming step may be judged late, where it is ``possible``."""
        self._at_once = max(0, self._at_once - 1)
        self._allowed = possible and not self._at_once
        return self._allowed

    def await_verdict(self, factor: Tensor) -> None:
        """Take up what kept the promise of a step, if that is judged late."""
        if self._allowed:
            self._to_come = LateVerdict(factor)

    def left_out(self) -> bool:
        """Whether the last step turns out to have been left out; asked once."""
        self._allowed, verdict, self._to_come = False, self._to_come, None
        left_out = verdict is not None and not verdict.taken
        if left_out:
            self._at_once = JUDGED_AT_ONCE
        return left_out
