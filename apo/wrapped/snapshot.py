"""What a wrapped optimizer holds beside the weights, so that a step that was tried can be taken back."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import ProxyTypes

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from apo.loop.past_weights import NAMES
from apo.rates.log_rates import get_rate, set_rate
from apo.trial import (
    UNCHANGING,
    Lookahead,
    attributes_of,
    copies_of,
    generator_state,
    is_generator,
    is_plain_object,
    put_attributes_back,
    random_state,
    restore_generator,
    restore_random_state,
    surely,
    write,
)

__all__ = ["Gradients", "OptimizerSnapshot", "Rehearsal", "with_wrapped", "without_hooks"]

_PRE, _POST = "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"
_LEFT_ALONE = {"params", *NAMES}
_GLOBAL = {_PRE: "_global_optimizer_pre_hooks", _POST: "_global_optimizer_post_hooks"}


class OptimizerSnapshot:
    """A copy of all that an optimizer holds: its state, its groups' settings, its other attributes, and the same of
    optimizers that it wraps.

    Parameters are shared, not copied; so are modules.

    Args:
        optimizer: the optimizer.
        chosen: the only parameters whose state may change; None: all.
    """

    def __init__(self, optimizer: Optimizer, chosen: Sequence[Tensor] | None = None) -> None:
        parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._parameters = parameters
        self._left_out = parameters - {id(p) for p in chosen} if chosen is not None else set()
        self._seen: dict[int, tuple[Any, Any]] = {}
        self._tensors: dict[int, Tensor] = {}
        self._save(optimizer)
        self._copies = copies_of([*self._tensors.values()])

    def restore(self) -> None:
        """Put everything back, in place where something else may hold it. Safe to call more than once."""
        write([*self._tensors.values()], self._copies)
        for held, content in self._seen.values():
            _put_back(held, content)

    def _save(self, value: Any, *, inside_object: bool = False) -> None:
        """Note a value's content."""
        if type(value) in UNCHANGING or id(value) in self._parameters or id(value) in self._seen:
            return
        if isinstance(value, Tensor):
            self._tensors[id(value)] = value
            return
        content, parts = self._content(value, inside_object=inside_object)
        if content is not None:
            self._seen[id(value)] = value, content
        inside_object = inside_object or _is_helper(value)
        for part in parts:
            self._save(part, inside_object=inside_object)

    def _content(self, value: Any, *, inside_object: bool) -> tuple[Any, list[Any]]:
        """What has to be written back, None if nothing, and the values inside."""
        if isinstance(value, np.ndarray):
            return value.copy(), []
        if is_generator(value):
            return generator_state(value), []
        if isinstance(value, dict):
            params = list(value["params"]) if isinstance(value.get("params"), list) else None
            inside = [x for name, x in value.items() if not _is_left_alone(name) and id(name) not in self._left_out]
            return (dict(value), params), inside
        if isinstance(value, (list, deque, set)):
            return list(value), list(value)
        if isinstance(value, tuple):
            return None, list(value)
        if isinstance(value, Optimizer) or (is_plain_object(value) and not (inside_object and _is_helper(value))):
            own = attributes_of(value)
            return own, list(own.values())
        return None, []


def _is_left_alone(name: Any) -> bool:
    """Of parameters, and of the means of past weights, which no step of the optimizer's writes. To compare a tensor
    with a word takes 20 µs."""
    return isinstance(name, str) and name in _LEFT_ALONE


def _is_helper(value: Any) -> bool:
    """An object of a user's class; dataclasses are states, whatever their depth."""
    return is_plain_object(value) and not dataclasses.is_dataclass(value)


def _put_back(held: Any, content: Any) -> None:
    if isinstance(held, np.ndarray):
        held[...] = content
    elif is_generator(held):
        restore_generator(held, content)
    elif isinstance(held, dict):
        items, params = content
        held.clear()
        held.update(items)
        if params is not None:
            held["params"][:] = params
    elif isinstance(held, list):
        held[:] = content
    elif isinstance(held, deque):
        held.clear()
        held.extend(content)
    elif isinstance(held, set):
        held.clear()
        held.update(content)
    else:
        put_attributes_back(held, content)


