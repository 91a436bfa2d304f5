"""The preconditioner of a whole model, against the definitions in float64."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import apo_kernels as ak
from apo_kernels import reference
from apo_kernels.aten import buffers, tiles
from apo_kernels.aten import model as aten_model
from apo_kernels.blocks import block_count
from tests.apo_kernels.cases import TOLERANCE, relative_error

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


@given(models(), st.booleans(), st.booleans())
def test_a_step(model: Model, alike: bool, bounded: bool) -> None:
    check_step(model, alike, bounded)


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


@given(models())
def test_energies(model: Model) -> None:
    check_energies(model)


@given(models(), st.booleans())
def test_a_trial_and_its_slopes(model: Model, alike: bool) -> None:
    check_trial(model, alike)


@given(models(), st.booleans())
def test_in_pieces(model: Model, alike: bool) -> None:
    """Small pieces, and tiles that are large, in place of the sizes that suit a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aten_model, "CACHED", 64)
        patch.setattr(aten_model, "HELD", 100)
        patch.setattr(buffers.Pool, "LARGE", 1)
        patch.setattr(tiles, "LARGE", 60)
        patch.setattr(tiles, "WORTH", 16)
        patch.setattr(tiles, "DIAGONAL", 4)
        check_step(model, alike, bounded=True)
        check_trial(model, alike)
        check_energies(model)


