"""What a ``torch.amp.GradScaler`` remembers of an optimizer, around closures that run more than once a step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch.amp import GradScaler
from torch.amp.grad_scaler import OptState, _refresh_per_optimizer_state
from torch.optim import Optimizer

__all__ = ["Scaling"]


class Scaling:
    """A GradScaler as one optimizer's steps see it. A scaler that is None or disabled scales by 1.

    Args:
        scaler: whose ``scale`` the closure calls.
        optimizers: those for which a closure may call ``unscale_``; the first is the one that is stepped.
    """

    def __init__(self, scaler: GradScaler | None, optimizers: Sequence[Optimizer]) -> None:
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._optimizers = list(optimizers)

    @property
    def active(self) -> bool:
        return self._scaler is not None

    @property
    def factor(self) -> float:
        """By which a backward of ours should be scaled."""
        return 1.0 if self._scaler is None else self._scaler.get_scale()

    @property
    def unscaled(self) -> bool:
        """Whether the closure has called ``unscale_`` itself."""
        if self._scaler is None:
            return True
        return any(state["stage"] is OptState.UNSCALED for state in self._states())

    @property
    def left(self) -> float:
        """By which the closure's gradients are still multiplied."""
        return 1.0 if self.unscaled else self.factor

    def unscale(self) -> None:
        """Unscale the gradients, unless that has been done."""
        if self._scaler is not None and not self.unscaled:
            self._scaler.unscale_(self._optimizers[0])

    @property
    def overflowed(self) -> bool:
        """Whether the unscaled gradients aren't finite; one synchronisation."""
        if self._scaler is None:
            return False
        return any(x.item() for state in self._states() for x in state["found_inf_per_device"].values())

    def _states(self) -> list[dict[str, Any]]:
        assert self._scaler is not None
        held = self._scaler._per_optimizer_states
        return [held[id(one)] for one in self._optimizers if id(one) in held]

    @contextmanager
    def one_step(self, *, move: bool) -> Iterator[None]:
        """Remember what the scaler knows of these optimizers: the step as taken, or all as before if it raises."""
        if self._scaler is None:
            yield
            return
        held = self._scaler._per_optimizer_states
        before = {id(one): dict(held[id(one)]) for one in self._optimizers if id(one) in held}
        try:
            yield
        except BaseException:
            for one in self._optimizers:
                held.pop(id(one), None)
            held.update(before)
            raise
        if move:
            for state in self._states():
                state["stage"] = OptState.STEPPED

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """As if no ``unscale_`` had been called yet; afterwards as if none had been called in here."""
        if self._scaler is None:
            yield
            return
        held = self._scaler._per_optimizer_states
        self._scaler._per_optimizer_states = defaultdict(_refresh_per_optimizer_state)
        try:
            yield
        finally:
            self._scaler._per_optimizer_states = held
