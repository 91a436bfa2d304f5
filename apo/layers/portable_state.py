"""The state of a layer in the form that checkpoints hold: it can be loaded under another sharding.

A block is held by its rows: row i of a side of length L has the entries of its square, ``(*batch, L, width)``, with its
place in that square beside it. So every tensor has a dimension of the weight's matrix first, and is a DTensor that is
cut where the weight is; A of a weight that is cut by rows is replicated. ``torch.distributed.checkpoint`` then brings
each rank what it needs. Where squares start elsewhere than they did, what reached across a new edge is lost.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apo.layers.matrix_view import MatrixView, Side
from apo.layers.preconditioner import PreconditionedLayer
from apo.ranks.sharding import is_placed, local, shards_of

__all__ = ["load_portable", "misfit", "portable"]

PLACE, ONES = "_place", "_ones"


def portable(layer: PreconditionedLayer, state: dict[str, Tensor], *, whole: bool = False) -> dict[str, Tensor]:
    """What a checkpoint holds of a layer's state; ``whole``: of all of it, where this rank holds only a part."""
    view = layer.view
    found = {"step": state["step"]}
    for name in layer.learned:
        own = layer.parts[name]
        for key in [key for key in state if key == name or key.startswith(f"{name}_")]:
            tensor = state[key]
            if own.block and tensor.is_floating_point() and tensor.ndim:
                tensor = _rows(layer, name, tensor, len(view.batch), whole)
            found[key] = _placed(view, name, tensor, batched=tensor.is_floating_point())
    if "momentum_buffer" in state:
        found["momentum_buffer"] = _placed(view, "S", state["momentum_buffer"])
    return found


def load_portable(layer: PreconditionedLayer, state: dict[str, Any]) -> None:
    """Take up what :func:`portable` made, on these ranks or others."""
    if layer.momentum is None and "momentum_buffer" in state:
        layer.momentum = torch.zeros_like(layer.S)
    for key, tensor in layer.state().items():
        if key not in state or key.endswith((PLACE, ONES)) or not (layer.view.held or tensor.ndim == 0):
            continue
        own = layer.parts.get(key.split("_")[0])
        if own is None or not own.block or tensor.ndim == 0:
            tensor.copy_(_local(layer.view, "S", state[key]) if tensor.ndim else torch.as_tensor(state[key]))
        else:
            name = key.split("_")[0]
            rows = _local(layer.view, name, state[key])
            side, batch = _side(layer, name), len(layer.view.batch)
            if tensor.ndim < own.tensor.ndim:
                tensor.copy_(_squares_of_vector(rows, side, tensor.shape))
                continue
            places = _local(layer.view, name, state[name + PLACE], batched=False)
            own.ones.fill_(float(torch.as_tensor(state[name + ONES])))
            ones = own.ones.item() if key == name else 0.0
            tensor.copy_(_squares(rows, places, side, tensor.shape, ones, batch))
    for copy, master in layer.copies():
        copy.copy_(master)


def misfit(layer: PreconditionedLayer, state: object) -> str | None:
    """Why a state can't be taken up; None where it can."""
    view = layer.view
    wanted = {*layer.learned, *(name + x for name in layer.learned if name != "S" for x in (PLACE, ONES))}
    if not isinstance(state, dict) or not wanted <= state.keys():
        return f"{view.name} needs entries {', '.join(sorted(wanted))}"
    whole = view.whole or view
    shapes: dict[str, tuple[int, ...]] = {"S": whole.shape, "momentum_buffer": whole.shape}
    for name, side in zip("AB", layer.whole_sides, strict=True):
        shapes[name] = (*view.batch, side.length, side.width)
    for name, shape in shapes.items():
        held = state.get(name)
        if name in {*layer.learned, "momentum_buffer"} and isinstance(held, Tensor) and held.shape != shape:
            return f"{name} of {view.name} must be {shape}, but is {tuple(held.shape)}"
    return None


def _side(layer: PreconditionedLayer, name: str, whole: bool = False) -> Side:
    return (layer.whole_sides if whole else layer.sides)["AB".index(name)]


def _rows(layer: PreconditionedLayer, name: str, tensor: Tensor, batch: int, whole: bool) -> Tensor:
    """A block, or what goes with it, by rows: a number for each, or a square's row."""
    side, own = _side(layer, name, whole), layer.parts[name]
    vector = tensor.ndim < own.tensor.ndim
    if side.block_size is not None:
        tensor = tensor.flatten(batch, batch + 1).narrow(batch, 0, side.length)
    if vector:
        return tensor.clone()
    return F.pad(tensor, (0, _side(layer, name, True).width - tensor.shape[-1])).contiguous()


