"""What each method costs: ``pytest benchmarks/kernels/stability``.

One fully connected layer recorded in training. The inverse and the eigenbasis are timed with their
decompositions, as a step that refreshes them has to pay for both.
"""

from __future__ import annotations

from functools import cache
from itertools import islice

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.common.dtypes import SHORT_NAMES
from benchmarks.kernels.stability.measure import DTYPES
from benchmarks.kernels.stability.methods import METHODS, Method
from benchmarks.kernels.stability.problem import Damped
from benchmarks.kernels.stability.recording import record

DAMPING = 1e-2  # one that none of them breaks down at


@cache
def problem() -> Damped:
    """The widest layer of the MLP, ``G (64, 129)``, after ten steps."""
    return Damped(next(islice(record((10,)), 1, None)), DAMPING)


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT_NAMES.get)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.key)
def test_method(benchmark: BenchmarkFixture, method: Method, dtype: torch.dtype) -> None:
    operands = method.prepare(problem()).to(dtype)
    benchmark.group = f"stability: {SHORT_NAMES[dtype]}, 64×129"
    trace = benchmark(method.apply, operands)
    assert trace.result.isfinite().all()
