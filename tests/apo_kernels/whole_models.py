"""Whole models drawn at random, and what their steps, trials, slopes and energies must be, by the definitions."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import apo_kernels as ak
from apo_kernels import reference
from apo_kernels.blocks import block_count
from tests.apo_kernels.cases import TOLERANCE

Parts = list[list[Tensor | None] | None]


@dataclass
class Model:
    """Layers drawn at random."""

    rng: random.Random
    dtype: torch.dtype = torch.float64
    block_dtype: torch.dtype = torch.float64
    As: list[Tensor] = field(default_factory=list)
    Bs: list[Tensor] = field(default_factory=list)
    Ss: list[Tensor] = field(default_factory=list)
    widths: list[tuple[int, ...]] = field(default_factory=list)
    learned: list[str] = field(default_factory=list)

    def add(
        self,
        m: int,
        n: int,
        b_A: int | None,
        b_B: int | None,
        *,
        batch: tuple[int, ...] = (),
        bias: bool = False,
        learned: str = "ABS",
    ) -> None:
        def block(side: int, b: int | None) -> Tensor:
            shape = (side, side) if b is None else (block_count(side, b), b, b)
            return self.draw(*batch, *shape, scale=max(shape[-1], 1) ** -0.5).to(self.block_dtype)

        self.As.append(block(n, b_A))
        self.Bs.append(block(m, b_B))
        self.Ss.append(self.draw(*batch, m, n).to(self.block_dtype))
        self.widths.append((n - 1, 1) if bias else (n,))
        self.learned.append(learned)

    def draw(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, dtype=torch.float64) * scale

    def bind(self, **options: Any) -> ak.ModelPreconditioner:
        return ak.ModelPreconditioner(
            self.As, self.Bs, self.Ss, widths=self.widths, learned=self.learned, backend="aten", **options
        )

    def parts(self, *, missing: float = 0.0) -> Parts:
        return [
            [None if self.rng.random() < missing else self.draw(*S.shape[:-1], width).to(self.dtype) for width in own]
            for S, own in zip(self.Ss, self.widths, strict=True)
        ]

    def buffers(self, *, missing: float = 0.0) -> list[Tensor | None]:
        return [None if self.rng.random() < missing else self.draw(*S.shape).to(self.wide) for S in self.Ss]

    @property
    def wide(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def numbers(self, low: float, high: float, *, alike: bool) -> list[float]:
        one = self.rng.uniform(low, high)
        return [one if alike else self.rng.uniform(low, high) for _ in self.Ss]

    def operands(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.As[i].double(), self.Bs[i].double(), self.Ss[i].double()

    def joined(self, parts: Parts, i: int) -> Tensor | None:
        """A layer's matrix in float64; None where it has no part."""
        own = parts[i]
        if own is None or all(x is None for x in own):
            return None
        each = [
            torch.zeros(*self.Ss[i].shape[:-1], width, dtype=torch.float64) if x is None else x.double()
            for x, width in zip(own, self.widths[i], strict=True)
        ]
        return torch.cat(each, -1)

    def directions(self, Gs: Parts) -> dict[int, Tensor]:
        found = {}
        for i in range(len(self.Ss)):
            G = self.joined(Gs, i)
            if G is not None:
                found[i] = reference.precondition(G, *self.operands(i))
        return found


@st.composite
def models(draw: st.DrawFn, **settings: Any) -> Model:
    model = Model(random.Random(draw(st.integers(0, 2**32))), **settings)
    torch.manual_seed(model.rng.randrange(2**32))
    sizes = st.sampled_from([1, 2, 3, 5, 8, 13, 20])
    blocks = st.sampled_from([None, 1, 2, 3, 4, 8])
    for _ in range(draw(st.integers(1, 5))):
        m, n = draw(sizes), draw(sizes)
        model.add(
            m,
            n,
            draw(blocks),
            draw(blocks),
            batch=draw(st.sampled_from([(), (), (), (3,), (2, 3)])),
            bias=n > 1 and draw(st.booleans()),
            learned=draw(st.sampled_from(["ABS", "ABS", "AS", "BS", "S"])),
        )
    return model


