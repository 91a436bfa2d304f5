"""What the front ends share: when a meta-step is due, what a step does when, state, copying, pickling."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from apo import checks
from apo.objective import Closure, Evaluation, ProximalObjective, average_over_ranks

__all__ = ["FrontEnd"]

# What torch.optim.Optimizer.__getstate__ leaves out too: hooks belong to the process, and schedulers wrap `step`.
_NOT_PICKLED = {"step", "_opt_called", "_zero_grad_profile_name"}


class FrontEnd(Optimizer):
    """A ``torch.optim.Optimizer`` whose ``step(closure)`` also adapts φ by the proximal objective.

    Attributes:
        objective: the :class:`~apo.ProximalObjective`.
        steps: how many steps were taken, skipped ones counted.
        failed_trials: how many trials were refused: Q not finite, or above ``J_B(θ) + |J_B(θ)| + 1``.
        last: the :class:`~apo.Evaluation` of the last trial, or None.
        in_trial: whether the closure is being run at trial weights. A closure that clips its gradients bounds the
            trial's as well, which the meta-optimizer evens out but for their weight against the FSD's; one that
            counts or logs may want to skip trials.
    """

    def _init_front_end(
        self,
        objective: ProximalObjective,
        interval: int,
        warmup: int,
        grad_scaler: GradScaler | None,
    ) -> None:
        self.objective = objective
        self.interval = interval
        self.warmup = warmup
        self.grad_scaler = grad_scaler
        self.steps = 0
        self.failed_trials = 0
        self.last: Evaluation | None = None
        self.in_trial = False

    @property
    def meta_due(self) -> bool:
        """Whether the next step runs the closure a second time and updates φ."""
        return self.interval > 0 and (self.steps < self.warmup or self.steps % self.interval == 0)

    @property
    def parameters(self) -> list[Tensor]:
        """The weights of all groups, in order."""
        return [p for group in self.param_groups for p in group["params"]]

    def step(self, closure: Closure | None = None) -> Any:
        """One step: φ first, if that is due, then the weights with the new φ (Algorithm 1).

        Args:
            closure: clears the gradients, runs forward and backward, returns the loss. Called at θ, and, every
                ``interval`` steps, once more at θ′ on the same batch. None, with the gradients in ``.grad``, will do
                where no meta-step is due (``meta_due``).

        Returns:
            What the closure returned at θ; None without one.

        Raises:
            TypeError: ``closure`` isn't callable, or didn't return a loss.
            ValueError: a meta-step is due and there is no closure.

        If anything raises, the weights, the optimizer's state and φ are as before the step.
        """
        due = self.meta_due
        if closure is None:
            if due:
                raise ValueError(
                    "closure must be given at a step that updates φ (meta_due), for it is run again at the trial "
                    "weights: call step(closure), or build the optimizer with interval=0 to leave φ as it is"
                )
            loss = None
        else:
            checks.closure(closure)
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            if self._gradients_overflowed():
                self.steps += 1
                return loss
            self._check_gradients()
            if due:
                assert closure is not None
                self._meta_step(closure, loss, move=True)
            else:
                self._plain_step()
            self.steps += 1
        return loss

    def meta_step(self, closure: Closure) -> Any:
        """Update φ once, whether due or not, and leave the weights where they are. Returns the loss at them."""
        checks.closure(closure)
        with torch.enable_grad():
            loss = closure()
        with torch.no_grad():
            if not self._gradients_overflowed():
                self._check_gradients()
                self._meta_step(closure, loss, move=False)
        return loss

    @abstractmethod
    def _meta_step(self, closure: Closure, loss: Any, *, move: bool) -> None: ...

    @abstractmethod
    def _plain_step(self) -> None: ...

    def _check_gradients(self) -> None:
        """Refuse gradients that can't be used, before anything is changed."""

    def _gradients_overflowed(self) -> bool:
        """Unscale what a GradScaler scaled; whether that step is to be left out."""
        scaler = self.grad_scaler
        if scaler is None or not scaler.is_enabled():
            return False
        scaler.unscale_(self)
        grads = [p.grad for p in self.parameters if p.grad is not None]
        # The scaler has looked at this too, but keeps it to itself.
        return not bool(torch.stack([g.isfinite().all() for g in grads]).all()) if grads else False

    def _scale(self) -> float:
        return 1.0 if self.grad_scaler is None else self.grad_scaler.get_scale()

    def _evaluate(self, closure: Closure, loss: Any, start: list[Tensor], anchor: Any) -> tuple[list[Tensor], bool]:
        """V at the present trial weights, and whether the trial can be learned from.

        A trial fails where Q isn't finite, or rises far above the loss at θ: stricter bounds were measured to drive
        rates to zero, as a step along the momentum may well go up on this batch.
        """
        self.in_trial = True
        try:
            V, self.last = self.objective.gradient(closure, self.parameters, start, anchor, scale=self._scale())
        finally:
            self.in_trial = False
        before = torch.as_tensor(loss, dtype=torch.float64).detach().reshape(())
        if self.objective.replicated:
            before = average_over_ranks(before, self.objective.model)
        base = before.item()
        q = self.last.objective
        return V, q <= base + abs(base) + 1  # False where q is NaN

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with what φ needs to go on to the bit under the key ``"apo"``.

        B′ is not part of it: an iterable begins anew, a callable goes on from whatever it draws from.
        """
        state = super().state_dict()
        counts = {"steps": self.steps, "failed_trials": self.failed_trials}
        state["apo"] = {**counts, "settings": self._settings(), **self._meta_state()}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a :meth:`state_dict` of the same front end on the same parameters.

        Raises:
            ValueError: it isn't one. Nothing has been loaded then.
        """
        meta = state_dict.get("apo") if isinstance(state_dict, dict) else None
        if not isinstance(meta, dict) or not self._meta_state().keys() <= meta.keys():
            raise ValueError(
                f"state_dict must come from {type(self).__name__}.state_dict(), but this one's 'apo' entry is "
                f"{'missing' if meta is None else 'another front end'!r}"
            )
        if meta["settings"] != self._settings():
            raise ValueError(f"state_dict must come from settings {self._settings()}, but its are {meta['settings']}")
        self._check_state(state_dict)
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "apo"})
        self._load_meta_state(meta, state_dict)
        self.steps, self.failed_trials = meta["steps"], meta["failed_trials"]

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """What gives the state its form."""

    @abstractmethod
    def _meta_state(self) -> dict[str, Any]: ...

    @abstractmethod
    def _load_meta_state(self, state: dict[str, Any], raw: dict[str, Any]) -> None:
        """Called after torch has loaded groups and state."""

    def _check_state(self, state_dict: dict[str, Any]) -> None:
        """Refuse a state that doesn't fit, before anything is loaded."""

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in self.__dict__.items()
            if not (name.endswith("_hooks") or name in _NOT_PICKLED)
        }
