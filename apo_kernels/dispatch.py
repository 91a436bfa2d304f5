"""Which path serves a call, and why: asked and answered here alone.

A backend offers the functions of :class:`Backend`. Which one serves is decided by, in this order, the ``backend=``
argument of the call, the environment variable ``APO_KERNELS_BACKEND`` as it was when the package was imported, and the
first backend that can serve the tensors: ``triton`` on a GPU that it has kernels for, else ``aten``.

**Names.** ``"aten"``, ``"triton"``, and ``"triton:ieee"``, ``"triton:tf32"``, ``"triton:tf32x3"``, ``"triton:bf16x6"``,
which say how float32 operands are multiplied; plain ``"triton"`` is faithful to it
(:meth:`apo_kernels.targets.Target.precision`).

**Failures.** A backend that was asked for fails loudly. One that was chosen here and fails is warned about once, and
``aten`` serves from then on. Not so running out of memory, and a failure that may have left some weights stepped: these
are raised.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import import_module
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from apo_kernels import aten
from apo_kernels.aten import Kept
from apo_kernels.slopes import ModelEnergies, ModelSlopes, Parts
from apo_kernels.triton.errors import Interrupted, Unserved

__all__ = ["BACKENDS", "ENVIRONMENT_VARIABLE", "Backend", "Choice", "choose", "serving"]

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
        relative: bool = False,
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

    def bind_step(
        self, thetas: Tensors, Gs: Tensors, As: Tensors, Bs: Tensors, Ss: Tensors, momentum_buffers: Tensors
    ) -> Callable[[float | Tensor, float, float], None]: ...

    def bind_model(
        self, As: Tensors, Bs: Tensors, Ss: Tensors, widths: Sequence[tuple[int, ...]], learned: Sequence[str]
    ) -> BoundModel: ...

    def relative_step_squares_(
        self,
        X: Tensor,
        slope: Tensor,
        size: Tensor,
        new_slope: Tensor,
        new_size: Tensor,
        rate: float | Tensor,
        betas: tuple[float, float],
        correction: float | Tensor,
        floor: float,
        longest: float,
        active: Tensor | None,
    ) -> None: ...

    def relative_step_scalings_(
        self,
        S: Tensor,
        slope: Tensor,
        size: Tensor,
        new_slope: Tensor,
        new_size: Tensor,
        lengths: Sequence[int],
        entries: Sequence[int],
        rate: float | Tensor,
        betas: tuple[float, float],
        correction: float | Tensor,
        floor: float,
        active: Tensor | None,
        total: Callable[[Tensor], None] | None,
    ) -> None: ...


class BoundModel(Protocol):
    """What a path must offer for :class:`apo_kernels.ModelPreconditioner`, whose methods these are."""

    def step_(
        self,
        thetas: Parts,
        Gs: Parts,
        momentum_buffers: Sequence[Tensor | None],
        lr: Sequence[float],
        momentum: Sequence[float],
        weight_decay: Sequence[float],
        most: float,
        shares: Sequence[float] | None,
        total: Callable[[Tensor], None] | None,
    ) -> Tensor: ...

    def trial_(
        self,
        thetas: Parts,
        Gs: Parts,
        momentum_buffers: Sequence[Tensor | None],
        lengths: Sequence[float],
        momentum: Sequence[float],
        shrink: Sequence[float],
    ) -> object: ...

    def keep(self, Gs: Parts) -> object: ...

    def slopes(self, Vs: Parts, kept: Any, lengths: Sequence[float]) -> ModelSlopes: ...

    def energies(self, Gs: Parts) -> ModelEnergies: ...


_ATEN = cast(Backend, aten)

BACKENDS = ("aten", "triton", "triton:ieee", "triton:tf32", "triton:tf32x3", "triton:bf16x6")

requested: str | None = os.environ.get(ENVIRONMENT_VARIABLE) or None
"""The backend that the environment asks for, which a program may change."""

_failure: str | None = None
"""Why ``triton`` isn't chosen any more, once it has failed."""


class Choice(NamedTuple):
    """The path that serves a call, the reason in a sentence, and whether it was asked for."""

    name: str
    reason: str
    forced: bool = True

    @property
    def backend(self) -> Backend:
        if self.name == "aten":
            return _ATEN
        backend = _triton(self.name.partition(":")[2] or None)
        return backend if self.forced else cast(Backend, _Guarded(backend))


def serving(backend: str | None, Gs: Tensors) -> Backend:
    """The backend of :func:`choose`, without its reasons: these would cost as much as a small layer."""
    if backend == "aten" or (backend is None and requested is None and not (Gs and Gs[0].is_cuda)):
        return _ATEN
    return choose(backend, Gs).backend


