"""The ways of learning A, B and S that are compared, and the optimizers they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from torch.optim import Optimizer

import apo
from benchmarks.paper.studies.start_from_moments import blocks_from_moments
from benchmarks.paper.studies.steps_by_length import StepsByLength
from benchmarks.paper.training.optimizers import METHODS
from benchmarks.paper.training.training import Setting


@dataclass(frozen=True)
class Variant:
    """APO with one thing done otherwise.

    Attributes:
        fsd_weight, wsd_weight: λ_FSD and λ_WSD; None: APO's.
    """

    what: str  # in words, for the table
    settings: Mapping[str, Any] = field(default_factory=dict)  # of :class:`apo.APO`, over its defaults
    fsd_weight: float | None = None
    wsd_weight: float | None = None
    decay: float = 1.0  # every meta-rate is multiplied by this after each step
    other: str = "fresh"  # which batch B′ is: ``"fresh"``, ``"same"`` as B, or ``"large"``, four fresh ones
    learned: str = "ABS"  # which of ``"ABS"`` are learned; the others stay the identity
    moments: bool = False  # start A and B from the second moments of ten gradients
    by_length: bool = False  # relative steps by their length alone
    start: Mapping[str, float] = field(default_factory=dict)  # constants of apo's FisherStart, such as RATE
    study: str = "meta-update"

    def make(self, setting: Setting) -> Optimizer:
        task, model, batches = setting.task, setting.model, setting.batches
        draw: dict[str, Callable[[], Any]] = {
            "fresh": batches.other,
            "same": lambda: batches.latest,
            "large": lambda: tuple(torch.cat(xs) for xs in zip(*(batches.other() for _ in range(4)), strict=True)),
        }
        objective = task.objective(model, draw[self.other], fsd_weight=self.fsd_weight, wsd_weight=self.wsd_weight)
        optimizer = apo.APO(model, objective, **self.settings)
        for name, value in self.start.items():
            setattr(optimizer._start, name, value)
        if self.by_length:
            learned, optimizer.meta = optimizer.meta.learned, StepsByLength()
            optimizer.meta.add(learned)
        for layer in optimizer.layers:
            for name, own in zip(layer.learned, layer.phi, strict=True):
                own.rate *= name in self.learned
        if self.moments:
            blocks_from_moments(optimizer, setting)
        if self.decay != 1.0:
            optimizer.register_step_post_hook(lambda *_: optimizer.meta.scale_rates(self.decay))
        return optimizer


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

_TEN = {"interval": 10}

VARIANTS |= {
    name: replace(variant, settings=_TEN | dict(variant.settings), study="start")
    for name, variant in {
        "start": Variant("defaults at interval 10"),
        "start: λ_WSD 0": Variant("", wsd_weight=0.0),
        "start: λ_WSD 0.001": Variant("", wsd_weight=1e-3),
        "start: none": Variant("no Fisher start", {"fisher_start": 0}),
        "start: 100": Variant("shorter start", {"fisher_start": 100}),
        "start: 450": Variant("longer start", {"fisher_start": 450}),
        "start: ε 0.1": Variant("faster start", start={"RATE": 0.1}),
        "start: β 0.98": Variant("shorter running means of the start", start={"BETA": 0.98}),
        "start: momentum 0": Variant("", {"momentum": 0.0}),
        "start: momentum 0.75": Variant("", {"momentum": 0.75}),
        "start: rate 0.05": Variant("lr learned at half the rate", {"lr_meta_lr": 0.05}),
        "start: rate 0.2": Variant("lr learned at twice the rate", {"lr_meta_lr": 0.2}),
        "start: interval 1": Variant("the same", {"interval": 1}),
    }.items()
}


@dataclass(frozen=True)
class Baseline:
    """An optimizer to compare with.

    Attributes:
        grid: the settings that are tried. What they don't set has the optimizer's own default.
    """

    method: str  # its name among :data:`METHODS`
    grid: tuple[dict[str, float], ...]
    fixed: Mapping[str, float] = field(default_factory=dict)  # what all of them share

    def make(self, setting: Setting, hyper: Mapping[str, float]) -> Optimizer:
        return METHODS[self.method].make(setting, {**self.fixed, **hyper})


def _grid(**values: tuple[float, ...]) -> tuple[dict[str, float], ...]:
    return tuple(dict(zip(values, chosen, strict=True)) for chosen in product(*values.values()))


_SGD_RATES = (1e-3, 3e-3, 0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
_ADAM_RATES = (1e-4, 3e-4, 1e-3, 2e-3, 3e-3, 5e-3, 0.01, 0.02, 0.03, 0.05, 0.1, 0.3)

BASELINES: dict[str, Baseline] = {
    "KFAC": Baseline("kfac", _grid(lr=(0.03, 0.1), damping=(1e-8, 1e-6, 1e-4, 1e-2, 3e-2, 1e-1))),
    "Shampoo": Baseline("shampoo", _grid(lr=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0), damping=(1e-8, 1e-4))),
    "SGDm": Baseline("sgdm", _grid(lr=_SGD_RATES), {"momentum": 0.9}),
    "Adam": Baseline("adam", _grid(lr=_ADAM_RATES)),
}
