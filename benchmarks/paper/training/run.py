"""One run: train, judge after each epoch, keep what is needed to go on to the bit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.paper.data import Dataset
from benchmarks.paper.tasks import Batches
from benchmarks.paper.training import run_files
from benchmarks.paper.training.evaluate import evaluate, some
from benchmarks.paper.training.optimizers import Setting
from benchmarks.paper.training.run_spec import Plan
from benchmarks.paper.training.schedules import factor

Watch = Callable[[int, float, float, float], None]
"""Told of a run's progress: ``(step, loss of the batch, last metric, learning rate)``."""

LOOK = 10
"""Every so many steps a loss is looked at, which on a GPU waits for it, and the clock with it."""

HOPELESS = 1000.0
"""A loss of so many times the first is taken for diverged, and the run ends."""

SAVE_SECONDS = 60.0
FEWEST_ROWS = 8
"""Of a run; those of more epochs have a row an epoch."""


class Run:
    """A run under way.

    Args:
        plan: what to run.
        data: the task's examples, as :meth:`Task.data` gives them.
        out: where results and checkpoints go; None: nowhere.

    Attributes:
        step: how many steps were taken.
        total: how many there are to take.
        curve: a column each of :data:`benchmarks.paper.training.run_files.COLUMNS`.
        status: ``"unfinished"``, ``"finished"`` or ``"diverged"``.
    """

    def __init__(self, plan: Plan, data: Dataset, out: Path | None = None) -> None:
        self.plan, self.out, self.task = plan, out, plan.definition
        data = data.held_out() if plan.held_out else data
        self.label = data.label
        self.data = data.to(plan.device, plan.dtype)
        self.model = self.task.model(plan.seed, plan.device, plan.dtype)
        self.batches = Batches(self.data.train, self.task.batch_size, plan.seed, self.task.augment)
        self.hyper = plan.full_hyper
        self.optimizer = plan.method.make(Setting(self.task, self.model, self.batches), self.hyper)
        self.total = plan.steps or plan.epochs * len(self.batches)
        self.every = min(len(self.batches), math.ceil(self.total / FEWEST_ROWS))
        self.factor = None
        if plan.method.schedule:
            decay, warmup = self.hyper.get("factor", 1.0), self.hyper.get("warmup", 0.0)
            self.factor = factor(plan.method.schedule, self.total, self.task.schedule, decay=decay, warmup=warmup)
        self.judged = some(self.data.train, self.task.evaluated)
        self.step, self.seconds, self.status, self.reason = 0, 0.0, "unfinished", ""
        self.scores: dict[str, float] = {}
        self.curve: dict[str, list[float]] = {column: [] for column in run_files.COLUMNS}
        self._losses: list[Tensor] = []

    def resume(self) -> bool:
        """Take up the checkpoint in ``out``, if there is one. Raises ValueError where it is another run's."""
        state = run_files.load_checkpoint(self.plan, self.out) if self.out else None
        if state is None:
            return False
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.batches.load_state_dict(state["batches"])
        self.step, self.seconds, self.curve = state["step"], state["seconds"], state["curve"]
        self._losses = list(state["losses"])
        torch.set_rng_state(state["random"].cpu())
        if state["cuda_random"]:
            torch.cuda.set_rng_state_all([x.cpu() for x in state["cuda_random"]])
        return True

    def save(self) -> None:
        """A checkpoint."""
        if self.out is None:
            return
        state = {
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
        run_files.save_checkpoint(self.plan, self.out, state)

    def go(
        self,
        watch: Watch | None = None,
        *,
        limit_seconds: float | None = None,
        limit_steps: int | None = None,
    ) -> dict[str, Any]:
        """Train to the end, or until a limit; write what came out; return it.

        Args:
            watch: told every :data:`LOOK` steps.
            limit_seconds: stop after so many seconds of training in this call, and keep a checkpoint.
            limit_steps: likewise, steps.
        """
        began, first, saved = self.seconds, self.step, time.monotonic()
        if not self.curve["step"]:
            self._judge()
        self.model.train()
        try:
            while self.step < self.total and self.status != "diverged":
                last = self.total if limit_steps is None else min(self.total, first + limit_steps)
                if self.step >= last or (limit_seconds is not None and self.seconds - began >= limit_seconds):
                    break
                # To the next look, row or end, by the clock; what comes after isn't training.
                until = min(self.step - self.step % LOOK + LOOK, self.step - self.step % self.every + self.every, last)
                self._train(until)
                loss = float(self._losses[-1]) if self._losses else math.nan
                if not math.isfinite(loss):
                    self.status, self.reason = "diverged", self.reason or f"loss {loss} at step {self.step}"
                if self.step % self.every == 0 or self.step == self.total or self.status == "diverged":
                    self._judge()
                if watch is not None:
                    watch(self.step, loss, self.curve["metric"][-1], self.rate)
                if time.monotonic() - saved > SAVE_SECONDS:
                    self.save()
                    saved = time.monotonic()
        except KeyboardInterrupt:
            self.save()
            raise
        if self.step == self.total and self.status == "unfinished":
            self.status = "finished"
            if self.task.score is not None:
                self.scores = self.task.score(self.model, self.data)
        return self._end()

    @property
    def rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def _train(self, until: int) -> None:
        self._wait()
        start = time.perf_counter()
        try:
            while self.step < until:
                self._one_step()
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # an inverse or an eigendecomposition that fails
            self.status, self.reason = "diverged", f"step {self.step}: {str(error).splitlines()[0]}"
        self._wait()
        self.seconds += time.perf_counter() - start

    def _one_step(self) -> None:
        if self.factor is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.hyper["lr"] * self.factor(self.step)
        inputs, targets = self.batches.batch(self.step)

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = self.task.loss_of(self.model, inputs, targets)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        loss: Any = self.optimizer.step(closure)  # type: ignore[arg-type]
        self._losses.append(loss.detach())
        self.step += 1

    def _wait(self) -> None:
        if torch.device(self.plan.device).type == "cuda":
            torch.cuda.synchronize(self.plan.device)

    def _judge(self) -> None:
        """A row of the curve, at the present weights."""
        if self.status == "diverged":
            train, test = (math.inf, math.nan), (math.inf, math.nan)
        else:
            train = evaluate(self.task, self.model, self.judged)
            test = evaluate(self.task, self.model, self.data.test)
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

    def _end(self) -> dict[str, Any]:
        task, plan = self.task, self.plan
        payload = {
            "status": self.status,
            "reason": self.reason,
            "task": task.name,
            "title": task.title,
            "place": task.place,
            "data": self.label,
            "stand_in": task.source.stand_in,
            "model": task.model_name,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "optimizer": plan.optimizer,
            "label": plan.method.label,
            "hyper": self.hyper,
            "hyper_from": plan.hyper_from,
            "seed": plan.seed,
            "precision": plan.precision,
            "batch_size": task.batch_size,
            "epochs": self.total / len(self.batches),
            "steps": self.step,
            "total_steps": self.total,
            "seconds": self.seconds,
            "loss_name": task.loss.name,
            "judged_on": len(self.judged),
            "metric_name": task.loss.metric,
            "higher_is_better": task.loss.higher_is_better,
            "scores": self.scores,
            "identity": plan.identity(),
            "curve": self.curve,
        }
        if self.out is not None:
            run_files.save_result(plan, self.out, payload)
            if self.status == "unfinished":
                self.save()
            else:
                run_files.discard_checkpoint(plan, self.out)
        return payload
