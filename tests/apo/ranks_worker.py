"""Scenes of several ranks: ``python -m tests.apo.ranks_worker scenes folder rank ranks``; each saves what it got."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import apo
import apo.ranks.distributed
from tests.apo.helpers import apo_of

STEPS = 6
FRONT_ENDS = ("AdaptiveLR", "APO", "FullPreconditioner")


class Net(nn.Module):
    def __init__(self, *, norm: bool = False, unused: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.unused = nn.Linear(2, 2) if unused else None

    def forward(self, x: Tensor) -> Any:
        return self.last(torch.tanh(self.norm(self.first(x))))


class Holder(nn.Module):
    """As trainers wrap a distributed model once more."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


def front_end(kind: str, model: nn.Module, goal: Any, lr: float = 0.05, **settings: Any) -> Any:
    settings = {"interval": 2, "warmup": 3, **settings}
    if kind == "AdaptiveLR":
        return apo.AdaptiveLR(torch.optim.SGD(model.parameters(), lr, 0.9), goal, **settings)
    if kind == "APO":
        return apo_of(model, goal, lr=lr, **settings)
    return getattr(apo, kind)(model, goal, lr=lr, **settings)


def outcome(opt: Any) -> list[Tensor]:
    counts = [opt.failed_trials, opt.skipped_steps, opt.steps, opt.param_groups[0]["lr"]]
    return [p.detach().clone() for p in opt.parameters] + [torch.tensor(counts, dtype=torch.float64)]


def replicas(
    rank: int | None,
    kind: str,
    given: str = "ddp",
    *,
    parts: int = 1,
    own_loss: bool = False,
    spoiled: int | None = None,
    norm: bool = False,
    unused: bool = False,
    **options: Any,
) -> list[Tensor]:
    """A rank trains on its half of each batch and of each B′, None on all of it: the same to rounding."""
    torch.manual_seed(0)
    inner = Net(norm=norm, unused=unused).double()
    model = inner if rank is None else DistributedDataParallel(inner, **options)
    generator = torch.Generator().manual_seed(5)
    x, others = (torch.randn(STEPS, 16, 5, generator=generator).double() for _ in range(2))
    t, targets = (torch.randint(3, (STEPS, 16), generator=generator) for _ in range(2))
    half = slice(None) if rank is None else slice(8 * rank, 8 * rank + 8)
    inputs = [(o[half], u[half]) if own_loss else o[half] for o, u in zip(others, targets, strict=True)]
    goal = apo.ProximalObjective(
        {"ddp": model, "inner": inner, "holder": Holder(model)}[given],
        inputs,
        wsd_weight=0.01,
        loss=F.cross_entropy if own_loss else None,
    )
    # the ranks' samples of the Fisher start aren't those of one process
    compared = kind == "APO" and not norm and spoiled is None
    opt = front_end(kind, inner, goal, **({"fisher_start": 0} if compared else {}))
    for step in range(STEPS):

        def closure(step: int = step) -> float:
            opt.zero_grad()
            total = 0.0
            batch = x[step][half] * (float("nan") if rank == 1 and spoiled == step else 1)
            pieces = list(zip(batch.chunk(parts), t[step][half].chunk(parts), strict=True))
            for i, (xs, ts) in enumerate(pieces):
                more = i < len(pieces) - 1 and rank is not None
                with model.no_sync() if more else nullcontext():
                    loss = F.cross_entropy(model(xs), ts) / parts
                    loss.backward()
                total += loss.item()
            return total

        if own_loss:
            closure()
            opt.step()
        else:
            opt.step(closure)
    return outcome(opt)


def alone(rank: int | None, kind: str, lr: float = 0.05, seed: int = 0, fsd_weight: float = 1.0, **more: Any) -> Any:
    """A model of this rank's own: a member of an ensemble or of a sweep."""
    torch.manual_seed(seed)
    model = Net()
    generator = torch.Generator().manual_seed(more.pop("data", 0))
    x, t = torch.randn(32, 5, generator=generator), torch.randint(3, (32,), generator=generator)
    goal = apo.ProximalObjective(model, [x.flip(0)], fsd_weight=fsd_weight)
    opt = front_end(kind, model, goal, lr, **more)
    for _ in range(STEPS + seed):
        opt.step(lambda: _run(opt, model, x, t))
    return outcome(opt)


