"""What a wrapped optimizer holds beside the weights, so that a step that was tried can be taken back."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from apo.trial import surely

__all__ = ["OptimizerSnapshot", "run_post_hooks", "with_wrapped", "without_hooks"]

_PRE, _POST = "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"
_GLOBAL = {_PRE: "_global_optimizer_pre_hooks", _POST: "_global_optimizer_post_hooks"}


class OptimizerSnapshot:
    """A copy of all that an optimizer holds: its state, its groups' settings, its other attributes, and the same of
    optimizers that it wraps. Put back when the block is left without :meth:`commit`.

    Parameters are shared, not copied.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._seen: dict[int, tuple[Any, Any]] = {}
        self._saved(optimizer)
        self._committed = False

    def commit(self) -> None:
        """Keep what the optimizer holds now."""
        self._committed = True

    def __enter__(self) -> OptimizerSnapshot:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._committed:
            surely(self.restore)

    def restore(self) -> None:
        """Put everything back, in place where something else may hold it."""
        for held, content in self._seen.values():
            _put_back(held, content)

    def _saved(self, value: Any) -> Any:
        """Note a value's content, of tensors by a copy, and return the value."""
        if id(value) in self._parameters or id(value) in self._seen:
            return value
        if isinstance(value, Tensor):
            self._seen[id(value)] = value, value.detach().clone()
        elif isinstance(value, torch.Generator):
            self._seen[id(value)] = value, value.get_state()
        elif isinstance(value, dict):
            params = list(value["params"]) if isinstance(value.get("params"), list) else None
            self._seen[id(value)] = value, (dict(value), params)
            for name, item in value.items():
                if name != "params":
                    self._saved(item)
        elif isinstance(value, list):
            self._seen[id(value)] = value, list(value)
            for item in value:
                self._saved(item)
        elif isinstance(value, tuple):
            for item in value:
                self._saved(item)
        elif isinstance(value, Optimizer) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
            own = {k: v for k, v in getattr(value, "__dict__", {}).items() if not k.endswith("_hooks")}
            self._seen[id(value)] = value, own
            for item in own.values():
                self._saved(item)
        return value


def _put_back(held: Any, content: Any) -> None:
    if isinstance(held, Tensor):
        with torch.no_grad():
            held.copy_(content)
    elif isinstance(held, torch.Generator):
        held.set_state(content)
    elif isinstance(held, dict):
        items, params = content
        held.clear()
        held.update(items)
        if params is not None:
            held["params"][:] = params
    elif isinstance(held, list):
        held[:] = content
    else:
        for name in [k for k in held.__dict__ if k not in content and not k.endswith("_hooks")]:
            del held.__dict__[name]
        held.__dict__.update(content)


def with_wrapped(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers that it holds as attributes, whatever their depth, and last itself."""
    found: list[Optimizer] = []
    seen: set[int] = set()

    def visit(one: Optimizer) -> None:
        seen.add(id(one))
        for value in one.__dict__.values():
            for item in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(item, Optimizer) and id(item) not in seen:
                    visit(item)
        found.append(one)

    visit(optimizer)
    return found


@contextmanager
def without_hooks(optimizers: Sequence[Optimizer], *, before: bool = False) -> Iterator[None]:
    """Run their ``step`` without the hooks after it; with ``before``, without those before it too."""
    kinds = (_PRE, _POST) if before else (_POST,)
    own = [(one, kind, getattr(one, kind)) for one in optimizers for kind in kinds]
    of_all = [(_GLOBAL[kind], getattr(torch_optimizer, _GLOBAL[kind])) for kind in kinds]
    try:
        for one, kind, _ in own:
            setattr(one, kind, OrderedDict())
        for name, _ in of_all:
            setattr(torch_optimizer, name, OrderedDict())
        yield
    finally:
        for one, kind, hooks in own:
            setattr(one, kind, hooks)
        for name, hooks in of_all:
            setattr(torch_optimizer, name, hooks)


def run_post_hooks(optimizers: Sequence[Optimizer]) -> None:
    """What :func:`without_hooks` kept from running after their steps."""
    for one in optimizers:
        for hook in (*getattr(one, _POST).values(), *getattr(torch_optimizer, _GLOBAL[_POST]).values()):
            hook(one, (one,), {})
