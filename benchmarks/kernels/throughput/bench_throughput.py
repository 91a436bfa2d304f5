"""The same contestants under pytest-benchmark, on one thread: ``pytest benchmarks``, with its options.

The default is the small models in every dtype; ``--all-models`` times all. Groups are what is to be compared.
"""

from functools import cache, lru_cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.common.dtypes import DTYPES
from benchmarks.common.timing import cpu_threads, device_timer
from benchmarks.kernels import machine_peaks
from benchmarks.kernels.shapes import MODELS
from benchmarks.kernels.throughput.contestants import NAMES, OPERATIONS, Workload, contestants, estimate

LIMIT = 2.0  # seconds per call


@pytest.mark.benchmark(timer=device_timer, min_rounds=3, max_time=0.5, warmup=False)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_throughput(benchmark: BenchmarkFixture, model: str, dtype: str, operation: str, name: str) -> None:
    with cpu_threads(1):
        expected = estimate(operation, name, MODELS[model], DTYPES[dtype], _rates())
        if expected > LIMIT:
            pytest.skip(f"about {expected:.0f} s a call expected")
        contestant = dict(contestants(operation, _workload(model, dtype)))[name]
        benchmark.group = f"{model}, {operation}, {dtype}"
        if contestant.flops is not None:
            benchmark.extra_info["gflop"] = contestant.flops / 1e9
        torch._dynamo.reset()
        contestant.call()
        benchmark(contestant.call)


@cache
def _rates() -> dict[torch.dtype, float]:
    return machine_peaks.matmul_rates("cpu", list(DTYPES.values()), seconds=0.2)


@lru_cache(maxsize=1)
def _workload(model: str, dtype: str) -> Workload:
    """The operands, kept from test to test as long as they stay the same."""
    return Workload(MODELS[model], DTYPES[dtype], "cpu")
