"""Optimizers by name, each with the hyperparameters it has, their defaults and the ranges a search draws from.

``sgdm`` is an optimizer at a fixed rate, ``sgdm+step`` the same with a manual schedule of ``schedules.py``.
``apo-lr:adam+cooldown`` learns the height of that schedule.
``apo-lr:adam`` learns its rate (``apo-lr`` alone: SGDm's). ``apo`` learns a preconditioner; of ``apo-defaults`` nothing
is searched.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

import apo
from benchmarks.paper.baselines import EKFAC, KFAC, Shampoo
from benchmarks.paper.baselines.packages import muon, schedule_free, soap
from benchmarks.paper.training.schedules import SCHEDULES
from benchmarks.paper.training.training import Setting

Hyper = dict[str, Any]
_OPEN: Hyper = {"fsd_weight": None, "wsd_weight": None}


@dataclass(frozen=True)
class Range:
    """What a search draws a hyperparameter from: evenly in log between two bounds, or one of a few choices."""

    low: float = 0.0
    high: float = 0.0
    choices: tuple[Any, ...] = ()

    def at(self, share: float) -> Any:
        """The value at ``share`` of the way, from [0, 1)."""
        if self.choices:
            return self.choices[int(share * len(self.choices))]
        return float(f"{self.low * (self.high / self.low) ** share:.4g}")


@dataclass(frozen=True)
class NamedOptimizer:
    """An optimizer that can be named."""

    label: str  # as the paper calls it
    make: Callable[[Setting, Hyper], Optimizer]  # ``(setting, hyperparameters) -> optimizer``
    defaults: Mapping[str, Any]  # every hyperparameter, where neither a search nor ``--set`` says another
    ranges: Mapping[str, Range]  # those that a search draws. The others stay at their defaults.
    schedule: str = ""  # the manual schedule, or empty
    eps_of_fp16: float | None = None  # the ε that float16 needs: 1e-8 is 0 there

    def hyper(self, given: Mapping[str, Any], precision: str) -> Hyper:
        """All hyperparameters: the given ones over the defaults; ValueError where one isn't among them."""
        unknown = given.keys() - self.defaults.keys()
        if unknown:
            raise ValueError(f"{self.label} has no {', '.join(sorted(unknown))}; it has {', '.join(self.defaults)}")
        found = {**self.defaults, **given}
        if precision == "fp16" and self.eps_of_fp16 is not None and "eps" not in given:
            found["eps"] = self.eps_of_fp16
        return found


def _torch(label: str, kind: type[Optimizer], low: float, high: float, **defaults: float) -> NamedOptimizer:
    """One of torch's, of which the rate is searched. One that divides by a second moment has an ``eps``."""
    hyper = {**defaults, "weight_decay": defaults.get("weight_decay", 0.0)}
    eps = 1e-4 if "eps" in defaults else None
    make = lambda setting, hyper: kind(setting.model.parameters(), **hyper)  # noqa: E731
    return NamedOptimizer(label, make, hyper, {"lr": Range(low, high)}, eps_of_fp16=eps)


def _package(label: str, make: Callable[..., Optimizer], lr: float, **defaults: Any) -> NamedOptimizer:
    """One of a package's, of which the rate is searched, a decade to either side."""
    hyper = {"lr": lr, **defaults}
    ranges = {"lr": Range(lr / 10, 10 * lr)}
    return NamedOptimizer(label, lambda setting, hyper: make(setting.model, **hyper), hyper, ranges)


def _kronecker_factored(label: str, kind: type[KFAC] | type[EKFAC]) -> NamedOptimizer:
    curvature = {"damping": 0.1, "decay": 0.95, "fisher": "sampled", "factor_interval": 1, "inverse_interval": 10}
    return NamedOptimizer(
        label,
        lambda setting, hyper: kind(setting.model, likelihood=setting.task.loss.likelihood, **hyper),
        {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.0, **curvature, "kl_clip": 1e-2},
        # without a clip nearly all of the other two's ranges diverge
        {"lr": Range(1e-3, 1.0), "damping": Range(1e-6, 1.0), "kl_clip": Range(1e-4, 1e-1)},
    )


def _shampoo() -> NamedOptimizer:
    statistics = {"damping": 1e-4, "decay": 0.95, "interval": 10, "block_size": None}
    return NamedOptimizer(
        "Shampoo",
        lambda setting, hyper: Shampoo(setting.model.parameters(), **hyper),
        {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.0, **statistics},
        {"lr": Range(3e-4, 0.3), "damping": Range(1e-8, 1e-2)},
    )


def _apo() -> NamedOptimizer:
    def make(setting: Setting, hyper: Hyper) -> Optimizer:
        own, terms = _split(hyper)
        own["method"] = apo.Method(meta_lr=own.pop("meta_lr"), lr_meta_lr=own.pop("lr_meta_lr"))
        other = partial(setting.batches.other, own.pop("other_size"))
        return apo.APO(setting.model, setting.task.objective(setting.model, other, **terms), **own)

    own = _defaults(apo.APO, "lr", "momentum", "weight_decay", "block_size", "interval", "warmup")
    return NamedOptimizer(
        "APO-Precond",
        make,
        {**own, **_defaults(apo.Method, "meta_lr", "lr_meta_lr"), **_OPEN, "other_size": None},
        {"fsd_weight": Range(0.1, 30.0), "wsd_weight": Range(choices=(0.0, 1e-4)), "interval": Range(choices=(10, 50))},
    )


