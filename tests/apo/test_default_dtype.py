"""What torch's default dtype is changes nothing: models have their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import apo
from tests.apo.helpers import closure_of, convnet, objective, same, weights

FRONT_ENDS: dict[str, Any] = {
    "APO": apo.APO,
    "APO, by the entry": lambda model, goal: apo.APO(model, goal, method=apo.Method(meta_optimizer="adam")),
    "AdaptiveLR": lambda model, goal: apo.AdaptiveLR(torch.optim.AdamW(model.parameters(), weight_decay=0.1), goal),
    "FullPreconditioner": apo.FullPreconditioner,
}


@contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def trained(front_end: str, dtype: torch.dtype, under: torch.dtype) -> list[Tensor]:
    model, x, t, other = convnet(dtype=dtype)
    with default(under):
        opt = FRONT_ENDS[front_end](model, objective(model, other))
        for _ in range(12):
            opt.step(closure_of(opt, model, x, t))
        state = opt.state_dict()
        opt.load_state_dict(state)
        opt.step(closure_of(opt, model, x, t))
    return weights(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_training_is_the_same_to_the_bit(front_end: str, dtype: torch.dtype) -> None:
    expected = trained(front_end, dtype, torch.float32)
    assert same(trained(front_end, dtype, torch.float64), expected)
