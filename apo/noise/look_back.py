"""A look at what the last step was worth to the batch at hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from apo.layers.arena import Arena, Parts
from apo.meta_learner import Elsewhere
from apo.noise.factor import NoiseFactor
from apo.ranks.distributed import Ranks

__all__ = ["LookBack"]


class LookBack:
    """What a batch that the last step wasn't made of says of it, until the noise factor takes it up."""

    def __init__(self) -> None:
        self._seen: tuple[float, float, float | None] | None = None

    def forget(self) -> None:
        self._seen = None

    def look(self, arena: Arena, gradients: Callable[[], Parts], elsewhere: Elsewhere | None, ranks: Ranks) -> None:
        """See the slope along the last step, which the momentum holds, at θ.

        Args:
            gradients: the batch's, as they stand at present.
            elsewhere: where it is given, the slope before the step is seen too.
        """
        Gs = gradients()
        if all(G is None for G in Gs):
            return
        found = arena.along_momentum(Gs)
        if elsewhere is not None:
            with elsewhere(partial(arena.step_back, Gs)) as scale:
                before = arena.along_momentum(gradients())[:1] / scale
            found = torch.cat([found, before])
        ranks.average_([found])
        after, square, *rest = found.tolist()
        if all(map(math.isfinite, (after, *rest))) and 0 < square < math.inf:
            self._seen = after, square, rest[0] if rest else None

    def taken_up(self, group: Mapping[str, Any], size: float, *, step: int) -> dict[str, Any]:
        """What the factor remembers from now on, in units of what this step promises; nothing, where nothing was seen.

        Args:
            group: that holds what it remembers.
            size: what the step t promises.
            step: t.
        """
        seen, self._seen = self._seen, None
        if seen is None or not 0 < size < math.inf:
            return {}
        return NoiseFactor().look(group, *seen, size, step=step, loss=group["apo_mean_loss"])