def copied(x: Any) -> Any:
    return [copied(each) for each in x] if isinstance(x, list) else x.clone() if isinstance(x, Tensor) else x


def leave_out(model: Model, parts: Parts) -> Parts:
    return [None if model.rng.random() < 0.2 else own for own in parts]


def assert_close(found: Tensor, truth: Tensor, tolerance: float) -> None:
    assert found.shape == truth.shape
    error = (found.double() - truth.double()).norm().item()
    assert error <= tolerance * max(truth.double().norm().item(), 1e-3), f"{error} of {truth.norm().item()}"


def assert_equal(now: Any, then: Any) -> None:
    if isinstance(now, list):
        for x, y in zip(now, then, strict=True):
            assert_equal(x, y)
    else:
        assert now is then is None or torch.equal(now, then)


def check_step(model: Model, alike: bool, bounded: bool, tolerance: float = 1e-11) -> None:
    thetas, Gs = model.parts(), leave_out(model, model.parts(missing=0.15))
    buffers = model.buffers(missing=0.3)
    lr, momentum, decay, shares = (model.numbers(0, top, alike=alike) for top in (0.1, 0.9, 0.5, 2.0))
    most = model.rng.uniform(0.1, 5) if bounded else math.inf
    before, carried = copied(thetas), copied(buffers)
    totals: list[Tensor] = []

    f = model.bind().step_(
        thetas,
        Gs,
        buffers,
        lr=lr,
        momentum=momentum,
        weight_decay=decay,
        most=most,
        shares=shares if bounded else None,
        total=lambda x: totals.append(x.clone()),
    )

    directions = model.directions(Gs)
    promised = sum(shares[i] * (model.joined(Gs, i) * P).sum().item() for i, P in directions.items())
    expected = most / max(promised, most) if bounded and directions else 1.0
    assert f.ndim == 0
    assert f.item() == pytest.approx(expected, rel=max(tolerance, 1e-6))
    assert [x.sum().item() for x in totals] == ([pytest.approx(promised, rel=1e-3)] if bounded else [])
    assert all(x.shape == (len(Gs),) for x in totals)
    check_written(model, before, Gs, thetas, carried, buffers, directions, lr, momentum, expected, decay, tolerance)


def check_written(
    model: Model,
    before: Parts,
    Gs: Parts,
    thetas: Parts,
    carried: list[Tensor | None],
    buffers: list[Tensor | None],
    directions: dict[int, Tensor],
    lr: list[float],
    momentum: list[float],
    f: float,
    decay: list[float],
    tolerance: float,
) -> None:
    for i, (own, old, v, v_old) in enumerate(zip(thetas, before, buffers, carried, strict=True)):
        if i not in directions:
            assert all(torch.equal(x, y) for x, y in zip(own, old, strict=True))
            assert v is None or torch.equal(v, v_old)
            continue
        step = lr[i] * f * directions[i]
        if v is not None:
            step = step + momentum[i] * v_old.double()
            assert_close(v, step, max(tolerance, TOLERANCE[model.block_dtype]))
        each = step.split(model.widths[i], -1)
        for x, x_old, d, G in zip(own, old, each, Gs[i], strict=True):
            truth = x_old.double() if G is None else (1 - lr[i] * decay[i]) * x_old.double() - d
            assert_close(x, truth, tolerance)


def check_trial(model: Model, alike: bool, tolerance: float = 1e-11) -> None:
    thetas, Gs, Vs = model.parts(), leave_out(model, model.parts(missing=0.15)), model.parts(missing=0.15)
    buffers = model.buffers(missing=0.3)
    lengths, momentum, shrink = (model.numbers(0, top, alike=alike) for top in (0.1, 0.9, 1.0))
    before, carried = copied(thetas), copied(buffers)
    bound = model.bind()

    kept = bound.trial_(thetas, Gs, buffers, lengths=lengths, momentum=momentum, shrink=shrink)

    directions = model.directions(Gs)
    assert all(x is None or torch.equal(x, y) for x, y in zip(buffers, carried, strict=True))
    for i, P in directions.items():
        step = lengths[i] * P + (0 if buffers[i] is None else momentum[i] * buffers[i].double())
        each = step.split(model.widths[i], -1)
        for x, x_old, d, G in zip(thetas[i], before[i], each, Gs[i], strict=True):
            assert_close(x, x_old.double() if G is None else shrink[i] * x_old.double() - d, tolerance)
    found = bound.slopes(Vs, kept, lengths=lengths)
    check_slopes(model, Gs, Vs, lengths, found, tolerance)
    again = bound.slopes(Vs, bound.keep(Gs), lengths=lengths)
    for name in found._fields[:6]:
        for x, y in zip(getattr(found, name), getattr(again, name), strict=True):
            assert (x is None and y is None) or torch.equal(x, y)


