"""Whole models for the tile kernels, and what their steps, trials, slopes and energies must be in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from torch import Tensor

import apo_kernels as ak
from apo_kernels import reference
from tests.apo_kernels.triton.examples import DTYPES, assert_close, block

pytest.importorskip("triton.language")
from apo_kernels.triton.launch import count_launches

Maybe = list[list[Tensor | None] | None]


@dataclass
class Layers:
    """Layers with their parts, each of its own random numbers.

    ``there`` says of each layer which of its parts G and V have: letters of "wb", none for a layer left out.
    """

    As: list[Tensor]
    Bs: list[Tensor]
    Ss: list[Tensor]
    widths: list[tuple[int, ...]]
    thetas: Maybe
    Gs: Maybe
    Vs: Maybe
    buffers: list[Tensor | None]
    lr: list[float]
    momentum: list[float]
    decay: list[float]
    shares: list[float]

    def bind(self, backend: str = "triton", learned: Sequence[str] | None = None) -> ak.ModelPreconditioner:
        return ak.ModelPreconditioner(self.As, self.Bs, self.Ss, widths=self.widths, learned=learned, backend=backend)

    def to(self, device: str) -> Layers:
        """With the pads between rows."""

        def moved(x: Tensor) -> Tensor:
            base = x if x._base is None else x._base
            return base.to(device).as_strided(x.shape, x.stride(), x.storage_offset())

        def each(x: Any) -> Any:
            return moved(x) if isinstance(x, Tensor) else [each(y) for y in x] if isinstance(x, list) else x

        return Layers(*(each(getattr(self, own.name)) for own in fields(Layers)))

    def present(self) -> list[int]:
        return [i for i, own in enumerate(self.Gs) if own is not None and any(x is not None for x in own)]

    def joined(self, parts: Maybe, i: int) -> Tensor:
        """In float64, zeros where a part isn't there."""
        own, S = parts[i], self.Ss[i]
        each = [
            S.new_zeros((*S.shape[:-1], width), dtype=torch.float64)
            if own is None or own[k] is None
            else own[k].double()
            for k, width in enumerate(self.widths[i])
        ]
        return torch.cat(each, -1)

    def exact(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """The operands, with zeros in what sticks out of a side."""
        A, B = (x[i].double().nan_to_num(0) for x in (self.As, self.Bs))
        return A, B, self.Ss[i].double()

    def P(self, i: int) -> Tensor:
        return reference.precondition(self.joined(self.Gs, i), *self.exact(i))

    def promise(self) -> float:
        return sum(self.shares[i] * (self.joined(self.Gs, i) * self.P(i)).sum().item() for i in self.present())


def layers(
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    *,
    A: int | None = 64,
    B: int | None = 64,
    bias: Sequence[bool] | bool = True,
    there: Sequence[str] | None = None,
    blocks: torch.dtype | None = None,
    pad: bool = False,
    scale: float = 0.1,
) -> Layers:
    """Layers of ``(*batch, m, n1)``, with a column more where ``bias``. ``pad``: rows of S and the buffers padded to 8;
    without ``A`` or ``B`` those are full blocks."""
    own = blocks or dtype
    flags = [bias] * len(shapes) if isinstance(bias, bool) else list(bias)
    there = ["wb"] * len(shapes) if there is None else list(there)
    found = Layers([], [], [], [], [], [], [], [], [], [], [], [])

    def padded(x: Tensor) -> Tensor:
        if not pad:
            return x
        n = x.shape[-1]
        wide = torch.full((*x.shape[:-1], -(-n // 8) * 8), 7.0, dtype=x.dtype)
        return wide[..., :n].copy_(x)

    for at, ((*batch, m, n1), one, letters) in enumerate(zip(shapes, flags, there, strict=True)):
        n = n1 + one
        count = math.prod(batch)
        for side, b, to in ((n, A, found.As), (m, B, found.Bs)):
            each = torch.stack([block(side, b, own) for _ in range(count)])
            if b is not None and side % b:  # what sticks out of a side may hold anything
                each[:, -1, side % b :] = each[:, -1, :, side % b :] = torch.nan
            to.append(each.reshape(*batch, *each.shape[1:]))
        found.Ss.append(padded((torch.randn(*batch, m, n) + 2).to(own)))
        found.widths.append((n1, 1) if one else (n,))
        for parts, size in ((found.thetas, 1.0), (found.Gs, scale), (found.Vs, scale)):
            each = [(torch.randn(*batch, m, width) * size).to(dtype) for width in found.widths[-1]]
            kept = [x if parts is found.thetas or "wb"[k] in letters else None for k, x in enumerate(each)]
            parts.append(kept if letters or parts is found.thetas else None)
        found.buffers.append(padded(torch.randn(*batch, m, n)) if at % 3 != 2 else None)
        found.lr.append(0.1 + 0.05 * at)
        found.momentum.append(0.0 if at % 3 == 1 else 0.9 - 0.1 * (at % 9))
        found.decay.append(0.02 * at)
        found.shares.append(0.5 + at)
    return found


SHAPES = ((7, 12), (64, 64), (33, 64), (65, 70), (1, 1), (2, 5, 16))
FORMS = ((64, 64), (16, 8), (None, None), (1, 64), (30, 1), (40, 48))
DRAWN = [
    pytest.param(dtype, *form, pad, id=f"{dtype}-{form}-{pad}".replace("torch.", ""))
    for dtype in DTYPES
    for form in FORMS
    for pad in (False, True)
    if dtype == torch.float32 or (form in (FORMS[0], FORMS[1]) and pad)
]


def of_form(dtype: torch.dtype, A: int | None, B: int | None, pad: bool) -> Layers:
    shapes = [(m, min(n, 63)) for *_, m, n in SHAPES if m <= 64] if A is None or B is None else SHAPES
    there = ["wb", "w", "b", "", "wb", "wb"][: len(shapes)]
    return layers(shapes, dtype, A=A, B=B, bias=[True, True, True, False, True, False][: len(shapes)],
                  there=there, pad=pad)  # fmt: skip


def step(own: Layers, bound: ak.ModelPreconditioner, most: float = math.inf, **more: Any) -> torch.Tensor:
    return bound.step_(
        own.thetas, own.Gs, own.buffers, lr=own.lr, momentum=own.momentum, weight_decay=own.decay, most=most,
        shares=own.shares, **more,
    )  # fmt: skip


def launched(call: Callable[[], object]) -> list[str]:
    with count_launches() as names:
        call()
    return names


def expected_step(own: Layers, f: float) -> tuple[list[list[Tensor]], list[Tensor | None]]:
    """Weights, part by part, and buffers after a step, in float64."""
    thetas, buffers = [], []
    for i, parts in enumerate(own.thetas):
        assert parts is not None
        before = [x.double() for x in parts]  # type: ignore[union-attr]
        buffer = own.buffers[i]
        v = None if buffer is None else buffer.double()
        if i in own.present():
            step = own.lr[i] * f * own.P(i)
            if v is not None:
                step = v = own.momentum[i] * v + step
            first = 0
            for k, width in enumerate(own.widths[i]):
                if own.Gs[i][k] is not None:  # type: ignore[index]
                    shrunk = (1 - own.lr[i] * own.decay[i]) * before[k]
                    before[k] = shrunk - step[..., first : first + width]
                first += width
        thetas.append(before)
        buffers.append(v)
    return thetas, buffers


def check_step(
    own: Layers, dtype: torch.dtype, share_of_promise: float | None, bound: ak.ModelPreconditioner | None = None
) -> list[str]:
    promise = own.promise()
    most = math.inf if share_of_promise is None else share_of_promise * promise
    f = min(1.0, 1.0 if share_of_promise is None else share_of_promise)
    thetas, buffers = expected_step(own, f)
    bound = bound or own.bind()
    with count_launches() as names:
        found = bound.step_(
            own.thetas, own.Gs, own.buffers, lr=own.lr, momentum=own.momentum, weight_decay=own.decay, most=most,
            shares=own.shares,
        )  # fmt: skip
    assert found.ndim == 0
    assert found.item() == pytest.approx(f, rel=2e-2 if dtype == torch.bfloat16 else 2e-3)
    check_weights(own, thetas, dtype)
    for i, (x, v) in enumerate(zip(own.buffers, buffers, strict=True)):
        if x is not None and v is not None:
            assert_close(x, v, dtype, f"v of {i}")
            check_pads(x)
    return names


def check_weights(own: Layers, expected: list[list[Tensor]], dtype: torch.dtype) -> None:
    for i, each in enumerate(expected):
        for k, x in enumerate(each):
            found = own.thetas[i][k]  # type: ignore[index]
            assert found is not None
            assert_close(found, x, dtype, f"part {k} of layer {i}")


def check_pads(x: Tensor) -> None:
    """What lies between the rows of a matrix is as it was."""
    pitch, n = x.stride(-2), x.shape[-1]
    if x.ndim == 2 and x.shape[0] > 1 and pitch > n:
        between = x.as_strided((x.shape[0] - 1, pitch - n), (pitch, 1), x.storage_offset() + n)
        assert (between == 7).all()


def check_trial(own: Layers, bound: ak.ModelPreconditioner, dtype: torch.dtype) -> object:
    shrink = [0.9 + 0.01 * i for i in range(len(own.Ss))]
    present = own.present()
    thetas = []
    for i, parts in enumerate(own.thetas):
        each = [x.double() for x in parts]  # type: ignore[union-attr]
        if i in present:
            step = own.lr[i] * own.P(i)
            if own.buffers[i] is not None:
                step += own.momentum[i] * own.buffers[i].double()  # type: ignore[union-attr]
            cut = step.split(own.widths[i], -1)
            each = [shrink[i] * x - y if g is not None else x for x, y, g in zip(each, cut, own.Gs[i], strict=True)]  # type: ignore[arg-type]
        thetas.append(each)
    buffers = [None if x is None else x.clone() for x in own.buffers]
    with count_launches() as names:
        kept = bound.trial_(own.thetas, own.Gs, own.buffers, lengths=own.lr, momentum=own.momentum, shrink=shrink)
    assert names == ["model_trial"]
    check_weights(own, thetas, dtype)
    for x, y in zip(own.buffers, buffers, strict=True):
        assert x is None or torch.equal(x, y)  # type: ignore[arg-type]
    return kept


def expected_slopes(own: Layers, i: int) -> list[Tensor]:
    """Without the length, in the order of :class:`ModelSlopes`: with the sign, and sizes."""
    A, B, S = own.exact(i)
    G, V = own.joined(own.Gs, i), own.joined(own.Vs, i)
    _, dA, dB, dS = reference.precondition_vjp(G, A, B, S, V, relative=True)
    _, sA, sB, sS = reference.precondition_vjp(G, A, B, S, G, relative=True)
    sizes = [x.diagonal(dim1=-2, dim2=-1) for x in (sA, sB)]
    return [-dA, -dB, -dS * S, *sizes, sS * S]


def check_slopes(
    own: Layers,
    bound: ak.ModelPreconditioner,
    kept: object,
    dtype: torch.dtype,
    learned: Sequence[str],
    most: int | None = 3,
) -> None:
    with count_launches() as names:
        found = bound.slopes(own.Vs, kept, lengths=own.lr)
    if most is not None:
        assert names[-1] == "model_sums"
        assert len(names) <= most
    for i in range(len(own.Ss)):
        if i not in own.present():
            assert all(each[i] is None for each in found[:6])
            assert found.inner[i] == found.size[i] == 0
            continue
        expected = expected_slopes(own, i)
        for slot, (letter, name) in enumerate(zip("ABSABS", found._fields, strict=False)):
            x = found[slot][i]
            if letter not in learned[i]:
                assert x is None
                continue
            truth = own.lr[i] * expected[slot]
            block_of = {"A": own.As, "B": own.Bs, "S": own.Ss}[letter][i]
            assert x.shape == (block_of.shape if slot < 3 or letter == "S" else block_of.shape[:-1])
            assert_close(x.double(), truth.reshape(x.shape), dtype, f"{name} of {i}", terms=[truth * 2])
        P, V = own.P(i), own.joined(own.Vs, i)
        assert abs(found.inner[i].item() - (P * V).sum().item()) <= 2 * assert_size(dtype) * (P.norm() * V.norm())
        G = own.joined(own.Gs, i)
        product = own.lr[i] * (P * G).sum().item()
        assert abs(found.size[i].item() - product) <= 2 * assert_size(dtype) * own.lr[i] * (P.norm() * G.norm())


def check_energies(own: Layers, bound: ak.ModelPreconditioner, dtype: torch.dtype, learned: Sequence[str]) -> None:
    found = bound.energies(own.Gs)
    for i in range(len(own.Ss)):
        if i not in own.present():
            assert all(each[i] is None for each in found)
            continue
        A, B, S = own.exact(i)
        G = own.joined(own.Gs, i)
        _, dA, dB, dS = reference.precondition_vjp(G, A, B, S, G, relative=True)
        for letter, x, truth in zip("ABS", (each[i] for each in found), (dA / 2, dB / 2, S * dS / 2), strict=True):
            assert (x is None) == (letter not in learned[i])
            if x is not None:
                assert_close(x.double(), truth.reshape(x.shape), dtype, f"{letter} of {i}", terms=[truth * 2])


def assert_size(dtype: torch.dtype) -> float:
    return {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]


def ways_of(bound: ak.ModelPreconditioner) -> set[tuple[bool, bool]]:
    """What was moved 16 bytes at a time in the launches so far: matrices, squares."""
    every = [launch for plan in bound._bound._plans.values() for launch in plan.launches]  # type: ignore[attr-defined]
    return {
        (launch.constants["WIDE_MATRICES"], launch.constants["WIDE_SQUARES"])
        for launch in every
        if "WIDE_MATRICES" in launch.constants
    }
