"""A whole model's steps, trials and slopes on the tile kernels against float64, in Triton's interpreter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from torch import Tensor

import apo_kernels as ak
from apo_kernels import checks, dispatch, reference
from apo_kernels.dispatch import Choice
from tests.apo_kernels.triton.examples import DTYPES, assert_close, block

pytest.importorskip("triton.language")
from apo_kernels.triton import config, model
from apo_kernels.triton.errors import Interrupted
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
    kept = check_trial(own, bound, dtype)
    check_slopes(own, bound, kept, dtype, learned)
    with count_launches() as names:
        kept = bound.keep(own.Gs)
    assert names == ["model_keep"]
    check_slopes(own, bound, kept, dtype, learned)
    check_energies(own, bound, dtype, learned)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("side", "way"), [(64, (True, True)), (40, (True, True)), (16, (True, False))])
def test_what_lies_well_is_moved_16_bytes_at_a_time(dtype: torch.dtype, side: int, way: tuple[bool, bool]) -> None:
    """With biases, last squares that stick out, and a gradient of which a part is missing."""
    own = layers([(64, 64), (33, 128), (3, 70, 80)], dtype, A=side, B=side, there=["wb", "w", "wb"], pad=True)
    bound = own.bind()
    for share in (None, 0.25):
        check_step(own, dtype, share, bound)
    kept = check_trial(own, bound, dtype)
    assert ways_of(bound) == {way}
    check_slopes(own, bound, kept, dtype, ["ABS"] * 3)
    assert ways_of(bound) == {way, way if way[1] else (False, False)}


def test_sums_of_many_parts() -> None:
    own = layers([(8, 700), (700, 7)], torch.float32, B=8)
    bound = own.bind()
    check_slopes(own, bound, bound.keep(own.Gs), torch.float32, ["ABS"] * 2)


def test_what_a_trial_keeps_lies_well_though_its_gradients_dont() -> None:
    own = layers([(64, 64), (33, 128)], torch.float32, pad=True)
    for parts in own.Gs:
        parts[0] = torch.cat([parts[0], parts[0]], 1)[:, 1 : 1 + parts[0].shape[1]]  # type: ignore[index, union-attr, list-item]
    bound = own.bind()
    kept = bound.keep(own.Gs)
    assert ways_of(bound) == {(False, False)}
    check_slopes(own, bound, kept, torch.float32, ["ABS"] * 2)
    assert ways_of(bound) == {(False, False), (True, True)}


@pytest.fixture
def counted_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches are made and counted, but no program runs."""
    monkeypatch.setattr(type(grouped_gemm), "__getitem__", lambda *_: lambda *_, **__: None)


def launched(call: Callable[[], object]) -> list[str]:
    with count_launches() as names:
        call()
    return names


def step(own: Layers, bound: ak.ModelPreconditioner, most: float = math.inf, **more: Any) -> torch.Tensor:
    return bound.step_(
        own.thetas, own.Gs, own.buffers, lr=own.lr, momentum=own.momentum, weight_decay=own.decay, most=most,
        shares=own.shares, **more,
    )  # fmt: skip


