"""Relative steps on torch's operations against the definition, entry by entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    with pytest.raises(TypeError, match=r"must be float32 or float64, but is torch\.bfloat16"):
        ak.relative_step_squares_(half, half, size, half, size, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rate must be a number or 3"):
        ak.relative_step_squares_(X, X.clone(), size, X, size, **{**options, "rate": torch.ones(2)})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="S must be flat, of 5"):
        ak.relative_step_scalings_(*flat, lengths=[2, 3], rate=1.0, correction=1.0, betas=BETAS, floor=FLOOR)


def arguments(scalings: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Good ones: tensors, and the rest."""
    whole, sums = ((10,), (10,)) if scalings else ((3, 4, 4), (3, 4))
    tensors = {"X": whole, "slope": whole, "size": sums, "new_slope": whole, "new_size": sums}
    rest: dict[str, Any] = {"rate": 0.1, "betas": (0.9, 0.9), "correction": 1.0, "floor": 0.1, "active": None}
    rest |= {"lengths": [4, 6]} if scalings else {"longest": 1.0}
    return {name: torch.rand(shape) for name, shape in tensors.items()}, rest


BOTH: list[tuple[str, Callable[[Tensor], Any]]] = [
    ("betas", lambda _: (0.9,)),
    ("betas", lambda _: 0.9),
    ("betas", lambda _: (0.9, None)),
    ("betas", lambda _: (0.9, 1.5)),
    ("floor", lambda _: None),
    ("floor", lambda _: -1.0),
    ("rate", lambda _: "x"),
    ("rate", lambda _: None),
    ("rate", lambda _: float("nan")),
    ("correction", lambda _: None),
    ("active", lambda _: [True, False]),
    ("active", lambda x: torch.ones(len(x), dtype=torch.int64)),
    ("active", lambda x: torch.ones(len(x))),
    *(
        (name, bad)
        for name in ("X", "slope", "size")
        for bad in (
            lambda x: x[:1].clone().expand(x.shape),
            lambda x: torch._neg_view(x),
            lambda x: None,
            lambda x: x.to_sparse(),
        )
    ),
    *((name, lambda x: x.to_sparse()) for name in ("new_slope", "new_size")),
]
SQUARES: list[tuple[str, Callable[[Tensor], Any]]] = [
    ("longest", lambda _: None),
    ("longest", lambda _: -1.0),
    ("longest", lambda _: float("nan")),
]
SCALINGS: list[tuple[str, Callable[[Tensor], Any]]] = [
    ("lengths", lambda _: [12, -2]),
    ("lengths", lambda _: [4.0, 6.0]),
    ("lengths", lambda _: None),
    ("entries", lambda _: ["a", 1]),
    ("entries", lambda _: [None, 1]),
    ("total", lambda _: 5),
]
CASES = [(False, *case) for case in BOTH + SQUARES] + [(True, *case) for case in BOTH + SCALINGS]


@pytest.mark.parametrize(("scalings", "name", "bad"), CASES, ids=[f"{i}: {case[1]}" for i, case in enumerate(CASES)])
def test_bad_arguments_are_named_and_nothing_is_written(
    scalings: bool, name: str, bad: Callable[[Tensor], Any]
) -> None:
    tensors, rest = arguments(scalings)
    before = {each: x.clone() for each, x in tensors.items()}
    own = tensors if name in tensors else rest
    changed = bad(tensors[name]) if own is tensors else bad(torch.rand(2 if scalings else 3))
    held = dict(tensors)
    (held if own is tensors else rest)[name] = changed
    step = ak.relative_step_scalings_ if scalings else ak.relative_step_squares_
    with pytest.raises((TypeError, ValueError), match=rf"^{'S' if scalings and name == 'X' else name}\b.* must "):
        step(*held.values(), **rest)
    assert all(torch.equal(x, before[each]) for each, x in tensors.items())


@pytest.mark.parametrize("scalings", [False, True])
def test_one_memory_under_two_names(scalings: bool) -> None:
    tensors, rest = arguments(scalings)
    tensors["new_slope"] = tensors["slope"]
    step = ak.relative_step_scalings_ if scalings else ak.relative_step_squares_
    with pytest.raises(ValueError, match="slope is written and must not share memory with new_slope"):
        step(*tensors.values(), **rest)
