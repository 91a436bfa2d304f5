"""The one place where kernels are launched, compiled beforehand, and counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs

__all__ = ["Launch", "LaunchInputs", "count_launches", "current_stream", "note_written", "on_device"]

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


class LaunchInputs(NamedTuple):
    """What changes from one run of a plan to the next.

    Attributes:
        operands: the table of addresses.
        amax: room in the workspace for partial maxima; None where no launch has any.
        scalars: of the update: lr, its tensor, momentum, decay.
        stream: the device's.
    """

    operands: Tensor
    amax: Tensor | None
    scalars: tuple[float, Tensor | None, float, float]
    stream: int


@dataclass
class Launch:
    """A kernel with everything that doesn't change from run to run.

    Its arguments: ``tables``, the table of addresses, ``amax`` where it takes it, the scalars where it takes them, the
    constants. A kernel that takes scalars but doesn't update (``updates``) gets the same ones always: an argument's
    type is part of what a kernel is compiled for.
    """

    name: str
    kernel: Any
    programs: int
    tables: tuple[Tensor, ...]
    constants: dict[str, Any]
    warps: int
    stages: int
    scalars: bool = False
    updates: bool = False
    amax: bool = False
    _start: Callable[..., None] | None = None

    def compile(self, run: LaunchInputs) -> None:
        """Compile and load, so that what can fail fails before anything has been written; once."""
        if self._start is not None:
            return
        options = {"num_warps": self.warps, "num_stages": self.stages}
        if knobs.runtime.interpret:
            self._start = partial(self._interpret, options)
            return
        compiled = self.kernel.warmup(*self._arguments(run), grid=(self.programs,), **self.constants, **options)
        # Triton's own way to a kernel in hand: its way through the decorated function takes 20 to 40 µs, this one 2.
        constants = tuple(self.constants[name] for name in self.kernel.arg_names if name in self.constants)
        self._start = partial(self._direct, compiled[self.programs, 1, 1], constants)

    def __call__(self, run: LaunchInputs) -> None:
        """Launch what was compiled."""
        assert self._start is not None
        for names in _observers:
            names.append(self.name)
        self._start(run)

    def _arguments(self, run: LaunchInputs) -> tuple[Any, ...]:
        arguments: tuple[Any, ...] = (*self.tables, run.operands)
        if self.amax:
            arguments += (run.amax,)
        if self.scalars:
            arguments += run.scalars if self.updates else _NO_SCALARS
        return arguments

    def _direct(self, start: Callable[..., None], constants: tuple[Any, ...], run: LaunchInputs) -> None:
        start(*self._arguments(run), *constants, stream=run.stream)

    def _interpret(self, options: dict[str, int], run: LaunchInputs) -> None:
        self.kernel[(self.programs,)](*self._arguments(run), **self.constants, **options)


def current_stream(device: torch.device) -> int:
    """The stream that a launch on the device goes to now; 0 for the CPU's interpreter."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def on_device(device: torch.device) -> AbstractContextManager[None]:
    """A GPU made the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def note_written(tensors: Iterable[Tensor | None]) -> None:
    """Tell autograd that a kernel writes to these. A graph that saved one refuses to be used, as after any operation in
    place."""
    there = [x for x in tensors if x is not None]
    try:
        torch.autograd.graph.increment_version(there)
    except RuntimeError:  # what was made under inference mode has no version, in some releases
        torch.autograd.graph.increment_version([x for x in there if not x.is_inference()])
