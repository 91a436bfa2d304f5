"""The one place where kernels are launched, compiled beforehand, and counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from triton import knobs

__all__ = ["Launch", "count_launches"]

_NO_SCALARS = (0.0, None, 0.0, 0.0)
_observers: list[list[str]] = []


@contextmanager
def count_launches() -> Iterator[list[str]]:
    """The names of the kernels launched inside, in order."""
    names: list[str] = []
    _observers.append(names)
    try:
        yield names
    finally:
        _observers.remove(names)


@dataclass
class Launch:
    """A kernel with everything that doesn't change from step to step.

    Its arguments: ``tables``, the table of addresses, ``tail``, and, if ``scalars``, lr, its tensor, momentum, decay.
    A kernel that takes these but doesn't update (``updates``) gets the same ones always: an argument's type is part of
    what a kernel is compiled for.
    """

    name: str
    kernel: Any
    programs: int
    tables: tuple[torch.Tensor, ...]
    constants: dict[str, Any]
    warps: int
    stages: int
    scalars: bool = False
    updates: bool = False
    tail: tuple[torch.Tensor, ...] = field(default=())

    def arguments(self, operands: torch.Tensor, scalars: tuple[Any, ...]) -> tuple[Any, ...]:
        given = scalars if self.updates else _NO_SCALARS
        return (*self.tables, operands, *self.tail, *(given if self.scalars else ()))

    def compile(self, operands: torch.Tensor, scalars: tuple[Any, ...]) -> None:
        """Compile and load, so that what can fail fails before anything has been written."""
        if knobs.runtime.interpret:
            return
        compiled = self.kernel.warmup(
            *self.arguments(operands, scalars),
            grid=(self.programs,),
            num_warps=self.warps,
            num_stages=self.stages,
            **self.constants,
        )
        compiled._init_handles()

    def __call__(self, operands: torch.Tensor, scalars: tuple[Any, ...]) -> None:
        for names in _observers:
            names.append(self.name)
        self.kernel[(self.programs,)](
            *self.arguments(operands, scalars), num_warps=self.warps, num_stages=self.stages, **self.constants
        )
