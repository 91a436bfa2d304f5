"""The text of a state shows every bit, so that tests may compare it: the print options of ``conftest.py``."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor


def neighbour(x: Tensor) -> Tensor:
    return torch.nextafter(x, torch.tensor(torch.inf, dtype=x.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 3e-5, 12345.678, -2.0])
def test_neighbouring_numbers_differ_in_text(dtype: torch.dtype, value: float) -> None:
    x = torch.tensor(value, dtype=dtype)
    for one, other in ((x, neighbour(x)), (x.view(1, 1), neighbour(x).view(1, 1)), (x.numpy(), neighbour(x).numpy())):
        assert repr({"state": one}) != repr({"state": other})
        assert str([one]) != str([other])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_entry_of_many_shows(dtype: torch.dtype) -> None:
    """Also among numbers of other sizes, where numbers are printed alike."""
    x = torch.linspace(-1e3, 1e3, 2003, dtype=dtype)
    y = x.clone()
    y[700] = neighbour(x[700])
    assert repr(x) != repr(y)
    assert repr(x.numpy()) != repr(y.numpy())


def test_neighbouring_rates_of_numpy_differ_in_text() -> None:
    for kind in (np.float32, np.float64):
        assert repr(kind(0.1)) != repr(np.nextafter(kind(0.1), kind(1)))
