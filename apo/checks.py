"""Refusing bad arguments: the error names the argument, its value and what it must be."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "boolean",
    "closure",
    "fraction",
    "grad_scaler",
    "increasing_pair",
    "integer",
    "module",
    "number",
    "one_of",
    "one_precision",
    "optimizer",
    "parameters",
]


def number(name: str, value: object, *, least: float = 0.0, above: bool = False) -> float:
    """A finite number, at least ``least``, or greater than it where ``above``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, but got {value!r} ({type(value).__name__})")
    if not math.isfinite(value) or value < least or (above and value == least):
        raise ValueError(f"{name} must be a finite number {'>' if above else '>='} {least:g}, but got {value!r}")
    return float(value)


def fraction(name: str, value: object) -> float:
    """A number in ``[0, 1)``."""
    value = number(name, value)
    if value >= 1:
        raise ValueError(f"{name} must be a number in [0, 1), but got {value!r}")
    return value


def integer(name: str, value: object, *, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, but got {value!r} ({type(value).__name__})")
    if value < least:
        raise ValueError(f"{name} must be an integer >= {least}, but got {value!r}")
    return value


def boolean(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, but got {value!r} ({type(value).__name__})")
    return value


def increasing_pair(name: str, value: Any) -> tuple[float, float]:
    """Two rates, ``0 < least < greatest``."""
    if not (isinstance(value, (tuple, list)) and len(value) == 2):
        raise TypeError(f"{name} must be a pair (least, greatest) of rates, but got {value!r}")
    least, greatest = (number(name, x) for x in value)
    if not 0 < least < greatest:
        raise ValueError(f"{name} must be rates 0 < least < greatest, but got {value!r}")
    return least, greatest


def one_of(name: str, value: object, choices: Iterable[Any]) -> None:
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, but got {value!r}")


def module(name: str, value: object) -> nn.Module:
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, but got {type(value).__name__}")
    return value


def optimizer(name: str, value: object) -> None:
    if not isinstance(value, torch.optim.Optimizer):
        raise TypeError(f"{name} must be a torch.optim.Optimizer, but got {type(value).__name__}")


def grad_scaler(name: str, value: object) -> None:
    if value is not None and not isinstance(value, torch.amp.GradScaler):
        raise TypeError(f"{name} must be a torch.amp.GradScaler or None, but got {type(value).__name__}")


def closure(value: object) -> None:
    if not callable(value):
        raise TypeError(
            "closure must be callable: clear the gradients, run forward and backward, return the loss; "
            f"but got {value!r} ({type(value).__name__})"
        )


def parameters(params: Iterable[Tensor]) -> None:
    """Trial weights are written in place on one device: dense floating-point weights on one device."""
    devices = set()
    for p in params:
        if not p.is_floating_point() or p.layout != torch.strided:
            raise TypeError(
                f"parameters must be dense floating-point tensors, but got one of {p.dtype}, {p.layout}, "
                f"shape {tuple(p.shape)}"
            )
        devices.add(p.device)
    if len(devices) > 1:
        raise ValueError(f"parameters must lie on one device, but got {sorted(map(str, devices))}")


def one_precision(model: nn.Module, params: Iterable[Tensor]) -> None:
    """What float64 is of, and what not, isn't stepped by one operator."""
    by_wide: dict[bool, Tensor] = {}
    for p in params:
        by_wide.setdefault(p.dtype == torch.float64, p)
    if len(by_wide) > 1:
        wide, other = (_name(model, by_wide[is_wide]) for is_wide in (True, False))
        raise TypeError(
            f"params must be float64 all or none, but {wide} is and {other} is {by_wide[False].dtype}: cast one of "
            "them, or give each its own optimizer"
        )


def _name(model: nn.Module, parameter: Tensor) -> str:
    return next((name for name, p in model.named_parameters() if p is parameter), f"one of {tuple(parameter.shape)}")
