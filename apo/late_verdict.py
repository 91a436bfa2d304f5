"""Whether a step was taken, told without waiting for the device."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["LateVerdict"]


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
