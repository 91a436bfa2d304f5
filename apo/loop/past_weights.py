"""Where the weights have been: two means θ̄ of them over training.

Later times weigh more in them, in the second more so. They stand in the optimizer's own state, so that every checkpoint
holds them and trainers move them: of each parameter once it has been stepped, because most optimizers take an empty
state for one that they haven't begun. In float32 at least, as a mean changes by less than the weights, and placed as
the parameter is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apo.loop.remembering import with_groups
from apo.ranks.sharding import local

__all__ = ["NAMES", "Way", "begin", "follow", "put", "taken", "ways_to"]

State = MutableMapping[Tensor, dict[str, Any]]

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


def ways_to(state: State, parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """``θ − θ̄`` for each mean, of this rank's parts; 0 of parameters that have none yet."""
    now = [_wide(local(p).detach()) for p in parameters]
    means = [_means(state, parameters, name) for name in NAMES]
    return [
        list(torch._foreach_sub(now, [w if m is None else m for w, m in zip(now, of_name, strict=True)]))
        for of_name in means
    ]


def follow(state: State, parameters: Sequence[Tensor], weights: Sequence[Tensor], share: float) -> None:
    """Take up weights, this rank's parts, which have been there for a share of training."""
    for name, power in zip(NAMES, POWERS, strict=True):
        means = _means(state, parameters, name)
        pairs = [(m, _wide(w.detach())) for m, w in zip(means, weights, strict=True) if m is not None]
        if pairs:
            torch._foreach_lerp_([m for m, _ in pairs], [w for _, w in pairs], min(power * share, 1.0))
    begin(state, parameters, weights)


def begin(state: State, parameters: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """Begin the means of parameters that have been stepped for the first time."""
    for p, weight in zip(parameters, weights, strict=True):
        if p.grad is not None and NAMES[0] not in state.get(p, {}):
            own = state.setdefault(p, {})
            for name in NAMES:
                own[name] = torch.empty_like(p.detach(), dtype=_wide_dtype(p))
                local(own[name]).copy_(weight.detach())


def taken(state_dict: dict[str, Any]) -> list[dict[str, Tensor]]:
    """Take the means out of a state dict, as torch casts what it loads to the parameters' dtypes; of each parameter by
    name."""
    held = with_groups(state_dict)
    states = held.get("state") if held else None
    if held is None or not isinstance(states, dict):
        return []
    names = [name for group in held["param_groups"] for name in group["params"]]
    return [{k: states[n].pop(k) for k in NAMES if k in states[n]} if n in states else {} for n in names]


def put(state: State, parameters: Sequence[Tensor], means: Sequence[Mapping[str, Tensor]]) -> None:
    """Put what was taken into the state of the parameters, in order."""
    for p, own in zip(parameters, means, strict=False):
        if own:
            state.setdefault(p, {}).update({name: mean.to(p.device) for name, mean in own.items()})


def _means(state: State, parameters: Sequence[Tensor], name: str) -> list[Tensor | None]:
    """This rank's parts. A mean that was cast or left on another device is put right."""
    found: list[Tensor | None] = []
    for p in parameters:
        mean = state.get(p, {}).get(name)
        if mean is not None and (mean.device != p.device or mean.dtype != _wide_dtype(p)):
            mean = state[p][name] = mean.to(p.device, _wide_dtype(p))
        found.append(None if mean is None else local(mean))
    return found


def _wide_dtype(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _wide(weight: Tensor) -> Tensor:
    return weight.to(_wide_dtype(weight))
