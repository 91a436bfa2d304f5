"""The ways of learning A, B and S that are compared, and the optimizers they are held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import apo
from apo.relative_steps import RelativeSteps
from benchmarks.baselines import KFAC, Shampoo
from benchmarks.studies.initial import blocks_from_moments
from benchmarks.tasks import Batches, Task

__all__ = ["BASELINES", "VARIANTS", "Baseline", "Variant"]


@dataclass(frozen=True)
class Variant:
    """APO with one thing done otherwise.

    Attributes:
        what: in words, for the table.
        settings: of :class:`apo.APO`, over its defaults.
        fsd_weight, wsd_weight: λ_FSD and λ_WSD.
        decay: every meta-rate is multiplied by this after each step.
        other: which batch B′ is: ``"fresh"``, ``"same"`` as B, or ``"large"``, four fresh ones.
        learned: which of ``"ABS"`` are learned; the others stay the identity.
        moments: start A and B from the second moments of ten gradients.
    """

    what: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    fsd_weight: float | None = None
    wsd_weight: float = 0.0
    decay: float = 1.0
    other: str = "fresh"
    learned: str = "ABS"
    moments: bool = False

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
        if self.learned != "ABS":
            assert isinstance(optimizer.meta, RelativeSteps)
            names = [name for layer in optimizer.layers for name in layer.learned]
            held = zip(names, optimizer.meta.rates, strict=True)
            optimizer.meta.rates = [rate if name in self.learned else 0.0 for name, rate in held]
        if self.moments:
            blocks_from_moments(optimizer, task, model, batches)
        return optimizer

    def after_step(self, optimizer: Optimizer) -> None:
        if self.decay != 1.0:
            assert isinstance(optimizer, apo.APO)
            optimizer.meta.scale_rates(self.decay)


ADAM = {"meta_optimizer": "adam", "lookahead": "step"}

VARIANTS: dict[str, Variant] = {
    "default": Variant("apo.APO's defaults: each of the first 300 steps, then every 10"),
    "interval 1": Variant("meta-update every step", {"interval": 1}),
    "warm-up 50": Variant("few meta-updates early", {"interval": 10, "warmup": 50}),
    "warm-up 200": Variant("meta-update at each of the first 200", {"interval": 10, "warmup": 200}),
    "step": Variant("lookahead with the old momentum in it", {"lookahead": "step", "interval": 1}, 10.0),
    "λ 0.3": Variant("λ_FSD 0.3", {"interval": 1}, 0.3),
    "λ 3": Variant("λ_FSD 3", {"interval": 1}, 3.0),
    "WSD": Variant("λ_WSD 0.01", {"interval": 1}, 1.0, 0.01),
    "former default": Variant("Adam, rate / side, λ_FSD 3", {**ADAM, "interval": 10, "warmup": 50}, 3.0),
    "adam fast": Variant("Adam, rate 0.1 / side, λ_FSD 10", {**ADAM, "interval": 1, "meta_lr": 0.1}, 10.0),
    "adam whole": Variant("the same at the whole lookahead", {"meta_optimizer": "adam", "interval": 1, "meta_lr": 0.1}),
    "decaying": Variant("meta-rate halves in 140 steps", {"interval": 1}, decay=0.995),
    "meta-rate 0.03": Variant("relative steps of 0.03", {"interval": 1, "meta_lr": 0.03}),
    "meta-rate 0.3": Variant("relative steps of 0.3", {"interval": 1, "meta_lr": 0.3}),
    "full blocks": Variant("blocks not cut", {"interval": 1, "block_size": None}),
    "S alone": Variant("no blocks", {"interval": 1, "block_size": 1}),
    "A alone": Variant("one-sided blocks, and S", {"interval": 1}, learned="AS"),
    "B alone": Variant("one-sided blocks, and S", {"interval": 1}, learned="BS"),
    "moments": Variant("A and B start from ten gradients' second moments", {"interval": 1}, moments=True),
    "momentum 0": Variant("no momentum", {"interval": 1, "momentum": 0.0}),
    "momentum 0 + WSD": Variant("no momentum, λ_WSD 0.003", {"interval": 1, "momentum": 0.0}, 1.0, 0.003),
    "B' = B": Variant("FSD on the batch itself", {"interval": 1}, other="same"),
    "B' of 4 batches": Variant("FSD on four fresh batches", {"interval": 1}, other="large"),
    "P fixed": Variant("only lr learned", {"interval": 1, "meta_lr": 0.0}),
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
