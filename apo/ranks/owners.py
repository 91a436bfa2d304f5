"""Which rank holds the preconditioner of which layer, where every rank holds all weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

import apo_kernels as ak
from apo.layers.matrix_view import MatrixView
from apo.ranks.distributed import distributed_data_parallel
from apo.ranks.sharding import known, local

__all__ = ["Owners", "Shard", "balanced"]

Shard = Literal["none", "auto", "owner"]
Cost = tuple[float, float]


class Owners:
    """Each layer has one owner, which alone holds A, B, S, momentum and running means, computes its step, and hands
    the weights on. The others hold an empty part of each.

    Args:
        group: the ranks that hold the same weights; None: this process alone, which owns everything.
    """

    def __init__(self, group: Any = None) -> None:
        together = group is not None and torch.distributed.get_world_size(group) > 1
        self._group = group if together else None
        self.over = (known(group),) if together else ()
        self.rank = torch.distributed.get_rank(group) if together else 0
        count = torch.distributed.get_world_size(group) if together else 1
        self._loads = [(0.0, 0.0)] * count

    @classmethod
    def found(cls, shard: Shard, process_group: Any, model: nn.Module, parameters: Sequence[Tensor]) -> Owners:
        """Those that ``shard`` asks for, in the given group or DDP's; with ``"owner"`` else in the default group."""
        distributed = torch.distributed
        if shard == "none" or not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        if process_group is None:
            ddp = distributed_data_parallel(model, parameters)
            if ddp is not None:
                process_group = ddp.process_group
            elif shard == "owner":
                process_group = distributed.group.WORLD
        return cls(process_group)

    @property
    def count(self) -> int:
        """How many ranks there are."""
        return len(self._loads)

    def views(self, views: Sequence[MatrixView], block_size: int | None, max_dim: int | None) -> list[MatrixView]:
        """The part of each that this rank holds: all of it, or nothing. The costliest are given away first, each to
        the rank that has least to do and to hold."""
        if not self._group:
            return list(views)
        costs = [_cost(view, block_size, max_dim) for view in views]
        owners = balanced(costs, self._loads)
        return [self._part(view, owner) for view, owner in zip(views, owners, strict=True)]

    def _part(self, view: MatrixView, owner: int) -> MatrixView:
        part = replace(view, whole=view, over=self.over, owner=owner, held=owner == self.rank)
        return part if part.held else replace(part, m=0, n=0)

    def share_(self, views: Iterable[MatrixView]) -> None:
        """Hand the weights of these layers on, from their owners to all: one broadcast from each, for each dtype."""
        if not self._group:
            return
        held: dict[tuple[int, torch.dtype], list[Tensor]] = {}
        for view in views:
            assert view.owner is not None
            for p in view.parameters:
                held.setdefault((view.owner, p.dtype), []).append(local(p))
        with torch.no_grad():
            for (owner, _), parts in sorted(held.items(), key=lambda each: (each[0][0], str(each[0][1]))):
                self.broadcast_(parts, owner)

    def broadcast_(self, tensors: Sequence[Tensor], owner: int) -> None:
        """Write what the owner holds in these tensors, which are alike in dtype, into those of the other ranks."""
        flat = torch.cat([t.reshape(-1) for t in tensors])
        torch.distributed.broadcast(flat, self._source(owner), group=self._group)
        if owner != self.rank:
            parts = torch.split(flat, [t.numel() for t in tensors])
            torch._foreach_copy_(list(tensors), [x.view(t.shape) for x, t in zip(parts, tensors, strict=True)])

    def handed_on(self, states: list[dict[str, Tensor]], owner: int) -> list[dict[str, Tensor]]:
        """Copies of the owner's tensors on all ranks, whatever these hold; to be called on all of them."""
        shapes: list[Any] = [[{name: (t.shape, t.dtype) for name, t in state.items()} for state in states]]
        torch.distributed.broadcast_object_list(shapes, self._source(owner), group=self._group)
        found = [
            {
                name: state[name].detach().clone() if owner == self.rank else state[name].new_empty(shape, dtype=dtype)
                for name, (shape, dtype) in each.items()
            }
            for state, each in zip(states, shapes[0], strict=True)
        ]
        alike: dict[torch.dtype, list[Tensor]] = {}
        for state in found:
            for t in state.values():
                if not _is_number(t):
                    alike.setdefault(t.dtype, []).append(t)
        for tensors in alike.values():
            self.broadcast_(tensors, owner)
        for own, state in zip(states, found, strict=True):
            state |= {name: t.clone() for name, t in own.items() if _is_number(t)}
        return found

    def _source(self, owner: int) -> int:
        assert self._group is not None
        return torch.distributed.get_global_rank(self._group, owner)

    def __getstate__(self) -> dict[str, Any]:
        if self._group:
            raise TypeError("an optimizer whose layers have owners can't be pickled or copied: save its state_dict()")
        return self.__dict__


def _is_number(tensor: Tensor) -> bool:
    """One that lies on the CPU, and is the same on all ranks."""
    return tensor.ndim == 0


def balanced(costs: Sequence[Cost], loads: list[Cost]) -> list[int]:
    """Give each cost to one of the ranks that have these loads, the largest first, each to the rank whose load in
    FLOPs and bytes then is least; the loads are written."""
    totals = [sum(each) or 1.0 for each in zip(*costs, *loads, strict=True)]
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -_share(costs[i], totals)):
        after = [_sum(load, costs[i]) for load in loads]
        owners[i] = min(range(len(loads)), key=lambda rank: (_share(after[rank], totals), rank))
        loads[owners[i]] = after[owners[i]]
    return owners


def _share(cost: Cost, totals: Sequence[float]) -> float:
    return max(x / total for x, total in zip(cost, totals, strict=True))


def _sum(a: Cost, b: Cost) -> Cost:
    return a[0] + b[0], a[1] + b[1]


def _cost(view: MatrixView, block_size: int | None, max_dim: int | None) -> Cost:
    """FLOPs of a step, and numbers held."""
    A, B = view.sides(block_size, max_dim)
    batch = view.batch[0] if view.batch else 1
    flops = ak.precondition_flops(view.m, view.n, A.block_size, B.block_size, batch=batch)
    blocks = sum(side.length * side.width for side in (A, B) if side.learned)
    return float(flops), float(batch * (view.m * view.n + blocks))