class Rehearsal:
    """Trial steps of an optimizer, which change the weights and nothing else, and at last the real one.

    All start from the same state, gradients and random numbers. Hooks before the step run at the first rehearsal,
    because they may change gradients; what they made of them is used again. Hooks after it run at the real step.

    Args:
        optimizer: the optimizer.
        weights: its parameters, with the copy that they are restored from.
    """

    def __init__(self, optimizer: Optimizer, weights: Lookahead) -> None:
        self._optimizer = optimizer
        self._weights = weights
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._rates = [get_rate(group) for group in optimizer.param_groups]
        self._random = random_state(self._parameters)
        self._snapshot = OptimizerSnapshot(optimizer)
        self._gradients = Gradients(self._parameters)
        self._hooks = _Hooks(with_wrapped(optimizer))

    def start_over(self) -> None:
        """Put back what the optimizer holds, its rates too."""
        surely(self._snapshot.restore)

    def rehearse(self, factor: float) -> None:
        """Step at ``factor`` times the rates, and take back everything but the weights."""
        try:
            if factor != 1:
                for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
                    set_rate(group, factor * rate)
            with self._hooks.rehearsed():
                self._optimizer.step()
        finally:
            surely(self._take_back)

    def perform(self) -> None:
        """Step at the present rates. If that raises, everything is as before the first rehearsal, the rates too."""
        try:
            with self._hooks.performed():
                self._optimizer.step()
        except BaseException:
            surely(self._take_back)
            surely(self._weights.restore)
            raise

    def _take_back(self) -> None:
        self._snapshot.restore()
        self._gradients.restore()
        restore_random_state(self._random)


class Gradients:
    """A copy of each ``.grad``: optimizers and their hooks may write to them."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._held = [(p, p.grad) for p in parameters]
        self._grads = [grad for _, grad in self._held if grad is not None]
        self._copies = copies_of(self._grads)

    def restore(self) -> None:
        write(self._grads, self._copies)
        for p, grad in self._held:
            if p.grad is not grad:
                p.grad = grad


def with_wrapped(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers that it holds as attributes, whatever their depth, and last itself."""
    found: list[Optimizer] = []
    seen: set[int] = set()

    def visit(one: Optimizer) -> None:
        seen.add(id(one))
        for value in one.__dict__.values():
            kind = type(value)  # as a proxy whose object is gone has no class
            inside = value.values() if issubclass(kind, dict) else value if issubclass(kind, (list, tuple)) else [value]
            for item in inside:
                if issubclass(type(item), Optimizer) and id(item) not in seen:
                    visit(item)
        found.append(one)

    visit(optimizer)
    return found


class _Hooks:
    """The step hooks of some optimizers, and those of all optimizers.

    Wrappers that don't call ``Optimizer.__init__`` have none.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = [one for one in optimizers if hasattr(one, _PRE) and hasattr(one, _POST)]
        any_before = getattr(torch_optimizer, _GLOBAL[_PRE]) or any(getattr(one, _PRE) for one in self._optimizers)
        self._before = bool(any_before)
        self._made: dict[int, tuple[Any, list[tuple[Tensor, Tensor | None]]]] = {}

    @contextmanager
    def rehearsed(self) -> Iterator[None]:
        """None after the step; those before it the first time only."""
        first = self._before and not self._made
        hook = self._note if first else self._repeat
        with without_hooks(self._optimizers, before=not first), self._added(hook):
            yield

    @contextmanager
    def performed(self) -> Iterator[None]:
        """Those before the step have run."""
        with _replaced(self._optimizers, _PRE), self._added(self._repeat):
            yield

    @contextmanager
    def _added(self, hook: Any) -> Iterator[None]:
        if not self._before:
            yield
            return
        handles = [one.register_step_pre_hook(hook) for one in self._optimizers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, one: Optimizer, args: Any, kwargs: Any) -> None:
        made = [(p, p.grad) for group in one.param_groups for p in group["params"]]
        self._made[id(one)] = (args, kwargs), [(p, None if g is None else g.detach().clone()) for p, g in made]

    def _repeat(self, one: Optimizer, args: Any, kwargs: Any) -> Any:
        if id(one) not in self._made:
            return None
        arguments, made = self._made[id(one)]
        with torch.no_grad():
            for p, content in made:
                if p.grad is None or content is None:
                    p.grad = None if content is None else content.clone()
                else:
                    p.grad.copy_(content)
        return arguments


@contextmanager
def _replaced(optimizers: Sequence[Optimizer], kind: str) -> Iterator[None]:
    """Without the hooks of one kind, those of all optimizers included."""
    own = [(one, getattr(one, kind)) for one in optimizers if hasattr(one, kind)]
    of_all = getattr(torch_optimizer, _GLOBAL[kind])
    try:
        for one, _ in own:
            setattr(one, kind, OrderedDict())
        setattr(torch_optimizer, _GLOBAL[kind], OrderedDict())
        yield
    finally:
        for one, hooks in own:
            setattr(one, kind, hooks)
        setattr(torch_optimizer, _GLOBAL[kind], of_all)


@contextmanager
def without_hooks(optimizers: Sequence[Optimizer], *, before: bool = False) -> Iterator[None]:
    """Run their ``step`` without the hooks after it; with ``before``, without those before it too."""
    with _replaced(optimizers, _POST):
        if before:
            with _replaced(optimizers, _PRE):
                yield
        else:
            yield


def copied(value: Any) -> Any:
    """A copy of numbers and tensors in containers; None for anything else."""
    if type(value) in ProxyTypes:
        return None
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: copied(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [copied(v) for v in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return copied(attributes_of(value))
    return copy.copy(value) if isinstance(value, (int, float, str, bool, np.ndarray)) else None