def _run(opt: Any, model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    opt.zero_grad()
    loss = F.cross_entropy(model(x), t)
    loss.backward()
    return loss


def averaged_by_hand(rank: int, kind: str, *, group: Any = None, told: bool = True, seed: int = 0) -> list[Tensor]:
    """Replicas without DDP: the loop averages gradients itself."""
    torch.manual_seed(seed)
    model = Net()
    generator = torch.Generator().manual_seed(rank)
    x, t = torch.randn(32, 5, generator=generator), torch.randint(3, (32,), generator=generator)
    opt = front_end(kind, model, apo.ProximalObjective(model, [x.flip(0)]), process_group=group if told else None)

    def closure() -> Tensor:
        loss = _run(opt, model, x, t)
        for p in model.parameters():
            assert p.grad is not None
            dist.all_reduce(p.grad, group=group)
            p.grad /= 2
        return loss

    for _ in range(STEPS):
        opt.step(closure)
    return outcome(opt)


OPTIONS: dict[str, dict[str, Any]] = {
    "given ddp": {},
    "given inner": {"given": "inner"},
    "given holder": {"given": "holder"},
    "bucket views": {"gradient_as_bucket_view": True},
    "many bucket views": {"given": "inner", "gradient_as_bucket_view": True, "bucket_cap_mb": 1e-4},
    "static graph": {"given": "inner", "static_graph": True, "gradient_as_bucket_view": True},
    "unused": {"given": "inner", "find_unused_parameters": True, "unused": True},
    "accumulated": {"parts": 4},
    "accumulated outside": {"given": "inner", "parts": 4, "own_loss": True, "gradient_as_bucket_view": True},
    "loss on B'": {"given": "inner", "own_loss": True, "find_unused_parameters": True},
}
ONLY_EQUAL: dict[str, dict[str, Any]] = {
    "norm": {"norm": True},
    "norm, own buffers": {"norm": True, "broadcast_buffers": False, "given": "inner"},
    "NaN on one rank": {"spoiled": 4, "given": "inner"},
}
SWEEPS: dict[str, Any] = {
    "seeds": lambda rank: {"seed": rank},
    "data": lambda rank: {"data": rank},
    "lr": lambda rank: {"lr": 0.02 * (rank + 1)},
    "fsd_weight": lambda rank: {"fsd_weight": 0.5 * (rank + 1)},
    "meta_lr": lambda rank: {"meta_lr": 0.01 * (rank + 1)},
    "interval": lambda rank: {"interval": rank + 1},
}


def two_ranks(rank: int) -> dict[str, Any]:
    apo.ranks.distributed._PATIENCE = timedelta(seconds=2)
    found: dict[str, Any] = {}
    for kind in FRONT_ENDS:
        for name, options in {**OPTIONS, **ONLY_EQUAL}.items():
            found[f"{kind}, {name}"] = replicas(rank, kind, **options)
        for name, settings in SWEEPS.items():
            found[f"{kind}, sweep of {name}"] = alone(rank, kind, **settings(rank))
        found[f"{kind}, averaged by hand"] = averaged_by_hand(rank, kind)
    if rank == 0:
        found["on one rank only"] = alone(None, "APO")
    found["after one rank alone"] = averaged_by_hand(rank, "APO")
    return found


def subgroups(rank: int) -> dict[str, Any]:
    """Two models of two replicas each."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    found: dict[str, Any] = {}
    for kind in ("AdaptiveLR", "APO"):
        found[kind] = averaged_by_hand(rank, kind, group=pairs[rank // 2], seed=rank // 2)
        try:
            averaged_by_hand(rank, kind, group=pairs[rank // 2], seed=rank // 2, told=False)
        except ValueError as error:
            found[f"{kind}, not told"] = str(error)
    return found


def raising(rank: int) -> dict[str, Any]:
    """Rank 1's closure raises at the third trial; the other must not go on by itself."""
    torch.manual_seed(0)
    inner = Net()
    model = DistributedDataParallel(inner)
    x, t = torch.randn(8, 5), torch.randint(3, (8,))
    opt = front_end("APO", inner, apo.ProximalObjective(inner, [x]), warmup=10)

    def closure() -> Tensor:
        if rank == 1 and opt.in_trial and opt.steps == 2:
            raise RuntimeError("stop")
        return _run(opt, model, x, t)

    try:
        for _ in range(STEPS):
            opt.step(closure)
    except RuntimeError as error:
        return {"steps": opt.steps, "error": str(error), "weights": outcome(opt)}
    return {"steps": opt.steps, "error": None}


SCENES = {"two_ranks": two_ranks, "subgroups": subgroups, "raising": raising}


def main(scene: str, folder: Path, rank: int, ranks: int) -> None:
    torch.set_num_threads(1)
    start = partial(dist.init_process_group, "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    start(timeout=timedelta(seconds=10 if scene == "raising" else 60))
    torch.save(SCENES[scene](rank), folder / f"{rank}.pt")
    if scene != "raising":
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
