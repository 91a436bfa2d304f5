"""Lightning: a script in which only ``configure_optimizers`` differs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from apo.integrations import front_end
from apo.integrations.lightning import APOCallback
from tests.integrations.helpers import Loss, by_hand, close, each_front_end, loader, net, optimizer_of, others, same

each_loss = pytest.mark.parametrize("loss", [None, F.cross_entropy], ids=["closure", "own loss"])
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Script(pl.LightningModule):
    """As a user writes it; ``make`` is what differs."""

    def __init__(self, make: Callable[[torch.nn.Module], Any], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.net = net(dtype)
        self.make = make
        self.accuracy = MulticlassAccuracy(num_classes=3)
        self.outputs: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, t = batch
        outputs = self.net(x)
        loss = F.cross_entropy(outputs, t)
        self.accuracy(outputs, t)
        self.log("accuracy", self.accuracy, on_epoch=True)
        self.log("loss", loss, on_epoch=True)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.outputs.append(float(outputs["loss"]))

    def configure_optimizers(self) -> Any:
        return self.make(self.net)


def trainer(**settings: Any) -> pl.Trainer:
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return pl.Trainer(**{**quiet, **settings})


def make(name: str, loss: Loss, dtype: torch.dtype = torch.float32, **settings: Any) -> Callable[..., Any]:
    return lambda model: optimizer_of(name, model, others(dtype), loss, **settings)


@pytest.mark.parametrize("name", ["AdamW", "AdaptiveLR", "APO"])
@each_loss
def test_an_unmodified_script_trains(name: str, loss: Loss) -> None:
    module = Script(make(name, loss))
    trainer(max_epochs=8).fit(module, loader())
    assert module.outputs[-1] < 0.9 * module.outputs[0]


@each_front_end
@each_loss
@pytest.mark.parametrize("clip", [None, 0.5])
def test_equal_to_a_hand_written_loop(name: str, loss: Loss, clip: float | None) -> None:
    module = Script(make(name, loss))
    trainer(max_epochs=3, gradient_clip_val=clip, callbacks=[APOCallback()]).fit(module, loader())
    model = net()
    losses = by_hand(model, make(name, loss)(model), [*loader()] * 3, clip=clip)
    assert same(module.net, model)
    assert module.outputs == losses


@each_front_end
def test_accumulated_batches_are_the_joined_batch(name: str) -> None:
    dtype = torch.float64
    module = Script(make(name, F.cross_entropy, dtype), dtype)
    trainer(max_epochs=3, accumulate_grad_batches=4, callbacks=[APOCallback()]).fit(module, loader(4, dtype))
    model = net(dtype)
    optimizer = make(name, F.cross_entropy, dtype)(model)
    by_hand(model, optimizer, [*loader(16, dtype)] * 3)
    assert close(module.net, model)
    assert optimizer.failed_trials == 0


@each_front_end
def test_accumulation_without_a_loss_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"closure must clear the gradients .* or give the ProximalObjective a loss="):
        trainer(max_epochs=1, accumulate_grad_batches=4).fit(Script(make(name, None)), loader(4))


@each_front_end
@each_loss
def test_bfloat16(name: str, loss: Loss) -> None:
    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)

    settings = {"objective": {"context": autocast}}
    module = Script(make(name, loss, **settings))
    trainer(max_epochs=3, precision="bf16-mixed").fit(module, loader())

    def loss_of(model: torch.nn.Module, batch: Any) -> Tensor:
        with autocast():
            return F.cross_entropy(model(batch[0]), batch[1])

    model = net()
    by_hand(model, make(name, loss, **settings)(model), [*loader()] * 3, loss_of=loss_of)
    assert same(module.net, model)
    assert next(model.parameters()).dtype == torch.float32


@each_front_end
def test_lightnings_grad_scaler(name: str) -> None:
    """It runs the closure, unscales and clips itself, and steps without a closure. Powers of two scale exactly."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    module, alone = Script(make(name, F.cross_entropy)), Script(make(name, F.cross_entropy))
    settings = {"max_epochs": 3, "gradient_clip_val": 0.5}
    scaled = trainer(**settings, callbacks=[APOCallback()], plugins=[Scaled("16-mixed", "cpu", scaler)])
    scaled.fit(module, loader())
    trainer(**settings).fit(alone, loader())
    assert scaler.get_scale() == 2.0**8
    assert same(module, alone)
    optimizer = front_end(scaled.optimizers[0])
    assert optimizer is not None
    assert (optimizer.steps, optimizer.failed_trials) == (12, 0)


class Scaled(MixedPrecision):
    """float16's scaler without its autocast."""

    def autocast_context_manager(self) -> Any:
        return nullcontext()


