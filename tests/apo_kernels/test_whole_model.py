"""The preconditioner of a whole model, against the definitions in float64."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import apo_kernels as ak
from apo_kernels.aten import buffers, tiles
from apo_kernels.aten import model as aten_model
from tests.apo_kernels.cases import TOLERANCE, relative_error
from tests.apo_kernels.whole_models import (
    Model,
    Parts,
    assert_close,
    assert_equal,
    check_energies,
    check_slopes,
    check_step,
    check_trial,
    check_written,
    copied,
    in_one_storage,
    models,
)


@given(models(), st.booleans(), st.booleans())
def test_a_step(model: Model, alike: bool, bounded: bool) -> None:
    check_step(model, alike, bounded)


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
    before, P = copied(thetas), model.directions(Gs)[0]
    model.bind().step_(thetas, Gs, [v], lr=[1.0], momentum=[0.0], weight_decay=[0.0])
    assert_close(v, P, 1e-12)
    assert_close(thetas[0][0], before[0][0] - P, 1e-12)


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
    before, directions = copied(thetas), model.directions(Gs)
    f = bound.step_(thetas, Gs, [None] * 3, shares=[1.0] * 3, **numbers).item()
    assert f == pytest.approx(1 / sum((model.joined(Gs, i) * P).sum().item() for i, P in directions.items()))
    args = numbers["lr"], numbers["momentum"], f, numbers["weight_decay"]
    check_written(model, before, Gs, thetas, [None] * 3, [None] * 3, directions, *args, 1e-11)


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


def test_reference_is_the_backend_of_single_layers() -> None:
    """The same directions as the operator's."""
    model = Model(random.Random(0))
    model.add(20, 13, 4, None, bias=True)
    Gs = model.parts()
    thetas = [[torch.zeros_like(x) for x in own] for own in Gs]
    model.bind().step_(thetas, Gs, [None], lr=[1.0], momentum=[0.0], weight_decay=[0.0])
    found = ak.precondition(torch.cat(Gs[0], -1), model.As[0], model.Bs[0], model.Ss[0])
    assert relative_error(-torch.cat(thetas[0], -1), found) < 1e-12
