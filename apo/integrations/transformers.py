"""Hugging Face's Trainer: a callback that logs what the optimizer learned, and a mixin that passes a closure.

With ``loss=`` in the objective the plain ``Trainer`` works as it is. The mixin serves objectives without one.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from apo.integrations import front_end, prefixed_metrics
from apo.meta_learner import MetaLearner

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

__all__ = ["APOCallback", "APOTrainerMixin"]


class APOCallback(TrainerCallback):
    """Adds the optimizer's ``metrics()`` as ``apo/…`` to what the Trainer logs of training.

    They reach ``state.log_history``, the console and the callbacks after this one. Reporters (``report_to``) come
    before the callbacks that a Trainer is given: for them take :class:`APOTrainerMixin`, or put this first with
    ``trainer.callback_handler.callbacks.insert(0, APOCallback())``.
    """

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        logs, optimizer = kwargs["logs"], front_end(kwargs["optimizer"])
        if optimizer is not None and "loss" in logs:
            found = prefixed_metrics([optimizer])
            logs.update(found)
            state.log_history[-1].update(found)
        return None


class _MicroBatch(NamedTuple):
    """What ``training_step`` was called with, and the loss that it returned."""

    arguments: tuple[Any, ...]
    settings: dict[str, Any]
    loss: Tensor


class APOTrainerMixin(_Trainer):
    """A Trainer that gives its optimizer a closure, for objectives without a ``loss`` of their own::

        class MyTrainer(APOTrainerMixin, Trainer): ...

    The closure runs ``training_step`` again on all micro-batches of the step, without gradient clipping.
    ``metrics()`` are added to what is logged, for all reporters, and nothing is logged in trials.
    """

    _micro_batches: list[_MicroBatch]
    _complete = False
    _given: MetaLearner | None = None

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        created = super().create_optimizer(*args, **kwargs)
        optimizer = front_end(created)
        self._micro_batches = []
        if optimizer is not None and optimizer is not self._given:
            optimizer.register_step_pre_hook(self._pass_closure)
            self._given = optimizer
        return created

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        optimizer = self._given
        if optimizer is None or optimizer.objective.loss is not None:
            return loss
        if self._complete:
            self._micro_batches = []  # those of a step that a GradScaler left out
        self._complete = self.accelerator.sync_gradients
        if optimizer.meta_due:
            self._micro_batches.append(_MicroBatch(args, kwargs, loss))
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        optimizer = self._given
        if optimizer is not None and optimizer.in_trial:
            return
        if optimizer is not None and "loss" in logs:
            logs = {**logs, **prefixed_metrics([optimizer])}
        super().log(logs, *args, **kwargs)

    def _pass_closure(
        self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """A hook before ``step``, which the Trainer calls without a closure."""
        batches, self._micro_batches = self._micro_batches, []
        if not batches:
            return None
        return args[:1], {"closure": partial(self._closure, optimizer, batches)}

    def _closure(self, optimizer: MetaLearner, batches: list[_MicroBatch]) -> Tensor:
        """The loss; at trial weights with its gradients, which at the real ones are there already."""
        if not optimizer.in_trial:
            return torch.stack([batch.loss for batch in batches]).sum()
        optimizer.zero_grad()
        losses = []
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self._model_of(batch)):
                losses.append(super().training_step(*batch.arguments, **batch.settings))
        self._unscale(optimizer)
        return torch.stack(losses).sum()

    @staticmethod
    def _model_of(batch: _MicroBatch) -> nn.Module:
        model: nn.Module = batch.arguments[0] if batch.arguments else batch.settings["model"]
        return model

    def _unscale(self, optimizer: MetaLearner) -> None:
        """Gradients at the real weights come without the GradScaler's factor."""
        scaler = self.accelerator.scaler
        if scaler is not None:
            grads = [p.grad for p in optimizer.parameters if p.grad is not None]
            torch._foreach_mul_(grads, 1.0 / scaler.get_scale())
