"""A training that is killed and resumed: ``python resume_worker.py checkpoint kill_at``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apo

STEPS = 24
EVERY = 5


def train(path: Path, kill_at: int | None = None) -> list[Tensor]:
    """Train under both front ends, from the checkpoint if there is one; the final weights.

    At step ``kill_at`` the process kills itself, in the middle of a trial, with the trial's weights in place.
    """
    torch.manual_seed(0)
    x, t = torch.randn(64, 5), torch.randint(3, (64,))
    models = [
        nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3)) for _ in range(3)
    ]

    def inputs() -> Tensor:
        return x[torch.randint(64, (16,))]

    def pairs_of() -> tuple[Tensor, Tensor]:
        batch = torch.randint(64, (16,))
        return x[batch], t[batch]

    goals = [apo.ProximalObjective(model, inputs) for model in models[:2]]
    goals.append(apo.ProximalObjective(models[2], pairs_of, loss=F.cross_entropy))
    optimizers: list[Any] = [
        apo.AdaptiveLR(torch.optim.Adam(models[0].parameters(), lr=1e-2), goals[0], interval=3, warmup=4),
        apo.APO(models[1], goals[1], lr=0.05, interval=3, warmup=4, block_size=4),
        apo.AdaptiveLR(torch.optim.RMSprop(models[2].parameters()), goals[2], interval=3, warmup=4, reach=0.5),
    ]
    first = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        for model, optimizer, state in zip(models, optimizers, saved["pairs"], strict=True):
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(saved["rng"])
        first = saved["step"]
    for step in range(first, STEPS):
        if step % EVERY == 0:
            pairs = [
                {"model": m.state_dict(), "optimizer": o.state_dict()} for m, o in zip(models, optimizers, strict=True)
            ]
            torch.save({"step": step, "rng": torch.get_rng_state(), "pairs": pairs}, path.with_suffix(".new"))
            os.replace(path.with_suffix(".new"), path)
        for model, optimizer in zip(models, optimizers, strict=True):
            batch = torch.randint(64, (16,))

            def closure(model: nn.Module = model, optimizer: Any = optimizer, batch: Tensor = batch) -> Tensor:
                if optimizer.in_trial and kill_at is not None and optimizer.steps >= kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x[batch]), t[batch])
                loss.backward()
                return loss

            optimizer.step(closure)
    return [v for model in models for v in model.state_dict().values()]


if __name__ == "__main__":
    torch.set_num_threads(1)  # as the tests have it: results to the bit depend on the number of threads
    train(Path(sys.argv[1]), int(sys.argv[2]))
