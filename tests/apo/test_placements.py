"""Parameters that can't be served as they lie, and the plan of those that can: on ranks that are not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import apo
from apo import preconditioned
from tests.apo.helpers import apo_of


@pytest.fixture(autouse=True)
def four_ranks() -> Iterator[None]:
    """Rank 0 of four; collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


def placed(module: nn.Module, name: str, *placements: Placement, mesh: DeviceMesh | None = None) -> nn.Module:
    """The module with one of its parameters as a DTensor whose part here is the parameter that it had."""
    mesh = init_device_mesh("cpu", (4,)) if mesh is None else mesh
    held: Tensor = getattr(module, name)
    setattr(module, name, nn.Parameter(DTensor.from_local(held.detach(), mesh, placements, run_check=False)))
    return module


class FullyShardedDataParallel(nn.Sequential):
    """By its name."""


def of_rows(*, bias: bool = True) -> nn.Module:
    return nn.Sequential(placed(nn.Linear(3, 8, bias=bias), "weight", Shard(0)))


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "partial sums": (
        lambda: nn.Sequential(placed(nn.Linear(3, 4), "weight", Partial())),
        {},
        r"0\.weight must be placed as Shard or Replicate.*Partial.*redistribute",
    ),
    "partial bias": (
        lambda: nn.Sequential(placed(nn.Linear(3, 4), "bias", Partial())),
        {},
        r"0\.bias must be placed as Shard or Replicate",
    ),
    "other ranks' mesh": (
        lambda: nn.Sequential(placed(nn.Linear(3, 4), "weight", Shard(0), mesh=DeviceMesh("cpu", [1, 2]))),
        {},
        r"0\.weight must lie on a mesh of this rank.*train it on those ranks",
    ),
    "FSDP 1": (
        lambda: nn.Sequential(FullyShardedDataParallel(nn.Linear(3, 4))),
        {},
        r"0 is a FullyShardedDataParallel.*use torch.distributed.fsdp.fully_shard",
    ),
    "a group beside a mesh": (
        of_rows,
        {"process_group": "world"},
        r"process_group must be None.*0\.weight is one.*leave it out",
    ),
    "the kernel cut": (
        lambda: nn.Sequential(placed(nn.Conv2d(3, 4, 3), "weight", Shard(2))),
        {},
        r"0\.weight must be cut along its dimension 0 or 1.*dim=2.*shard another",
    ),
    "full blocks of rows": (
        of_rows,
        {"block_size": None},
        r"0\.weight must not be cut where block_size is None.*give a block_size",
    ),
    "full blocks of columns": (
        lambda: nn.Sequential(placed(nn.Linear(8, 3), "weight", Shard(1))),
        {"block_size": None},
        r"0\.weight must not be cut where block_size is None",
    ),
    "attention's rows": (
        lambda: nn.Sequential(placed(nn.MultiheadAttention(4, 2), "in_proj_weight", Shard(0))),
        {},
        r"0\.in_proj_weight holds 3 matrices.*ignored_params.*Linear",
    ),
    "owners": (of_rows, {"shard": "owner"}, r"shard='owner' isn't served on DTensors.*leave it out"),
    "no such sharding": (
        lambda: nn.Linear(3, 4),
        {"shard": "rows"},
        r"shard must be one of 'none', 'auto', 'owner', but got 'rows'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_at_construction_before_blocks_are_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, settings, words = REFUSED[name]
    if settings.get("process_group") == "world":
        settings = {**settings, "process_group": dist.group.WORLD}
    model = make()
    monkeypatch.setattr(preconditioned.PreconditionedLayer, "start", lambda *_: pytest.fail("a block was allocated"))
    with pytest.raises((TypeError, ValueError), match=words):
        apo_of(model, apo.ProximalObjective(model, [torch.ones(2, 3)]), **settings)


@pytest.mark.parametrize("name", ["partial sums", "other ranks' mesh", "FSDP 1", "a group beside a mesh"])
def test_refused_by_adaptive_lr(name: str) -> None:
    make, settings, words = REFUSED[name]
    settings = dict.fromkeys(settings, dist.group.WORLD)
    model = make()
    base = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises((TypeError, ValueError), match=words):
        apo.AdaptiveLR(base, apo.ProximalObjective(model, [torch.ones(2, 3)]), **settings)


def test_offloaded_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = of_rows()
    monkeypatch.setattr(model[0].weight.device_mesh, "_device_type", "cuda")
    with pytest.raises(ValueError, match=r"0\.weight must lie on its mesh's devices \(cuda\).*CPUOffloadPolicy"):
        apo.APO(model, apo.ProximalObjective(model, [torch.ones(2, 3)]))


def test_the_full_preconditioner_is_refused() -> None:
    model = of_rows()
    with pytest.raises(ValueError, match=r"FullPreconditioner isn't served on DTensors.*Shard\(dim=0\).*use APO"):
        apo.FullPreconditioner(model, apo.ProximalObjective(model, [torch.ones(2, 3)]))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_plan_is_of_what_this_rank_holds(device: str) -> None:
    """Before anything runs, also of a model that isn't there."""
    with torch.device(device):
        model = nn.Sequential(nn.Linear(9, 23), nn.ReLU(), nn.Linear(23, 5))
    whole = apo_of(model, apo.ProximalObjective(model, [None]), block_size=3).plan()
    fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
    plan = apo_of(model, apo.ProximalObjective(model, [None]), block_size=3).plan()
    assert [row.part for row in plan.rows] == ["6 of 23 rows", "2 of 5 rows"]
    assert [row.shape for row in plan.rows] == [(6, 10), (2, 24)]
    assert plan.memory_bytes < whole.memory_bytes / 2
    assert plan.rows[0].weight_bytes == 6 * 10 * 4
    assert "6 of 23 rows" in str(plan)
    assert "sent: " in str(plan)
    assert whole.meta_sent == 0


def test_the_plan_of_owners() -> None:
    model = nn.Sequential(nn.Linear(9, 23), nn.ReLU(), nn.Linear(23, 5), nn.ReLU(), nn.Linear(5, 2))
    goal = apo.ProximalObjective(model, [None])
    whole, plan = (apo_of(model, goal, shard=shard).plan() for shard in ("none", "owner"))
    parts = [row.part for row in plan.rows]
    assert parts.count("owned here") == 1
    assert all(part == "owned here" or part.startswith("owned by rank ") for part in parts)
    assert 0 < plan.memory_bytes < whole.memory_bytes
    assert plan.step_sent == sum(p.nbytes for p in model.parameters()) + 8 * len(plan.rows)


def test_biases_that_are_not_cut_as_their_weights_are_vectors() -> None:
    model = nn.Sequential(placed(placed(nn.Linear(3, 8), "weight", Shard(1)), "bias", Replicate()))
    rows = apo.APO(model, apo.ProximalObjective(model, [None])).plan().rows
    assert [(row.name, row.part) for row in rows] == [("0.weight", "3 of 12 columns"), ("0.bias", "")]