def choose(backend: str | None = None, Gs: Tensors = ()) -> Choice:
    """The path for a call on the gradients ``Gs``.

    Raises:
        TypeError: ``backend`` is neither ``None`` nor a string.
        ValueError: ``backend``, or the environment variable, names no backend, or one that can't serve ``Gs``.
    """
    if backend is not None:
        return _forced("backend", backend, "asked for by the argument backend=", Gs)
    if requested is not None:
        return _forced(ENVIRONMENT_VARIABLE, requested, f"asked for by {ENVIRONMENT_VARIABLE}", Gs)
    obstacle = _obstacle(Gs) if Gs and Gs[0].device.type == "cuda" else "the tensors are on no GPU"
    if obstacle is None and _failure is not None:
        obstacle = f"triton failed before: {_failure}"
    if obstacle is None:
        return Choice("triton", f"it serves {Gs[0].device} in few launches, and Triton is there", forced=False)
    return Choice(
        "aten", f"it serves every device and dtype through torch's own matrix products; {obstacle}", forced=False
    )


def _forced(source: str, name: object, reason: str, Gs: Tensors) -> Choice:
    if not isinstance(name, str):
        raise TypeError(f"{source} must be None or one of {sorted(BACKENDS)}, but got {name!r}")
    if name not in BACKENDS:
        raise ValueError(f"{source} must be None or one of {sorted(BACKENDS)}, but got {name!r}")
    if name != "aten" and (obstacle := _obstacle(Gs)) is not None:
        raise ValueError(f"{source} is {name!r}, which can't serve this call: {obstacle}")
    return Choice(name, reason)


def _obstacle(Gs: Tensors) -> str | None:
    """Why ``triton`` can't serve these tensors; None if it can."""
    if (missing := _triton_missing()) is not None:
        return missing
    for i, G in enumerate(Gs):
        if G.dtype == torch.float64:
            return f"triton serves float32, bfloat16 and float16, but Gs[{i}] is float64"
    return _device_obstacle(Gs[0].device) if Gs else None


@cache
def _triton_missing() -> str | None:
    try:
        import_module("triton.language")
    except ImportError as error:
        return f"Triton can't be imported ({error})"
    return None


@cache
def _device_obstacle(device: torch.device) -> str | None:
    if device.type == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else "triton serves GPUs, and the CPU only under TRITON_INTERPRET=1"
    from apo_kernels.targets import target_of

    try:
        target_of(device)
    except ValueError as error:
        return str(error)
    return None


@cache
def _triton(precision: str | None) -> Backend:
    backend: Backend = import_module("apo_kernels.triton.backend").TritonBackend(precision)
    return backend


class _Guarded:
    """A backend that was chosen, not asked for: where it fails, ``aten`` takes over, for good.

    Kernels are planned and compiled before the first of them writes, so no weight has been written when that fails.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(self._call, getattr(self._backend, name), getattr(aten, name))

    def bind_step(self, *operands: Any) -> Callable[[float | Tensor, float, float], None]:
        return partial(self._call, self._backend.bind_step(*operands), aten.bind_step(*operands))

    def bind_model(self, *operands: Any) -> BoundModel:
        fallback = aten.bind_model(*operands)

        def guarded() -> BoundModel:
            return cast(BoundModel, _GuardedModel(self, self._backend.bind_model(*operands), fallback))

        model: BoundModel = self._call(guarded, lambda: fallback)
        return model

    def _call(self, serves: Callable[..., Any], fallback: Callable[..., Any], *arguments: Any) -> Any:
        global _failure
        if _failure is not None:  # since this was bound
            return fallback(*arguments)
        try:
            return serves(*arguments)
        except (torch.OutOfMemoryError, Interrupted):
            raise
        except Unserved as error:
            warnings.warn(f"apo_kernels: aten serves a call, for {error}", RuntimeWarning, stacklevel=3)
        except Exception as error:
            _failure = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"apo_kernels: the backend triton failed and aten serves from now on ({_failure}); "
                f"backend='triton' shows the failure in full",
                RuntimeWarning,
                stacklevel=3,
            )
        return fallback(*arguments)


class _GuardedModel:
    """A bound model of a backend that was chosen: where a call fails, ATen's serves it. What one path kept, the other
    can read."""

    def __init__(self, guard: _Guarded, serves: BoundModel, fallback: aten.AtenModel) -> None:
        self._guard, self._serves, self._fallback = guard, serves, fallback
        self.sees = getattr(serves, "sees", None)

    def step_(self, *arguments: Any) -> Tensor:
        found: Tensor = self._guard._call(self._serves.step_, self._fallback.step_, *arguments)
        return found

    def trial_(self, *arguments: Any) -> object:
        return self._guard._call(self._serves.trial_, self._fallback.trial_, *arguments)

    def keep(self, *arguments: Any) -> object:
        return self._guard._call(self._serves.keep, self._fallback.keep, *arguments)

    def energies(self, Gs: Parts) -> ModelEnergies:
        found: ModelEnergies = self._guard._call(self._serves.energies, self._fallback.energies, Gs)
        return found

    def slopes(self, Vs: Parts, kept: Any, lengths: Sequence[float]) -> ModelSlopes:
        def fallback() -> ModelSlopes:
            own = self._fallback.adopted(kept.by_layer()) if hasattr(kept, "by_layer") else kept
            slopes: ModelSlopes = self._fallback.slopes(Vs, own, lengths)
            return slopes

        if not hasattr(kept, "by_layer"):
            return fallback()
        found: ModelSlopes = self._guard._call(lambda: self._serves.slopes(Vs, kept, lengths), fallback)
        return found
