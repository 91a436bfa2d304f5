"""When Triton's kernels serve, and what happens when they fail."""

from __future__ import annotations

import pytest
import torch

import apo_kernels as ak
from apo_kernels import dispatch
from apo_kernels.dispatch import Choice
from tests.apo_kernels.triton.conftest import INTERPRETED
from tests.apo_kernels.triton.examples import assert_close, model

pytest.importorskip("triton.language")
from apo_kernels.triton.backend import TritonBackend
from apo_kernels.triton.layers import Unserved, layers_of
from apo_kernels.triton.roles import Role


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Triton had been chosen for tensors on the CPU, not asked for."""
    chosen = Choice("triton", "", forced=False)
    monkeypatch.setattr("apo_kernels.functional.serving", lambda *_: chosen.backend)
    monkeypatch.setattr(dispatch, "_failure", None)


def fails(error: Exception) -> object:
    def fail(*_: object) -> None:
        raise error

    return fail


def test_a_failure_is_warned_about_and_aten_serves(chosen: None, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = model(((5, 7),), torch.float32)
    monkeypatch.setattr(TritonBackend, "foreach_precondition", fails(RuntimeError("no such instruction")))
    with pytest.warns(RuntimeWarning, match="aten serves from now on .*no such instruction"):
        found = ak.foreach_precondition(*layers.operands)
    assert_close(found[0], layers.expected()[0], torch.float32)
    assert dispatch._failure == "RuntimeError: no such instruction"


def test_what_isnt_served_is_no_failure(chosen: None, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = model(((5, 7),), torch.float32)
    monkeypatch.setattr(TritonBackend, "foreach_precondition", fails(Unserved("its strides")))
    with pytest.warns(RuntimeWarning, match="aten serves a call, for its strides"):
        found = ak.foreach_precondition(*layers.operands)
    assert_close(found[0], layers.expected()[0], torch.float32)
    assert dispatch._failure is None


def test_running_out_of_memory_is_the_callers(chosen: None, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = model(((5, 7),), torch.float32)
    monkeypatch.setattr(TritonBackend, "foreach_precondition", fails(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError):
        ak.foreach_precondition(*layers.operands)


@pytest.mark.interpret
def test_a_backend_that_was_asked_for_fails_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = model(((5, 7),), torch.float32)
    monkeypatch.setattr(TritonBackend, "foreach_precondition", fails(RuntimeError("no such instruction")))
    with pytest.raises(RuntimeError, match="no such instruction"):
        ak.foreach_precondition(*layers.operands, backend="triton")


@pytest.mark.parametrize(
    ("role", "shape", "strides", "served"),
    [
        (Role.G, (2, 3), (2**24 - 2, 1), True),
        (Role.G, (2, 3), (2**24 - 1, 1), False),
        (Role.G, (2, 3), (2**23, 2**23), False),  # each fits, a corner of a tile doesn't
        (Role.G, (1, 3), (2**40, 1), True),
        (Role.G, (3, 1), (1, 2**40), True),  # nothing is reached by that stride
        (Role.A, (3, 1, 1), (2**24, 1, 1), False),
        (Role.A, (1, 3, 3), (2**40, 3, 1), True),
    ],
)
def test_strides_that_int32_cannot_hold(
    role: Role, shape: tuple[int, ...], strides: tuple[int, ...], served: bool
) -> None:
    m, n = shape if role is Role.G else (2, 3)
    plain = {Role.G: (m, n), Role.A: (n, n), Role.B: (m, m), Role.S: (m, n)}
    operands = {each: [torch.empty(*sides, device="meta")] for each, sides in plain.items()}
    operands[role] = [torch.empty_strided(shape, strides, device="meta")]
    if served:
        assert len(layers_of(operands, turn=False)) == 1
    else:
        with pytest.raises(Unserved, match=r"less than 2\*\*24"):
            layers_of(operands, turn=False)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter serves the CPU")
def test_the_cpu_isnt_served_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch._device_obstacle.cache_clear()
    layers = model(((5, 7),), torch.float32)
    with pytest.raises(ValueError, match=r"backend is 'triton', which can't serve .* TRITON_INTERPRET"):
        ak.foreach_precondition(*layers.operands, backend="triton")


@pytest.mark.interpret
def test_float64_isnt_served() -> None:
    layers = model(((5, 7),), torch.float64)
    with pytest.raises(ValueError, match=r"Gs\[0\] is float64"):
        ak.foreach_precondition(*layers.operands, backend="triton")


def test_the_cpu_is_atens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "requested", None)
    layers = model(((5, 7),), torch.float32)
    assert ak.explain(None, layers.Gs).startswith("aten: ")
    assert "no GPU" in ak.explain(None, layers.Gs)


@pytest.mark.interpret
@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3", "bf16x6"])
def test_a_precision_in_the_name(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = model(((5, 7),), torch.float32)
    monkeypatch.setattr(dispatch, "requested", f"triton:{precision}")
    assert_close(ak.foreach_precondition(*layers.operands)[0], layers.expected()[0], torch.float32)
    with pytest.raises(ValueError, match="backend must be None or one of"):
        ak.foreach_precondition(*layers.operands, backend="triton:fast")
