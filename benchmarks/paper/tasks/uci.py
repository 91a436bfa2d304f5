"""UCI regression (Figure 3): an MLP of two layers of 100, ReLU, 500 epochs."""

from __future__ import annotations

from benchmarks.paper.data import Source
from benchmarks.paper.data.uci import PARKINSONS, PROTEIN, SLICE
from benchmarks.paper.models import mlp
from benchmarks.paper.tasks.losses import REGRESSION
from benchmarks.paper.tasks.task import Task


def _task(name: str, source: Source, features: int) -> Task:
    return Task(
        name=name,
        title=f"regression on {source.name}, MLP of two layers of 100, ReLU",
        place="Figure 3",
        model_name=f"MLP {features}-100-100-1",
        build=lambda: mlp(features, 100, 100, 1),
        source=source,
        loss=REGRESSION,
        batch_size=100,
        epochs=500,
        quick_epochs=1,
        evaluated=50_000,
    )


TASKS = (_task("protein", PROTEIN, 9), _task("parkinsons", PARKINSONS, 19), _task("slice", SLICE, 384))
