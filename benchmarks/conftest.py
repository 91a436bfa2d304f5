"""Which models the microbenchmarks under pytest time."""

import pytest

from benchmarks.kernels.shapes import MODELS, QUICK_MODELS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-models", action="store_true", help="time the large models too")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("model", MODELS if metafunc.config.getoption("--all-models") else QUICK_MODELS)
