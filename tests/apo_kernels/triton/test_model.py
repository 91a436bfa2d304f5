"""A whole model's steps, trials and slopes on the tile kernels against float64, in Triton's interpreter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import apo_kernels as ak
from apo_kernels import reference
from apo_kernels.blocks import is_stack
from tests.apo_kernels.triton.examples import DTYPES, assert_close, block

pytest.importorskip("triton.language")
from apo_kernels.triton import config
from apo_kernels.triton import plan as plans
from apo_kernels.triton.errors import Interrupted, Unserved
from apo_kernels.triton.gemm import grouped_gemm
from apo_kernels.triton.launch import Launch, count_launches

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poison")]

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
        return ak.ModelPreconditioner(
            self.As, self.Bs, self.Ss, widths=self.widths, learned=learned, backend=backend
        )

    def present(self) -> list[int]:
        return [i for i, own in enumerate(self.Gs) if own is not None and any(x is not None for x in own)]

    def joined(self, parts: Maybe, i: int) -> Tensor:
        """In float64, zeros where a part isn't there."""
        own, S = parts[i], self.Ss[i]
        each = [
            torch.zeros(*S.shape[:-1], width, dtype=torch.float64) if own is None or own[k] is None else own[k].double()
            for k, width in enumerate(self.widths[i])
        ]
        return torch.cat(each, -1)

    def exact(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.As[i].double(), self.Bs[i].double(), self.Ss[i].double()

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
            to.append(each.reshape(*batch, *each.shape[1:]))
        found.Ss.append(padded((torch.randn(*batch, m, n) + 2).to(own)))
        found.widths.append((n1, 1) if one else (n,))
        for parts, size in ((found.thetas, 1.0), (found.Gs, scale), (found.Vs, scale)):
            each = [(torch.randn(*batch, m, width) * size).to(dtype) for width in found.widths[-1]]
            kept = [x if k < len(letters) and "wb"[k] in letters or parts is found.thetas else None
                    for k, x in enumerate(each)]  # fmt: skip
            kept = [x if parts is found.thetas or "wb"[k] in letters else None for k, x in enumerate(each)]
            parts.append(kept if letters or parts is found.thetas else None)
        found.buffers.append(padded(torch.randn(*batch, m, n)) if at % 3 != 2 else None)
        found.lr.append(0.1 + 0.05 * at)
        found.momentum.append(0.0 if at % 3 == 1 else 0.9 - 0.1 * at)
        found.decay.append(0.02 * at)
        found.shares.append(0.5 + at)
    return found


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


def check_step(own: Layers, dtype: torch.dtype, share_of_promise: float | None) -> list[str]:
    promise = own.promise()
    most = math.inf if share_of_promise is None else share_of_promise * promise
    f = min(1.0, 1.0 if share_of_promise is None else share_of_promise)
    thetas, buffers = expected_step(own, f)
    bound = own.bind()
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


@pytest.mark.parametrize(("dtype", "A", "B", "pad"), DRAWN)
@pytest.mark.parametrize("share", [None, 0.25, 4.0])
def test_steps(dtype: torch.dtype, A: int | None, B: int | None, pad: bool, share: float | None) -> None:
    names = check_step(of_form(dtype, A, B, pad), dtype, share)
    assert names == (["model_update"] if share is None else ["model_direction", "model_sums", "model_apply"])


def expected_slopes(own: Layers, i: int) -> list[Tensor]:
    """Without the length, in the order of :class:`ModelSlopes`: with the sign, and sizes."""
    A, B, S = own.exact(i)
    G, V = own.joined(own.Gs, i), own.joined(own.Vs, i)
    _, dA, dB, dS = reference.precondition_vjp(G, A, B, S, V, relative=True)
    _, sA, sB, sS = reference.precondition_vjp(G, A, B, S, G, relative=True)
    sizes = [x.diagonal(dim1=-2, dim2=-1) for x in (sA, sB)]
    return [-dA, -dB, -dS * S, *sizes, sS * S]


@pytest.mark.parametrize(("dtype", "A", "B", "pad"), DRAWN)
def test_trials_and_slopes(dtype: torch.dtype, A: int | None, B: int | None, pad: bool) -> None:
    own = of_form(dtype, A, B, pad)
    learned = ["ABS", "AS", "BS", "ABS", "S", "ABS"][: len(own.Ss)]
    bound = own.bind(learned=learned)
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
        kept = bound.trial_(
            own.thetas, own.Gs, own.buffers, lengths=own.lr, momentum=own.momentum, shrink=shrink
        )
    assert names == ["model_trial"]
    check_weights(own, thetas, dtype)
    for x, y in zip(own.buffers, buffers, strict=True):
        assert x is None or torch.equal(x, y)  # type: ignore[arg-type]
    check_slopes(own, bound, kept, dtype, learned)
    with count_launches() as names:
        kept = bound.keep(own.Gs)
    assert names == ["model_keep"]
    check_slopes(own, bound, kept, dtype, learned)


def check_slopes(
    own: Layers, bound: ak.ModelPreconditioner, kept: object, dtype: torch.dtype, learned: Sequence[str]
) -> None:
    with count_launches() as names:
        found = bound.slopes(own.Vs, kept, lengths=own.lr)
    assert names[-1] == "model_sums"
    assert len(names) <= 3
    for i in range(len(own.Ss)):
        if i not in own.present():
            assert all(each[i] is None for each in found[:6])
            assert found.inner[i] == 0
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


def assert_size(dtype: torch.dtype) -> float:
    return {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]


def test_is_stack_is_seen() -> None:
    own = layers([(7, 12)], torch.float32)
    assert is_stack(own.As[0], own.Ss[0])
    assert config.model_split(10**6)
    assert Interrupted is not Unserved
    assert plans is not None
    assert Launch is not None
    assert grouped_gemm is not None
