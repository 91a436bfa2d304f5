"""Regression: poorly conditioned (Figure 4, left), UCI's (Figure 3), and diabetes, which stands in for UCI's."""

import torch

from benchmarks.paper.data import Source
from benchmarks.paper.data.uci import PARKINSONS, PROTEIN, SLICE
from benchmarks.paper.data.without_files import DIABETES, ILL_CONDITIONED, INPUTS, OUTPUTS
from benchmarks.paper.models import linear_network, mlp
from benchmarks.paper.tasks.losses import REGRESSION
from benchmarks.paper.tasks.task import Task

_ILL_CONDITIONED = Task(
    name="ill-conditioned",
    title="regression with κ = 1e10, two-layer linear network, float64",
    place="Figure 4 (left)",
    model_name="linear 6-6-10",
    build=lambda: linear_network(INPUTS, INPUTS, OUTPUTS),
    source=ILL_CONDITIONED,
    loss=REGRESSION,
    batch_size=100,
    epochs=200,
    quick_epochs=20,
    dtype=torch.float64,
    precisions=("fp64",),  # rounding inputs to float32 would hide all but the largest singular values
)


def _mlp(name: str, data: str, source: Source, features: int, **settings: int | str) -> Task:
    return Task(
        name=name,
        title=f"regression on {data}, MLP of two layers of 100, ReLU",
        model_name=f"MLP {features}-100-100-1",
        build=lambda: mlp(features, 100, 100, 1),
        source=source,
        loss=REGRESSION,
        **settings,  # type: ignore[arg-type]
    )


SMALL = (_ILL_CONDITIONED, _mlp("diabetes", "diabetes", DIABETES, 10, batch_size=64, epochs=100, quick_epochs=10))
UCI = tuple(
    _mlp(name, source.name, source, features, place="Figure 3", batch_size=100, epochs=500, evaluated=50_000)
    for name, source, features in (("protein", PROTEIN, 9), ("parkinsons", PARKINSONS, 19), ("slice", SLICE, 384))
)
