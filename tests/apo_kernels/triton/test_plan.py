"""How many launches a model takes, and what a plan does again in a second step."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch

import apo_kernels as ak
from apo_kernels import checks
from tests.apo_kernels.triton.examples import Model, assert_close, model

pytest.importorskip("triton.language")
from apo_kernels.triton import config
from apo_kernels.triton import plan as plans
from apo_kernels.triton.gemm import grouped_gemm
from apo_kernels.triton.launch import count_launches
from apo_kernels.triton.table_layout import Role

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poison")]

SIXTY = [(3, 9), (10, 20), (1, 1), (16, 8), (2, 30)] * 11 + [(70, 90), (64, 64), (96, 16), (8, 200), (7, 7)]


@pytest.fixture
def counted_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches are made and counted, but no program runs: the interpreter takes its time for sixty layers."""
    monkeypatch.setattr(type(grouped_gemm), "__getitem__", lambda *_: lambda *_, **__: None)


def launches(call: Callable[[], object]) -> list[str]:
    with count_launches() as names:
        call()
    return names


@pytest.fixture(scope="module")
def full() -> Model:
    return model(SIXTY, torch.bfloat16)


@pytest.fixture(scope="module")
def blocks() -> Model:
    return model(SIXTY, torch.bfloat16, A=16, B=16)


@pytest.mark.usefixtures("counted_only")
def test_sixty_layers_of_full_blocks(full: Model) -> None:
    forward = launches(lambda: ak.foreach_precondition(*full.operands, backend="triton"))
    assert forward == ["pack", "right", "scale", "left", "out"]
    vjp = launches(lambda: ak.foreach_precondition_vjp(*full.operands, full.Vs, wanted="GABS", backend="triton"))
    assert vjp == ["pack", "right", "pair", "left_dB", "dA_dG"]


@pytest.mark.usefixtures("counted_only")
def test_sixty_layers_of_block_diagonal_blocks(blocks: Model) -> None:
    """One launch for the tiles that lie well in memory, and one for the others."""
    assert launches(lambda: ak.foreach_precondition(*blocks.operands, backend="triton")) == ["tile_forward"] * 2
    vjp = launches(lambda: ak.foreach_precondition_vjp(*blocks.operands, blocks.Vs, wanted="GABS", backend="triton"))
    assert vjp == ["tile_backward", "tile_backward", "sum_parts", "tile_dG"]


@pytest.mark.usefixtures("counted_only")
def test_a_split_of_the_derivatives_takes_one_launch_more() -> None:
    layers = model([(64, 128)], torch.bfloat16, A=16, B=16)
    with config.override(tile_backward={"split": 1}):
        vjp = launches(lambda: ak.foreach_precondition_vjp(*layers.operands, layers.Vs, backend="triton"))
    assert vjp == ["tile_backward", "tile_backward", "sum_parts"]


def spaced(x: torch.Tensor) -> torch.Tensor:
    """In rows that don't begin at multiples of 16 bytes."""
    return torch.zeros(x.shape[0], x.shape[1] + 1, dtype=x.dtype)[:, :-1].copy_(x)


@pytest.mark.usefixtures("counted_only")
@pytest.mark.parametrize(
    ("shapes", "side", "odd", "expected"),
    [
        ([(64, 128), (128, 64)], 64, None, [(True, True)]),
        ([(64, 128), (128, 64)], 64, "Ss", [(False, True)]),
        ([(64, 128)], 16, None, [(True, False)]),
        ([(64, 128)], 16, "Gs", [(False, False)]),
        ([(64, 65)], 64, None, [(False, True), (False, False)]),  # the last column is a tile of its own
        ([(64, 72)], 64, None, [(True, True)]),
        ([(60, 72)], 64, None, [(True, False)]),
        ([(64, 128), (60, 72)], 64, None, [(True, False)]),  # one launch for all whose matrices lie well
        ([(64, 128), (64, 65)], 64, None, [(True, True), (False, True), (False, False)]),
        ([(16, 16)], 16, None, [(False, False)]),  # too small to pay
    ],
)
def test_what_is_moved_16_bytes_at_a_time(
    shapes: list[tuple[int, int]], side: int, odd: str | None, expected: list[tuple[bool, bool]]
) -> None:
    """A constant of each launch; of a model whose tiles lie in all ways, there are three."""
    layers = model(shapes, torch.bfloat16, A=side, B=side)
    if odd is not None:
        setattr(layers, odd, [spaced(x) for x in getattr(layers, odd)])
    thetas, buffers = [torch.zeros_like(G) for G in layers.Gs], [torch.zeros_like(G) for G in layers.Gs]
    ak.foreach_precondition_step_(
        thetas, *layers.operands, lr=0.1, momentum=0.9, momentum_buffers=buffers, backend="triton"
    )
    (plan,) = plans._plans.values()
    found = [(launch.constants["WIDE_MATRICES"], launch.constants["WIDE_SQUARES"]) for launch in plan.launches]
    assert sorted(found) == sorted(expected)


