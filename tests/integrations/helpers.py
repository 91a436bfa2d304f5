"""What the tests of the trainers share: a small task, both front ends, and B′ as a function of the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import apo

NAMES = ("AdaptiveLR", "APO")
each_front_end = pytest.mark.parametrize("name", NAMES)

Loss = Callable[[Any, Any], Tensor] | None


class Fresh:
    """B′: the batch with the optimizer's step number, so that a resumed run meets the batches that it would have."""

    def __init__(self, batches: list[Any], *, targets: bool) -> None:
        self.batches, self.targets = batches, targets
        self.optimizer: Any = None

    def __call__(self) -> Any:
        batch = self.batches[self.optimizer.steps % len(self.batches)]
        return batch if self.targets or not isinstance(batch, (tuple, list)) else batch[0]


def optimizer_of(
    name: str,
    model: nn.Module,
    batches: list[Any],
    loss: Loss,
    *,
    objective: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """AdamW, or a front end whose objective looks at ``batches``, with a ``loss`` of its own or without."""
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    if name == "AdamW":
        return base
    fresh = Fresh(batches, targets=loss is not None)
    goal = apo.ProximalObjective(model, fresh, loss=loss, **(objective or {}))
    settings = {"interval": 2, "warmup": 4, **settings}
    # its samples of the Fisher matrix would differ between ranks and one process
    method = apo.Method(fisher_start=0, lr_meta_lr=0.3)
    fresh.optimizer = (
        apo.APO(model, goal, block_size=4, **settings, method=method)
        if name == "APO"
        else apo.AdaptiveLR(base, goal, **settings)
    )
    return fresh.optimizer


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def data(dtype: torch.dtype = torch.float32) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 5, generator=generator, dtype=torch.float64)
    t = (x @ torch.randn(5, 3, generator=generator, dtype=torch.float64)).argmax(1)
    return TensorDataset(x.to(dtype), t)


def loader(size: int = 16, dtype: torch.dtype = torch.float32) -> DataLoader[Any]:
    return DataLoader(data(dtype), size)


def others(dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    """Batches for B′, in another order than those of training."""
    x, t = data(dtype).tensors
    return list(zip(x.flip(0).split(16), t.flip(0).split(16), strict=True))


def by_hand(
    model: nn.Module,
    optimizer: Any,
    batches: Iterator[Any] | list[Any],
    *,
    loss_of: Callable[[nn.Module, Any], Tensor] = lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
    clip: float | None = None,
    clip_trials: bool = True,
    scheduler: Any = None,
) -> list[float]:
    """The loop as one writes it: a closure for each batch. Returns the losses."""
    losses = []
    for batch in batches:

        def closure(batch: Any = batch) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            if clip is not None and (clip_trials or not optimizer.in_trial):
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            return loss

        losses.append(optimizer.step(closure).item())
        if scheduler is not None:
            scheduler.step()
    return losses


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: nn.Module, b: nn.Module) -> bool:
    """To the bit."""
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


def close(a: nn.Module, b: nn.Module, rtol: float = 1e-9) -> bool:
    return all(torch.allclose(x, y, rtol=rtol, atol=rtol) for x, y in zip(weights(a), weights(b), strict=True))


def forget_accelerators() -> None:
    """accelerate keeps its settings, and the Trainer's, for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
