"""How many operations a whole model's step and trial take: as many as before, whatever the number of layers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from tests.apo_kernels.whole_models import Model, in_one_storage


class _Count(TorchDispatchMode):
    """Counts operations but views; a foreach is one."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not func.is_view and "empty" not in func.__name__:
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def operations(model: Model) -> tuple[int, int]:
    """Of a bounded step, and of a trial with its slopes."""
    count = len(model.Ss)
    bound, Gs, thetas, buffers = model.bind(), model.parts(), model.parts(), model.buffers()
    numbers: dict[str, Any] = {"momentum": [0.5] * count}

    def step() -> None:
        decay = {"lr": [0.1] * count, "weight_decay": [0.1] * count}
        bound.step_(thetas, Gs, buffers, **decay, **numbers, most=1.0, shares=[0.1] * count)

    def trial() -> None:
        kept = bound.trial_(thetas, Gs, buffers, lengths=[0.1] * count, shrink=[0.9] * count, **numbers)
        bound.slopes(Gs, kept, lengths=[0.1] * count)

    return counted(step), counted(trial)


def counted(function: Callable[[], None]) -> int:
    with _Count() as counter:
        function()
    return len(counter.names)


@pytest.mark.parametrize("shared", [False, True])
def test_operations_dont_go_with_layers(shared: bool) -> None:
    found = []
    for layers in (3, 9, 33):
        model = Model(random.Random(0))
        for _ in range(layers):
            model.add(32, 33, None, None, bias=True)
        if shared:
            in_one_storage(model)
        found.append(operations(model))
    assert found[0] == found[1] == found[2]
    plain, trial = found[0]
    assert plain <= 34
    assert trial <= 60


def test_operations_go_with_different_tiles() -> None:
    """In blocks of 64: squares of 64, and the bias column's tiles."""
    model = Model(random.Random(0))
    for _ in range(2):
        model.add(128, 129, 64, 64, bias=True)
    plain, trial = operations(model)
    assert plain <= 45
    assert trial <= 110
