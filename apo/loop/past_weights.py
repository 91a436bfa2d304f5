"""Where the weights have been."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from apo.ranks.sharding import is_placed, local

__all__ = ["MEAN", "PastWeights", "WithPastWeights"]

MEAN = "apo_past_weights"
"""Under which name states hold a parameter's mean."""


class PastWeights:
    """A mean θ̄ of the weights over training, each weighed by its time: of a straight way, where two thirds of it lay.

    Of each parameter, or this rank's part of it, in float32 at least, because a mean changes by less than the weights.
    """

    POWER = 2.0
    """Of the time, by which shares of training follow one another in it."""

    def __init__(self) -> None:
        self._means: list[Tensor] = []

    def way_to(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """``θ − θ̄``; 0 of weights that are new."""
        return list(torch._foreach_sub(self._settled(weights), self._means))

    def follow(self, weights: Sequence[Tensor], share: float) -> None:
        """Take up the weights, which have been there for a share of training."""
        torch._foreach_lerp_(self._means, self._settled(weights), min(self.POWER * share, 1.0))

    def means(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """As they are, placed as the parameters are."""
        self._settled([local(p) for p in parameters])
        return [_placed_as(p, m) for p, m in zip(parameters, self._means, strict=True)]

    def load(self, parameters: Sequence[Tensor], saved: Sequence[Tensor | None]) -> None:
        """Take up what :meth:`means` gave; where that is None, begin from the weights."""
        parts = [local(p) for p in parameters]
        self._means = [_begun(part if s is None else local(s)) for part, s in zip(parts, saved, strict=True)]

    def _settled(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """The weights in the means' dtypes; where they are new or have moved, the means follow first."""
        self._means += [_begun(w) for w in weights[len(self._means) :]]
        self._means = [m.to(w.device, _wide(w)) for m, w in zip(self._means, weights, strict=True)]
        return [w.detach().to(m.dtype) for w, m in zip(weights, self._means, strict=True)]


class WithPastWeights(Mapping[Tensor, dict[str, Any]]):
    """An optimizer's state of each parameter, and the mean beside it, of which the optimizer isn't told: most take an
    empty state for one that isn't begun.

    Args:
        own: the optimizer's.
        past: the means.
        groups: the optimizer's param groups.
    """

    def __init__(
        self, own: Mapping[Tensor, dict[str, Any]], past: PastWeights, groups: Sequence[Mapping[str, Any]]
    ) -> None:
        self._own, self._past, self._groups = own, past, groups

    def __getitem__(self, p: Tensor) -> dict[str, Any]:
        parameters = self._parameters
        means = dict(zip(map(id, parameters), self._past.means(parameters), strict=True))
        return {**self._own.get(p, {}), MEAN: means[id(p)]} if id(p) in means else self._own[p]

    def __iter__(self) -> Iterator[Tensor]:
        yield from dict.fromkeys([*self._parameters, *self._own])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __bool__(self) -> bool:
        """Whether the optimizer's own is begun, which is what callers ask."""
        return bool(self._own)

    @property
    def _parameters(self) -> list[Tensor]:
        return [p for group in self._groups for p in group["params"]]


def _wide(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _begun(weight: Tensor) -> Tensor:
    return weight.detach().to(_wide(weight), copy=True)


def _placed_as(parameter: Tensor, part: Tensor) -> Tensor:
    if not is_placed(parameter):
        return part
    from torch.distributed.tensor import DTensor

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride())
