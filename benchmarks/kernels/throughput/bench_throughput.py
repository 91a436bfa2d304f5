"""The same contestants under pytest-benchmark: ``pytest benchmarks``, with its options to compare and to save.

The default is the small models in every dtype; ``--all-models`` times all. Groups are what is to be compared.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.common.dtypes import DTYPES
from benchmarks.kernels.shapes import MODELS
from benchmarks.kernels.throughput.contestants import NAMES, OPERATIONS, Workload, contestants, estimate

LIMIT = 2.0  # seconds per call


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_throughput(
    benchmark: BenchmarkFixture,
    workload: Workload,
    matmul_rates: dict[torch.dtype, float],
    model: str,
    dtype: str,
    operation: str,
    name: str,
) -> None:
    expected = estimate(operation, name, MODELS[model], DTYPES[dtype], matmul_rates)
    if expected > LIMIT:
        pytest.skip(f"about {expected:.0f} s a call expected")
    contestant = dict(contestants(operation, workload))[name]
    benchmark.group = f"{model}, {operation}, {dtype}"
    if contestant.flops is not None:
        benchmark.extra_info["gflop"] = contestant.flops / 1e9
    torch._dynamo.reset()
    contestant.call()
    benchmark(contestant.call)
