"""Which positions of the outputs on B′ count: padding must not dilute the function-space term."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from apo.trial import modules_of

__all__ = ["CountedPositions", "Mask", "kept_positions", "select"]

Mask = Callable[[Any], Tensor] | int | bool | None
"""A callable ``mask(batch) -> bool tensor``; an int, the target of positions that don't count; None: find padding by
itself; False: every position counts."""


IGNORED = -100
"""The target that torch's losses leave out."""


class CountedPositions(NamedTuple):
    """The positions that count.

    Attributes:
        places: their flat indices; None: all of them.
        dims: over how many leading dimensions of the outputs they go.
    """

    places: Tensor | None
    dims: int

    @property
    def none(self) -> bool:
        return self.places is not None and self.places.numel() == 0


def kept_positions(mask: Mask, model: nn.Module, batch: Any, targets: Any, outputs: Any) -> CountedPositions | None:
    """The positions that count.

    Args:
        mask: see :data:`Mask`.
        batch: what ``inputs`` gave.
        targets: its targets, where the objective has a loss.
        outputs: what the discrepancy compares.

    Returns:
        None where there is no mask.

    Raises:
        TypeError, ValueError: the mask's tensor doesn't fit the outputs.
    """
    first = _first_tensor(outputs)
    if first is None or mask is False:
        return None
    kept: Tensor | None
    if mask is None:
        kept = _padding_found(model, batch, targets, first)
    elif callable(mask):
        kept = _checked(mask(batch), first)
    else:
        labels = targets if isinstance(targets, Tensor) else _labels(batch)
        if labels is None or labels.shape != first.shape[: labels.ndim]:
            raise ValueError(
                f"mask is the target {mask} of positions that don't count, but B′ has no targets of a shape that "
                f"leads the outputs' {tuple(first.shape)}: give a callable mask(batch) instead"
            )
        kept = labels != mask
    if kept is None:
        return None
    return CountedPositions(None if bool(kept.all()) else kept.flatten().nonzero().squeeze(1), kept.ndim)


def select(outputs: Any, kept: CountedPositions) -> Any:
    """The positions that count, as examples: ``(N, T, C)`` becomes ``(kept, C)``."""
    places, dims = kept

    def chosen(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        flat = x.flatten(0, dims - 1)
        return flat if places is None else flat.index_select(0, places.to(x.device))

    return tree_map(chosen, outputs)


def _padding_found(model: nn.Module, batch: Any, targets: Any, outputs: Tensor) -> Tensor | None:
    """From a mapping's attention_mask, from the tokens that an embedding takes as padding, or from the targets."""
    if isinstance(batch, Mapping):
        held = batch.get("attention_mask")
        if isinstance(held, Tensor) and _leads(held, outputs):
            return held != 0
    tokens = _tokens(batch)
    paddings = {m.padding_idx for m in modules_of([model]) if isinstance(m, nn.Embedding) and m.padding_idx is not None}
    if tokens is not None and _leads(tokens, outputs) and len(paddings) == 1:
        return tokens != paddings.pop()
    labels = targets if isinstance(targets, Tensor) else batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(labels, Tensor) and not labels.is_floating_point() and _leads(labels, outputs):
        return labels != IGNORED
    return None


def _leads(positions: Tensor, outputs: Tensor) -> bool:
    return outputs.ndim == positions.ndim + 1 and outputs.shape[:-1] == positions.shape


def _tokens(batch: Any) -> Tensor | None:
    if isinstance(batch, Mapping):
        batch = batch.get("input_ids")
    while isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    integers = (torch.int64, torch.int32, torch.int16, torch.uint8)
    return batch if isinstance(batch, Tensor) and batch.dtype in integers else None


def _labels(batch: Any) -> Tensor | None:
    held = batch.get("labels") if isinstance(batch, Mapping) else _tokens(batch)
    return held if isinstance(held, Tensor) else None


def _checked(kept: Any, outputs: Tensor) -> Tensor:
    if not isinstance(kept, Tensor):
        raise TypeError(f"mask must return a bool tensor, but got {type(kept).__name__}")
    if kept.ndim == 0 or kept.shape != outputs.shape[: kept.ndim]:
        raise ValueError(
            f"mask must return a bool tensor whose shape leads the outputs' {tuple(outputs.shape)}, "
            f"but got {tuple(kept.shape)}"
        )
    return kept.to(torch.bool)


def _first_tensor(outputs: Any) -> Tensor | None:
    return next((x for x in tree_leaves(outputs) if isinstance(x, Tensor)), None)