@pytest.mark.usefixtures("counted_only")
@pytest.mark.parametrize("count", [3, 9, 33, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_launches_dont_grow_with_the_layers(count: int, dtype: torch.dtype) -> None:
    shapes = [((8, 16), (64, 128), (10, 33), (65, 27), (3, 200))[i % 5] for i in range(count)]
    own = layers(shapes, dtype, bias=[i % 4 != 3 for i in range(count)])
    bound = own.bind()
    assert len(launched(lambda: step(own, bound))) == 1
    assert len(launched(lambda: step(own, bound, 0.1))) == 3
    trial = {"lengths": own.lr, "momentum": own.momentum, "shrink": own.lr}
    kept: list[object] = []
    assert len(launched(lambda: kept.append(bound.trial_(own.thetas, own.Gs, own.buffers, **trial)))) == 1
    assert len(launched(lambda: bound.slopes(own.Vs, kept[0], lengths=own.lr))) == 2


@pytest.mark.usefixtures("counted_only")
def test_what_has_a_launch_of_its_own() -> None:
    """Layers of other dtypes; A's slopes where one launch would spill; in a model of many tiles, those that don't lie
    well."""
    own, other = layers([(64, 64)], torch.float32), layers([(64, 64)], torch.bfloat16)
    both = Layers(*(getattr(own, each.name) + getattr(other, each.name) for each in fields(Layers)))
    bound = both.bind()
    names = launched(lambda: step(both, bound, 0.1))
    assert names == ["model_direction"] * 2 + ["model_sums"] + ["model_apply"] * 2
    kept = bound.keep(both.Gs)
    with config.override(model_slopes={"split": 1}):
        assert launched(lambda: bound.slopes(both.Vs, kept, lengths=both.lr)) == ["model_slopes"] * 4 + ["model_sums"]


@pytest.mark.usefixtures("counted_only")
@pytest.mark.parametrize(("many", "expected"), [(7, [(True, False)]), (6, [(True, True), (True, False)])])
def test_tiles_that_lie_well_are_many(
    many: int, expected: list[tuple[bool, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "MODEL_SPLIT", many)
    own = layers([(64, 128), (64, 128)], torch.float32, pad=True)
    narrow = layers([(64, 64)], torch.float32, A=16, B=16, pad=True)
    own = Layers(*(getattr(own, each.name) + getattr(narrow, each.name) for each in fields(Layers)))
    bound = own.bind()
    step(own, bound)
    (plan,) = bound._bound._plans.values()  # type: ignore[union-attr, attr-defined]
    found = [(each.constants["WIDE_MATRICES"], each.constants["WIDE_SQUARES"]) for each in plan.launches]
    assert found == expected


def test_a_bias_leaves_the_weight_moved_16_bytes_at_a_time() -> None:
    own = layers([(64, 128)], torch.bfloat16, pad=True)
    bound = own.bind()
    step(own, bound)
    (plan,) = bound._bound._plans.values()  # type: ignore[union-attr, attr-defined]
    (launch,) = plan.launches
    assert launch.constants["WIDE_MATRICES"]
    assert launch.constants["WIDE_SQUARES"]


@pytest.mark.parametrize("side", [16, 32])
def test_slabs_and_launches_apart(side: int) -> None:
    own = of_form(torch.float32, 64, 64, True)
    bound = own.bind()
    slab = {"slab": side, "split": 1}
    changes = {f"model_{name}": slab for name in ("slopes", "keep", "direction", "update")}
    with config.override(**changes):
        kept = bound.keep(own.Gs)
        check_slopes(own, bound, kept, torch.float32, ["ABS"] * len(own.Ss))
        check_step(own, torch.float32, 0.5)
        check_step(own, torch.float32, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("A", "B"), [(70, 64), (None, None), (100, 70)])
def test_squares_wider_than_a_tile(dtype: torch.dtype, A: int | None, B: int | None) -> None:
    """Among narrow ones, in one call; the directions of all make one promise, and one launch applies them."""
    own, narrow = layers([(75, 80), (2, 6, 80)], dtype, A=A, B=B, there=["wb", "w"]), layers([(7, 12)], dtype)
    own = Layers(*(getattr(own, each.name) + getattr(narrow, each.name) for each in fields(Layers)))
    own.shares[2], own.lr[2] = 3.0, 0.3
    for share in (0.25, None):
        names = check_step(own, dtype, share)
        assert names[-3:] == ["model_direction", "model_sums", "model_apply"]
    learned = ["ABS", "AS", "BS"]
    bound = own.bind(learned=learned)
    kept = bound.keep(own.Gs)
    check_slopes(own, bound, kept, dtype, learned, None)
    before = [[x.double() for x in parts] for parts in own.thetas]  # type: ignore[union-attr]
    bound.trial_(own.thetas, own.Gs, own.buffers, lengths=own.lr, momentum=own.momentum, shrink=[0.9] * 3)
    for i, parts in enumerate(before):
        step_ = own.lr[i] * own.P(i)
        if own.buffers[i] is not None:
            step_ += own.momentum[i] * own.buffers[i].double()  # type: ignore[union-attr]
        for k, (x, y) in enumerate(zip(parts, step_.split(own.widths[i], -1), strict=True)):
            if own.Gs[i][k] is not None:  # type: ignore[index]
                before[i][k] = 0.9 * x - y
    check_weights(own, before, dtype)


def test_mixed_dtypes() -> None:
    """Of blocks and parts, each of its own; the bias not of its weight's."""
    own = layers([(33, 64), (7, 12)], torch.float32, blocks=torch.bfloat16)
    own.Gs[0][1] = own.Gs[0][1].bfloat16()  # type: ignore[index, union-attr]
    own.thetas[1][0] = own.thetas[1][0].half()  # type: ignore[index, union-attr]
    names = check_step(own, torch.float16, 0.5)
    assert names.count("model_sums") == 1
    kept = own.bind().keep(own.Gs)
    check_slopes(own, own.bind(), kept, torch.float32, ["ABS"] * 2)


def test_the_sum_is_shown_before_it_is_compared() -> None:
    own = layers([(7, 12), (9, 30)], torch.float32)
    promise, shown = own.promise(), []

    def total(x: torch.Tensor) -> None:
        shown.append(x.item())
        x.mul_(4)

    f = step(own, own.bind(), 2 * promise, total=total)
    assert shown == [pytest.approx(promise, rel=1e-5)]
    assert f.item() == pytest.approx(0.5, rel=1e-5)


def test_a_process_without_gradients_adds_its_part_to_the_sum() -> None:
    own = layers([(7, 12), (9, 30)], torch.float32)
    own.Gs = [None, None]
    assert step(own, own.bind(), 3.0, total=lambda x: x.add_(12)).item() == pytest.approx(0.25)
    assert step(own, own.bind(), 3.0, total=lambda x: x.add_(torch.inf)).isnan()
    assert step(own, own.bind(), 3.0).item() == 1


@pytest.mark.parametrize("entry", [torch.nan, torch.inf, 1e30])
def test_a_promise_that_isnt_a_number_stops_the_step(entry: float) -> None:
    """Of all layers: nothing is written."""
    own = layers([(7, 12), (9, 30)], torch.float32)
    own.Gs[0][0][0, 0] = entry  # type: ignore[index]
    before = [x.clone() for parts in (*own.thetas, own.buffers) for x in parts if x is not None]
    assert step(own, own.bind(), 1.0).isnan()
    after = [x for parts in (*own.thetas, own.buffers) for x in parts if x is not None]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("most", [math.inf, 3.0])
def test_a_graph_from_before_the_step_refuses_to_go_back(most: float) -> None:
    own = layers([(7, 12), (9, 30)], torch.float32)
    thetas = [theta.requires_grad_() for pair in own.thetas for theta in pair or () if theta is not None]
    squares = [theta.square().sum() for theta in thetas]
    step(own, own.bind(), most)
    for square in squares:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            square.backward()


def test_what_a_buffer_holds_isnt_read_at_momentum_0() -> None:
    own = layers([(7, 12)], torch.float32)
    own.momentum[0] = 0.0
    own.buffers[0].fill_(torch.nan)  # type: ignore[union-attr]
    step(own, own.bind())
    assert own.buffers[0].isfinite().all()  # type: ignore[union-attr]
    assert_close(own.buffers[0], own.lr[0] * own.P(0), torch.float32)  # type: ignore[arg-type]


def test_nothing_is_there() -> None:
    own = layers([(7, 12), (3, 4)], torch.float32, there=["", ""])
    bound = own.bind()
    assert launched(lambda: step(own, bound, 0.1)) == []
    assert step(own, bound, 0.1) == 1
    kept = bound.keep(own.Gs)
    found = bound.slopes(own.Vs, kept, lengths=own.lr)
    assert found.A == [None, None]
    assert found.inner.tolist() == [0, 0]
    none = ak.ModelPreconditioner([], [], [], widths=[], backend="triton")
    assert none.step_([], [], [], lr=[], momentum=[], weight_decay=[]) == 1


def test_layers_without_entries() -> None:
    own = layers([(0, 5), (7, 12)], torch.float32)
    bound = own.bind()
    kept = bound.keep(own.Gs)
    found = bound.slopes(own.Vs, kept, lengths=own.lr)
    assert found.A[0] is not None
    assert (found.A[0] == 0).all()
    step(own, bound, 0.1)


def test_tensors_that_moved_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    own = layers([(7, 12), (33, 65)], torch.float32)
    bound = own.bind()
    step(own, bound, 0.1)
    own.Gs = [[x.clone() * 2 for x in each] for each in own.Gs]  # type: ignore[union-attr]
    thetas, _ = expected_step(own, 0.1 / own.promise())
    step(own, bound, 0.1)
    check_weights(own, thetas, torch.float32)
    made: list[str] = []
    for module, name in ((checks, "parts"), (model, "to_device"), (model.ModelPlanner, "plan")):
        monkeypatch.setattr(module, name, lambda *_, name=name, **__: made.append(name))
    step(own, bound, 0.1)
    assert made == []


def test_gradients_that_lie_at_two_places_in_turn_are_prepared_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those that every backward pass makes anew."""
    own = layers([(7, 12), (33, 65)], torch.float32)
    bound = own.bind()
    both = [own.Gs, [[x.clone() * 2 for x in each] for each in own.Gs]]  # type: ignore[union-attr]
    for own.Gs in both:
        step(own, bound, 0.1)
    made: list[str] = []
    for module, name in ((checks, "parts"), (checks, "buffers"), (model, "to_device"), (model.ModelPlanner, "plan")):
        monkeypatch.setattr(module, name, lambda *_, name=name, **__: made.append(name))
    for own.Gs in both * 2:
        thetas, _ = expected_step(own, 0.1 / own.promise())
        step(own, bound, 0.1)
        check_weights(own, thetas, torch.float32)
    assert made == []


def test_a_captured_call_leaves_no_table_to_those_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """It lies in the graph's memory, which others may overwrite."""
    own = layers([(7, 12)], torch.float32)
    bound, here = own.bind(), own.Gs
    step(own, bound, 0.1)
    with monkeypatch.context() as capture:
        capture.setattr(model.plans, "_capturing", lambda _: True)
        capture.setattr(model, "keep_for_graph", lambda *_: None)
        own.Gs = [[x.clone() for x in each] for each in here]  # type: ignore[union-attr]
        step(own, bound, 0.1)
    made: list[str] = []
    made_on_device = model.to_device
    monkeypatch.setattr(model, "to_device", lambda *args: made.append("table") or made_on_device(*args))
    step(own, bound, 0.1)
    assert made


@pytest.mark.parametrize(
    ("Gs", "match"),
    [
        (None, r"Gs must be a list with an entry for each of 1 layers"),
        ([1], r"Gs\[0\] must be a list of 2 parts"),
        ([[1, 2]], r"Gs\[0\]\[0\] must be a torch.Tensor"),
        ([], r"Gs must be a list with an entry for each of 1 layers"),
    ],
)
def test_what_are_no_parts_is_refused(Gs: Any, match: str) -> None:
    own = layers([(7, 12)], torch.float32)
    bound = own.bind()
    own.Gs = Gs
    with pytest.raises((TypeError, ValueError), match=match):
        step(own, bound)


def test_parts_at_known_places_but_of_another_kind_are_refused() -> None:
    own = layers([(7, 12)], torch.float32)
    bound = own.bind()
    step(own, bound)
    good, bias = own.Gs[0]  # type: ignore[misc]
    own.Gs[0] = [good.clone()[:, :11], bias]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"Gs\[0\]\[0\] must be a tensor of shape"):
        step(own, bound)
    own.Gs[0] = [good]
    with pytest.raises(ValueError, match=r"Gs\[0\] must be a list of"):
        step(own, bound)


def test_parts_that_dont_fit_are_refused_again_and_again() -> None:
    own = layers([(7, 12)], torch.float32)
    bound = own.bind()
    step(own, bound)
    own.Gs[0][0] = torch.ones(7, 11)  # type: ignore[index]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"Gs\[0\]\[0\] must be a tensor of shape"):
            step(own, bound)


def test_the_same_bits_in_every_run() -> None:
    own = layers([(130, 200)], torch.float32)
    bound = own.bind()
    kept = bound.keep(own.Gs)
    first, second = (bound.slopes(own.Vs, kept, lengths=own.lr) for _ in range(2))
    for x, y in zip(first[:6], second[:6], strict=True):
        assert torch.equal(x[0], y[0])  # type: ignore[arg-type]
    assert torch.equal(first.inner, second.inner)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels as the ones that were chosen, not asked for."""
    monkeypatch.setattr("apo_kernels.whole_model.serving", lambda *_: Choice("triton", "", forced=False).backend)
    monkeypatch.setattr(dispatch, "_failure", None)


def test_where_slopes_fail_aten_reads_what_was_kept(chosen: None, monkeypatch: pytest.MonkeyPatch) -> None:
    own = layers([(7, 12), (33, 64)], torch.float32)
    bound = own.bind()
    kept = bound.keep(own.Gs)
    expected = bound.slopes(own.Vs, kept, lengths=own.lr)

    def fail(launch: Launch, run: object) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(Launch, "compile", fail)
    with pytest.warns(RuntimeWarning, match="aten serves from now on .*no such instruction"):
        found = bound.slopes(own.Vs, kept, lengths=own.lr)
    for x, y in zip(found[:6], expected[:6], strict=True):
        for one, other in zip(x, y, strict=True):
            assert_close(one, other.double(), torch.float32)  # type: ignore[union-attr, arg-type]
    buffers = [None if x is None else x.double() for x in own.buffers]
    assert buffers
    thetas, _ = expected_step(own, 1.0)
    step(own, bound)
    check_weights(own, thetas, torch.float32)


def test_a_bias_of_two_columns_is_atens(chosen: None) -> None:
    with pytest.warns(RuntimeWarning, match="aten serves a call, .*a bias of width 1"):
        ak.ModelPreconditioner([torch.eye(5)], [torch.eye(3)], [torch.ones(3, 5)], widths=[(3, 2)])


def test_a_launch_that_fails_after_a_weight_was_stepped_is_raised(
    chosen: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, other = layers([(8, 8)], torch.float32), layers([(2, 8)], torch.bfloat16)
    both = Layers(*(getattr(own, each.name) + getattr(other, each.name) for each in fields(Layers)))
    bound = both.bind()
    launches, start = [], Launch.__call__

    def fail(launch: Launch, run: Any) -> None:
        if launch.name in launches:
            raise RuntimeError("too many resources")
        launches.append(launch.name)
        start(launch, run)

    monkeypatch.setattr(Launch, "__call__", fail)
    with pytest.raises(Interrupted, match="after some weights had been stepped"):
        step(both, bound)
    assert dispatch._failure is None
