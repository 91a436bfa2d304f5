"""How a whole model's calls reach the device: how many launches, what they move at a time, what is prepared once."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from apo_kernels import checks

pytest.importorskip("triton.language")
from apo_kernels.triton import config, model
from apo_kernels.triton.gemm import grouped_gemm
from tests.apo_kernels.triton.whole_models import (
    Layers,
    check_slopes,
    check_weights,
    expected_step,
    launched,
    layers,
    step,
    ways_of,
)

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poison")]


@pytest.fixture
def counted_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches are made and counted, but no program runs."""
    monkeypatch.setattr(type(grouped_gemm), "__getitem__", lambda *_: lambda *_, **__: None)


def test_what_a_trial_keeps_lies_well_though_its_gradients_dont() -> None:
    own = layers([(64, 64), (33, 128)], torch.float32, pad=True)
    for parts in own.Gs:
        parts[0] = torch.cat([parts[0], parts[0]], 1)[:, 1 : 1 + parts[0].shape[1]]  # type: ignore[index, union-attr, list-item]
    bound = own.bind()
    kept = bound.keep(own.Gs)
    assert ways_of(bound) == {(False, False)}
    check_slopes(own, bound, kept, torch.float32, ["ABS"] * 2)
    assert ways_of(bound) == {(False, False), (True, True)}


def test_a_bias_leaves_the_weight_moved_16_bytes_at_a_time() -> None:
    own = layers([(64, 128)], torch.bfloat16, pad=True)
    bound = own.bind()
    step(own, bound)
    (plan,) = bound._bound._plans.values()  # type: ignore[union-attr, attr-defined]
    (launch,) = plan.launches
    assert launch.constants["WIDE_MATRICES"]
    assert launch.constants["WIDE_SQUARES"]


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
