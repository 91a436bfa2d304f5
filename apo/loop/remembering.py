"""What a front end remembers beside the weights: counts and rates in the param groups, and how all of it is saved."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

__all__ = ["Remembering", "apart", "with_groups"]

# What torch.optim.Optimizer.__getstate__ leaves out too: hooks belong to the process, and schedulers wrap `step`.
_NOT_PICKLED = {"step", "_opt_called", "_zero_grad_profile_name"}

_NUMBERS = {"apo_steps": 0, "apo_failed_trials": 0, "apo_skipped_steps": 0, "apo_begun": False}


class Remembering(Optimizer):
    """A ``torch.optim.Optimizer`` that keeps numbers in every param group, so that every checkpoint holds them."""

    NUMBERS: ClassVar[dict[str, Any]] = {}
    """What a front end remembers beside the rates, and how it starts."""

    @property
    def steps(self) -> int:
        """How many steps were taken, skipped ones counted."""
        return int(self.param_groups[0]["apo_steps"])

    @steps.setter
    def steps(self, count: int) -> None:
        self._note("apo_steps", count)

    @property
    def failed_trials(self) -> int:
        """How many trials were refused: Q not finite, or above ``J(θ) + |J(θ)| + 1``, or above ``J(θ)`` by a step that
        is longer than the weights; before the first step all that overshoot or are longer than the weights."""
        return int(self.param_groups[0]["apo_failed_trials"])

    @property
    def skipped_steps(self) -> int:
        """How many steps were left out because their gradients weren't finite."""
        self._settle()
        return int(self.param_groups[0]["apo_skipped_steps"])

    @property
    def parameters(self) -> list[Tensor]:
        """The weights of all groups, in order."""
        return [p for group in self.param_groups for p in group["params"]]

    @property
    def _begun(self) -> bool:
        """Whether a step was taken by a trial that passed."""
        return bool(self.param_groups[0]["apo_begun"])

    def _settle(self) -> None:
        """Count the last step as skipped, if it was."""

    def _note(self, name: str, value: Any) -> None:
        for group in self.param_groups:
            group[name] = value

    def _note_all(self, numbers: Mapping[str, Any]) -> None:
        for name, value in numbers.items():
            self._note(name, value)

    def _count(self, name: str) -> None:
        self._note(name, self.param_groups[0][name] + 1)

    def _prepare_group(self, group: dict[str, Any]) -> None:
        """Put what is remembered beside the rates into a new group: what the first one has, or the start."""
        first = self.param_groups[0]
        for name, start in (_NUMBERS | self.NUMBERS).items():
            group[name] = first.get(name, start)
        group["apo_settings"] = self._settings_text()

    def _settings_text(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self._settings().items())
        return f"{type(self).__name__}({settings})"

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """What gives the state its form."""

    def state_dict(self) -> dict[str, Any]:
        """As torch's, and apart from what later steps write: tensors under ``"state"``, numbers in the groups.

        B′ is not part of it: an iterable begins anew, a callable goes on from whatever it draws from.
        """
        self._settle()
        found: dict[str, Any] = tree_map(apart, super().state_dict())
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a copy of a :meth:`state_dict` of the same front end on the same parameters.

        Raises:
            ValueError: it isn't one. Nothing has been loaded then.
        """
        held = with_groups(state_dict)
        groups = held["param_groups"] if held else None
        saved = groups[0].get("apo_settings") if groups else None
        name = type(self).__name__
        if not isinstance(saved, str) or not saved.startswith(f"{name}("):
            raise ValueError(
                f"state_dict must come from {name}.state_dict(), but this one comes from {saved or 'something else'}"
            )
        if saved != self._settings_text():
            raise ValueError(f"state_dict must come from settings {self._settings_text()}, but its are {saved}")
        assert groups is not None
        if "param_groups" in state_dict and not isinstance(state_dict.get("state"), dict):
            raise ValueError(f"state_dict must have the entries 'state' and 'param_groups', but has {list(state_dict)}")
        sizes, own = [len(g.get("params", ())) for g in groups], [len(g["params"]) for g in self.param_groups]
        if sizes != own:
            raise ValueError(f"state_dict must have param groups of {own} parameters, but got {sizes}")
        self._check_state(state_dict)
        self._load(copy.deepcopy(state_dict))
        self._forget_last_step()

    @abstractmethod
    def _load(self, state_dict: dict[str, Any]) -> None:
        """Take up a state dict that fits and that nothing else holds."""

    def _forget_last_step(self) -> None:
        """A state has been loaded: let go of what is true of the last step alone."""

    def _check_state(self, state_dict: dict[str, Any]) -> None:
        """Refuse a state that doesn't fit, before anything is loaded."""

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return {
            name: value
            for name, value in self.__dict__.items()
            if not (name.endswith("_hooks") or name in _NOT_PICKLED)
        }


def apart(x: Any) -> Any:
    """A copy; of a tensor that shares its storage with others, of it alone."""
    return x.detach().clone() if isinstance(x, Tensor) else copy.deepcopy(x)


def with_groups(state_dict: Any) -> dict[str, Any] | None:
    """Of a state dict the part that has the param groups: itself, or in a wrapper's that of another optimizer."""
    if not isinstance(state_dict, dict) or "param_groups" in state_dict:
        return state_dict if isinstance(state_dict, dict) else None
    return next((found for part in state_dict.values() if (found := with_groups(part))), None)
