"""The ways of learning A, B and S that are compared, and the optimizers they are compared with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch.optim import Optimizer

import apo
from benchmarks.paper.training.optimizers import METHODS
from benchmarks.paper.training.training import Setting


@dataclass(frozen=True)
class Variant:
    """APO with one thing done otherwise."""

    what: str  # in words, for the table
    settings: Mapping[str, Any] = field(default_factory=dict)  # of :class:`apo.APO`, over its defaults
    fsd_weight: float | None = None  # λ_FSD; None: APO's
    wsd_weight: float | None = None  # λ_WSD
    other: str = "fresh"  # which batch B′ is: ``"fresh"``, ``"same"`` as B, or ``"large"``, four fresh ones

    def make(self, setting: Setting) -> Optimizer:
        task, model, batches = setting.task, setting.model, setting.batches
        draw: dict[str, Callable[[], Any]] = {
            "fresh": batches.other,
            "same": lambda: batches.latest,
            "large": lambda: tuple(torch.cat(xs) for xs in zip(*(batches.other() for _ in range(4)), strict=True)),
        }
        objective = task.objective(model, draw[self.other], fsd_weight=self.fsd_weight, wsd_weight=self.wsd_weight)
        return apo.APO(model, objective, **self.settings)


VARIANTS: dict[str, Variant] = {
    "default": Variant("apo.APO's defaults: steps by size"),
    "interval 2": Variant("an interval of 2 in the end", {"interval": 2}),
    "interval 10": Variant("an interval of 10 in the end", {"interval": 10}),
    "warm-up 50": Variant("a shorter warm-up", {"interval": 10, "warmup": 50}),
    "momentum 0": Variant("no momentum", {"momentum": 0.0}),
    "momentum 0.9": Variant("", {"momentum": 0.9}),
    "λ_WSD 0": Variant("nothing holds P where outputs saturate", wsd_weight=0.0),
    "λ_WSD 0.01": Variant("", wsd_weight=0.01),
    "λ_FSD 0.3": Variant("", fsd_weight=0.3),
    "λ_FSD 3": Variant("", fsd_weight=3.0),
    "full blocks": Variant("blocks not cut", {"block_size": None}),
    "step": Variant("lookahead with the old momentum in it, λ_FSD 10", {"method": apo.Method(lookahead="step")}, 10.0),
    "adam": Variant("Adam on A, B and S, rate 0.01 / side", {"method": apo.Method(meta_optimizer="adam")}),
    "adam fast": Variant("Adam, rate 0.1 / side", {"method": apo.Method(meta_optimizer="adam", meta_lr=0.1)}),
    "meta-rate 0.02": Variant("", {"method": apo.Method(meta_lr=0.02)}),
    "meta-rate 0.1": Variant("", {"method": apo.Method(meta_lr=0.1)}),
    "S alone": Variant("no blocks", {"block_size": 1}),
    "B' = B": Variant("FSD on the batch itself", other="same"),
    "B' of 4 batches": Variant("FSD on four fresh batches", other="large"),
    "P fixed": Variant("only lr learned", {"method": apo.Method(meta_lr=0.0)}),
}

_OFTEN = {"interval": 10, "warmup": 500}
START = {
    "start": Variant("interval 10, warm-up 500", _OFTEN),
    "start: λ_WSD 0": Variant("", _OFTEN, wsd_weight=0.0),
    "start: none": Variant("no Fisher start", _OFTEN | {"method": apo.Method(fisher_start=0)}),
    "start: momentum 0.75": Variant("", _OFTEN | {"momentum": 0.75}),
}
"""What is set for the Fisher start."""

NO_LONGER_RUN = {
    "by length": "relative steps by their length, momentum 0.9, λ_WSD 0",
    "by length + WSD": "the same with the default's momentum and λ_WSD",
    "decaying": "meta-rate halves in 140 steps",
    "A alone": "one-sided blocks, and S",
    "B alone": "one-sided blocks, and S",
    "moments": "A and B start from ten gradients' second moments",
}
"""Ways that reached into ``apo``. Their results were kept; the results file names the commit that had them."""


@dataclass(frozen=True)
class TunedBaseline:
    """An optimizer to compare with."""

    method: str  # its name among :data:`METHODS`
    grid: tuple[dict[str, float], ...]  # the settings that are tried, over the optimizer's own defaults
    fixed: Mapping[str, float] = field(default_factory=dict)  # what all of them share

    def make(self, setting: Setting, hyper: Mapping[str, float]) -> Optimizer:
        return METHODS[self.method].make(setting, {**self.fixed, **hyper})


def _grid(**values: tuple[float, ...]) -> tuple[dict[str, float], ...]:
    return tuple(dict(zip(values, chosen, strict=True)) for chosen in product(*values.values()))


_SGD_RATES = (1e-3, 3e-3, 0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
_ADAM_RATES = (1e-4, 3e-4, 1e-3, 2e-3, 3e-3, 5e-3, 0.01, 0.02, 0.03, 0.05, 0.1, 0.3)

BASELINES: dict[str, TunedBaseline] = {
    "KFAC": TunedBaseline("kfac", _grid(lr=(0.03, 0.1), damping=(1e-8, 1e-6, 1e-4, 1e-2, 3e-2, 1e-1))),
    "Shampoo": TunedBaseline("shampoo", _grid(lr=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0), damping=(1e-8, 1e-4))),
    "SGDm": TunedBaseline("sgdm", _grid(lr=_SGD_RATES), {"momentum": 0.9}),
    "Adam": TunedBaseline("adam", _grid(lr=_ADAM_RATES)),
}
