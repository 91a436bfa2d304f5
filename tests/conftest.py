"""What all tests share: one thread, a seed, small examples, and what needs a GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import settings

# MKL's products may else depend on where operands lie in memory: they do on CPUs without AVX-512
os.environ.setdefault("MKL_CBWR", "AUTO")
settings.register_profile("default", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("default")
torch.set_num_threads(1)

# Tests compare the text of whole states to the bit. By default torch prints four decimals, and of more than 1,000
# entries only the first and last three, so that a small change would not show.
torch.set_printoptions(precision=18, sci_mode=True, threshold=sys.maxsize, linewidth=10**6)
np.set_printoptions(floatmode="unique", threshold=sys.maxsize)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A GPU that has faulted is of no more use to its process: a worker of xdist's ends there, and another goes on."""
    on_gpu = item.get_closest_marker("gpu") is not None
    try:
        yield
        if on_gpu:
            torch.cuda.synchronize()  # so that the test that did it is the one that fails
    except RuntimeError as error:
        if on_gpu and "CUDA error" in str(error) and "PYTEST_XDIST_WORKER" in os.environ:
            print(f"{item.nodeid}: {error}", file=sys.stderr, flush=True)
            os._exit(3)
        raise
