"""Options and fixtures of the microbenchmarks under pytest."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import pytest
import torch

from benchmarks.common.dtypes import DTYPES
from benchmarks.common.timing import cpu_threads, device_timer
from benchmarks.kernels import machine_peaks
from benchmarks.kernels.shapes import MODELS, QUICK_MODELS
from benchmarks.kernels.throughput.contestants import Workload


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("apo benchmarks")
    group.addoption("--all-models", action="store_true", help="time the large models too")
    group.addoption("--bench-device", default="cpu", help="device to time on (default: cpu)")
    group.addoption("--bench-threads", type=int, default=1, help="CPU threads (default: 1)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "model" in metafunc.fixturenames:
        metafunc.parametrize("model", MODELS if metafunc.config.getoption("--all-models") else QUICK_MODELS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=device_timer, min_rounds=3, max_time=0.5, warmup=False))


@pytest.fixture(scope="session", autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    with cpu_threads(request.config.getoption("--bench-threads")):
        yield


@pytest.fixture(scope="session")
def matmul_rates(request: pytest.FixtureRequest) -> dict[torch.dtype, float]:
    return machine_peaks.matmul_rates(request.config.getoption("--bench-device"), list(DTYPES.values()), seconds=0.2)


@pytest.fixture
def workload(request: pytest.FixtureRequest, model: str, dtype: str) -> Workload:
    return _workload(model, dtype, request.config.getoption("--bench-device"))


@lru_cache(maxsize=1)
def _workload(model: str, dtype: str, device: str) -> Workload:
    """The operands, kept from test to test as long as they stay the same."""
    return Workload(MODELS[model], DTYPES[dtype], device)
