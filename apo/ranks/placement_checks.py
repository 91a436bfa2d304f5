"""Refusing parameters that lie where they can't be served: the error names the parameter and says what to do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from apo.ranks.sharding import is_placed, local, shards_of

__all__ = ["check_matrix", "check_placements", "check_unplaced"]


def check_placements(models: Iterable[nn.Module], parameters: Sequence[Tensor], process_group: Any = None) -> None:
    """Refuse what no front end can serve.

    Raises:
        TypeError: FSDP's first version; a DTensor of other tensors than plain ones.
        ValueError: a Partial placement; a mesh that this rank is no part of; weights that are offloaded to the CPU;
            a ``process_group`` beside a mesh.
    """
    names: dict[int, str] = {}
    for model in models:
        names |= {id(p): name for name, p in model.named_parameters()}
        for prefix, module in model.named_modules():
            if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__):
                raise TypeError(
                    f"parameters must be whole tensors or DTensors, but {prefix or 'the model'} is a "
                    "FullyShardedDataParallel, which keeps flat ones: use torch.distributed.fsdp.fully_shard"
                )
    for i, p in enumerate(parameters):
        if is_placed(p):
            _check_placed(names.get(id(p), f"parameter {i}"), p)
            if process_group is not None:
                raise ValueError(
                    "process_group must be None where parameters are DTensors: their mesh says which ranks train "
                    f"the model, but {names.get(id(p), f'parameter {i}')} is one and a group was given: leave it out"
                )


def _check_placed(name: str, p: Tensor) -> None:
    mesh: Any = p.device_mesh  # type: ignore[attr-defined]
    placements = tuple(p.placements)  # type: ignore[attr-defined]
    if mesh.get_coordinate() is None:
        raise ValueError(f"{name} must lie on a mesh of this rank, but its mesh is {mesh}: train it on those ranks")
    if any(placement.is_partial() for placement in placements):
        raise ValueError(
            f"{name} must be placed as Shard or Replicate, but is placed as {placements}: redistribute it first"
        )
    if p.device.type not in (mesh.device_type, "meta"):
        raise ValueError(
            f"{name} must lie on its mesh's devices ({mesh.device_type}), but lies on {p.device.type}: leave out "
            "CPUOffloadPolicy"
        )
    part = local(p)
    if type(part) not in (Tensor, nn.Parameter):
        raise TypeError(
            f"{name} must be a DTensor of plain tensors, but its parts are of {type(part).__name__}: keep the weights "
            "that are trained in a plain dtype"
        )


def check_unplaced(what: str, parameters: Iterable[Tensor], instead: str) -> None:
    """Refuse DTensors for what isn't served on them, with a ValueError."""
    for p in parameters:
        if is_placed(p):
            placements = tuple(p.placements)  # type: ignore[attr-defined]
            raise ValueError(
                f"{what} isn't served on DTensors, but a parameter of shape {tuple(p.shape)} is placed as "
                f"{placements}: {instead}"
            )


def check_matrix(name: str, p: Tensor, *, row_dim: int, batch: tuple[int, ...], full: Sequence[bool]) -> None:
    """Refuse ways to cut a weight that its matrix can't follow, before its blocks are allocated.

    Args:
        name: the weight's.
        p: the weight, of two dimensions or more.
        row_dim: which of its dimensions the matrix's rows are.
        batch: the matrices in it.
        full: whether full blocks are asked for, A and B.
    """
    cut = shards_of(p)
    placements = tuple(getattr(p, "placements", ()))
    for dim, _ in cut:
        if dim > 1:
            raise ValueError(
                f"{name} must be cut along its dimension 0 or 1, but is placed as {placements}: shard another one"
            )
        if full[dim == row_dim]:
            raise ValueError(
                f"{name} must not be cut where block_size is None, because a full block needs whole rows and columns, "
                f"but it is placed as {placements}: give a block_size, such as 64"
            )
        if batch and dim == row_dim:
            raise ValueError(
                f"{name} holds {batch[0]} matrices one below the other, which must not be cut across, but it is placed "
                f"as {placements}: keep it whole (fully_shard's ignored_params), or project by a Linear each"
            )
