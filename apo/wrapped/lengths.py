"""How long an optimizer's coming step is beside others, at the same rate and for the same gradient."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer, RMSprop

from apo.rates.slopes import carried_in
from apo.wrapped.snapshot import with_wrapped

__all__ = ["carried", "lasting", "lengthened"]

Group = dict[str, Any]


def lengthened(optimizer: Optimizer) -> float:
    """How many times as long as later ones it is.

    RMSprop's first ones are up to 1/√(1 − α) times as long, because it has no bias correction. Trials go as far as
    later steps will: by the first ones the rate would fall, and where noise balances progress it wouldn't rise again.
    """
    found = 1.0
    for one in with_wrapped(optimizer):
        for group in one.param_groups if isinstance(one, RMSprop) else ():
            steps = [one.state[p].get("step", 0) for p in group["params"] if p in one.state]
            share = 1 - group["alpha"] ** (1 + max(map(float, steps), default=0.0))
            found = max(found, share**-0.5 if share > 0 else 1.0)
    return found


def carried(optimizer: Optimizer) -> float:
    """How many times its own length momentum will carry it: that of SGD and of RMSprop, which adds steps up."""
    return max(1.0, *map(carried_in, _groups(optimizer)))


def lasting(optimizer: Optimizer) -> float:
    """How many times its own length a step goes on to go, whatever gradients follow: as momentum decays, or a mean of
    gradients as Adam's."""
    decays = [float(g["betas"][0] if g.get("betas") else g.get("momentum") or 0.0) for g in _groups(optimizer)]
    return max([1.0, *(1 / (1 - decay) for decay in decays if 0 < decay < 1)])


def _groups(optimizer: Optimizer) -> list[Group]:
    return [group for one in with_wrapped(optimizer) for group in one.param_groups]
