"""Optimizers by name, each with the hyperparameters it has, their defaults and the ranges a search draws from.

``sgdm`` is an optimizer at a fixed rate, ``sgdm+step`` the same with a manual schedule of ``schedules.py``.
``apo-lr:adam`` learns its rate (``apo-lr`` alone: SGDm's). ``apo`` learns a preconditioner.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

import apo
from benchmarks.paper.baselines import EKFAC, KFAC, Shampoo
from benchmarks.paper.training.schedules import SCHEDULES
from benchmarks.paper.training.training import Setting

Hyper = dict[str, Any]


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
class Method:
    """An optimizer that can be named.

    Attributes:
        label: as the paper calls it.
        make: ``(setting, hyperparameters) -> optimizer``.
        defaults: every hyperparameter with the value it has where neither a search nor ``--set`` says another.
        ranges: those that a search draws. The others stay at their defaults.
        schedule: the manual schedule, or empty.
    """

    label: str
    make: Callable[[Setting, Hyper], Optimizer]
    defaults: Mapping[str, Any]
    ranges: Mapping[str, Range]
    schedule: str = ""
    eps_of_fp16: float | None = None
    """The ε that float16 needs: 1e-8 is 0 there."""

    def hyper(self, given: Mapping[str, Any], precision: str) -> Hyper:
        """All hyperparameters: the given ones over the defaults.

        Raises:
            ValueError: a given one isn't among them.
        """
        unknown = given.keys() - self.defaults.keys()
        if unknown:
            raise ValueError(f"{self.label} has no {', '.join(sorted(unknown))}; it has {', '.join(self.defaults)}")
        found = {**self.defaults, **given}
        if precision == "fp16" and self.eps_of_fp16 is not None and "eps" not in given:
            found["eps"] = self.eps_of_fp16
        return found


def _torch(kind: type[Optimizer]) -> Callable[[Setting, Hyper], Optimizer]:
    return lambda setting, hyper: kind(setting.model.parameters(), **hyper)


def _kfac(kind: type[KFAC] | type[EKFAC]) -> Callable[[Setting, Hyper], Optimizer]:
    return lambda setting, hyper: kind(setting.model, likelihood=setting.task.loss.likelihood, **hyper)


def _shampoo(setting: Setting, hyper: Hyper) -> Optimizer:
    return Shampoo(setting.model.parameters(), **hyper)


_OBJECTIVE = ("fsd_weight", "wsd_weight")


def _split(hyper: Hyper) -> tuple[Hyper, Any]:
    """Those of the optimizer, and those of the objective. A λ of None is left to the front end."""
    return (
        {key: value for key, value in hyper.items() if key not in _OBJECTIVE},
        {key: hyper[key] for key in _OBJECTIVE},
    )


def _apo(setting: Setting, hyper: Hyper) -> Optimizer:
    own, terms = _split(hyper)
    objective = setting.task.objective(setting.model, setting.batches.other, **terms)
    settings: dict[str, Any] = own
    return apo.APO(setting.model, objective, **settings)


def _normalised(label: str, kind: type[Optimizer], **own: float) -> Method:
    """A method that divides by the root of a running second moment."""
    return Method(label, _torch(kind), {"lr": 1e-3, **own}, {"lr": Range(1e-5, 1e-1)}, eps_of_fp16=1e-4)


_RATES = Range(1e-4, 1.0)
_SECOND_ORDER: dict[str, Range] = {
    "lr": Range(1e-3, 1.0),
    "damping": Range(1e-6, 1.0),
    "kl_clip": Range(1e-4, 1e-1),  # without a clip nearly all of the other two's ranges diverge
}
_KFAC_DEFAULTS: Hyper = {
    "lr": 0.03,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "damping": 0.1,
    "decay": 0.95,
    "fisher": "sampled",
    "factor_interval": 1,
    "inverse_interval": 10,
    "kl_clip": 1e-2,
}

METHODS: dict[str, Method] = {
    "sgd": Method("SGD", _torch(torch.optim.SGD), {"lr": 0.1, "weight_decay": 0.0}, {"lr": Range(1e-3, 10.0)}),
    "sgdm": Method("SGDm", _torch(torch.optim.SGD), {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0}, {"lr": _RATES}),
    "rmsprop": _normalised("RMSprop", torch.optim.RMSprop, alpha=0.99, eps=1e-8, weight_decay=0.0),
    "adam": _normalised("Adam", torch.optim.Adam, eps=1e-8, weight_decay=0.0),
    "adamw": _normalised("AdamW", torch.optim.AdamW, eps=1e-8, weight_decay=0.01),
    "kfac": Method("KFAC", _kfac(KFAC), _KFAC_DEFAULTS, _SECOND_ORDER),
    "ekfac": Method("EKFAC", _kfac(EKFAC), _KFAC_DEFAULTS, _SECOND_ORDER),
    "shampoo": Method(
        "Shampoo",
        _shampoo,
        {
            "lr": 0.01,
            "momentum": 0.9,
            "weight_decay": 0.0,
            "damping": 1e-4,
            "decay": 0.95,
            "interval": 10,
            "block_size": None,
        },
        {"lr": Range(3e-4, 0.3), "damping": Range(1e-8, 1e-2)},
    ),
    "apo": Method(
        "APO-Precond",
        _apo,
        {
            "lr": 0.1,
            "momentum": 0.75,
            "weight_decay": 0.0,
            "block_size": 64,
            "interval": 1,
            "warmup": 300,
            "meta_lr": 0.05,
            "lr_meta_lr": 0.03,
            "fsd_weight": None,
            "wsd_weight": None,
        },
        {"fsd_weight": Range(0.1, 30.0), "wsd_weight": Range(choices=(0.0, 1e-3))},
    ),
}
"""The optimizers at a fixed rate, and APO. :func:`method` knows their other forms too."""

_FIRST_ORDER = ("sgd", "sgdm", "rmsprop", "adam", "adamw")
_WITHOUT_MOMENTUM = ("sgd", "rmsprop")
_META: Hyper = {"interval": 10, "warmup": 50, "meta_lr": 0.1, "fsd_weight": None, "wsd_weight": 0.0}


def names() -> list[str]:
    """Every name without a schedule; ``+step`` and the like may follow all that learn no rate."""
    return [*METHODS, "apo-lr", *(f"apo-lr:{base}" for base in _FIRST_ORDER)]


def method(name: str) -> Method:
    """The method of that name.

    Raises:
        ValueError: there is none.
    """
    base, plus, schedule = name.partition("+")
    kind, colon, inner = base.partition(":")
    if kind == "apo-lr" and not plus and (inner in _FIRST_ORDER or not colon):
        return _adaptive(inner or "sgdm")
    if base in METHODS and not plus:
        return METHODS[base]
    if base in METHODS and schedule in SCHEDULES and base != "apo":
        return _scheduled(METHODS[base], schedule)
    raise ValueError(
        f"optimizer must be one of {', '.join(names())}, or one that learns no rate followed by "
        f"{' or '.join('+' + s for s in SCHEDULES)}, but got {name!r}"
    )


def _adaptive(base: str) -> Method:
    """AdaptiveLR over a first-order method, with the loss on B′. Its initial rate hardly matters and isn't searched."""
    inner, momentum = METHODS[base], base not in _WITHOUT_MOMENTUM

    def make(setting: Setting, hyper: Hyper) -> Optimizer:
        own, terms = _split(hyper)
        meta: dict[str, Any] = {key: own.pop(key) for key in ("interval", "warmup", "meta_lr", "reach")}
        objective = setting.task.objective_on_others(setting.model, setting.batches.other_labelled, **terms)
        return apo.AdaptiveLR(inner.make(setting, own), objective, **meta)

    return Method(
        f"{inner.label}-APO",
        make,
        {**inner.defaults, **_META, "reach": 1.0 if momentum else 0.4},
        # At a short reach λ_WSD is what decays the rate: below 1e-3 it was measured to do too little.
        {"fsd_weight": Range(3e-3, 1.0), "wsd_weight": Range(1e-4 if momentum else 1e-3, 0.1)},
        eps_of_fp16=inner.eps_of_fp16,
    )


def _scheduled(inner: Method, schedule: str) -> Method:
    own: dict[str, Any] = {"factor": 0.1} if schedule == "step" else {"warmup": 0.1}
    drawn = {"factor": Range(choices=(0.1, 0.2, 0.5))} if schedule == "step" else {}

    def make(setting: Setting, hyper: Hyper) -> Optimizer:
        return inner.make(setting, {key: value for key, value in hyper.items() if key not in own})

    return Method(
        f"{inner.label}, {schedule.replace('-', ' then ')}",
        make,
        {**inner.defaults, **own},
        {**inner.ranges, **drawn},
        schedule=schedule,
        eps_of_fp16=inner.eps_of_fp16,
    )
