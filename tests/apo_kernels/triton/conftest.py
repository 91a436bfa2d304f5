"""When the tests here can run, what makes the interpreter faster, and what poisons the memory that kernels get."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
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


@pytest.fixture(autouse=True, scope="session")
def _language_replaced_once() -> Iterator[None]:
    """Triton's interpreter puts its own functions in the place of the language's at each call of a device function,
    which takes 3 ms and changes nothing after the first call of a launch: half of the time of all."""
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", _once_a_launch(interpreter._patch_lang))
        yield


def _once_a_launch(replace: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``replace``, unless the launch has called it for a function that knows the language by the same names."""
    import triton.language as tl

    replaced: set[tuple[str, ...]] = set()

    @cache
    def names(function: Any) -> tuple[str, ...]:
        return tuple(name for name, value in function.__globals__.items() if value is tl or value is tl.core)

    def once(function: Any) -> Any:
        if names(function) in replaced:
            return None  # a device function, and its call drops this
        scope = replace(function)
        if not replaced:  # the launch's own
            restore = scope.restore

            def end() -> None:
                replaced.clear()
                restore()

            scope.restore = end
        replaced.add(names(function))
        return scope

    return once


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


@pytest.fixture
def no_second_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel's first launch succeeds, and its second one fails."""
    from apo_kernels.triton.launch import Launch, LaunchInputs

    launched, start = [], Launch.__call__

    def fail(launch: Launch, run: LaunchInputs) -> None:
        if launch.name in launched:
            raise RuntimeError("too many resources")
        launched.append(launch.name)
        start(launch, run)

    monkeypatch.setattr(Launch, "__call__", fail)
