"""Both front ends on a GPU: ``pytest -m gpu``. They do what they do on a CPU."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apo
import apo_kernels as ak
from tests.apo.helpers import same, weights

pytestmark = pytest.mark.gpu

CLASSES = 5


@pytest.fixture(autouse=True)
def _plain_arithmetic() -> Iterator[None]:
    """Sums in a fixed order, and float32 that is float32."""
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    cudnn = torch.backends.cudnn
    cudnn.deterministic, cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 70), nn.Tanh(), nn.Linear(70, 33), nn.Tanh(), nn.Linear(33, 5))


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.GroupNorm(4, 24), nn.ReLU(),
        nn.Flatten(), nn.Linear(24 * 16, CLASSES),
    )  # fmt: skip


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(24, 4, 48, dropout=0.0, batch_first=True)
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x.flatten(1).view(len(x), 8, 24)).mean(1))


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "convnet": convnet, "attention": Attention}
each_model = pytest.mark.parametrize("name", MODELS)

FRONT_ENDS: dict[str, Callable[..., Any]] = {
    "APO": apo.APO,
    "AdaptiveLR": lambda model, goal, **settings: apo.AdaptiveLR(
        torch.optim.AdamW(model.parameters(), lr=3e-3), goal, **settings
    ),
}
each_front_end = pytest.mark.parametrize("front_end", FRONT_ENDS)


class Training:
    """A model on a device, in training on batches that are the same on every device."""

    def __init__(self, name: str, front_end: str, device: str, dtype: torch.dtype = torch.float32, **settings: Any):
        self.device, self.dtype, self.context = device, dtype, settings.pop("context", None)
        torch.manual_seed(0)
        self.model = MODELS[name]().to(device, dtype)
        self.scaler = settings.pop("grad_scaler", None)
        own = {} if self.scaler is None else {"grad_scaler": self.scaler}
        self.inputs = self.drawn()
        goal = apo.ProximalObjective(self.model, lambda: next(self.inputs), fsd_weight=1.0, context=self.context)
        self.opt = FRONT_ENDS[front_end](self.model, goal, **{"interval": 3, "warmup": 6, **own, **settings})
        self.batch = 0

    def drawn(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(1)
        while True:
            yield torch.randn(20, 3, 8, 8, generator=generator).to(self.device, self.dtype)

    def loss(self, x: Tensor, t: Tensor) -> Tensor:
        if self.context is None:
            return F.cross_entropy(self.model(x).float() if self.dtype.itemsize == 2 else self.model(x), t)
        with self.context():
            return F.cross_entropy(self.model(x), t)

    def step(self) -> float:
        generator = torch.Generator().manual_seed(100 + self.batch % 4)
        self.batch += 1
        x, t = torch.randn(32, 3, 8, 8, generator=generator), torch.randint(CLASSES, (32,), generator=generator)
        x, t = x.to(self.device, self.dtype), t.to(self.device)

        def closure() -> Tensor:
            self.opt.zero_grad()
            loss = self.loss(x, t)
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            return loss

        found = self.opt.step(closure)
        if self.scaler is not None:
            self.scaler.update()
        return float(found.detach())

    def losses(self, steps: int) -> list[float]:
        return [self.step() for _ in range(steps)]


@each_front_end
@each_model
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-2)])
def test_as_on_a_cpu(name: str, front_end: str, dtype: torch.dtype, tolerance: float) -> None:
    """Without the start, whose samples are those of the device's own random numbers."""
    settings = {"method": apo.Method(fisher_start=0)} if front_end == "APO" else {}
    here, there = (Training(name, front_end, device, dtype, **settings) for device in ("cuda", "cpu"))
    found, expected = here.losses(20), there.losses(20)
    assert found == pytest.approx(expected, rel=tolerance)
    assert here.opt.metrics() == pytest.approx(there.opt.metrics(), rel=20 * tolerance, abs=1e-6)


@each_front_end
@each_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_falls(name: str, front_end: str, dtype: torch.dtype) -> None:
    training = Training(name, front_end, "cuda", dtype)
    first, *_, last = training.losses(60)
    assert last < 0.8 * first
    assert training.opt.failed_trials <= 3


@each_front_end
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_scaler(front_end: str, dtype: torch.dtype) -> None:
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**12) if dtype == torch.float16 else None
    training = Training("convnet", front_end, "cuda", context=lambda: torch.autocast("cuda", dtype), grad_scaler=scaler)
    first, *_, last = training.losses(60)
    assert last < 0.8 * first


@each_front_end
@each_model
def test_the_same_bits_after_a_resumption(name: str, front_end: str) -> None:
    whole, begun, resumed = (Training(name, front_end, "cuda") for _ in range(3))
    whole.losses(14)
    begun.losses(7)
    resumed.model.load_state_dict(begun.model.state_dict())
    resumed.opt.load_state_dict(copy.deepcopy(begun.opt.state_dict()))
    resumed.batch, resumed.inputs = begun.batch, begun.inputs
    resumed.losses(7)
    assert same(weights(whole.model), weights(resumed.model))


@each_front_end
def test_a_checkpoint_goes_on_on_another_device(front_end: str) -> None:
    here, there = Training("mlp", front_end, "cuda"), Training("mlp", front_end, "cpu")
    here.losses(7)
    there.model.load_state_dict(here.model.state_dict())
    there.opt.load_state_dict(here.opt.state_dict())
    there.batch, there.inputs = here.batch, here.inputs
    here.opt.interval = there.opt.interval = 0
    assert there.losses(5) == pytest.approx(here.losses(5), rel=1e-2)


@each_front_end
def test_the_training_s_random_numbers_are_its_own(front_end: str) -> None:
    found = []
    for interval in (0, 1):
        training = Training("mlp", front_end, "cuda", interval=interval)
        training.model.insert(2, nn.Dropout(0.3))
        torch.cuda.manual_seed(3)
        training.losses(4)
        found.append(torch.cuda.get_rng_state())
    assert torch.equal(*found)


def test_its_steps_are_the_kernels_of_this_library() -> None:
    """Of a plain step at most four launches, whatever the number of layers."""
    training = Training("mlp", "APO", "cuda", interval=50, warmup=0)
    assert ak.explain(None, list(training.model.parameters())).startswith("triton")
    training.losses(3)
    from apo_kernels.triton.launch import count_launches

    with count_launches() as names:
        training.step()
    assert 1 <= len(names) <= 4


def test_a_plain_step_waits_for_nothing() -> None:
    training = Training("convnet", "APO", "cuda", interval=50, warmup=0)
    training.losses(3)
    x, t = torch.randn(32, 3, 8, 8, device="cuda"), torch.randint(CLASSES, (32,), device="cuda")
    for _ in range(2):
        training.opt.zero_grad()
        training.loss(x, t).backward()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as waits:
                warnings.simplefilter("always")
                training.opt.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert not [w for w in waits if "synchroniz" in str(w.message)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_without_finite_gradients_is_left_out(value: float) -> None:
    training = Training("convnet", "APO", "cuda", interval=50, warmup=0)
    training.losses(3)
    before = weights(training.model)
    handle = training.model[0].weight.register_hook(lambda g: g * value)
    training.step()
    handle.remove()
    assert same(weights(training.model), before)
    assert training.opt.skipped_steps == 1
    training.losses(2)
    assert not same(weights(training.model), before)
    assert training.opt.skipped_steps == 1
