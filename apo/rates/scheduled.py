"""Where a schedule has a rate, whatever was learned of it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

__all__ = ["Scheduled"]

Group = dict[str, Any]
_GREATEST = ("initial_lr", "max_lr")
"""Where torch's schedulers note the rate that they are shares of."""


class Scheduled(NamedTuple):
    """What a schedule did to a group's rate.

    Attributes:
        share: of the greatest rate that it has, or had so far where nothing notes that; in (0, 1].
        moved: by how much the logarithm of that share has changed since it was last asked for.
    """

    share: float = 1.0
    moved: float = 0.0

    @staticmethod
    def prepare(group: Group) -> None:
        """Put what is remembered into a new group."""
        group.setdefault("apo_greatest_lr", 0.0)
        group.setdefault("apo_scheduled_share", 1.0)

    @staticmethod
    def notice(group: Group, *, kept: bool) -> None:
        """Something wrote the rate: a schedule if what was learned was ``kept``, else a new one to begin with."""
        noted = [float(group[name]) for name in _GREATEST if group.get(name) is not None]
        if kept:
            group["apo_greatest_lr"] = max(group["apo_greatest_lr"], *noted, 0.0)
        else:
            group.update(apo_greatest_lr=0.0, apo_scheduled_share=1.0)

    @classmethod
    def of(cls, group: Group, rate: float) -> Scheduled:
        """Of a group whose schedule alone would have it at this rate."""
        group["apo_greatest_lr"] = greatest = max(rate, group["apo_greatest_lr"])
        if not 0 < rate < math.inf:
            return cls()
        share, before = rate / greatest, group["apo_scheduled_share"]
        group["apo_scheduled_share"] = share
        return cls(share, math.log(share / before))
