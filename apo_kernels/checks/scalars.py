"""Numbers."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from apo_kernels.checks.describe import LISTS, described, kind_of, length_text
from apo_kernels.checks.tensors import Tensors

__all__ = ["at_least_0", "check_list", "check_lr", "check_number", "check_scalar", "finite", "numbers", "step_numbers"]


def check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, but got {kind_of(value)}")


def check_scalar(name: str, value: Any, *, below: float = math.inf) -> None:
    check_number(name, value)
    if not 0 <= value < below:
        bound = "finite and at least 0" if below == math.inf else f"at least 0 and below {below:g}"
        raise ValueError(f"{name} must be {bound}, but got {value}")


def at_least_0(name: str, value: Any, *, most: float = math.inf) -> None:
    """Refuse what isn't a number from 0 to the most."""
    check_number(name, value)
    if not 0 <= value <= most:
        bound = "at least 0" if most == math.inf else f"at least 0 and at most {most:g}"
        raise ValueError(f"{name} must be {bound}, but got {value}")


def finite(name: str, value: Any) -> None:
    """Refuse what is no finite number."""
    check_number(name, value)
    if not abs(value) <= sys.float_info.max:
        raise ValueError(f"{name} must be finite, but is {value}")


def check_lr(lr: object, Gs: Tensors) -> None:
    if not isinstance(lr, Tensor):
        check_scalar("lr", lr)
    elif lr.ndim != 0 or not lr.is_floating_point():
        raise ValueError(f"lr must be a number or a floating-point tensor of no dimensions, but got {described(lr)}")
    elif lr.device.type != "cpu" and Gs and lr.device != Gs[0].device:
        raise ValueError(f"lr must be on the CPU or on {Gs[0].device} with Gs, but is on {lr.device}")


def check_list(name: str, each: object, count: int) -> None:
    if not isinstance(each, LISTS) or len(each) != count:
        raise ValueError(f"{name} must be a list with a number for each of {count} layers, but is {length_text(each)}")


def step_numbers(count: int, lr: Sequence[float], momentum: Sequence[float], weight_decay: Sequence[float]) -> None:
    """Refuse lists of what no step can be taken with."""
    lists = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    numbers(count, **lists)
    if not count or (min(*lr, *momentum, *weight_decay) >= 0 and max(momentum) < 1):
        return
    for name, each in lists.items():
        for i, x in enumerate(each):
            check_scalar(f"{name}[{i}]", x, below=1.0 if name == "momentum" else math.inf)


def numbers(count: int, **lists: Sequence[float]) -> None:
    """Refuse lists that don't have a finite number for each layer."""
    for name, each in lists.items():
        check_list(name, each, count)
        if set(map(type, each)) <= {float} and math.isfinite(sum(each)):
            continue
        for i, x in enumerate(each):
            finite(f"{name}[{i}]", x)
