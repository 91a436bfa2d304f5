"""Trainings that are killed at random moments and resumed: ``python -m tests.apo.resume_worker --kills 100``.

Each ends as the training that wasn't killed, to the bit. Needs ``os.fork``.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apo

STEPS = 24
EVERY = 2


def train(path: Path, steps: int = STEPS) -> list[Tensor]:
    """Train under all front ends, from the checkpoint if there is one, which is written every other step; what the
    models and the optimizers hold at the end."""
    torch.manual_seed(0)
    x, t = torch.randn(64, 5), torch.randint(3, (64,))
    models = [
        nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3)) for _ in range(4)
    ]

    def inputs() -> Tensor:
        return x[torch.randint(64, (16,))]

    def pairs_of() -> tuple[Tensor, Tensor]:
        batch = torch.randint(64, (16,))
        return x[batch], t[batch]

    goals = [apo.ProximalObjective(model, inputs) for model in models[:3]]
    goals.append(apo.ProximalObjective(models[3], pairs_of, loss=F.cross_entropy))
    optimizers: list[Any] = [
        apo.AdaptiveLR(torch.optim.Adam(models[0].parameters(), lr=1e-2), goals[0], interval=3, warmup=4),
        apo.APO(models[1], goals[1], lr=0.05, interval=3, warmup=4, block_size=4),
        apo.FullPreconditioner(models[2], goals[2], interval=3),
        apo.AdaptiveLR(torch.optim.RMSprop(models[3].parameters()), goals[3], interval=3, warmup=4, reach=0.5),
    ]
    first = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        for model, optimizer, state in zip(models, optimizers, saved["pairs"], strict=True):
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(saved["rng"])
        first = saved["step"]
    for step in range(first, steps):
        if step % EVERY == 0:
            pairs = [
                {"model": m.state_dict(), "optimizer": o.state_dict()} for m, o in zip(models, optimizers, strict=True)
            ]
            torch.save({"step": step, "rng": torch.get_rng_state(), "pairs": pairs}, path.with_suffix(".new"))
            os.replace(path.with_suffix(".new"), path)
        for model, optimizer in zip(models, optimizers, strict=True):
            batch = torch.randint(64, (16,))

            def closure(model: nn.Module = model, optimizer: Any = optimizer, batch: Tensor = batch) -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x[batch]), t[batch])
                loss.backward()
                return loss

            optimizer.step(closure)
    states = [v for optimizer in optimizers for s in optimizer.state_dict()["state"].values() for v in s.values()]
    rates = [torch.tensor([g["lr"] for o in optimizers for g in o.param_groups], dtype=torch.float64)]
    return [v.clone() for model in models for v in model.state_dict().values()] + states + rates


def resumptions(kills: int, folder: Path, steps: int = STEPS, seed: int = 0) -> tuple[int, int, int]:
    """Kill until it was done so often: the kills, those that found a checkpoint, and the trainings that ended.

    Raises:
        AssertionError: a training didn't end as the one that wasn't killed.
    """
    generator = random.Random(seed)
    train(folder / "warm.pt", 2)
    begun = time.monotonic()
    whole = train(folder / "whole.pt", steps)
    length = time.monotonic() - begun
    done = resumed = ended = 0
    path, final = folder / "killed.pt", folder / "final.pt"
    while done < kills or path.exists():
        found = path.exists()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                torch.save(train(path, steps), final)
                code = 0
            finally:
                os._exit(code)
        if done < kills:
            time.sleep(generator.uniform(0, length))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        resumed += found
        if os.WIFSIGNALED(status):
            done += 1
            continue
        assert os.waitstatus_to_exitcode(status) == 0
        ended += 1
        result = torch.load(final, weights_only=True)
        assert len(result) == len(whole)
        assert all(torch.equal(a, b) for a, b in zip(result, whole, strict=True)), f"after {done} kills"
        path.unlink()
    return done, resumed, ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # results to the bit depend on the number of threads
    with tempfile.TemporaryDirectory() as folder:
        done, resumed, ended = resumptions(options.kills, Path(folder), options.steps, options.seed)
    sys.stdout.write(f"{done} kills, {resumed} resumptions, {ended} trainings ended as the one that wasn't killed\n")


if __name__ == "__main__":
    main()
