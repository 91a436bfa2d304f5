"""Relative steps on the kernels against the same in float64, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import apo_kernels as ak

pytest.importorskip("triton.language")
from apo_kernels.triton.launch import count_launches

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poison")]

BETAS = 0.5, 0.9


def numbers(each: bool, count: int) -> dict[str, float | Tensor]:
    if not each:
        return {"rate": 0.03, "correction": 0.7}
    return {"rate": torch.rand(count) * 0.1, "correction": torch.rand(count), "active": torch.arange(count) % 3 != 1}


def wide(given: dict[str, float | Tensor]) -> dict[str, float | Tensor]:
    return {k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in given.items()}


def close(x: Tensor, y: Tensor, before: Tensor) -> None:
    assert x.isfinite().all()
    assert (x.double() - y).norm() <= 2e-6 * (y.norm() + (y - before.double()).norm())


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize(("count", "b"), [(7, 64), (5, 33), (5, 30), (3, 16), (9, 3), (1030, 1), (2, 70), (1, 8)])
def test_squares(count: int, b: int, each: bool, apart: bool) -> None:
    def stack(x: Tensor) -> Tensor:
        if not apart:
            return x
        room = -(-b * b // 8) * 8 + 8
        return torch.zeros(count, room).as_strided((count, b, b), (room, b, 1)).copy_(x)

    X, slope, new = (stack(torch.randn(count, b, b) * scale) for scale in (1.0, 0.1, 3.0))
    X += torch.eye(b)
    for x in (slope, new):  # so that some have a greater norm than the longest
        x *= (10.0 ** -(torch.arange(count) % 4))[:, None, None]
    size, new_size = torch.rand(count, b), torch.rand(count, b)
    size[0, 0] = new_size[0, 0] = 0.0
    given = numbers(each, count)
    before = [x.clone() for x in (X, slope, size)]
    exact = [x.double() for x in (X, slope, size, new, new_size)]
    options = {"betas": BETAS, "floor": 1e-6, "longest": 2.0}
    ak.relative_step_squares_(*exact, **wide(given), **options)  # type: ignore[arg-type]
    with count_launches() as names:
        ak.relative_step_squares_(X, slope, size, new, new_size, backend="triton", **given, **options)  # type: ignore[arg-type]
    assert names == ([] if b in (33, 70) else ["relative_squares"])  # else ATen's
    for x, y, z in zip((X, slope, size), exact, before, strict=False):
        close(x, y, z)
    if each:
        for x, z in zip((X, slope, size), before, strict=True):
            assert torch.equal(x[1::3], z[1::3])


@pytest.mark.parametrize("each", [False, True])
def test_scalings(each: bool) -> None:
    entries = [5, 8, 9000, 1, 4096]
    lengths = [-(-x // 8) * 8 for x in entries]
    inside = torch.cat([torch.arange(length) < true for length, true in zip(lengths, entries, strict=True)])
    S, slope, size, new, new_size = (torch.randn(sum(lengths)) * inside for _ in range(5))
    size, new_size = size.square(), new_size.square()
    given = numbers(each, len(lengths))
    before = [x.clone() for x in (S, slope, size)]
    exact = [x.double() for x in (S, slope, size, new, new_size)]
    options = {"betas": (0.9, 0.99), "floor": 1e-3, "lengths": lengths, "entries": entries}
    ak.relative_step_scalings_(*exact, **wide(given), **options)  # type: ignore[arg-type]
    with count_launches() as names:
        ak.relative_step_scalings_(S, slope, size, new, new_size, backend="triton", **given, **options)  # type: ignore[arg-type]
    assert names == ["relative_means", "relative_scalings"]
    first = 0
    for at, length in enumerate(lengths):
        here = slice(first, first + length)
        for x, y, z in zip((S, slope, size), exact, before, strict=False):
            close(x[here], y[here], z[here])
            assert not each or at % 3 != 1 or torch.equal(x[here], z[here])
        first += length
    assert (S[~inside] == 0).all()