@pytest.mark.usefixtures("counted_only")
def test_what_the_epilogues_of_the_gemm_move_16_bytes_at_a_time() -> None:
    """Tile by tile: all but the ragged ones, here of the second layer."""
    layers = model([(64, 256), (64, 129)], torch.bfloat16)
    thetas = [torch.zeros_like(G) for G in layers.Gs]
    ak.foreach_precondition_step_(thetas, *layers.operands, lr=0.1, backend="triton")
    (plan,) = plans._plans.values()
    (update,) = (launch for launch in plan.launches if launch.name == "update")
    number_of_first = [problem[0] for problem in update.tables[1].tolist()].index(0)
    for number, _, _, wide in update.tables[0].tolist():
        assert wide == (number == number_of_first)


@pytest.mark.usefixtures("counted_only")
def test_layers_that_fit_one_tile_take_one_launch() -> None:
    small = model([(3, 9), (60, 60), (10, 33)], torch.float32)
    assert launches(lambda: ak.foreach_precondition(*small.operands, backend="triton")) == ["tile_forward"]
    vjp = launches(lambda: ak.foreach_precondition_vjp(*small.operands, small.Vs, backend="triton"))
    assert vjp == ["tile_backward"]  # one tile a layer: nothing to sum


@pytest.mark.usefixtures("counted_only")
def test_what_lies_well_isnt_packed() -> None:
    even = model([(64, 128), (8, 72)], torch.bfloat16)
    assert "pack" not in launches(lambda: ak.foreach_precondition(*even.operands, backend="triton"))


@pytest.mark.usefixtures("counted_only")
def test_derivatives_that_need_less_launch_less() -> None:
    layers = model([(70, 90)], torch.float32)
    for wanted, count in (("S", 3), ("B", 4), ("BS", 4), ("A", 5)):
        call = launches(
            lambda w=wanted: ak.foreach_precondition_vjp(*layers.operands, layers.Vs, wanted=w, backend="triton")
        )
        assert len(call) == count, wanted


def test_weights_are_written_last() -> None:
    """Until everything else has run: a launch that fails before leaves them whole."""
    both = model([(70, 90), (16, 16)], torch.float32)
    both.As[1], both.Bs[1] = torch.randn(2, 8, 8), torch.randn(2, 8, 8)
    thetas = [torch.zeros_like(G) for G in both.Gs]
    names = launches(lambda: ak.foreach_precondition_step_(thetas, *both.operands, lr=0.1, backend="triton"))
    assert names == ["pack", "right", "scale", "left", "update", "tile_update"]


@pytest.mark.parametrize("side", [None, 16])
def test_a_bound_step_is_the_step(side: int | None) -> None:
    """Also in two dtypes, with other numbers, and after a tensor has moved."""
    layers, more = model([(20, 40), (16, 16)], torch.float32, A=side, B=side), model([(9, 8)], torch.bfloat16)
    layers = Model(*(getattr(layers, name) + getattr(more, name) for name in ("Gs", "As", "Bs", "Ss", "Vs")))
    (thetas, buffers), (copies, copied) = ([[torch.zeros_like(G) for G in layers.Gs] for _ in "θv"] for _ in "ab")
    step = ak.BoundStep(thetas, *layers.operands, momentum_buffers=buffers, backend="triton")
    for lr, momentum, decay in ((0.1, 0.9, 0.0), (0.2, 0.0, 0.1), (torch.tensor(0.3), 0.5, 0.1)):
        names = launches(partial(step, lr=lr, momentum=momentum, weight_decay=decay))
        assert names == launches(
            partial(
                ak.foreach_precondition_step_, copies, *layers.operands, lr=lr, momentum=momentum,
                momentum_buffers=copied, weight_decay=decay, backend="triton",
            )
        )  # fmt: skip
        for x, y in zip(thetas + buffers, copies + copied, strict=True):
            assert torch.equal(x, y)
        thetas[1].data = thetas[1].clone()
        layers.Gs[0].mul_(-2)


