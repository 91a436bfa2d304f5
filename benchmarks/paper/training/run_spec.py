"""The specification of a run: task, optimizer and hyperparameters, seed, length, precision."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.common.dtypes import DTYPES
from benchmarks.paper.tasks import Task, named
from benchmarks.paper.training.optimizers import NamedOptimizer, method


@dataclass(frozen=True)
class RunSpec:
    """All that determines a run's numbers."""

    task: str  # its name
    optimizer: str  # its name (:mod:`benchmarks.paper.training.optimizers`)
    hyper: dict[str, Any]  # hyperparameters other than the defaults
    hyper_from: str = "given"  # where they come from, for the reader
    seed: int = 0  # of weights and batches
    epochs: int = 1  # passes through the training examples
    steps: int | None = None  # steps to take instead; None: ``epochs`` of them
    precision: str = "fp32"  # of parameters, activations and gradients alike: one of the task's ``precisions``
    device: str = "cpu"  # a torch device
    held_out: bool = False  # train on 90% of the training examples and test on the rest, as a search does

    def __post_init__(self) -> None:
        task = named(self.task)
        if self.precision not in task.precisions:
            known = f"one of {', '.join(task.precisions)} for the task {task.name}"
            raise ValueError(f"precision must be {known}, but got {self.precision!r}")
        method(self.optimizer).hyper(self.hyper, self.precision)
        for name in ("epochs", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, but got {value}")

    @property
    def definition(self) -> Task:
        return named(self.task)

    @property
    def method(self) -> NamedOptimizer:
        return method(self.optimizer)

    @property
    def full_hyper(self) -> dict[str, Any]:
        """All hyperparameters, defaults included."""
        return self.method.hyper(self.hyper, self.precision)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES.get(self.precision, self.definition.dtype)

    @property
    def file_name(self) -> str:
        """Of its results, without a suffix: optimizer, precision and seed."""
        plain = self.optimizer.replace(":", "_").replace("+", "_with_")
        return f"{plain}-{self.precision}-seed{self.seed}"

    def identity(self) -> dict[str, Any]:
        """What two runs must share to be the same run."""
        return {**asdict(self), "hyper": self.full_hyper, "hyper_from": None}
