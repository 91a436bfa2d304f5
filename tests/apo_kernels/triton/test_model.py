"""A whole model's steps, trials and slopes on the tile kernels against float64, in Triton's interpreter."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch

import apo_kernels as ak
from tests.apo_kernels.triton.examples import assert_close

pytest.importorskip("triton.language")
from apo_kernels.triton import config
from apo_kernels.triton.launch import count_launches
from tests.apo_kernels.triton.whole_models import (
    DRAWN,
    Layers,
    check_energies,
    check_slopes,
    check_step,
    check_trial,
    check_weights,
    expected_step,
    launched,
    layers,
    of_form,
    step,
    ways_of,
)

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poison")]


@pytest.mark.parametrize(("dtype", "A", "B", "pad"), DRAWN)
@pytest.mark.parametrize("share", [None, 0.25, 4.0])
def test_steps(dtype: torch.dtype, A: int | None, B: int | None, pad: bool, share: float | None) -> None:
    names = check_step(of_form(dtype, A, B, pad), dtype, share)
    assert names == (["model_update"] if share is None else ["model_direction", "model_sums", "model_apply"])


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
    """Among narrow ones, in one call; the directions of all make one promise, if it is bounded, and one launch applies
    them."""
    own, narrow = layers([(75, 80), (2, 6, 80)], dtype, A=A, B=B, there=["wb", "w"]), layers([(7, 12)], dtype)
    own = Layers(*(getattr(own, each.name) + getattr(narrow, each.name) for each in fields(Layers)))
    own.shares[2], own.lr[2] = 3.0, 0.3
    for share in (0.25, None):
        names = check_step(own, dtype, share)
        assert names[names.index("out") + 1 :] == ["model_direction", *["model_sums"] * bool(share), "model_apply"]
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
    bound = own.bind()
    check_slopes(own, bound, bound.keep(own.Gs), torch.float32, ["ABS"] * 2)


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
    thetas, _ = expected_step(own, 1.0)
    own.buffers[0].fill_(torch.nan)  # type: ignore[union-attr]
    step(own, own.bind())
    check_weights(own, thetas, torch.float32)
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
    check_step(own, torch.float32, 0.5, bound)


def test_the_same_bits_in_every_run() -> None:
    own = layers([(130, 200)], torch.float32)
    bound = own.bind()
    kept = bound.keep(own.Gs)
    first, second = (bound.slopes(own.Vs, kept, lengths=own.lr) for _ in range(2))
    for x, y in zip(first[:6], second[:6], strict=True):
        assert torch.equal(x[0], y[0])  # type: ignore[arg-type]
    assert torch.equal(first.inner, second.inner)
