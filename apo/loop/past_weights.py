"""Where the weights have been."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apo.loop.remembering import with_groups
from apo.ranks.sharding import is_placed, local

__all__ = ["PastWeights", "Way", "WithPastWeights", "means_taken", "with_means"]

NAMES = ("apo_past_weights", "apo_recent_weights")
"""Under which names states hold a parameter's means."""
POWERS = (2.0, 8.0)
"""Of the time, by which shares of training follow one another in them: on the mean a third and a ninth of it ago."""
BETWEEN = 1 / (1 + POWERS[0]) - 1 / (1 + POWERS[1])
"""What of a straight way lies between them."""


class Way(NamedTuple):
    """What gradients say of the way come.

    Attributes:
        back: ``⟨G, θ − θ̄⟩``, what going back to the older mean would gain.
        falling: ``−dJ/d log t``, by what lies between the means.
    """

    back: float = math.nan
    falling: float = math.nan

    @classmethod
    def by(cls, past: float, recent: float) -> Way:
        """By the products of G and the ways from the means."""
        return cls(past, (recent - past) / BETWEEN)


class PastWeights:
    """Two means θ̄ of the weights over training, in which later times weigh more, in the second more so.

    Of each parameter, or this rank's part of it, in float32 at least, because a mean changes by less than the weights.
    """

    def __init__(self) -> None:
        self._means: list[list[Tensor]] = [[] for _ in POWERS]

    def ways_to(self, weights: Sequence[Tensor]) -> list[list[Tensor]]:
        """``θ − θ̄`` for each mean; 0 of weights that are new."""
        now = self._settled(weights)
        return [list(torch._foreach_sub(now, means)) for means in self._means]

    def follow(self, weights: Sequence[Tensor], share: float) -> None:
        """Take up the weights, which have been there for a share of training."""
        now = self._settled(weights)
        for means, power in zip(self._means, POWERS, strict=True):
            torch._foreach_lerp_(means, now, min(power * share, 1.0))

    def state(self, parameters: Sequence[Tensor], place: int) -> dict[str, Tensor]:
        """The means of the parameter at a place, by name, as they are, placed as it is."""
        if place >= len(self._means[0]):
            self._settled([local(p) for p in parameters])
        p = parameters[place]
        return {n: _placed_as(p, m[place].to(p.device)) for n, m in zip(NAMES, self._means, strict=True)}

    def load(self, parameters: Sequence[Tensor], states: Sequence[Mapping[str, Tensor]]) -> None:
        """Take up what :meth:`state` gave of each; where a mean isn't there, it begins from the weights."""
        parts = [local(p) for p in parameters]
        self._means = [
            [_begun(local(state[name]) if name in state else part) for part, state in zip(parts, states, strict=True)]
            for name in NAMES
        ]

    def _settled(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """The weights in the means' dtypes; where they are new or have moved, the means follow first."""
        for i, means in enumerate(self._means):
            begun = means + [_begun(w) for w in weights[len(means) :]]
            self._means[i] = [m.to(w.device, _wide(w)) for m, w in zip(begun, weights, strict=True)]
        return [w.detach().to(_wide(w)) for w in weights]


class WithPastWeights(Mapping[Tensor, dict[str, Any]]):
    """An optimizer's state of each parameter with the means beside it, of which the optimizer isn't told: most take an
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
        place = {id(q): i for i, q in enumerate(parameters)}.get(id(p))
        return self._own[p] if place is None else {**self._own.get(p, {}), **self._past.state(parameters, place)}

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


def with_means(state_dict: dict[str, Any], past: PastWeights, parameters: Sequence[Tensor]) -> None:
    """Put copies of the means into a state dict of the optimizer that has the parameters."""
    states, names = _of_parameters(state_dict)
    for place, name in enumerate(names):
        means = past.state(parameters, place)
        states[name] = {**states.get(name, {}), **{k: mean.clone() for k, mean in means.items()}}


def means_taken(state_dict: dict[str, Any]) -> list[dict[str, Tensor]]:
    """Take the means out of a state dict, so that it is the optimizer's own; of each parameter by name."""
    states, names = _of_parameters(state_dict)
    taken = []
    for name in names:
        state = states.get(name, {})
        taken.append({key: state.pop(key) for key in NAMES if key in state})
        if not state:
            states.pop(name, None)  # of optimizers that have none
    return taken


def _of_parameters(state_dict: Any) -> tuple[dict[Any, Any], list[Any]]:
    """A state dict's states of parameters, and by which names it has them, in order."""
    held = with_groups(state_dict)
    if held is None or not isinstance(held.get("state"), dict):
        return {}, []
    return held["state"], [name for group in held["param_groups"] for name in group["params"]]


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
