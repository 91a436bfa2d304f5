"""Regression on scikit-learn's diabetes, the stand-in for UCI regression (Figure 3): the same network."""

from __future__ import annotations

from benchmarks.paper.data.bundled import DIABETES
from benchmarks.paper.models import mlp
from benchmarks.paper.tasks.losses import REGRESSION
from benchmarks.paper.tasks.task import Task

TASK = Task(
    name="diabetes",
    title="regression on diabetes, MLP of two layers of 100, ReLU",
    model_name="MLP 10-100-100-1",
    build=lambda: mlp(10, 100, 100, 1),
    source=DIABETES,
    loss=REGRESSION,
    batch_size=64,
    epochs=100,
    quick_epochs=10,
)
