"""accelerate: a loop of one's own in which only the optimizer's construction differs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from apo.integrations import front_end
from tests.integrations.helpers import (
    NAMES,
    Loss,
    by_hand,
    close,
    data,
    each_front_end,
    forget_accelerators,
    loader,
    net,
    optimizer_of,
    others,
    same,
)

each_loss = pytest.mark.parametrize("loss", [None, F.cross_entropy], ids=["closure", "own loss"])


@pytest.fixture(autouse=True)
def _anew() -> None:
    forget_accelerators()


class Script:
    """A training script: what ``accelerate launch`` would run."""

    def __init__(
        self,
        make: Callable[[nn.Module], Any],
        *,
        dtype: torch.dtype = torch.float32,
        size: int = 16,
        schedule: Callable[[int], float] | None = None,
        **settings: Any,
    ) -> None:
        self.accelerator = Accelerator(cpu=True, **settings)
        model = net(dtype)
        optimizer = make(model)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule or (lambda step: 1.0)) if schedule else None
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            model, optimizer, loader(size, dtype), scheduler
        )
        self.losses: list[float] = []

    def train(self, epochs: int = 3) -> Script:
        for _ in range(epochs):
            for x, t in self.loader:
                with self.accelerator.accumulate(self.model):
                    loss = F.cross_entropy(self.model(x), t)
                    self.accelerator.backward(loss)
                    self.optimizer.step()
                    if self.scheduler is not None:
                        self.scheduler.step()
                    self.optimizer.zero_grad()
                self.losses.append(loss.item())
        return self

    def train_with_closures(self, epochs: int = 3) -> Script:
        """For an objective without a loss."""
        for _ in range(epochs):
            for x, t in self.loader:

                def closure(x: Tensor = x, t: Tensor = t) -> Tensor:
                    self.optimizer.zero_grad()
                    loss = F.cross_entropy(self.model(x), t)
                    self.accelerator.backward(loss)
                    return loss

                self.optimizer.step(closure)
        return self

    def run(self, loss: Loss, epochs: int = 3) -> Script:
        return self.train_with_closures(epochs) if loss is None else self.train(epochs)


def make(name: str, loss: Loss, dtype: torch.dtype = torch.float32, **settings: Any) -> Callable[[nn.Module], Any]:
    return lambda model: optimizer_of(name, model, others(dtype), loss, **settings)


@pytest.mark.parametrize("name", ["AdamW", *NAMES])
def test_an_unmodified_script_trains(name: str) -> None:
    losses = Script(make(name, F.cross_entropy)).train(8).losses
    assert losses[-1] < 0.9 * losses[0]


@each_front_end
@each_loss
def test_equal_to_a_hand_written_loop(name: str, loss: Loss) -> None:
    script = Script(make(name, loss)).run(loss)
    model = net()
    by_hand(model, make(name, loss)(model), [*loader()] * 3)
    assert same(script.model, model)


@each_front_end
def test_accumulated_batches_are_the_joined_batch(name: str) -> None:
    dtype = torch.float64
    script = Script(make(name, F.cross_entropy, dtype), dtype=dtype, size=4, gradient_accumulation_steps=4).train()
    model = net(dtype)
    by_hand(model, make(name, F.cross_entropy, dtype)(model), [*loader(16, dtype)] * 3)
    assert close(script.model, model)
    optimizer = front_end(script.optimizer)
    assert optimizer is not None
    assert (optimizer.steps, optimizer.failed_trials) == (12, 0)


@each_front_end
@each_loss
def test_bfloat16(name: str, loss: Loss) -> None:
    """accelerate casts in the model itself, B′ included: the objective needs no ``context``."""
    script = Script(make(name, loss), mixed_precision="bf16").run(loss)

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                outputs: Tensor = self.inner(x)
            return outputs.float()

    model = Cast()
    by_hand(model, make(name, loss)(model), [*loader()] * 3)
    assert same(script.model, model)
    assert next(script.model.parameters()).dtype == torch.float32


@each_front_end
@each_loss
def test_resuming_goes_on_to_the_bit(name: str, loss: Loss, tmp_path: Path) -> None:
    first = Script(make(name, loss)).run(loss, 2)
    first.accelerator.save_state(str(tmp_path))
    first.run(loss, 1)
    resumed = Script(make(name, loss))
    resumed.accelerator.load_state(str(tmp_path))
    resumed.run(loss, 1)
    assert same(first.model, resumed.model)


@each_front_end
def test_a_scheduler_multiplies_what_was_learned(name: str) -> None:
    def schedule(step: int) -> float:
        return 1 / (1 + step / 4)

    build = make(name, F.cross_entropy, rescale_schedule=True)
    script = Script(build, schedule=schedule).train()
    model = net()
    optimizer = build(model)
    by_hand(model, optimizer, [*loader()] * 3, scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, schedule))
    assert same(script.model, model)


@each_front_end
def test_the_step_is_skipped_where_the_grad_scaler_says_so(name: str) -> None:
    """As under ``mixed_precision="fp16"``, which needs a GPU: an overflow halves the scale and changes nothing."""
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    model = net()
    model, optimizer = accelerator.prepare(model, make(name, F.cross_entropy)(model))
    x, t = data().tensors
    for step in range(4):
        before = [p.detach().clone() for p in model.parameters()]
        accelerator.backward(F.cross_entropy(model(x), t) * (float("inf") if step == 2 else 1.0))
        optimizer.step()
        optimizer.zero_grad()
        moved = any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        assert moved == (step != 2)
        assert optimizer.step_was_skipped == (step == 2)
    assert accelerator.scaler.get_scale() == 2.0**7