def _squares_of_vector(rows: Tensor, side: Side, shape: torch.Size) -> Tensor:
    if side.block_size is None:
        return rows
    return F.pad(rows, (0, shape[-2] * shape[-1] - side.length)).reshape(shape)


def _squares(rows: Tensor, places: Tensor, side: Side, shape: torch.Size, ones: float, batch: int) -> Tensor:
    """Squares that start where they do here, of rows whose squares may have started elsewhere."""
    length, b = side.length, side.width
    if length == 0:
        return rows.new_zeros(shape)
    here = torch.arange(length, device=rows.device)
    starts = here - places  # of the squares that they were
    there = (here // b * b)[:, None] + torch.arange(b, device=rows.device)
    known = (there < length) & (starts[there.clamp(max=length - 1)] == starts[:, None])
    columns = (there - starts[:, None]).clamp(0, rows.shape[-1] - 1)
    found = rows.gather(-1, columns.expand(*rows.shape[:-1], b)).where(known, rows.new_zeros(()))
    if side.block_size is None:
        return found
    beyond = shape[batch] * b - length
    found = F.pad(found, (0, 0, 0, beyond))
    if beyond:
        last = torch.arange(length, length + beyond, device=rows.device)
        found[..., last, last % b] = ones
    return found.reshape(shape)


def _placement(view: MatrixView, name: str, *, batched: bool) -> tuple[Any, list[Any], tuple[int, ...]]:
    """The mesh, the placements, and the whole shape of the leading dimensions, of a tensor of a block or of S."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    weight: Any = view.weight
    row_dim = int(view.transposed)
    batch = len(view.batch) if batched else 0
    where = {"A": (None, batch), "B": (batch, None), "S": (batch, batch + 1)}[name]  # of rows, of columns
    placements: list[Any] = []
    cut = {group for _, group in shards_of(weight)}
    for placement in weight.placements:
        dim = getattr(placement, "dim", None)
        if dim is None or not cut:
            placements.append(Replicate())
            continue
        rows = not view.is_vector and dim % weight.ndim == row_dim
        to = where[0] if rows else where[1]
        if name == "A" and not rows:
            to = batch
        factor = getattr(placement, "split_factor", None)
        placements.append(
            Replicate() if to is None else Shard(to) if factor is None else _StridedShard(to, split_factor=factor)
        )
    whole = view.whole or view
    lengths = {"A": (whole.n,), "B": (whole.m,), "S": (whole.m, whole.n)}[name]
    return weight.device_mesh, placements, ((*view.batch, *lengths) if batched else lengths)


def _placed(view: MatrixView, name: str, part: Tensor, *, batched: bool = True) -> Tensor:
    if not is_placed(view.weight) or part.ndim == 0:
        return part
    from torch.distributed.tensor import DTensor

    mesh, placements, leading = _placement(view, name, batched=batched)
    _check_even(view)
    shape = torch.Size((*leading, *part.shape[len(leading) :]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part.contiguous(), mesh, placements, run_check=False, shape=shape, stride=stride)


def _local(view: MatrixView, name: str, tensor: Any, *, batched: bool = True) -> Tensor:
    """This rank's part of what a checkpoint holds."""
    tensor = torch.as_tensor(tensor)
    if not is_placed(view.weight):
        whole: Tensor = tensor.full_tensor() if is_placed(tensor) else tensor
        return whole
    from torch.distributed.tensor import distribute_tensor

    mesh, placements, _ = _placement(view, name, batched=batched)
    if not is_placed(tensor):
        tensor = distribute_tensor(tensor.to(mesh.device_type), mesh, placements, src_data_rank=None)
    elif tuple(tensor.placements) != tuple(placements):
        tensor = tensor.redistribute(mesh, placements)
    return local(tensor)


def _check_even(view: MatrixView) -> None:
    """Columns that are cut unevenly across what a column stands for have no placement of their own."""
    weight, whole = view.weight, view.whole or view
    columns = weight.shape[1 - int(view.transposed)] if not view.is_vector else whole.n
    if view.column_over and not view.is_vector and whole.n != columns and columns % (columns * view.n // whole.n or 1):
        raise ValueError(f"{view.name} is cut unevenly by columns, which checkpoints can't hold: cut it by rows")
