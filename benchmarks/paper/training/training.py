"""A network under training on a task, and the curve of how it is judged on the way."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.common.steps import take_steps, weights_to_judge
from benchmarks.common.timing import training_timer
from benchmarks.paper.data import Dataset, Examples
from benchmarks.paper.tasks import Batches, Task
from benchmarks.paper.training.schedules import factor

COLUMNS = ("step", "epoch", "seconds", "loss", "batch_loss", "test_loss", "metric", "rate", "failed_trials")
"""Of a curve. ``seconds`` are of training alone. ``loss`` is of training examples at the weights of that step,
``batch_loss`` the mean over the batches since the row before."""

Watch = Callable[[int, float, float, float], None]
"""Told of the progress: ``(step, loss of the batch, last metric, learning rate)``."""

LOOK = 10
"""Read a loss every N steps. Reading waits for the GPU, so the clock is read then too."""

HOPELESS = 1000.0
"""Training ends as diverged where the loss exceeds the first one by this factor."""

CHUNK = 1000
"""Examples that are judged at a time."""

SAVE_SECONDS = 60.0
FEWEST_ROWS = 8


@dataclass(frozen=True)
class Setting:
    """What an optimizer is made for."""

    task: Task
    model: nn.Module
    batches: Batches


class Training:
    """A network, its batches and its optimizer.

    Args:
        epochs: passes through the training examples; ``steps`` instead, where given.
        every: steps between two rows of the curve; None: an epoch, or less where there would be few rows.

    Attributes:
        step, total: how many steps were taken, and how many there are.
        rate_at: sets the learning rate of each step; None: the optimizer's own.
        status: ``"unfinished"``, ``"finished"`` or ``"diverged"``, the last with its ``reason``.
    """

    def __init__(
        self,
        task: Task,
        data: Dataset,
        make: Callable[[Setting], Optimizer],
        *,
        seed: int = 0,
        epochs: int = 1,
        steps: int | None = None,
        every: int | None = None,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.task = task
        self.data = data.to(device, dtype or task.dtype)
        self.model = task.model(seed, device, dtype)
        self.batches = Batches(self.data.train, task.batch_size, seed, task.augment)
        self.optimizer = make(Setting(task, self.model, self.batches))
        self.total = steps or epochs * len(self.batches)
        self.every = every or min(len(self.batches), math.ceil(self.total / FEWEST_ROWS))
        self.rate_at: Callable[[int], float] | None = None
        self.judged = some(self.data.train, task.evaluated)
        self.step, self.seconds, self.status, self.reason = 0, 0.0, "unfinished", ""
        self.curve: dict[str, list[float]] = {column: [] for column in COLUMNS}
        self._losses: list[Tensor] = []

    def follow(self, schedule: str, hyper: Mapping[str, Any]) -> None:
        """Let a manual schedule, if there is one, set the rate."""
        if schedule:
            decay, warmup = hyper.get("factor", 1.0), hyper.get("warmup", 0.0)
            share = factor(schedule, self.total, self.task.milestones, decay=decay, warmup=warmup)
            self.rate_at = lambda step: hyper["lr"] * share(step)

    @property
    def rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def save(self) -> None:
        """Called every :data:`SAVE_SECONDS`, and when the user interrupts."""

    def train(
        self, watch: Watch | None = None, *, limit_seconds: float | None = None, limit_steps: int | None = None
    ) -> None:
        """Train to the end, or until a limit of training in this call. ``watch`` is told every :data:`LOOK` steps."""
        until = math.inf if limit_seconds is None else self.seconds + limit_seconds
        last = self.total if limit_steps is None else min(self.total, self.step + limit_steps)
        saved = time.monotonic()
        if not self.curve["step"]:
            self._judge()
        self.model.train()
        try:
            while self.step < last and self.seconds < until and self.status != "diverged":
                # To the next look, row or end, by the clock. What comes after isn't training.
                looks = [self.step + stride - self.step % stride for stride in (LOOK, self.every)]
                self._advance(min(*looks, last))
                self._look(watch)
                if time.monotonic() - saved > SAVE_SECONDS:
                    self.save()
                    saved = time.monotonic()
        except KeyboardInterrupt:
            self.save()
            raise
        if self.step == self.total and self.status == "unfinished":
            self.status = "finished"

    def _advance(self, until: int) -> None:
        start = training_timer()
        try:
            for loss in take_steps(self.optimizer, self._loss_at, range(self.step, until)):
                self._losses.append(loss)
                self.step += 1
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # a decomposition that fails
            self.status, self.reason = "diverged", f"step {self.step}: {str(error).splitlines()[0]}"
        self.seconds += training_timer() - start

    def _loss_at(self, step: int) -> Callable[[], Tensor]:
        if self.rate_at is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate_at(step)
        inputs, targets = self.batches.batch(step)
        return lambda: self.task.loss_of(self.model, inputs, targets)

    def _look(self, watch: Watch | None) -> None:
        loss = float(self._losses[-1]) if self._losses else math.nan
        if not math.isfinite(loss):
            self.status, self.reason = "diverged", self.reason or f"loss {loss} at step {self.step}"
        if self.step % self.every == 0 or self.step == self.total or self.status == "diverged":
            self._judge()
        if watch is not None:
            watch(self.step, loss, self.curve["metric"][-1], self.rate)

    def _judge(self) -> None:
        """A row of the curve, at the present weights."""
        train = test = (math.inf, math.nan)
        if self.status != "diverged":
            with weights_to_judge(self.optimizer):
                train, test = (evaluate(self.task, self.model, each) for each in (self.judged, self.data.test))
        row = {
            "step": self.step,
            "epoch": self.step / len(self.batches),
            "seconds": self.seconds,
            "loss": train[0],
            "batch_loss": float(torch.stack(self._losses).double().mean()) if self._losses else math.nan,
            "test_loss": test[0],
            "metric": test[1],
            "rate": self.rate,
            "failed_trials": getattr(self.optimizer, "failed_trials", 0),
        }
        for column, value in row.items():
            self.curve[column].append(value)
        self._losses = []
        hopeless = row["loss"] > HOPELESS * self.curve["loss"][0] or not math.isfinite(row["loss"])
        if self.status == "unfinished" and hopeless:
            self.status, self.reason = "diverged", f"loss {row['loss']:.3g} after step {self.step}"

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run needs to go on to the bit."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "batches": self.batches.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve,
            "losses": self._losses,
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.batches.load_state_dict(state["batches"])
        self.step, self.seconds, self.curve = state["step"], state["seconds"], state["curve"]
        self._losses = list(state["losses"])
        torch.set_rng_state(state["random"].cpu())
        if state["cuda_random"]:
            torch.cuda.set_rng_state_all([x.cpu() for x in state["cuda_random"]])


def some(examples: Examples, count: int) -> Examples:
    """``count`` examples, always the same ones; all where there are fewer."""
    if len(examples) <= count:
        return examples
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0))
    return examples.take(order[:count].to(examples.targets.device))


@torch.no_grad()
def evaluate(task: Task, model: nn.Module, examples: Examples) -> tuple[float, float]:
    """The mean loss and metric, in eval mode; the random state and the modules' modes are left as they were."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    loss = metric = torch.zeros((), dtype=torch.float64, device=examples.targets.device)
    total = 0
    size = CHUNK if examples.pad is None else min(CHUNK, 100)  # logits of whole sentences are large
    for chosen in torch.split(torch.arange(len(examples), device=examples.targets.device), size):
        inputs, targets = examples.batch(chosen)
        outputs, targets = task.forward(model, inputs), task.targets(targets)
        loss = loss + len(targets) * task.loss.function(outputs, targets)
        metric = metric + len(targets) * task.loss.measure(outputs, targets)
        total += len(targets)
    for module, mode in modes:
        module.training = mode
    return float(loss) / total, float(metric) / total
