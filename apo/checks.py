"""Refusing bad arguments: the error names the argument, its value and what it must be."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["closure", "fraction", "integer", "module", "number", "one_of", "parameters"]


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


def one_of(name: str, value: object, choices: Iterable[Any]) -> None:
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, but got {value!r}")


def module(name: str, value: object) -> nn.Module:
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, but got {type(value).__name__}")
    return value


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
