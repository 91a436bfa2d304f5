"""Batches B′ on the device of the model that is called on them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from apo.trial import modules_of, parameters_of

__all__ = ["moved", "only_device", "own_loader"]


def own_loader(inputs: Iterable[Any]) -> Iterable[Any]:
    """What goes through the batches beside others that do: a DataLoader whose workers persist has one iterator for all,
    so it gets workers of its own."""
    if not (isinstance(inputs, DataLoader) and inputs.persistent_workers):
        return inputs
    own = copy.copy(inputs)
    own._iterator = None
    return own


def only_device(model: nn.Module) -> torch.device | None:
    """Where the model's parameters are; None where they are on several devices, or there are none."""
    parameters = iter(parameters_of(modules_of([model])))
    first = next(parameters, None)
    return first.device if first is not None and all(p.device == first.device for p in parameters) else None


def moved(batch: Any, device: torch.device) -> Any:
    """A batch with all its tensors on ``device``: in mappings, tuples and lists, and what has a ``to`` of its own."""
    if isinstance(batch, Tensor) or callable(getattr(batch, "to", None)):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(value, device) for value in batch))
    if type(batch) in (tuple, list):
        return type(batch)(moved(value, device) for value in batch)
    return batch
