"""One run of the study: a task, a way or a baseline, a seed."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.paper.studies.variants import BASELINES, VARIANTS
from benchmarks.paper.tasks import named
from benchmarks.paper.training.training import Training

TASKS = ("ill-conditioned", "diabetes", "digits", "digits-autoencoder")
POINTS = 20
"""How many times the loss is taken in a run."""


def one_run(
    task_name: str, name: str, setting: dict[str, Any] | None, seed: int, *, quick: bool = False
) -> dict[str, list[float]]:
    """The training loss over all examples after some steps, and the seconds that the steps took."""
    task = named(task_name)
    data, epochs = task.data(), task.quick_epochs if quick else task.epochs
    every = max(1, epochs * (len(data.train) // task.batch_size) // POINTS)
    make = VARIANTS[name].make if name in VARIANTS else partial(BASELINES[name].make, hyper=setting or {})
    training = Training(task, data, make, seed=seed, epochs=epochs, every=every)
    training.train()
    columns = {"steps": "step", "losses": "loss", "seconds": "seconds"}
    return {ours: training.curve[theirs][1:] for ours, theirs in columns.items()}  # without that before the first step