def check_slopes(
    model: Model, Gs: Parts, Vs: Parts, lengths: list[float], found: ak.ModelSlopes, tolerance: float
) -> None:
    for i in range(len(model.Ss)):
        G, V = model.joined(Gs, i), model.joined(Vs, i)
        if G is None:
            assert all(getattr(found, name)[i] is None for name in found._fields[:6])
            assert found.inner[i] == found.size[i] == 0
            continue
        V = torch.zeros_like(G) if V is None else V
        A, B, S = model.operands(i)
        P = reference.precondition(G, A, B, S)
        for own, product in ((found.inner[i], (V * P).sum()), (found.size[i], lengths[i] * (G * P).sum())):
            assert_close(own, product, max(tolerance, 1e-4 if tolerance > 1e-5 else 0))
        for cotangent, sign, prefix in ((V, -1, ""), (G, 1, "size_")):
            _, dA, dB, dS = reference.precondition_vjp(G, A, B, S, cotangent, relative=True)
            for letter, d in (("A", dA), ("B", dB), ("S", S * dS)):
                own = getattr(found, prefix + letter)[i]
                if letter not in model.learned[i]:
                    assert own is None
                    continue
                d = d.diagonal(dim1=-2, dim2=-1) if prefix and letter != "S" else d
                assert own.dtype is model.wide
                assert_close(own, sign * lengths[i] * d, tolerance)


def check_energies(model: Model, tolerance: float = 1e-11) -> None:
    Gs = leave_out(model, model.parts(missing=0.15))
    found = model.bind().energies(Gs)
    for i in range(len(model.Ss)):
        G = model.joined(Gs, i)
        if G is None:
            assert all(each[i] is None for each in found)
            continue
        A, B, S = model.operands(i)
        _, dA, dB, dS = reference.precondition_vjp(G, A, B, S, G, relative=True)
        for letter, d in (("A", dA), ("B", dB), ("S", S * dS)):
            own = getattr(found, letter)[i]
            assert (own is None) == (letter not in model.learned[i])
            if own is not None:
                assert_close(own, d / 2, tolerance)


def in_one_storage(model: Model) -> None:
    """Blocks as views of a stack for each side, S of a flat buffer with padded rows."""
    sides: dict[int, list[tuple[list[Tensor], int]]] = {}
    for i in range(len(model.Ss)):
        for blocks in (model.As, model.Bs):
            sides.setdefault(blocks[i].shape[-1], []).append((blocks, i))
    for b, owners in sides.items():
        apart = -(-b * b // 8) * 8
        counts = [blocks[i].numel() // (b * b) for blocks, i in owners]
        stack = torch.zeros(sum(counts), apart, dtype=torch.float64)[:, : b * b].unflatten(-1, (b, b))
        first = 0
        for (blocks, i), count in zip(owners, counts, strict=True):
            own = stack[first : first + count].view(blocks[i].shape)
            blocks[i] = own.copy_(blocks[i])
            first += count
    padded = [(*S.shape[:-1], -(-S.shape[-1] // 8) * 8) for S in model.Ss]
    flat = torch.zeros(sum(map(math.prod, padded)), dtype=torch.float64)
    first = 0
    for i, shape in enumerate(padded):
        own = flat[first : first + math.prod(shape)].view(shape)[..., : model.Ss[i].shape[-1]]
        model.Ss[i] = own.copy_(model.Ss[i])
        first += math.prod(shape)