@pytest.mark.parametrize(
    ("dtype", "block_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
def test_narrow_dtypes(dtype: torch.dtype, block_dtype: torch.dtype) -> None:
    @given(models(dtype=dtype, block_dtype=block_dtype), st.booleans())
    def check(model: Model, bounded: bool) -> None:
        check_step(model, True, bounded, tolerance=3 * TOLERANCE[dtype] if dtype.itemsize == 2 else 1e-4)

    check()


def test_slopes_of_narrow_dtypes() -> None:
    @given(models(dtype=torch.bfloat16, block_dtype=torch.bfloat16))
    def check(model: Model) -> None:
        Gs, Vs = model.parts(), model.parts()
        lengths = model.numbers(0, 0.1, alike=True)
        bound = model.bind()
        check_slopes(model, Gs, Vs, lengths, bound.slopes(Vs, bound.keep(Gs), lengths=lengths), 1e-4)

    check()


def test_large_layers() -> None:
    """Full blocks hundreds wide, and layers of several pieces."""
    model = Model(random.Random(0))
    model.add(300, 201, None, None, bias=True)
    model.add(201, 300, 64, None)
    model.add(700, 257, 64, 64, bias=True)
    model.add(3000, 40, None, 1, learned="AS")
    model.add(1, 5000, 1, 1, learned="S")
    check_step(model, True, bounded=True)
    check_trial(model, False)
    check_energies(model)


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


@given(models(), st.booleans())
def test_blocks_and_scalings_of_one_storage(model: Model, alike: bool) -> None:
    in_one_storage(model)
    check_step(model, alike, bounded=True)
    check_trial(model, alike)


def test_slopes_lie_as_the_blocks_do() -> None:
    """So that one operation can take all of them."""
    model = Model(random.Random(0))
    for _ in range(4):
        model.add(20, 13, 4, None, bias=True)
    in_one_storage(model)
    bound, Gs = model.bind(), model.parts()
    found = bound.slopes(Gs, bound.keep(Gs), lengths=[1.0] * 4)
    for own, slopes in ((model.As, found.A), (model.Bs, found.B), (model.Ss, found.S), (model.Ss, found.size_S)):
        assert len({x.untyped_storage().data_ptr() for x in slopes}) == 1
        for x, slope in zip(own, slopes, strict=True):
            assert slope.stride() == x.stride()
            assert slope.storage_offset() - slopes[0].storage_offset() == x.storage_offset() - own[0].storage_offset()
    assert found.size_A[0]._base is found.size_A[1]._base


def test_blocks_may_be_written_between_calls() -> None:
    for shared in (False, True):
        model = Model(random.Random(0))
        model.add(20, 13, 4, None, bias=True)
        model.add(20, 13, 1, 8, bias=True)
        if shared:
            in_one_storage(model)
        bound, Gs = model.bind(), model.parts()
        thetas = [[torch.zeros_like(x) for x in own] for own in Gs]
        for _ in range(2):
            for x in (*model.As, *model.Bs, *model.Ss):
                x.mul_(-0.7).add_(0.1)
            for own in thetas:
                torch._foreach_zero_(own)
            bound.step_(thetas, Gs, [None] * 2, lr=[1.0] * 2, momentum=[0.0] * 2, weight_decay=[0.0] * 2)
            for i, P in model.directions(Gs).items():
                assert_close(-torch.cat(thetas[i], -1), P, 1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_weights_of_any_strides_that_move(bias: bool) -> None:
    model = Model(random.Random(0))
    model.add(20, 13, 4, None, bias=bias)
    model.add(13, 20, 4, 3, batch=(2,), bias=bias)
    bound, Gs = model.bind(), model.parts()
    Gs = [[x.mT.contiguous().mT for x in own] for own in Gs]
    numbers: dict[str, Any] = {"lr": [0.1] * 2, "momentum": [0.5] * 2, "weight_decay": [0.0] * 2}
    for _ in range(2):  # other memory each time
        thetas, buffers = model.parts(), model.buffers()
        thetas = [[x.mT.contiguous().mT for x in own] for own in thetas]
        padded = [torch.zeros(*v.shape[:-1], 24, dtype=v.dtype)[..., : v.shape[-1]].copy_(v) for v in buffers]
        before = copied(thetas)
        bound.step_(thetas, Gs, padded, **numbers)
        args = numbers["lr"], numbers["momentum"], 1.0, [0.0] * 2
        check_written(model, before, Gs, thetas, buffers, padded, model.directions(Gs), *args, 1e-12)


def test_buffers_are_overwritten_without_momentum() -> None:
    model = Model(random.Random(0))
    model.add(5, 4, 2, None)
    Gs, thetas, v = model.parts(), model.parts(), torch.full((5, 4), torch.nan, dtype=torch.float64)
    model.bind().step_(thetas, Gs, [v], lr=[1.0], momentum=[0.0], weight_decay=[0.0])
    assert_close(v, model.directions(Gs)[0], 1e-12)


def test_a_buffer_that_was_moved_is_looked_at_again() -> None:
    model = Model(random.Random(0))
    model.add(5, 4, 2, None)
    bound, v = model.bind(), torch.zeros(5, 4, dtype=torch.float64)
    numbers = {"lr": [1.0], "momentum": [0.9], "weight_decay": [0.0]}
    for _ in range(2):
        bound.step_(model.parts(), model.parts(), [v], **numbers)
    v.data = v.float()
    with pytest.raises(ValueError, match=r"momentum_buffers\[0\] must be a torch.float64 tensor"):
        bound.step_(model.parts(), model.parts(), [v], **numbers)


def test_garbage_in_scratch_is_harmless() -> None:
    """Non-finite gradients of one step don't reach the layers of the next."""
    model = Model(random.Random(0))
    for _ in range(3):
        model.add(8, 8, 4, 4, bias=True)
    bound = model.bind()
    numbers: dict[str, Any] = {"lr": [0.1] * 3, "momentum": [0.0] * 3, "weight_decay": [0.0] * 3, "most": 1.0}
    bad = [[torch.full_like(x, torch.inf) for x in own] for own in model.parts()]
    bound.step_(model.parts(), bad, [None] * 3, shares=[1.0] * 3, **numbers)
    Gs = model.parts()
    Gs[0], Gs[1][1] = None, None
    thetas = model.parts()
    f = bound.step_(thetas, Gs, [None] * 3, shares=[1.0] * 3, **numbers)
    assert f.isfinite()
    assert all(x.isfinite().all() for own in thetas for x in own)


def test_no_layers() -> None:
    bound = ak.ModelPreconditioner([], [], [], widths=[])
    assert bound.step_([], [], [], lr=[], momentum=[], weight_decay=[], most=1.0, shares=[]).item() == 1
    kept = bound.trial_([], [], [], lengths=[], momentum=[], shrink=[])
    assert bound.slopes([], kept, lengths=[]).inner.shape == (0,)


def test_empty_layers() -> None:
    model = Model(random.Random(0))
    model.add(0, 3, None, None)
    model.add(3, 0, 2, 2)
    model.add(4, 3, 2, 2)
    check_step(model, True, bounded=True)
    check_trial(model, True)


def test_nothing_is_promised() -> None:
    model = Model(random.Random(0))
    model.add(4, 3, 2, 2)
    zeros = [[torch.zeros(4, 3, dtype=torch.float64)]]
    numbers: dict[str, Any] = {"lr": [0.1], "momentum": [0.0], "weight_decay": [0.0]}
    f = model.bind().step_(model.parts(), zeros, [None], most=0.0, shares=[1.0], **numbers)
    assert f.item() == 1


def test_memory_is_used_again_once_nobody_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers.Pool, "LARGE", 1)
    model = Model(random.Random(0))
    model.add(9, 7, 4, 4, bias=True)
    bound, Gs, Vs = model.bind(), model.parts(), model.parts()
    kept = bound.keep(Gs)
    first = bound.slopes(Vs, kept, lengths=[1.0])
    assert first.S[0] is not None
    held, place = first.S[0].clone(), first.S[0].data_ptr()
    second = bound.slopes(Gs, bound.keep(Vs), lengths=[2.0])
    assert torch.equal(first.S[0], held)
    check_slopes(model, Gs, Vs, [1.0], bound.slopes(Vs, kept, lengths=[1.0]), 1e-11)
    check_slopes(model, Vs, Gs, [2.0], second, 1e-11)
    del first
    places = {x.data_ptr() for _ in range(3) for x in bound.slopes(Vs, kept, lengths=[1.0]).S if x is not None}
    assert place in places


class _Fails(Exception):
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_a_layer_gets_depends_on_no_other_layer(dtype: torch.dtype) -> None:
    """To the bit: so layers may be shared out among processes."""
    torch.manual_seed(0)
    for seed in range(40):
        model = Model(random.Random(seed), dtype, dtype)
        b = model.rng.choice([None, 3, 4, 64])
        for _ in range(5):
            m, n = (model.rng.choice([1, 2, 7, 9, 17, 64, 65, 66, 130]) for _ in "mn")
            model.add(m, n, b and min(b, n), b and min(b, m), bias=n > 1)
        model.As, model.Bs, model.Ss = ([x.to(dtype) for x in each] for each in (model.As, model.Bs, model.Ss))
        Gs, Vs = model.parts(), model.parts()
        every = results(model, range(5), Gs, Vs)
        for some in ([0], [3], [1, 2], [4, 0, 3]):
            for layer, found in results(model, some, Gs, Vs).items():
                assert all(torch.equal(x, y) for x, y in zip(found, every[layer], strict=True)), (b, some, layer)


def results(model: Model, layers: Sequence[int], Gs: Parts, Vs: Parts) -> dict[int, list[Tensor]]:
    """A step, its promise and slopes of some layers, in this order."""
    As, Bs, Ss, widths, Gs, Vs = (
        [each[i] for i in layers] for each in (model.As, model.Bs, model.Ss, model.widths, Gs, Vs)
    )
    bound = ak.ModelPreconditioner(As, Bs, Ss, widths=widths, backend="aten")
    thetas, terms, count = [[torch.zeros_like(G) for G in own or []] for own in Gs], list[Tensor](), len(Gs)
    numbers = {"lr": [0.1] * count, "momentum": [0.0] * count, "weight_decay": [0.0] * count}
    bound.step_(thetas, Gs, [None] * count, most=1e9, shares=[0.3] * count, total=terms.append, **numbers)
    slopes = bound.slopes(Vs, bound.keep(Gs), lengths=[0.1] * count)
    return {
        layer: [*thetas[k], terms[0][k], *(own[k] for own in slopes if own[k] is not None)]
        for k, layer in enumerate(layers)
    }


def test_a_failure_leaves_everything_unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """At any operation up to the first that writes."""
    model = Model(random.Random(0))
    for _ in range(2):
        model.add(9, 7, 4, 4, bias=True)
    Gs, thetas, buffers = model.parts(), model.parts(), model.buffers()
    thetas[1] = [x.to(torch.float64) for x in thetas[1]]
    before = copied(thetas), copied(buffers)

    def fail(_: Tensor) -> None:
        raise _Fails

    bound = model.bind()
    numbers: dict[str, Any] = {"lr": [0.1] * 2, "momentum": [0.5] * 2, "weight_decay": [0.1] * 2}
    with pytest.raises(_Fails):
        bound.step_(thetas, Gs, buffers, most=1e-3, shares=[1.0] * 2, total=fail, **numbers)
    product = torch.bmm
    left = [0]

    def bmm(*args: Any, **kwargs: Any) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise _Fails
        return product(*args, **kwargs)

    monkeypatch.setattr(torch, "bmm", bmm)
    for products in range(8):
        left[0] = products
        with pytest.raises(_Fails):
            bound.step_(thetas, Gs, buffers, **numbers)
        assert_equal([thetas, buffers], list(before))


def assert_equal(now: Any, then: Any) -> None:
    if isinstance(now, list):
        for x, y in zip(now, then, strict=True):
            assert_equal(x, y)
    else:
        assert now is then is None or torch.equal(now, then)


def test_a_weight_is_rounded_once() -> None:
    """16-bit weights: a small decay and a small step that cancel must not be rounded apart."""
    model = Model(random.Random(0), dtype=torch.bfloat16, block_dtype=torch.float32)
    model.add(16, 16, 4, 4, bias=True)
    thetas, Gs, buffers = model.parts(), model.parts(), model.buffers()
    before, carried = copied(thetas), copied(buffers)
    model.bind().step_(thetas, Gs, buffers, lr=[0.01], momentum=[0.9], weight_decay=[0.1])
    step = 0.9 * carried[0].double() + 0.01 * model.directions(Gs)[0]
    for x, old, d in zip(thetas[0], before[0], step.split([15, 1], -1), strict=True):
        truth = (1 - 0.001) * old.double() - d
        assert (x == truth.to(torch.bfloat16)).double().mean() > 0.99


class _Count(TorchDispatchMode):
    """Counts operations but views; a foreach is one."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not func.is_view and "empty" not in func.__name__:
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def operations(model: Model) -> tuple[int, int]:
    """Of a bounded step, and of a trial with its slopes."""
    count = len(model.Ss)
    bound, Gs, thetas, buffers = model.bind(), model.parts(), model.parts(), model.buffers()
    numbers: dict[str, Any] = {"momentum": [0.5] * count}

    def step() -> None:
        decay = {"lr": [0.1] * count, "weight_decay": [0.1] * count}
        bound.step_(thetas, Gs, buffers, **decay, **numbers, most=1.0, shares=[0.1] * count)

    def trial() -> None:
        kept = bound.trial_(thetas, Gs, buffers, lengths=[0.1] * count, shrink=[0.9] * count, **numbers)
        bound.slopes(Gs, kept, lengths=[0.1] * count)

    return counted(step), counted(trial)


def counted(function: Callable[[], None]) -> int:
    with _Count() as counter:
        function()
    return len(counter.names)


@pytest.mark.parametrize("shared", [False, True])
def test_operations_dont_go_with_layers(shared: bool) -> None:
    found = []
    for layers in (3, 9, 33):
        model = Model(random.Random(0))
        for _ in range(layers):
            model.add(32, 33, None, None, bias=True)
        if shared:
            in_one_storage(model)
        found.append(operations(model))
    assert found[0] == found[1] == found[2]
    plain, trial = found[0]
    assert plain <= 34
    assert trial <= 60


def test_operations_go_with_different_tiles() -> None:
    """In blocks of 64: squares of 64, and the bias column's tiles."""
    model = Model(random.Random(0))
    for _ in range(2):
        model.add(128, 129, 64, 64, bias=True)
    plain, trial = operations(model)
    assert plain <= 45
    assert trial <= 110


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
    buffers = arguments.pop("buffers", model.buffers())
    with pytest.raises(ValueError, match=match):
        bound.step_(model.parts(), model.parts(), buffers, **arguments)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"widths": [(2, 1)]}, "widths must be a list with an entry for each of 2 layers"),
        ({"widths": [(2, 2), (3,)]}, r"widths\[0\] must be one or two numbers that add up to 3"),
        ({"widths": [(1, 1, 1), (3,)]}, r"widths\[0\] must be one or two numbers"),
        ({"learned": ["ABS"]}, "learned must be a list with an entry for each of 2 layers"),
        ({"learned": ["ABS", "AB"]}, r"learned\[1\] must be letters of 'ABS', with 'S'"),
        ({"learned": ["ABS", "SX"]}, r"learned\[1\] must be letters of 'ABS', with 'S'"),
        ({"Ss": [torch.zeros(4, 3)]}, "Ss must have the length of As"),
        ({"backend": "cuda"}, "backend must be None or one of"),
    ],
)
def test_models_that_arent_one(changed: dict[str, Any], match: str) -> None:
    _, model = small()
    own: dict[str, Any] = {"As": model.As, "Bs": model.Bs, "Ss": model.Ss, "widths": model.widths} | changed
    with pytest.raises((TypeError, ValueError), match=match):
        ak.ModelPreconditioner(own.pop("As"), own.pop("Bs"), own.pop("Ss"), **own)


def test_reference_is_the_backend_of_single_layers() -> None:
    """The same directions as the operator's."""
    model = Model(random.Random(0))
    model.add(20, 13, 4, None, bias=True)
    Gs = model.parts()
    thetas = [[torch.zeros_like(x) for x in own] for own in Gs]
    model.bind().step_(thetas, Gs, [None], lr=[1.0], momentum=[0.0], weight_decay=[0.0])
    found = ak.precondition(torch.cat(Gs[0], -1), model.As[0], model.Bs[0], model.Ss[0])
    assert relative_error(-torch.cat(thetas[0], -1), found) < 1e-12
