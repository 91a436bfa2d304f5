"""Parts that a whole model refuses, by name, and what follows where a kernel fails."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch

import apo_kernels as ak
from apo_kernels import dispatch
from apo_kernels.dispatch import Choice
from tests.apo_kernels.triton.examples import assert_close

pytest.importorskip("triton.language")
from apo_kernels.triton.errors import Interrupted
from apo_kernels.triton.launch import Launch
from tests.apo_kernels.triton.whole_models import Layers, check_weights, expected_step, layers, step

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poison")]


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
    """And no layer is stepped."""
    own = layers([(9, 8), (7, 12)], torch.float32)
    bound = own.bind()
    step(own, bound)
    own.Gs[1][0] = torch.ones(7, 11)  # type: ignore[index]
    written = [x for parts in (*own.thetas, own.buffers) for x in parts or () if x is not None]
    before = [x.clone() for x in written]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"Gs\[1\]\[0\] must be a tensor of shape"):
            step(own, bound)
    assert all(torch.equal(x, y) for x, y in zip(written, before, strict=True))


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
    thetas, _ = expected_step(own, 1.0)
    step(own, bound)
    check_weights(own, thetas, torch.float32)


def test_a_bias_of_two_columns_is_atens(chosen: None) -> None:
    with pytest.warns(RuntimeWarning, match="aten serves a call, .*a bias of width 1"):
        ak.ModelPreconditioner([torch.eye(5)], [torch.eye(3)], [torch.ones(3, 5)], widths=[(3, 2)])


def test_a_launch_that_fails_after_a_weight_was_stepped_is_raised(chosen: None, no_second_launch: None) -> None:
    own, other = layers([(8, 8)], torch.float32), layers([(2, 8)], torch.bfloat16)
    both = Layers(*(getattr(own, each.name) + getattr(other, each.name) for each in fields(Layers)))
    bound = both.bind()
    with pytest.raises(Interrupted, match="after some weights had been stepped"):
        step(both, bound)
    assert dispatch._failure is None
