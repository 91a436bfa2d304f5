"""Which path serves a call, and why: asked and answered here alone.

A backend is a module with the four functions of :class:`Backend`. Which one serves is decided by, in this order,
the ``backend=`` argument of the call, the environment variable ``APO_KERNELS_BACKEND``, and the first backend
that can serve the tensors.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple, Protocol, cast

from torch import Tensor

from apo_kernels import aten
from apo_kernels.aten import Kept

__all__ = ["BACKENDS", "ENVIRONMENT_VARIABLE", "Backend", "Choice", "choose"]

ENVIRONMENT_VARIABLE = "APO_KERNELS_BACKEND"

Tensors = Sequence[Tensor]


class Backend(Protocol):
    """What a path must offer. Operands have been checked; lists are of equal length and may be empty."""

    def foreach_precondition(self, Gs: Tensors, As: Tensors, Bs: Tensors, Ss: Tensors) -> list[Tensor]: ...

    def foreach_precondition_keep(
        self, Gs: Tensors, As: Tensors, Bs: Tensors, Ss: Tensors
    ) -> tuple[list[Tensor], list[Kept]]: ...

    def foreach_precondition_vjp(
        self,
        Gs: Tensors,
        As: Tensors,
        Bs: Tensors,
        Ss: Tensors,
        Vs: Tensors,
        kept: Sequence[Kept] | None,
        wanted: str,
    ) -> list[dict[str, Tensor]]: ...

    def foreach_precondition_step_(
        self,
        thetas: Tensors,
        Gs: Tensors,
        As: Tensors,
        Bs: Tensors,
        Ss: Tensors,
        momentum_buffers: Tensors,
        lr: float | Tensor,
        momentum: float,
        weight_decay: float,
    ) -> None: ...


class Choice(NamedTuple):
    """The path that serves a call, and the reason in a sentence."""

    name: str
    reason: str

    @property
    def backend(self) -> Backend:
        return BACKENDS[self.name]


BACKENDS: dict[str, Backend] = {"aten": cast(Backend, aten)}


def choose(backend: str | None = None) -> Choice:
    """The path for a call.

    Raises:
        TypeError: ``backend`` is neither ``None`` nor a string.
        ValueError: ``backend``, or the environment variable, names no backend.
    """
    if backend is not None:
        return Choice(_known("backend", backend), "asked for by the argument backend=")
    if asked := os.environ.get(ENVIRONMENT_VARIABLE):
        return Choice(_known(ENVIRONMENT_VARIABLE, asked), f"asked for by {ENVIRONMENT_VARIABLE}")
    return Choice("aten", "it serves every device and dtype through torch's own matrix products")


def _known(source: str, name: object) -> str:
    if not isinstance(name, str):
        raise TypeError(f"{source} must be None or one of {sorted(BACKENDS)}, but got {name!r}")
    if name not in BACKENDS:
        raise ValueError(f"{source} must be None or one of {sorted(BACKENDS)}, but got {name!r}")
    return name
