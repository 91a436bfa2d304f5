"""How many operations a step takes on ATen, beside the model's own: as many for 33 layers as for 3."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import apo
import apo_kernels as ak

FREE = (
    "aten.detach",
    "aten.alias",
    "aten._unsafe_view",
    "aten.empty",
    "aten._local_scalar_dense",
    "aten.promote_types",
    "profiler.",
)
"""How names of what computes nothing begin."""

PLAIN, META = 25, 200
"""Most operations of a step; measured: 18 and 189."""
START = 12
"""Most operations of the start for each layer; measured: 8."""


class Operations(TorchDispatchMode):
    """Counts operations that aren't views, by name; a ``_foreach_`` is one. None while a model runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._paused = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not (self._paused or func.is_view or str(func).startswith(FREE)):
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1


class Chain(nn.Module):
    """Layers of width 32, whose forward isn't counted."""

    def __init__(self, layers: int, operations: Operations) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[x for _ in range(layers) for x in (nn.Linear(32, 32), nn.Tanh())])
        self.operations = operations

    def forward(self, x: Tensor) -> Tensor:
        with self.operations.paused():
            found: Tensor = self.layers(x)
            return found


Take = Callable[[], Any]


def trained(
    layers: int, operations: Operations, patch: pytest.MonkeyPatch, *, meta: bool, start: int = 0
) -> tuple[apo.APO, Take]:
    """An optimizer that has taken a few steps, and what takes one more."""
    torch.manual_seed(0)
    model = Chain(layers, operations)
    x, t, other = torch.randn(16, 32), torch.randint(32, (16,)), torch.randn(16, 32)
    opt = apo.APO(model, apo.ProximalObjective(model, [other]), interval=1, method=apo.Method(fisher_start=start))
    backward = Tensor.backward

    def uncounted(*args: Any, **kwargs: Any) -> None:
        with operations.paused():
            backward(*args, **kwargs)

    patch.setattr(Tensor, "backward", uncounted)

    def closure() -> Tensor:
        with operations.paused():
            opt.zero_grad()
            loss = F.cross_entropy(model(x), t)
            loss.backward()
        return loss

    for _ in range(3):
        opt.step(closure)
    if not meta:
        opt.interval = opt.warmup = 0
    for _ in range(2):
        opt.step(closure)
    return opt, lambda: opt.step(closure)


@pytest.mark.parametrize(("meta", "most"), [(False, PLAIN), (True, META)])
def test_a_step_takes_as_many_operations_for_many_layers_as_for_few(
    meta: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for layers in (3, 9, 33):
        operations = Operations()
        with monkeypatch.context() as patch:
            _, take = trained(layers, operations, patch, meta=meta)
            with operations:
                take()
        found.append(operations.counts)
    assert found[0] == found[1] == found[2]
    assert 0 < found[0].total() <= most


def test_the_start_takes_few_operations_for_each_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a meta-step's, and the sample's backward pass."""
    found = []
    for layers in (9, 33):
        operations = Operations()
        with monkeypatch.context() as patch:
            _, take = trained(layers, operations, patch, meta=True, start=100)
            with operations:
                take()
        found.append(operations.counts.total())
    assert found[1] - found[0] <= START * 24


@pytest.mark.parametrize(
    ("meta", "expected"), [(False, ["step_"]), (True, ["trial_", "slopes", "step_"])], ids=["plain", "meta"]
)
def test_a_step_is_a_few_calls_of_the_whole_model(
    meta: bool, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, take = trained(9, Operations(), monkeypatch, meta=meta)
    called: list[str] = []

    def noted(name: str) -> Callable[..., Any]:
        true = getattr(ak.ModelPreconditioner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return true(*args, **kwargs)

        return call

    names = ("step_", "trial_", "slopes", "keep")
    for name, call in {name: noted(name) for name in names}.items():
        monkeypatch.setattr(ak.ModelPreconditioner, name, call)
    take()
    assert called == expected
