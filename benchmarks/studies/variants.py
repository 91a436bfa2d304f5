"""The ways of learning A, B and S that are compared, and the optimizers they are held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import apo
from benchmarks.baselines import KFAC, Shampoo
from benchmarks.studies.initial import blocks_from_moments
from benchmarks.studies.lengths import ByLength
from benchmarks.tasks import Batches, Task

__all__ = ["BASELINES", "VARIANTS", "Baseline", "Variant"]


@dataclass(frozen=True)
class Variant:
    """APO with one thing done otherwise.

    Attributes:
        what: in words, for the table.
        settings: of :class:`apo.APO`, over its defaults.
        fsd_weight, wsd_weight: λ_FSD and λ_WSD; None: APO's.
        decay: every meta-rate is multiplied by this after each step.
        other: which batch B′ is: ``"fresh"``, ``"same"`` as B, or ``"large"``, four fresh ones.
        learned: which of ``"ABS"`` are learned; the others stay the identity.
        moments: start A and B from the second moments of ten gradients.
        by_length: relative steps by their length alone.
    """

    what: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    fsd_weight: float | None = None
    wsd_weight: float | None = None
    decay: float = 1.0
    other: str = "fresh"
    learned: str = "ABS"
    moments: bool = False
    by_length: bool = False

    def make(self, task: Task, model: nn.Module, batches: Batches, inputs: Callable[[], Any]) -> Optimizer:
        """The optimizer; ``inputs`` returns those of the batch that is being trained on."""
        draw: dict[str, Callable[[], Any]] = {
            "fresh": batches.other,
            "same": inputs,
            "large": lambda: tuple(
                torch.cat(parts) for parts in zip(*(batches.other() for _ in range(4)), strict=True)
            ),
        }
        goal = task.objective(model, draw[self.other], fsd_weight=self.fsd_weight, wsd_weight=self.wsd_weight)
        optimizer = apo.APO(model, goal, **self.settings)
        if self.by_length:
            learned, optimizer.meta = optimizer.meta.learned, ByLength()
            optimizer.meta.add(learned)
        for layer in optimizer.layers:
            for name, own in zip(layer.learned, layer.phi, strict=True):
                own.rate *= name in self.learned
        if self.moments:
            blocks_from_moments(optimizer, task, model, batches)
        return optimizer

    def after_step(self, optimizer: Optimizer) -> None:
        if self.decay != 1.0:
            assert isinstance(optimizer, apo.APO)
            optimizer.meta.scale_rates(self.decay)


FORMER = {"momentum": 0.9, "meta_lr": 0.1}

VARIANTS: dict[str, Variant] = {
    "default": Variant("apo.APO's defaults: steps by size, a meta-update every step, momentum 0.75, λ_WSD 0.001"),
    "interval 2": Variant("meta-update at each of the first 300 steps, then every 2", {"interval": 2}),
    "interval 10": Variant("meta-update at each of the first 300 steps, then every 10", {"interval": 10}),
    "warm-up 50": Variant("at each of the first 50, then every 10", {"interval": 10, "warmup": 50}),
    "momentum 0": Variant("no momentum", {"momentum": 0.0}),
    "momentum 0.9": Variant("", {"momentum": 0.9}),
    "λ_WSD 0": Variant("nothing holds P where outputs saturate", wsd_weight=0.0),
    "λ_WSD 0.01": Variant("", wsd_weight=0.01),
    "λ_FSD 0.3": Variant("", fsd_weight=0.3),
    "λ_FSD 3": Variant("", fsd_weight=3.0),
    "by length": Variant("relative steps by their length, momentum 0.9, λ_WSD 0", FORMER, 1.0, 0.0, by_length=True),
    "by length + WSD": Variant("the same with the default's momentum and λ_WSD", {"meta_lr": 0.1}, by_length=True),
    "full blocks": Variant("blocks not cut", {"block_size": None}),
    "step": Variant("lookahead with the old momentum in it, λ_FSD 10", {"lookahead": "step"}, 10.0),
    "adam": Variant("Adam on A, B and S, rate 0.01 / side", {"meta_optimizer": "adam"}),
    "adam fast": Variant("Adam, rate 0.1 / side", {"meta_optimizer": "adam", "meta_lr": 0.1}),
    "decaying": Variant("meta-rate halves in 140 steps", decay=0.995),
    "meta-rate 0.02": Variant("", {"meta_lr": 0.02}),
    "meta-rate 0.1": Variant("", {"meta_lr": 0.1}),
    "S alone": Variant("no blocks", {"block_size": 1}),
    "A alone": Variant("one-sided blocks, and S", learned="AS"),
    "B alone": Variant("one-sided blocks, and S", learned="BS"),
    "moments": Variant("A and B start from ten gradients' second moments", moments=True),
    "B' = B": Variant("FSD on the batch itself", other="same"),
    "B' of 4 batches": Variant("FSD on four fresh batches", other="large"),
    "P fixed": Variant("only lr learned", {"meta_lr": 0.0}),
}


@dataclass(frozen=True)
class Baseline:
    """An optimizer to be held against, with a grid of settings."""

    grid: tuple[Mapping[str, Any], ...]
    build: Callable[[Task, nn.Module, Mapping[str, Any]], Optimizer]


def _grid(**values: tuple[float, ...]) -> tuple[Mapping[str, Any], ...]:
    found: list[dict[str, Any]] = [{}]
    for name, choices in values.items():
        found = [{**f, name: c} for f in found for c in choices]
    return tuple(found)


BASELINES: dict[str, Baseline] = {
    "KFAC": Baseline(
        _grid(lr=(0.03, 0.1), damping=(1e-8, 1e-6, 1e-4, 1e-2, 3e-2, 1e-1)),
        lambda task, model, s: KFAC(model, task.loss.likelihood, **s),
    ),
    "Shampoo": Baseline(
        _grid(lr=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0), damping=(1e-8, 1e-4)),
        lambda task, model, s: Shampoo(model.parameters(), **s),
    ),
    "SGDm": Baseline(
        _grid(lr=(1e-3, 3e-3, 0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)),
        lambda task, model, s: torch.optim.SGD(model.parameters(), momentum=0.9, **s),
    ),
    "Adam": Baseline(
        _grid(lr=(1e-4, 3e-4, 1e-3, 2e-3, 3e-3, 5e-3, 0.01, 0.02, 0.03, 0.05, 0.1, 0.3)),
        lambda task, model, s: torch.optim.Adam(model.parameters(), **s),
    ),
}
