"""One run of the study: a task, a way, a seed."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from benchmarks.paper.studies.variants import BASELINES, VARIANTS
from benchmarks.paper.tasks import Batches, named

TASKS = ("ill-conditioned", "diabetes", "digits", "digits-autoencoder")
POINTS = 20
"""How many times the loss is taken in a run."""


def one_run(
    task_name: str, name: str, setting: dict[str, Any] | None, seed: int, *, quick: bool = False
) -> dict[str, list[float]]:
    """The training loss over all examples after some steps, and the seconds that the steps took."""
    task = named(task_name)
    data, model = task.data(), task.model(seed)
    batches = Batches(data.train, task.batch_size, seed)
    inputs, targets = batches.batch(0)
    variant = VARIANTS.get(name)
    if variant is not None:
        optimizer = variant.make(task, model, batches, lambda: inputs)
    else:
        optimizer = BASELINES[name].build(task, model, setting or {})

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = task.loss_of(model, inputs, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    total = len(batches) * (task.quick_epochs if quick else task.epochs)
    every = max(1, total // POINTS)
    found: dict[str, list[float]] = {"steps": [], "losses": [], "seconds": []}
    elapsed = 0.0
    for step in range(1, total + 1):
        inputs, targets = batches.batch(step - 1)
        start = time.perf_counter()
        optimizer.step(closure)  # type: ignore[arg-type]
        elapsed += time.perf_counter() - start
        if variant is not None:
            variant.after_step(optimizer)
        if step % every == 0 or step == total:
            with torch.no_grad():
                loss = task.loss_of(model, data.train.inputs, data.train.targets).item()
            found["steps"].append(step)
            found["losses"].append(loss)
            found["seconds"].append(elapsed)
            if not math.isfinite(loss):
                break
    return found
