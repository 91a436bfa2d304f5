"""What a closure touches: the leaves that it differentiates, and what it writes beside the gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from apo.trial.contents import place
from apo.trial.patched import patched
from apo.trial.walk import modules_of, parameters_of

__all__ = ["WrittenMeanwhile", "leaves_of_backwards"]


@contextmanager
def leaves_of_backwards() -> Iterator[list[Tensor]]:
    """The leaves of all graphs that are gone through backward in here: what closures write ``.grad`` of."""
    found: dict[int, Tensor] = {}
    leaves: list[Tensor] = []

    def backward(true: Callable[..., Any], tensors: Any, *args: Any, **kwargs: Any) -> Any:
        roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        found.update((id(leaf), leaf) for leaf in _graph_leaves(roots))
        leaves[:] = found.values()
        return true(roots if not isinstance(tensors, Tensor) else tensors, *args, **kwargs)

    with patched(torch.autograd, "backward", backward):
        yield leaves


def _graph_leaves(roots: Iterable[Tensor]) -> list[Tensor]:
    queue = [root.grad_fn for root in roots if isinstance(root, Tensor)]
    seen, leaves = set(queue), []
    while queue:
        node = queue.pop()
        if node is None:
            continue
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            leaves.append(variable)
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                queue.append(following)
    return leaves


class WrittenMeanwhile:
    """Other parameters of the models than ``own`` whose content is written between two looks: averages, as teachers
    hold, or what the forward passes of training write, and then a trial's too."""

    def __init__(self, models: Iterable[nn.Module], own: Iterable[Tensor]) -> None:
        self._marks: dict[int, Any] = {}
        self.look(models, own)

    def look(self, models: Iterable[nn.Module], own: Iterable[Tensor]) -> list[Tensor]:
        """Those written since the last look, and those that weren't there."""
        others = _others(models, own)
        marks = {id(p): _mark(p) for p in others}
        changed = [p for p in others if self._marks.get(id(p)) != marks[id(p)]]
        self._marks = marks
        return changed

    def __getstate__(self) -> dict[str, Any]:
        return {"_marks": {}}  # a copy's parameters are others


def _others(models: Iterable[nn.Module], own: Iterable[Tensor]) -> list[Tensor]:
    left_out = {id(p) for p in own}
    parameters = {id(p): p for p in parameters_of(modules_of(models)) if id(p) not in left_out}
    return [p for p in parameters.values() if not is_lazy(p) and not p.is_inference()]


def _mark(p: Tensor) -> Any:
    return p._version, place(p)
