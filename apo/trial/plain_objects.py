"""Objects of users' classes, such as a helper that keeps running means: what they hold can be put back."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["attributes_of", "is_plain_object", "put_attributes_back"]

_OTHERS = sys.stdlib_module_names - {"types"} | {"torch", "numpy"}


def is_plain_object(value: Any) -> bool:
    """Whether it is one, a dataclass or a namespace. Not what leads to the whole program."""
    kind = type(value)  # a proxy whose object is gone has no class
    if issubclass(kind, (Tensor, Optimizer, nn.Module, type)) or kind.__module__.split(".")[0] in _OTHERS:
        return False
    return dataclasses.is_dataclass(value) or hasattr(value, "__dict__")


def attributes_of(value: Any) -> dict[str, Any]:
    """What it holds by name, but for hooks."""
    if hasattr(value, "__dict__"):
        return {name: x for name, x in value.__dict__.items() if not name.endswith("_hooks")}
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if hasattr(value, f.name)}  # slots


def put_attributes_back(held: Any, content: dict[str, Any]) -> None:
    """Let it hold what :func:`attributes_of` found."""
    if hasattr(held, "__dict__"):
        for name in [k for k in held.__dict__ if k not in content and not k.endswith("_hooks")]:
            del held.__dict__[name]
        held.__dict__.update(content)
    else:
        for name, value in content.items():
            object.__setattr__(held, name, value)
