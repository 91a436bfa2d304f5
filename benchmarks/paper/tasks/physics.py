"""Poisson's equation in one dimension, by a physics-informed network."""

from torch import Tensor

from benchmarks.paper.data.without_files import POINTS
from benchmarks.paper.models import Poisson
from benchmarks.paper.tasks.losses import Loss
from benchmarks.paper.tasks.task import Task


def _mean_square(residuals: Tensor, targets: Tensor) -> Tensor:
    return residuals.square().mean()


RESIDUALS = Loss("mean square", _mean_square, "mse", "gaussian", "mean square of residuals", _mean_square, False)
"""As such networks are trained: twice a negative log-likelihood."""

TASKS = (
    Task(
        name="pinn",
        title="Poisson's equation in one dimension, tanh network of residuals",
        model_name="PINN 1-32-32-1",
        build=Poisson,
        source=POINTS,
        loss=RESIDUALS,
        batch_size=64,
        epochs=20,
        precisions=("fp32",),
    ),
)
