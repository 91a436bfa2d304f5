"""Lightning: a callback that logs what the optimizer learned, and keeps trials out of the logs.

Lightning hands its optimizers a closure, so that nothing else is needed. With ``loss=`` in the objective the closure
is run once per step; without it once more at the trial weights. It covers only the last of the batches that
``accumulate_grad_batches`` counts, and isn't passed under a GradScaler: both need a ``loss=``, and say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torchmetrics import Metric

from apo.integrations import front_end, prefixed_metrics
from apo.meta_learner import MetaLearner

try:
    import lightning.pytorch as pl
except ImportError:  # the same, by its older name
    import pytorch_lightning as pl  # type: ignore[no-redef]

__all__ = ["APOCallback"]


class APOCallback(pl.Callback):
    """Logs ``metrics()`` of each front end as ``apo/…``, every ``log_every_n_steps`` steps.

    While ``training_step`` is run at trial weights, ``self.log`` does nothing, torchmetrics count nothing, and the
    outputs that ``on_train_batch_end`` gets stay those at the real weights. What else a ``training_step`` writes
    (files, ``logger.experiment``) it must leave out itself where the optimizer's ``in_trial`` is true.
    """

    def __init__(self) -> None:
        self._hooks: list[RemovableHandle] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for optimizer in _front_ends(trainer):
            self._hooks.append(optimizer.register_step_pre_hook(partial(_quiet_in_trials, pl_module)))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        optimizers = _front_ends(trainer)
        # Only where Lightning writes, as its own monitors do: metrics() may wait for the device.
        if optimizers and trainer._logger_connector.should_update_logs:
            pl_module.log_dict(prefixed_metrics(optimizers), on_step=True, on_epoch=False)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        while self._hooks:
            self._hooks.pop().remove()


def _front_ends(trainer: pl.Trainer) -> list[MetaLearner]:
    found = map(front_end, trainer.optimizers)
    return [optimizer for optimizer in found if optimizer is not None]


def _quiet_in_trials(
    module: pl.LightningModule, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A hook before ``step``: its closure, guarded."""
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        return None

    def guarded() -> Any:
        if not optimizer.in_trial:
            return closure()
        with _without_logging(module), _without_counting(module), _with_kept_result(closure):
            return closure()

    return args[:1], {"closure": guarded}


@contextmanager
def _without_logging(module: pl.LightningModule) -> Iterator[None]:
    module.log = _nothing  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.log


def _nothing(*_: Any, **__: Any) -> None:
    """In the place of ``LightningModule.log``, which ``log_dict`` calls too."""


@contextmanager
def _without_counting(module: torch.nn.Module) -> Iterator[None]:
    """What torchmetrics hold is put back: their states are no buffers."""
    metrics = [m for m in module.modules() if isinstance(m, Metric)]
    held = [{**vars(m), **{name: _copied(getattr(m, name)) for name in m._defaults}} for m in metrics]
    try:
        yield
    finally:
        for metric, attributes in zip(metrics, held, strict=True):
            vars(metric).clear()
            vars(metric).update(attributes)


def _copied(state: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    return state.clone() if isinstance(state, Tensor) else list(state)


@contextmanager
def _with_kept_result(closure: Callable[[], Any]) -> Iterator[None]:
    """Lightning passes on what the closure returned last: let that be the run at the real weights."""
    inner = closure.args[-1] if isinstance(closure, partial) and closure.args else closure
    result = getattr(inner, "_result", None)
    try:
        yield
    finally:
        if hasattr(inner, "_result"):
            inner._result = result
