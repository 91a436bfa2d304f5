"""Gradients whose targets are sampled from the model's own outputs: their second moment is the Fisher matrix."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from apo.inner_products import norms
from apo.objective import ProximalObjective
from apo.ranks.distributed import Ranks
from apo.ranks.sharding import Shards, is_placed
from apo.trial import without_autocast

__all__ = ["FisherSample", "send_sample_back"]


class FisherSample:
    """A sampled gradient of B′: drawn while the graph of its outputs is there, and taken over ranks later."""

    def __init__(self) -> None:
        self._grads: list[Tensor | None] | None = None
        self._places = 1

    def draw(
        self, objective: ProximalObjective, outputs: Any, shards: Shards, ranks: Ranks, *, number: int | None
    ) -> None:
        """Draw it, in the place of one that wasn't taken; all ``.grad`` are None afterwards.

        Args:
            number: which one it is, for the same random numbers in a run that was resumed; None: none is wanted.
        """
        self._grads = None
        tensors = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
        if number is None or not all(isinstance(x, Tensor) and x.requires_grad for x in tensors):
            return  # the discrepancy says what is wrong
        if any(map(is_placed, tensors)):
            return  # samples are drawn of whole outputs
        place, count = shards.batches(tensors)
        self._places = ranks.count * count
        if send_sample_back(objective, outputs, (ranks.rank * count + place) * 2**32 + number):
            self._grads = shards.grads()
            for p in shards.parameters:
                p.grad = None

    def take(self, shards: Shards, ranks: Ranks) -> list[Tensor | None] | None:
        """The sample of all ranks' examples, a part of a gradient for each parameter; None if there is none, or it
        isn't finite. It is drawn once."""
        grads, self._grads = self._grads, None
        if grads is None:
            return None
        pairs = [(p, w) for p, w in zip(shards.parameters, grads, strict=True) if w is not None]
        held = [w for _, w in pairs]
        ranks.average_(held)
        shards.mean_([w for p, w in pairs if not is_placed(p)])  # the others have been averaged
        if not held or shards.any(not bool(norms(held).isfinite().all())):
            return None
        torch._foreach_mul_(held, math.sqrt(self._places))  # a sum over n examples of each rank, over √n
        return grads


def send_sample_back(objective: ProximalObjective, outputs: Any, seed: int, *, again: bool = False) -> bool:
    """Add ``Jᵀ`` times a sample of the outputs' Fisher matrix to ``.grad``; ``again``: the graph is kept. False where
    the discrepancy has none."""
    tensors = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    # of its own, lest training's random numbers change
    generator = torch.Generator(tensors[0].device).manual_seed(seed)
    cotangents = objective.fisher_sample(outputs, generator)
    if cotangents is None:
        return False
    with without_autocast(tensors[0]):
        each = [c.to(t.dtype) for c, t in zip(cotangents, tensors, strict=True)]
        torch.autograd.backward(tensors, each, retain_graph=again)
    return True
