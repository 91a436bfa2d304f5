"""When the tests here can run, and what poisons the memory that kernels get."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("interpret") and not INTERPRETED:
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every tensor that is made uninitialised holds NaN: results, workspaces, and their pads."""
    pytest.importorskip("triton.language")
    from apo_kernels.triton.plan import clear_plans

    real = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        x = real(*args, **kwargs)
        return x.fill_(torch.nan) if x.is_floating_point() else x.fill_(255)  # 0xFFFF… is NaN in every format

    clear_plans()
    monkeypatch.setattr(torch, "empty", poisoned)
    yield
    clear_plans()
