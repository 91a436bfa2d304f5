"""Hugging Face's Trainer: a script in which only ``optimizers=`` differs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments, get_scheduler

from apo.integrations import front_end
from apo.integrations.transformers import APOCallback, APOTrainerMixin
from tests.integrations.helpers import NAMES, Loss, by_hand, close, each_front_end, optimizer_of, same
from tests.integrations.language import batches, counted_loss, language_model, own_loss, sentences

each_loss = pytest.mark.parametrize("loss", [None, own_loss], ids=["mixin", "own loss"])


class ClosureTrainer(APOTrainerMixin, Trainer):
    pass


def make(name: str, model: nn.Module, loss: Loss, **settings: Any) -> Any:
    settings = {"rescale_schedule": True, **settings} if name in NAMES else settings
    return optimizer_of(name, model, batches()[::-1], loss, **settings)


def trainer(
    folder: Path, optimizer: Any, model: nn.Module, loss: Loss, *, callbacks: Any = None, **settings: Any
) -> Trainer:
    """With a ``loss`` of the objective's own: the Trainer itself."""
    usual = {
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "per_device_train_batch_size": 8,
        "train_sampling_strategy": "sequential",
        "num_train_epochs": 3,
        "logging_steps": 1,
    }
    kind = Trainer if loss is not None else ClosureTrainer
    arguments = TrainingArguments(str(folder), **{**usual, **settings})
    return kind(
        model, arguments, train_dataset=sentences(), optimizers=(optimizer, None), callbacks=callbacks or [APOCallback]
    )


def losses_of(trained: Trainer) -> list[float]:
    return [line["loss"] for line in trained.state.log_history if "loss" in line]


def schedule(optimizer: Any, steps: int, kind: str = "linear") -> Any:
    return get_scheduler(kind, optimizer=optimizer, num_warmup_steps=0, num_training_steps=steps)


@pytest.mark.parametrize("name", ["AdamW", *NAMES])
@each_loss
def test_an_unmodified_script_trains(name: str, loss: Loss, tmp_path: Path) -> None:
    model = language_model()
    trained = trainer(tmp_path, make(name, model, loss), model, loss, num_train_epochs=8)
    trained.train()
    losses = losses_of(trained)
    assert losses[-1] < 0.9 * losses[0]


@each_front_end
@each_loss
def test_equal_to_a_hand_written_loop(name: str, loss: Loss, tmp_path: Path) -> None:
    """With the Trainer's defaults: a linear schedule, gradients clipped (the mixin clips none in trials)."""
    model, other = language_model(), language_model()
    trained = trainer(tmp_path, make(name, model, loss), model, loss)
    trained.train()
    optimizer = make(name, other, loss)
    losses = by_hand(
        other.train(),
        optimizer,
        batches() * 3,
        loss_of=counted_loss,
        clip=1.0,
        clip_trials=False,
        scheduler=schedule(optimizer, 12),
    )
    assert same(model, other)
    assert losses_of(trained) == losses
    assert optimizer.failed_trials == 0


@each_front_end
@each_loss
def test_accumulated_batches_are_the_joined_batch(name: str, loss: Loss, tmp_path: Path) -> None:
    models = []
    for parts in (1, 4):
        model = language_model(torch.float64)
        trained = trainer(
            tmp_path,
            make(name, model, loss),
            model,
            loss,
            per_device_train_batch_size=8 // parts,
            gradient_accumulation_steps=parts,
        )
        trained.train()
        optimizer = front_end(trained.optimizer)
        assert optimizer is not None
        assert (optimizer.steps, optimizer.failed_trials) == (12, 0)
        models.append(model)
    assert close(*models)


@each_front_end
@each_loss
def test_bfloat16(name: str, loss: Loss, tmp_path: Path) -> None:
    model, other = language_model(), language_model()
    trained = trainer(tmp_path, make(name, model, loss), model, loss, bf16=True)
    trained.train()

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with autocast():
            loss = counted_loss(model, batch)
        return loss.float()

    # accelerate's models return float32 under autocast
    goal = {"context": autocast, "outputs": lambda output: output.logits.float()}
    optimizer = make(name, other, loss, objective=goal)
    settings = {"clip": 1.0, "clip_trials": False, "scheduler": schedule(optimizer, 12)}
    by_hand(other.train(), optimizer, batches() * 3, loss_of=loss_of, **settings)
    assert same(model, other)
    assert next(model.parameters()).dtype == torch.float32


