"""Bad input to a whole model's preconditioner: refused by name, and everything is left as it was."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

import apo_kernels as ak
from tests.apo_kernels.whole_models import Model, assert_equal, copied


def small() -> tuple[ak.ModelPreconditioner, Model]:
    model = Model(random.Random(0), dtype=torch.float32, block_dtype=torch.float32)
    model.add(4, 3, 2, None, bias=True)
    model.add(3, 3, 2, None)
    return model.bind(), model


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda Gs, thetas: Gs.pop(), "Gs must be a list with an entry for each of 2 layers, but is a list of 1"),
        (lambda Gs, thetas: thetas.pop(), "thetas must be a list with an entry for each of 2 layers"),
        (lambda Gs, thetas: Gs[0].pop(), r"Gs\[0\] must be a list of 2 parts"),
        (lambda Gs, thetas: Gs.__setitem__(0, 1), r"Gs\[0\] must be a list of 2 parts"),
        (lambda Gs, thetas: thetas.__setitem__(1, None), r"thetas\[1\] must be a list of 1 parts"),
        (lambda Gs, thetas: Gs[0].__setitem__(1, torch.zeros(4)), r"Gs\[0\]\[1\] must be a tensor of shape \(4, 1\)"),
        (lambda Gs, thetas: Gs[0].__setitem__(1, 3.0), r"Gs\[0\]\[1\] must be a torch.Tensor"),
        (lambda Gs, thetas: thetas[0].__setitem__(0, None), r"thetas\[0\]\[0\] must be a torch.Tensor"),
        (lambda Gs, thetas: thetas[0].__setitem__(0, torch.zeros(4, 2).double()), "float64 exactly if the blocks are"),
        (lambda Gs, thetas: thetas[0].__setitem__(0, torch.zeros(4, 1).expand(4, 2)), "must not overlap itself"),
        (lambda Gs, thetas: Gs[0].__setitem__(0, torch.zeros(4, 2, dtype=torch.cfloat).conj().imag), "lazily negated"),
    ],
)
def test_parts_that_dont_fit(change: Callable[[Any, Any], None], match: str) -> None:
    bound, model = small()
    Gs, thetas, buffers = model.parts(), model.parts(), model.buffers()
    change(Gs, thetas)
    before = copied(thetas), copied(buffers)
    numbers: dict[str, Any] = {"lr": [0.1] * 2, "momentum": [0.5] * 2, "weight_decay": [0.1] * 2}
    with pytest.raises((TypeError, ValueError), match=match):
        bound.step_(thetas, Gs, buffers, **numbers)
    with pytest.raises((TypeError, ValueError), match=match):
        bound.trial_(thetas, Gs, buffers, lengths=[1.0] * 2, momentum=[0.0] * 2, shrink=[1.0] * 2)
    assert_equal([x for x in thetas if x], [x for x in before[0] if x])
    assert_equal(buffers, before[1])


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"lr": [0.1]}, "lr must be a list with a number for each of 2 layers, but is a list of 1"),
        ({"momentum": 0.5}, "momentum must be a list with a number for each"),
        ({"most": 1.0}, "shares must be a list with a number for each"),
        ({"buffers": [None]}, "momentum_buffers must be a list with an entry for each of 2 layers"),
        ({"buffers": [None, torch.zeros(3, 4)]}, r"momentum_buffers\[1\] must be a torch.float32 tensor"),
        ({"buffers": [None, torch.zeros(3, 3).half()]}, r"momentum_buffers\[1\] must be a torch.float32 tensor"),
        ({"buffers": [None, torch.zeros(3, 1).expand(3, 3)]}, r"momentum_buffers\[1\] must not overlap itself"),
    ],
)
def test_numbers_and_buffers_that_dont_fit(changed: dict[str, Any], match: str) -> None:
    bound, model = small()
    arguments: dict[str, Any] = {"lr": [0.1] * 2, "momentum": [0.5] * 2, "weight_decay": [0.1] * 2} | changed
    thetas, buffers = model.parts(), arguments.pop("buffers", model.buffers())
    before = copied(thetas), copied(buffers)
    with pytest.raises(ValueError, match=match):
        bound.step_(thetas, model.parts(), buffers, **arguments)
    assert_equal([thetas, buffers], list(before))


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"widths": [(2, 1)]}, "widths must be a list with an entry for each of 2 layers"),
        ({"widths": [(2, 2), (3,)]}, r"widths\[0\] must be one or two ints that add up to 3"),
        ({"widths": [(1, 1, 1), (3,)]}, r"widths\[0\] must be one or two ints"),
        ({"learned": ["ABS"]}, "learned must be a list with an entry for each of 2 layers"),
        ({"learned": ["ABS", "AB"]}, r"learned\[1\] must be different letters of 'ABS', with 'S'"),
        ({"learned": ["ABS", "SX"]}, r"learned\[1\] must be different letters of 'ABS', with 'S'"),
        ({"Ss": [torch.zeros(4, 3)]}, "Ss must have the length of As"),
        ({"backend": "cuda"}, "backend must be None or one of"),
    ],
)
def test_models_that_arent_one(changed: dict[str, Any], match: str) -> None:
    _, model = small()
    own: dict[str, Any] = {"As": model.As, "Bs": model.Bs, "Ss": model.Ss, "widths": model.widths} | changed
    with pytest.raises((TypeError, ValueError), match=match):
        ak.ModelPreconditioner(own.pop("As"), own.pop("Bs"), own.pop("Ss"), **own)