def _defaults(kind: Callable[..., Any], *names: str) -> Hyper:
    """The library's own."""
    return {name: inspect.signature(kind).parameters[name].default for name in names}


def _split(hyper: Hyper) -> tuple[Hyper, Hyper]:
    """The optimizer's hyperparameters, and the objective's. A λ of None is left to the front end."""
    terms = {key: hyper[key] for key in _OPEN}
    return {key: value for key, value in hyper.items() if key not in terms}, terms


METHODS: dict[str, NamedOptimizer] = {
    "sgd": _torch("SGD", torch.optim.SGD, 1e-3, 10.0, lr=0.1),
    "sgdm": _torch("SGDm", torch.optim.SGD, 1e-4, 1.0, lr=0.1, momentum=0.9),
    "rmsprop": _torch("RMSprop", torch.optim.RMSprop, 1e-5, 1e-1, lr=1e-3, alpha=0.99, eps=1e-8),
    "adam": _torch("Adam", torch.optim.Adam, 1e-5, 1e-1, lr=1e-3, eps=1e-8),
    "adamw": _torch("AdamW", torch.optim.AdamW, 1e-5, 1e-1, lr=1e-3, eps=1e-8, weight_decay=0.01),
    "kfac": _kronecker_factored("KFAC", KFAC),
    "ekfac": _kronecker_factored("EKFAC", EKFAC),
    "shampoo": _shampoo(),
    "muon": _package("Muon", muon, 0.02),
    "soap": _package("SOAP", soap, 3e-3),
    "schedule-free": _package("schedule-free AdamW", schedule_free, 2.5e-3),
    "apo-defaults": replace(_apo(), label="APO, defaults", ranges={}),
    "apo": _apo(),
}
"""The optimizers at a fixed rate, and APO. :func:`method` knows their other forms too."""

_FIRST_ORDER = ("sgd", "sgdm", "rmsprop", "adam", "adamw")
_WITHOUT_MOMENTUM = ("sgd", "rmsprop")


def names() -> list[str]:
    """Every name without a schedule; ``+step`` and the like may follow all that learn no rate."""
    return [*METHODS, "apo-lr", *(f"apo-lr:{base}" for base in _FIRST_ORDER)]


def method(name: str) -> NamedOptimizer:
    """The method of that name; ValueError where there is none."""
    base, plus, schedule = name.partition("+")
    kind, colon, inner = base.partition(":")
    if kind == "apo-lr" and (not plus or schedule == "cooldown") and (inner in _FIRST_ORDER or not colon):
        learned = _adaptive(inner or "sgdm", rescale_schedule=bool(plus))
        return _scheduled(learned, schedule) if plus else learned
    if base in METHODS and not plus:
        return METHODS[base]
    if base in METHODS and schedule in SCHEDULES and not base.startswith("apo"):
        return _scheduled(METHODS[base], schedule)
    raise ValueError(
        f"optimizer must be one of {', '.join(names())}, or one that learns no rate followed by "
        f"{' or '.join('+' + s for s in SCHEDULES)}, but got {name!r}"
    )


def _adaptive(base: str, *, rescale_schedule: bool = False) -> NamedOptimizer:
    """AdaptiveLR over a first-order method, with the loss on B′. Its initial rate hardly matters and isn't searched."""
    inner, momentum = METHODS[base], base not in _WITHOUT_MOMENTUM
    meta = _defaults(apo.AdaptiveLR, "interval", "warmup", "meta_lr", "meta_optimizer", "reach")
    meta["rescale_schedule"] = rescale_schedule

    def make(setting: Setting, hyper: Hyper) -> Optimizer:
        own, terms = _split(hyper)
        chosen = {key: own.pop(key) for key in meta}
        task, others = setting.task, setting.batches.other_labelled
        objective = task.objective(setting.model, others, loss=task.loss_from, **terms)
        return apo.AdaptiveLR(inner.make(setting, own), objective, **chosen)

    return replace(
        inner,
        label=f"{inner.label}-APO",
        make=make,
        defaults={**inner.defaults, **meta, **_OPEN},
        # At a short reach λ_WSD is what decays the rate: below 1e-3 it was measured to do too little.
        ranges={"fsd_weight": Range(3e-3, 1.0), "wsd_weight": Range(1e-4 if momentum else 1e-3, 0.1)},
    )


def _scheduled(inner: NamedOptimizer, schedule: str) -> NamedOptimizer:
    own: Hyper = {"step": {"factor": 0.1}, "cooldown": {}}.get(schedule, {"warmup": 0.1})
    drawn = {"factor": Range(choices=(0.1, 0.2, 0.5))} if schedule == "step" else {}

    def make(setting: Setting, hyper: Hyper) -> Optimizer:
        return inner.make(setting, {key: value for key, value in hyper.items() if key not in own})

    return replace(
        inner,
        label=f"{inner.label}, {schedule.replace('-', ' then ')}",
        make=make,
        defaults={**inner.defaults, **own},
        ranges={**inner.ranges, **drawn},
        schedule=schedule,
    )