@each_front_end
@each_loss
def test_resuming_goes_on_to_the_bit(name: str, loss: Loss, tmp_path: Path) -> None:
    """In the middle of the second epoch, with shuffled examples."""
    settings = {"save_strategy": "steps", "save_steps": 5, "train_sampling_strategy": "random"}
    whole, resumed = language_model(), language_model()
    trainer(tmp_path / "whole", make(name, whole, loss), whole, loss, **settings).train()
    again = trainer(tmp_path / "resumed", make(name, resumed, loss), resumed, loss, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert same(whole, resumed)
    optimizer = front_end(again.optimizer)
    assert optimizer is not None
    assert optimizer.steps == 12


@each_front_end
@each_loss
def test_the_log_holds_the_metrics(name: str, loss: Loss, tmp_path: Path) -> None:
    model = language_model()
    trained = trainer(tmp_path, make(name, model, loss), model, loss)
    trained.train()
    optimizer = front_end(trained.optimizer)
    assert optimizer is not None
    lines = [line for line in trained.state.log_history if "loss" in line]
    last = {f"apo/{key}": value for key, value in optimizer.metrics().items()}
    assert {key: lines[-1][key] for key in last} == pytest.approx(last, nan_ok=True)
    assert "apo/" not in "".join(trained.state.log_history[-1])  # the run's summary


class Reporter(TrainerCallback):
    """Stands where ``report_to`` puts Weights & Biases: before the callbacks of one's own."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.lines.append(dict(kwargs["logs"]))


def test_put_first_the_callback_reaches_reporters(tmp_path: Path) -> None:
    model, reporter = language_model(), Reporter()
    trained = trainer(tmp_path, make("APO", model, own_loss), model, own_loss, callbacks=[reporter])
    trained.callback_handler.callbacks.insert(0, APOCallback())
    trained.train()
    assert all("apo/Q" in line for line in reporter.lines if "loss" in line)


@each_front_end
def test_the_mixin_reaches_reporters_and_logs_nothing_in_trials(name: str, tmp_path: Path) -> None:
    class Logging(ClosureTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            self.log({"seen": loss.item()})
            return loss

    model, reporter = language_model(), Reporter()
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1)
    optimizer = make(name, model, None)
    trained = Logging(
        model, arguments, train_dataset=sentences(), optimizers=(optimizer, None), callbacks=[reporter, APOCallback]
    )
    trained.train()
    assert sum("seen" in line for line in reporter.lines) == optimizer.steps
    logged = [line for line in reporter.lines if "loss" in line]
    assert len(logged) == optimizer.steps
    assert f"apo/{next(iter(optimizer.metrics()))}" in logged[0]


@each_front_end
def test_a_constant_schedule_leaves_what_was_learned(name: str, tmp_path: Path) -> None:
    """As if there were none, although it is a LambdaLR, which sets the rate from its own base after each step."""
    model, other = language_model(torch.float64), language_model(torch.float64)
    optimizer = make(name, model, own_loss)
    trainer(tmp_path, optimizer, model, own_loss, lr_scheduler_type="constant").train()
    free = make(name, other, own_loss)
    by_hand(other.train(), free, batches() * 3, loss_of=counted_loss, clip=1.0)
    assert close(model, other, rtol=1e-6)


@each_front_end
@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup", "inverse_sqrt"])
def test_schedules_multiply_what_was_learned(name: str, kind: str, tmp_path: Path) -> None:
    """Between meta-updates, at every other step, the rate goes with the schedule; the log holds the rates in use."""
    model = language_model()
    optimizer = make(name, model, own_loss, **({} if name == "APO" else {"meta_optimizer": "rmsprop"}))
    rates: list[float] = []
    optimizer.register_step_post_hook(lambda *_: rates.append(float(optimizer.param_groups[0]["lr"])))
    trained = trainer(tmp_path, optimizer, model, own_loss, lr_scheduler_type=kind, warmup_steps=3)
    trained.train()
    lines = [line for line in trained.state.log_history if "loss" in line]
    assert [line["apo/lr"] for line in lines] == pytest.approx(rates)
    assert rates[0] == 0  # where a warmup begins, nothing is to be learned
    factors = [rate / line["learning_rate"] for rate, line in zip(rates[1:], lines[1:], strict=True)]
    assert abs(math.log(factors[2])) > 0.3
    for step in range(4, 11, 2):  # the steps 5, 7, ... have no meta-update
        assert factors[step] == pytest.approx(factors[step - 1], rel=1e-5)
    assert len({round(factor, 4) for factor in factors}) > 5


@each_front_end
def test_a_schedule_that_overwrites_is_told_of_once(name: str, tmp_path: Path) -> None:
    model = language_model()
    optimizer = make(name, model, own_loss, rescale_schedule=False)
    with pytest.warns(UserWarning, match="rescale_schedule") as seen:
        trainer(tmp_path, optimizer, model, own_loss, lr_scheduler_type="constant_with_warmup").train()
    assert sum("rescale_schedule" in str(warning.message) for warning in seen) == 1


@each_front_end
def test_the_mixins_trials_carry_no_grad_scaler(name: str, tmp_path: Path) -> None:
    """Powers of two scale exactly: the run with a GradScaler is the one without."""
    models = []
    for enabled in (False, True):
        model = language_model()
        trained = trainer(tmp_path, make(name, model, None), model, None, max_grad_norm=0)
        trained.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8) if enabled else None
        trained.train()
        models.append(model)
    assert same(*models)


def test_the_mixin_leaves_other_optimizers_alone(tmp_path: Path) -> None:
    model, other = language_model(), language_model()
    trainer(tmp_path, make("AdamW", model, None), model, None).train()
    trainer(tmp_path, make("AdamW", other, own_loss), other, own_loss).train()
    assert same(model, other)
