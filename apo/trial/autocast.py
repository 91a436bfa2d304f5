"""The autocast that a step is called under, and what torch keeps that depends on the weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

__all__ = ["CallersAutocast", "forget_casts", "without_autocast"]


def forget_casts(models: Iterable[nn.Module] = ()) -> None:
    """Drop what torch holds of the weights' former values. Call it whenever weights were written in place.

    Of models under ``fully_shard`` that is the gathered weights, which the root keeps after a forward pass.
    """
    for model in models:
        for module in model.modules():
            if hasattr(module, "reshard") and hasattr(module, "set_reshard_after_backward"):  # an FSDPModule
                module.reshard()  # type: ignore[operator]
    torch.clear_autocast_cache()
    if parametrize._cache_enabled:  # inside parametrize.cached()
        parametrize._cache.clear()


@contextmanager
def without_autocast(outputs: Any) -> Iterator[None]:
    """No operation on such outputs is cast in here."""
    devices = {x.device.type for x in tree_leaves(outputs) if isinstance(x, Tensor)} - {"meta"}
    with ExitStack() as stack:
        for device in devices:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


class CallersAutocast:
    """The autocast that ``step`` was called under: lifted from the optimizer's own arithmetic, not from the model's.

    Args:
        devices: types of the weights' devices.
    """

    def __init__(self, devices: Iterable[str]) -> None:
        self._enabled = [
            (device, torch.get_autocast_dtype(device))
            for device in sorted({"cpu", *devices} - {"meta"})
            if torch.is_autocast_enabled(device)
        ]

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Without autocast and without gradients."""
        with ExitStack() as stack:
            for device, dtype in self._enabled:
                stack.enter_context(torch.autocast(device, dtype, enabled=False))
            stack.enter_context(torch.no_grad())
            yield

    @contextmanager
    def back(self) -> Iterator[None]:
        """Inside :meth:`lifted`: as the caller had it, with gradients."""
        with ExitStack() as stack:
            for device, dtype in self._enabled:
                stack.enter_context(torch.autocast(device, dtype))
            stack.enter_context(torch.enable_grad())
            yield
