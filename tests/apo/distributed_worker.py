"""Training under both front ends, alone or as a rank: ``python distributed_worker.py folder rank``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import apo

RANKS = 2


def train(rank: int | None, dtype: torch.dtype) -> dict[str, Any]:
    """Twelve steps. A rank trains on its half of each batch, and of each B′; None on all of it."""
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(12, 16, 5, generator=generator).to(dtype) for _ in range(2)]
    t = torch.randint(3, (12, 16), generator=generator)
    results: dict[str, Any] = {}
    for name in ("AdaptiveLR", "its own loss", "APO", "failing"):
        torch.manual_seed(1)
        inner = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
        model = inner if rank is None else DistributedDataParallel(inner)
        half = slice(None) if rank is None else slice(8 * rank, 8 * rank + 8)
        fresh = name == "its own loss"
        others: list[Any] = [
            (x[half], target[half]) if fresh else x[half] for x, target in zip(data[1], t, strict=True)
        ]
        goal = apo.ProximalObjective(model, others, wsd_weight=0.01, loss=F.cross_entropy if fresh else None)
        lr = 1e3 if name == "failing" else 0.05
        optimizer: Any
        if name == "APO":
            bare = apo.Method(fisher_start=0)
            optimizer = apo.APO(model, goal, lr=lr, interval=2, warmup=4, block_size=4, method=bare)
        else:
            base = torch.optim.SGD(inner.parameters(), lr, 0.9)
            optimizer = apo.AdaptiveLR(base, goal, interval=2, warmup=4, reach=0.5 if fresh else 1.0)
        for x, target in zip(data[0], t, strict=True):

            def closure(
                x: Tensor = x[half], target: Tensor = target[half], model: Any = model, optimizer: Any = optimizer
            ) -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), target)
                loss.backward()
                return loss

            optimizer.step(closure)
        results[name] = {
            "weights": [p.detach() for p in inner.parameters()],
            "rate": optimizer.param_groups[0]["lr"],
            "failed": optimizer.failed_trials,
            "Q": optimizer.last.objective,
        }
    return results


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    found = {str(dtype): train(rank, dtype) for dtype in (torch.float64, torch.float32)}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
