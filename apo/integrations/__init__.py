"""What trainers need beside the optimizer: ``apo.integrations.lightning`` and ``apo.integrations.transformers``.

Import the one that you use: each needs its own library, and ``import apo`` imports neither. accelerate needs nothing.
See ``docs/trainers.md``.
"""

from __future__ import annotations

from typing import Any

from apo.meta_learner import MetaLearner

__all__ = ["front_end", "prefixed_metrics"]


def front_end(optimizer: Any) -> MetaLearner | None:
    """The front end inside the wrappers of Lightning, accelerate and DeepSpeed; None where there is none."""
    while optimizer is not None:
        wrapped = getattr(optimizer, "__dict__", {}).get("_optimizer")
        if wrapped is None:  # else Lightning's, which is an instance of the wrapped optimizer's class too
            if isinstance(optimizer, MetaLearner):
                return optimizer
            wrapped = getattr(optimizer, "optimizer", None)
        optimizer = wrapped
    return None


def prefixed_metrics(optimizers: list[MetaLearner]) -> dict[str, float]:
    """``metrics()`` under names ``apo/…``, or ``apo/0/…``, ``apo/1/…`` where there are several optimizers."""
    return {
        f"apo/{name}" if len(optimizers) == 1 else f"apo/{i}/{name}": value
        for i, optimizer in enumerate(optimizers)
        for name, value in optimizer.metrics().items()
    }
