"""Which part of each parameter this rank holds, and over which ranks sums of parts go.

A DTensor lies on a mesh of ranks: ``Shard(d)`` on a dimension of the mesh cuts it along its own dimension d,
``Replicate()`` repeats it. The optimizers work on the local parts. What they sum over a whole tensor, they sum over the
mesh dimensions that cut it: here are the parts, these sums, and nothing else that communicates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Over",
    "Shards",
    "any_over",
    "is_placed",
    "known",
    "local",
    "local_grad",
    "over",
    "shards_of",
    "sum_over",
    "sum_over_",
    "summed_once",
]

Over = tuple[str, ...]
"""Names of process groups, in the order of the mesh's dimensions. A sum over them goes over one after the other."""

_groups: dict[str, Any] = {}


def is_placed(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that this rank holds, in the same memory; any other tensor itself."""
    if not is_placed(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def local_grad(p: Tensor) -> Tensor | None:
    """This rank's part of a parameter's gradient, placed as the parameter is."""
    grad = p.grad
    if grad is None or not is_placed(p):
        return grad
    if is_placed(grad) and grad.placements != p.placements:  # type: ignore[attr-defined]
        with torch.no_grad():
            grad = grad.redistribute(p.device_mesh, p.placements)  # type: ignore[attr-defined]
    return local(grad)


def shards_of(tensor: Tensor) -> list[tuple[int, str]]:
    """The dimensions that a tensor is cut along, each with the group of the ranks that hold the other parts."""
    if not is_placed(tensor):
        return []
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    found = []
    for i, placement in enumerate(placements):
        dim = getattr(placement, "dim", None)  # None: replicated. FSDP over TP is a strided Shard, which is no Shard
        if dim is not None and mesh.size(i) > 1:
            found.append((dim % tensor.ndim, known(mesh.get_group(i))))
    return found


def over(tensor: Tensor) -> Over:
    """The groups over which a tensor is cut."""
    return tuple(name for _, name in shards_of(tensor))


def known(group: Any) -> str:
    """The name that a process group goes by here."""
    _groups[group.group_name] = group
    return str(group.group_name)


def sum_over(values: Tensor, overs: Sequence[Over]) -> Tensor:
    """Each of a vector's numbers summed over its own groups: one all-reduce for each group there is."""
    names = list(dict.fromkeys(name for own in overs for name in own))
    if not names:
        return values
    values = values.clone()
    for name in names:
        at = [i for i, own in enumerate(overs) if name in own]
        if len(at) == len(overs):
            _all_reduce(values, name)
        else:
            part = values[at]
            _all_reduce(part, name)
            values[at] = part
    return values


def sum_over_(tensors: Sequence[Tensor], overs: Sequence[Over]) -> None:
    """Each tensor summed over its own groups, in place: one all-reduce for each group and dtype there is."""
    names = list(dict.fromkeys(name for own in overs for name in own))
    for name in names:
        alike: dict[torch.dtype, list[Tensor]] = {}
        for tensor, own in zip(tensors, overs, strict=True):
            if name in own:
                alike.setdefault(tensor.dtype, []).append(tensor)
        for those in alike.values():
            flat = torch.cat([t.reshape(-1) for t in those])
            _all_reduce(flat, name)
            parts = [x.view(t.shape) for x, t in zip(torch.split(flat, [t.numel() for t in those]), those, strict=True)]
            torch._foreach_copy_(those, parts)


def any_over(flag: bool, groups: Over, device: torch.device) -> bool:
    """Whether it is so on any rank of these groups; on all of them the same."""
    if not groups:
        return flag
    return bool(sum_over(torch.tensor([float(flag)], device=device), [groups]).item())


def summed_once(shares: Sequence[float], overs: Sequence[Over]) -> tuple[list[float], Callable[[Tensor], None] | None]:
    """What makes one number, the sum of ``share · product`` of parts, a sum over all ranks that counts each part once:
    the shares of what some of them hold alike, and what adds the number up, in place."""
    names = list(dict.fromkeys(name for own in overs for name in own))
    if not names:
        return list(shares), None
    counts = {name: torch.distributed.get_world_size(_groups[name]) for name in names}
    each = [
        share / math.prod(count for name, count in counts.items() if name not in own)
        for share, own in zip(shares, overs, strict=True)
    ]

    def total(value: Tensor) -> None:
        for name in names:
            _all_reduce(value, name)

    return each, total


def _all_reduce(tensor: Tensor, name: str) -> None:
    torch.distributed.all_reduce(tensor, group=_groups[name])


class Shards:
    """Parameters as they lie over the ranks.

    Attributes:
        parts: this rank's part of each, in the memory of the parameter.
        overs: the groups over which each is cut.
        groups: all groups of their meshes, replicating ones too: the ranks that train one model.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.parameters = list(parameters)
        self.placed = any(map(is_placed, self.parameters))
        self.parts = [local(p) for p in self.parameters] if self.placed else list(self.parameters)
        self.overs = [over(p) if self.placed else () for p in self.parameters]
        found: dict[str, None] = {}
        for p in self.parameters if self.placed else ():
            if is_placed(p):
                mesh: Any = p.device_mesh  # type: ignore[attr-defined]
                found |= dict.fromkeys(known(mesh.get_group(i)) for i in range(mesh.ndim) if mesh.size(i) > 1)
        self.groups: Over = tuple(found)

    def grads(self) -> list[Tensor | None]:
        """This rank's part of each gradient."""
        return [local_grad(p) if self.placed else p.grad for p in self.parameters]

    def sum(self, values: Tensor) -> Tensor:
        """One number for each parameter, or several times as many, summed over its parts."""
        return sum_over(values, self.overs * (len(values) // len(self.overs)) if self.overs else [])

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank; on all ranks the same."""
        return any_over(flag, self.groups, self._device)

    def largest(self, value: Tensor) -> float:
        """The largest of the ranks' values; infinite where one isn't finite."""
        if self.groups:
            value = value.nan_to_num(nan=math.inf, posinf=math.inf).reshape(1)
            for name in self.groups:
                torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX, group=_groups[name])
        return float(value.item())

    def batches(self, outputs: Sequence[Tensor]) -> tuple[int, int]:
        """Which of the ranks' batches this rank has, and how many they are. Ranks along a dimension of the mesh have
        the same one if its outputs add up to the same on all of them, as those of tensor parallel do."""
        place, count = 0, 1
        if not self.groups:
            return place, count
        number = torch.stack([x.detach().sum(dtype=torch.float64) for x in outputs]).sum()
        for name in self.groups:
            ends = torch.stack([number, -number])
            torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MAX, group=_groups[name])
            if self.any(bool(ends.sum() != 0)):
                size = torch.distributed.get_world_size(_groups[name])
                place, count = place * size + torch.distributed.get_rank(_groups[name]), count * size
        return place, count

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each by its mean over all ranks of the mesh; the same bits on all of them."""
        if not self.groups or not tensors:
            return
        sum_over_(tensors, [self.groups] * len(tensors))
        count = math.prod(torch.distributed.get_world_size(_groups[name]) for name in self.groups)
        torch._foreach_div_(list(tensors), count)

    @property
    def _device(self) -> torch.device:
        return self.parts[0].device
