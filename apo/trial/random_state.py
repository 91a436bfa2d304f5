"""The random state that models draw from, and generators that objects hold."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["generator_state", "is_generator", "random_state", "restore_generator", "restore_random_state"]


def is_generator(value: Any) -> bool:
    return isinstance(value, (torch.Generator, random.Random, np.random.Generator, np.random.RandomState))


def generator_state(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        return value.getstate()
    return value.bit_generator.state if isinstance(value, np.random.Generator) else value.get_state()


def restore_generator(value: Any, state: Any) -> None:
    if isinstance(value, torch.Generator):
        value.set_state(state)
    elif isinstance(value, random.Random):
        value.setstate(state)
    elif isinstance(value, np.random.Generator):
        value.bit_generator.state = state
    else:
        value.set_state(state)


def random_state(parameters: Iterable[Tensor]) -> dict[str, Any]:
    """The states of the generators that a model may draw from: torch's on the CPU and on the parameters' devices,
    Python's and NumPy's."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state(), "python": random.getstate()}
    state |= {"numpy": np.random.get_state()}  # noqa: NPY002
    for device in {p.device for p in parameters if not p.is_cpu and not p.is_meta}:
        state[str(device)] = torch.get_device_module(device).get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    for name, content in state.items():
        if name == "cpu":
            torch.set_rng_state(content)
        elif name == "python":
            random.setstate(content)
        elif name == "numpy":
            np.random.set_state(content)  # noqa: NPY002
        else:
            torch.get_device_module(torch.device(name)).set_rng_state(content, torch.device(name))
