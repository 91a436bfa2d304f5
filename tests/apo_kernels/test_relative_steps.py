"""Relative steps on torch's operations against the definition, entry by entry."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import apo_kernels as ak

BETAS, FLOOR = (0.5, 0.9), 1e-2


def lerped(mean: Tensor, new: Tensor, beta: float) -> Tensor:
    return beta * mean + (1 - beta) * new


@pytest.mark.parametrize(("count", "b"), [(1, 5), (70, 3), (130, 1), (3, 8)])
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("some", [False, True])
def test_squares(count: int, b: int, each: bool, some: bool) -> None:
    torch.manual_seed(0)
    X, slope, new = (torch.randn(count, b, b, dtype=torch.float64) for _ in range(3))
    size, new_size = (torch.rand(count, b, dtype=torch.float64) for _ in range(2))
    rate = torch.rand(count, dtype=torch.float64) if each else 0.1
    correction = torch.rand(count, 1, 1, dtype=torch.float64) if each else 0.7
    active = torch.arange(count) % 2 == 0 if some else None
    found = [x.clone() for x in (X, slope, size)]
    ak.relative_step_squares_(
        *found, new, new_size, rate=rate, betas=BETAS, correction=correction, floor=FLOOR, longest=2.0, active=active
    )
    for q in range(count):
        expected = [X[q], slope[q], size[q]]
        if active is None or active[q]:
            mean, sizes = lerped(slope[q], new[q], BETAS[0]), lerped(size[q], new_size[q], BETAS[1])
            root = (sizes + FLOOR * sizes.mean()).sqrt()
            c, step = (float(x.flatten()[q]) if isinstance(x, Tensor) else x for x in (correction, rate))
            R = c * (mean + mean.T) / 2 / torch.outer(root, root)
            R *= 2.0 / max(2.0, R.norm().item())
            expected = [X[q] - step * X[q] @ R, mean, sizes]
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x[q], y, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("some", [False, True])
def test_scalings(each: bool, some: bool) -> None:
    torch.manual_seed(0)
    entries, lengths = [5, 40000, 8], [8, 40000, 8]
    inside = torch.cat([torch.arange(length) < true for length, true in zip(lengths, entries, strict=True)])
    S, slope, size, new, new_size = (torch.rand(sum(lengths), dtype=torch.float64) * inside for _ in range(5))
    rate = torch.rand(3, dtype=torch.float64) if each else 0.1
    correction = torch.rand(3, dtype=torch.float64) if each else 0.7
    active = torch.tensor([True, True, False]) if some else None
    found = [x.clone() for x in (S, slope, size)]
    ak.relative_step_scalings_(
        *found, new, new_size, lengths=lengths, entries=entries, rate=rate, betas=BETAS, correction=correction,
        floor=FLOOR, active=active,
    )  # fmt: skip
    first = 0
    for at, (length, true) in enumerate(zip(lengths, entries, strict=True)):
        here = slice(first, first + length)
        expected = [S[here], slope[here], size[here]]
        if active is None or active[at]:
            mean, sizes = lerped(slope[here], new[here], BETAS[0]), lerped(size[here], new_size[here], BETAS[1])
            c, step = (float(x[at]) if isinstance(x, Tensor) else x for x in (correction, rate))
            r = (c * mean / (sizes + FLOOR * sizes.sum() / true)).clamp(-1, 1)
            expected = [S[here] * torch.exp(-step * r), mean, sizes]
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x[here], y, rtol=1e-12, atol=1e-14)
        first += length


def test_what_doesnt_fit_is_refused() -> None:
    X, size = torch.eye(4).repeat(3, 1, 1), torch.ones(3, 4)
    options = {"rate": 1.0, "correction": 1.0, "betas": BETAS, "floor": FLOOR, "longest": 2.0}
    with pytest.raises(ValueError, match=r"size must be a .* shape \(3, 4\)"):
        ak.relative_step_squares_(X, X.clone(), size[:2], X, size, **options)  # type: ignore[arg-type]
    half, flat = X.bfloat16(), [torch.ones(6) for _ in range(5)]
    with pytest.raises(TypeError, match=r"float32 or float64, but the tensors are torch\.bfloat16"):
        ak.relative_step_squares_(half, half, size, half, size, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rate must be a number or 3"):
        ak.relative_step_squares_(X, X.clone(), size, X, size, **{**options, "rate": torch.ones(2)})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="S must be flat, of 5"):
        ak.relative_step_scalings_(*flat, lengths=[2, 3], rate=1.0, correction=1.0, betas=BETAS, floor=FLOOR)
