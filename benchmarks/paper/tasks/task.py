"""A task: network, data, loss, length, and how it is judged."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import apo
from benchmarks.paper.data import Dataset, Source
from benchmarks.paper.tasks.losses import Loss

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Task:
    """One of the paper's tasks, or a small one that needs no files."""

    name: str  # on the command line and in files
    title: str  # what it is, in a line
    model_name: str  # as the paper calls the network
    build: Callable[[], nn.Module]  # makes the network, from torch's random state
    source: Source  # the data
    loss: Loss  # with its discrepancy, likelihood and metric
    batch_size: int  # of B and of B′
    epochs: int  # how long the paper trains, or as long as a small task needs
    quick_epochs: int = 1  # with ``--quick``
    place: str = ""  # where the paper shows it; empty for the small ones
    milestones: tuple[float, ...] = (0.5, 0.75)  # where a manual schedule decays the rate, as shares of the run
    dtype: torch.dtype = torch.float32  # of weights and activations in full precision
    precisions: tuple[str, ...] = ("fp32", "bf16", "fp16")  # what ``--precision`` may be
    forward: Callable[[nn.Module, Inputs], Tensor] = lambda model, inputs: model(*inputs)  # what the loss takes
    targets: Callable[[Tensor], Tensor] = lambda targets: targets  # the part of the targets that the loss takes
    augment: Callable[[Inputs, torch.Generator], Inputs] | None = None  # of training batches
    evaluated: int = 10_000  # on how many training examples the loss is taken at most after an epoch
    judged_by: str = "loss"  # what a search picks by: the training "loss", or the "metric" on held-out examples
    score: Callable[[nn.Module, Dataset], dict[str, float]] | None = None  # a slower judgement at the end of a run

    def data(self, folder: Path | None = None) -> Dataset:
        """The examples, on the CPU. Raises :class:`~benchmarks.paper.data.MissingData` where files are missing."""
        return self.source.load(folder)

    def model(self, seed: int, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> nn.Module:
        """The network as it starts with this seed, the same on every device."""
        torch.manual_seed(seed)
        return self.build().to(device, dtype or self.dtype)

    def loss_of(self, model: nn.Module, inputs: Inputs, targets: Tensor) -> Tensor:
        """``J_B(θ)``."""
        return self.loss_from(self.forward(model, inputs), targets)

    def loss_from(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of outputs that were computed already."""
        return self.loss.function(outputs, self.targets(targets))

    def objective(self, model: nn.Module, inputs: Callable[[], Any], **settings: Any) -> apo.ProximalObjective:
        """Eq. 8 with the task's discrepancy; ``inputs`` returns B′ (with its targets, if the loss is on B′ too)."""
        return apo.ProximalObjective(model, inputs, self.loss.discrepancy, forward=self.forward, **settings)

    def parameters(self) -> int:
        """How many weights the network has; no memory is taken for them."""
        with torch.device("meta"):
            model = self.build()
        return sum(p.numel() for p in model.parameters())
