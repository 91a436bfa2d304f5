"""Autocast changes no result: it is lifted where the package is entered, by Python or by an operator."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

__all__ = ["without_autocast"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_ACCELERATOR = torch.accelerator.current_accelerator()
_DEVICES = ("cpu",) if _ACCELERATOR is None else ("cpu", _ACCELERATOR.type)
"""Whose autocast can be on in this build of torch."""


def without_autocast(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function, whose operations are never cast.

    A decorator and no context manager: asking costs less than entering one, and a small layer takes microseconds.
    """

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return call(*args, **kwargs)
        return function(*args, **kwargs)

    return call