@each_front_end
@each_loss
def test_resuming_goes_on_to_the_bit(name: str, loss: Loss, tmp_path: Path) -> None:
    whole = Script(make(name, loss))
    trainer(max_epochs=4, callbacks=[APOCallback()]).fit(whole, loader())
    first = trainer(max_epochs=2, callbacks=[APOCallback()])
    first.fit(Script(make(name, loss)), loader())
    first.save_checkpoint(tmp_path / "at.ckpt")
    resumed = Script(make(name, loss))
    trainer(max_epochs=4, callbacks=[APOCallback()]).fit(resumed, loader(), ckpt_path=tmp_path / "at.ckpt")
    assert same(whole, resumed)
    assert resumed.outputs == whole.outputs[8:]


class InMemory(DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # type: ignore[override]
        self.lines.append(metrics)


@each_front_end
@each_loss
def test_the_log_holds_the_metrics_and_no_trials(name: str, loss: Loss) -> None:
    log = InMemory()
    module = Script(make(name, loss))
    fit = trainer(max_epochs=2, logger=log, callbacks=[APOCallback()])
    fit.fit(module, loader())
    optimizer = front_end(fit.optimizers[0])
    assert optimizer is not None
    steps = [line for line in log.lines if "loss_step" in line]
    assert [line["loss_step"] for line in steps] == pytest.approx(module.outputs)
    assert len(steps) == 8
    last = {f"apo/{key}": value for key, value in optimizer.metrics().items()}
    assert last.keys() <= steps[-1].keys()
    assert {key: steps[-1][key] for key in last} == pytest.approx(last, nan_ok=True)
    epochs = [line for line in log.lines if "loss_epoch" in line]
    assert epochs[0]["loss_epoch"] == pytest.approx(sum(module.outputs[:4]) / 4)
    # The same accuracy as without trials: the metric has seen every example once.
    model = net()
    alone = make(name, loss)(model)
    hits = 0
    count = MulticlassAccuracy(num_classes=3)
    for batch in loader():
        count.update(model(batch[0]), batch[1])
        hits += len(batch[1])
        by_hand(model, alone, [batch])
    assert hits == 64
    assert epochs[0]["accuracy_epoch"] == pytest.approx(count.compute().item())


def test_the_log_is_written_as_often_as_lightning_writes() -> None:
    log = InMemory()
    callbacks = [APOCallback()]
    trainer(max_epochs=3, logger=log, log_every_n_steps=3, callbacks=callbacks).fit(Script(make("APO", None)), loader())
    assert [line["apo/steps"] for line in log.lines if "apo/steps" in line] == [3, 6, 9, 12]


def test_the_guard_leaves_nothing_behind() -> None:
    module = Script(make("APO", None))
    fit = trainer(max_epochs=1, callbacks=[APOCallback()])
    fit.fit(module, loader())
    assert "log" not in vars(module)
    assert not fit.optimizers[0]._optimizer_step_pre_hooks


@each_front_end
def test_manual_optimization_with_two_optimizers(name: str) -> None:
    """``opt.step()`` and no closure, as in GANs; the metrics of both are logged."""

    class Manual(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.one, self.two = net(), net()

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for model, optimizer in zip((self.one, self.two), self.optimizers(), strict=True):
                optimizer.zero_grad()
                self.manual_backward(F.cross_entropy(model(batch[0]), batch[1]))
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [make(name, F.cross_entropy)(model) for model in (self.one, self.two)]

    module = Manual()
    fit = trainer(max_epochs=2, callbacks=[APOCallback()])
    fit.fit(module, loader())
    model = net()
    by_hand(model, make(name, F.cross_entropy)(model), [*loader()] * 2)
    assert same(module.one, model)
    assert same(module.two, model)
    assert any(key.startswith("apo/1/") for key in fit.callback_metrics)


@each_front_end
def test_a_scheduler_multiplies_what_was_learned(name: str) -> None:
    def configure(model: torch.nn.Module) -> Any:
        optimizer = make(name, F.cross_entropy, rescale_schedule=True)(model)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    module = Script(configure)
    trainer(max_epochs=3, callbacks=[APOCallback()]).fit(module, loader())
    model = net()
    found = configure(model)
    by_hand(model, found["optimizer"], [*loader()] * 3, scheduler=found["lr_scheduler"]["scheduler"])
    assert same(module.net, model)


@each_loss
def test_the_older_name_of_lightning(loss: Loss) -> None:
    class Old(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()
            self.outputs: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.outputs.append(float(outputs["loss"]))

        def configure_optimizers(self) -> Any:
            return make("APO", loss)(self.net)

    module = Old()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "log_every_n_steps": 1}
    fit = pytorch_lightning.Trainer(max_epochs=3, accelerator="cpu", callbacks=[APOCallback()], **quiet)
    fit.fit(module, loader())
    model = net()
    assert module.outputs == by_hand(model, make("APO", loss)(model), [*loader()] * 3)
    assert any(key.startswith("apo/") for key in fit.callback_metrics)
