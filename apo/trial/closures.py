"""What a closure touches: the leaves that it differentiates, and what it writes beside the gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from apo.trial.contents import place
from apo.trial.walk import modules_of, parameters_of

__all__ = ["changed_by", "leaves_of_backwards"]


@contextmanager
def leaves_of_backwards() -> Iterator[list[Tensor]]:
    """The leaves of all graphs that are gone through backward in here: what closures write ``.grad`` of."""
    found: dict[int, Tensor] = {}
    true = torch.autograd.backward

    @wraps(true)
    def backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        found.update((id(leaf), leaf) for leaf in _graph_leaves(roots))
        leaves[:] = found.values()
        return true(roots if not isinstance(tensors, Tensor) else tensors, *args, **kwargs)

    leaves: list[Tensor] = []
    torch.autograd.backward = backward
    try:
        yield leaves
    finally:
        torch.autograd.backward = true


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


@contextmanager
def changed_by(models: Iterable[nn.Module], own: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Other parameters of the models than ``own`` whose content was written in here: averages, as teachers hold."""
    left_out = {id(p) for p in own}
    parameters = {id(p): p for p in parameters_of(modules_of(models)) if id(p) not in left_out}
    others = [p for p in parameters.values() if not p.is_inference()]
    before = [(p._version, place(p)) for p in others]
    changed: list[Tensor] = []
    yield changed
    changed += [p for p, mark in zip(others, before, strict=True) if (p._version, place(p)) != mark]
