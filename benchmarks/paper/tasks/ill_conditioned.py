"""Poorly-conditioned regression with a two-layer linear network (Figure 4, left)."""

from __future__ import annotations

import torch

from benchmarks.paper.data.ill_conditioned import ILL_CONDITIONED, INPUTS, OUTPUTS
from benchmarks.paper.models import linear_network
from benchmarks.paper.tasks.losses import REGRESSION
from benchmarks.paper.tasks.task import Task

TASK = Task(
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