def test_a_bound_step_neither_checks_nor_plans_again(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = model([(20, 40), (16, 16)], torch.float32, A=16, B=16)
    thetas = [torch.zeros_like(G) for G in layers.Gs]
    step = ak.BoundStep(thetas, *layers.operands, backend="triton")
    step(lr=0.1)
    called: list[str] = []
    monkeypatch.setattr(checks, "step_tensors", lambda *_: called.append("checks"))
    monkeypatch.setattr(plans, "plan_for", lambda *_: called.append("plan"))
    step(lr=0.2)
    assert called == []


def test_a_second_step_makes_no_plan_and_allocates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = model([(20, 40), (16, 16)], torch.float32, A=16, B=16)
    thetas = [torch.zeros_like(G) for G in layers.Gs]

    def step() -> None:
        ak.foreach_precondition_step_(thetas, *layers.operands, lr=0.1, backend="triton")

    step()
    made: list[str] = []
    for name in ("empty", "zeros", "from_numpy", "tensor"):
        monkeypatch.setattr(torch, name, lambda *_, name=name, **__: made.append(name))
    monkeypatch.setattr(plans, "LaunchPlan", lambda *_: made.append("Plan"))
    step()
    assert made == []


def test_a_plan_follows_tensors_that_moved() -> None:
    layers = model([(66, 8)], torch.float32)
    ak.foreach_precondition(*layers.operands, backend="triton")
    known = set(plans._plans)
    for _ in range(plans._BINDINGS + 2):  # more places than are remembered
        layers.Gs = [torch.randn_like(G) for G in layers.Gs]
        found = ak.foreach_precondition(*layers.operands, backend="triton")
        assert_close(found[0], layers.expected()[0], torch.float32)
    assert set(plans._plans) == known


def test_a_plan_made_in_a_capture_serves_no_other_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tables are filled when the graph is replayed, which need not have been."""
    layers = model([(20, 30)], torch.float32)
    call = partial(ak.foreach_precondition, *layers.operands, backend="triton")
    kept: list[object] = []
    monkeypatch.setattr(plans, "keep_for_graph", lambda _stream, plan, *_: kept.append(plan))
    with monkeypatch.context() as capture:
        capture.setattr(plans, "_capturing", lambda _: True)
        call()
        call()
        assert not plans._plans
        assert len(set(map(id, kept))) == 2
    call()
    (plan,) = plans._plans.values()
    assert plan not in kept
    with monkeypatch.context() as capture:
        capture.setattr(plans, "_capturing", lambda _: True)
        call()
    assert kept[2:] == [plan], "one that was there serves a capture too"


def test_no_workspace_outlives_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = model([(70, 90)], torch.float32)
    made: list[weakref.ref[torch.Tensor]] = []
    real = torch.empty

    def recorded(*args: Any, **kwargs: Any) -> torch.Tensor:
        made.append(weakref.ref(x := real(*args, **kwargs)))
        return x

    monkeypatch.setattr(torch, "empty", recorded)
    ak.foreach_precondition_vjp(*layers.operands, layers.Vs, backend="triton")
    gc.collect()
    assert made
    assert not any(x() is not None for x in made), "the plan holds on to memory besides its tables"


@pytest.mark.parametrize("first", [0, 8])
def test_a_plan_knows_how_the_entries_of_a_batch_lie(first: int) -> None:
    """To 16 bytes or not: one plan promises it to the kernels, the other one can't."""
    memory = torch.randn(2 * 130 + 8)
    stride, count = 34, len(plans._plans)  # 136 bytes: of two entries that follow each other one lies well
    G = [memory[at : at + 2 * stride].as_strided((2, 4, 8), (stride, 8, 1)) for at in (0, 2)]
    assert [x.data_ptr() % 16 for x in G] == [0, 8]
    A, B, S = torch.eye(8).expand(2, 8, 8).clone(), torch.eye(4).expand(2, 4, 4).clone(), torch.ones(2, 4, 8)
    for x in G if first == 0 else reversed(G):
        found = ak.precondition(x, A, B, S, backend="triton")
        assert torch.equal(found, x)
    offsets = [memory[at:].as_strided((2, 4, 8), (stride, 8, 1)).data_ptr() % 16 for at in (1, 3)]
    assert offsets == [4, 12], "neither lies well, but their second entries lie differently"
    for at in (1, 3):
        x = memory[at:].as_strided((2, 4, 8), (stride, 8, 1))
        assert torch.equal(ak.precondition(x, A, B, S, backend="triton"), x)
    assert len(plans._plans) == count + 4


def test_threads_make_one_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = model([(5, 7)], torch.float32)
    made: list[object] = []
    real = plans.LaunchPlan

    def slow(*args: Any) -> plans.LaunchPlan:
        made.append(plan := real(*args))
        time.sleep(0.2)
        return plan

    monkeypatch.setattr(plans, "LaunchPlan", slow)
    operands = dict(zip((Role.G, Role.A, Role.B, Role.S), layers.operands, strict=True))
    operands[Role.OUT] = [torch.empty_like(layers.Gs[0])]
    pointers = [x.data_ptr() for tensors in operands.values() for x in tensors]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: plans.plan_for(None, plans.Operation(), operands, pointers), range(4)))
    assert len(made) == 1
    assert all(plan is found[0] for plan in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nothing_of_the_last_step_is_left(dtype: torch.dtype) -> None:
    """A workspace is used again: what it held may not be seen, nor how large it was."""
    small, large = model([(70, 90)], dtype), model([(70, 90)], dtype, scale=1e3)
    first = ak.foreach_precondition(*small.operands, backend="triton")[0]
    ak.foreach_precondition(*large.operands, backend="triton")
    assert torch.equal(ak.foreach_precondition(*small.operands, backend="triton")[0], first)
