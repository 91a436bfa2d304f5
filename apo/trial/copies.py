"""Copies of many tensors in a few operations: on a GPU every operation costs the host as much as a small layer's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["copies_of", "write"]

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


@torch.no_grad()
def copies_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """A copy of each, as ``x.detach().clone()`` makes it."""
    plain = [_is_plain(x) for x in tensors]
    found = [torch.empty_like(x) if own else x.detach().clone() for x, own in zip(tensors, plain, strict=True)]
    _write_alike([(copy, x) for copy, x, own in zip(found, tensors, plain, strict=True) if own])
    return found


@torch.no_grad()
def write(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target, what is of one kind together."""
    plain: list[tuple[Tensor, Tensor]] = []
    for target, source in zip(targets, sources, strict=True):
        if _is_plain(target) and _is_plain(source):
            plain.append((target, source))
        else:
            target.copy_(source)
    _write_alike(plain)


def _write_alike(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy the second of each pair into the first."""
    alike: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in pairs:
        own = alike.setdefault((target.dtype, target.device, source.dtype, source.device), ([], []))
        own[0].append(target)
        own[1].append(source)
    for own in alike.values():
        torch._foreach_copy_(*own)


def _is_plain(x: Tensor) -> bool:
    odd = x.is_quantized or x.is_nested or x.is_conj() or x.is_neg()
    return type(x) in _PLAIN and x.layout is torch.strided and not odd
