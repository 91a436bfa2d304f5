"""When Triton's kernels serve, and what happens when they fail."""

from __future__ import annotations

import pytest
import torch

import apo_kernels as ak
from apo_kernels import dispatch
from apo_kernels.dispatch import Choice
from tests.apo_kernels.triton.conftest import INTERPRETED
from tests.apo_kernels.triton.examples import Model, assert_close, model

pytest.importorskip("triton.language")
from apo_kernels.triton.backend import TritonBackend
from apo_kernels.triton.errors import Interrupted, Unserved
from apo_kernels.triton.launch import Launch
from apo_kernels.triton.layers import layers_of
from apo_kernels.triton.table_layout import Role


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


def two_groups(side: int | None = None) -> tuple[list[torch.Tensor], Model]:
    """Weights at 1, and layers of two dtypes."""
    layers, more = model(((8, 8),), torch.float32, A=side, B=side), model(((2, 8),), torch.bfloat16, A=side, B=side)
    both = Model(*(getattr(layers, name) + getattr(more, name) for name in ("Gs", "As", "Bs", "Ss", "Vs")))
    return [torch.ones_like(G) for G in both.Gs], both


def far_apart(x: torch.Tensor) -> torch.Tensor:
    """In strides that these kernels don't take."""
    wide = torch.empty((2, 2**24 + 8), dtype=x.dtype)[:, : x.shape[1]]
    return wide.copy_(x)


def assert_stepped_once(thetas: list[torch.Tensor], layers: Model, lr: float) -> None:
    for theta, P in zip(thetas, layers.expected(), strict=True):
        assert_close(theta, 1 - lr * P, theta.dtype)


@pytest.mark.interpret
def test_a_group_that_isnt_served_leaves_all_weights_as_they_were() -> None:
    thetas, layers = two_groups()
    layers.Gs[1] = far_apart(layers.Gs[1])
    with pytest.raises(Unserved, match="less than"):
        ak.foreach_precondition_step_(thetas, *layers.operands, lr=0.5, backend="triton")
    assert all((theta == 1).all() for theta in thetas)


@pytest.mark.interpret
def test_a_group_that_isnt_served_is_stepped_once_by_aten(chosen: None) -> None:
    thetas, layers = two_groups()
    layers.Gs[1] = far_apart(layers.Gs[1])
    with pytest.warns(RuntimeWarning, match="aten serves a call"):
        ak.foreach_precondition_step_(thetas, *layers.operands, lr=0.5)
    assert_stepped_once(thetas, layers, 0.5)


@pytest.mark.interpret
@pytest.mark.parametrize("side", [None, 8])
def test_a_group_that_doesnt_compile_is_stepped_once_by_aten(
    side: int | None, chosen: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    thetas, layers = two_groups(side)
    compiled: list[str] = []

    def refuse(launch: Launch, run: object) -> None:
        compiled.append(launch.name)
        if compiled.count(launch.name) == 2:
            raise RuntimeError("no such instruction")

    monkeypatch.setattr(Launch, "compile", refuse)
    with pytest.warns(RuntimeWarning, match="no such instruction"):
        ak.foreach_precondition_step_(thetas, *layers.operands, lr=0.5)
    assert_stepped_once(thetas, layers, 0.5)


@pytest.mark.interpret
def test_a_launch_that_fails_after_a_weight_was_stepped_is_raised(chosen: None, no_second_launch: None) -> None:
    """By the guard too: a fallback would step that weight again."""
    thetas, layers = two_groups()
    with pytest.raises(Interrupted, match=r"after some weights had been stepped: .*too many resources"):
        ak.foreach_precondition_step_(thetas, *layers.operands, lr=0.5)
    assert_close(thetas[0], 1 - 0.5 * layers.expected()[0], torch.float32)
    assert (thetas[1] == 1).all()
    assert dispatch._failure is None


@pytest.mark.interpret
def test_a_bound_step_that_fails_is_atens_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    thetas, layers = two_groups()
    monkeypatch.setattr("apo_kernels.functional.serving", lambda *_: Choice("triton", "", forced=False).backend)
    monkeypatch.setattr(dispatch, "_failure", None)
    step = ak.BoundStep(thetas, *layers.operands)
    monkeypatch.setattr(Launch, "compile", fails(RuntimeError("no such instruction")))
    with pytest.warns(RuntimeWarning, match="aten serves from now on .*no such instruction"):
        step(lr=0.5)
    assert_stepped_once(thetas, layers, 0.5)
    step(lr=0.5)
    assert_stepped_once(thetas, layers, 1.0)


@pytest.mark.interpret
def test_a_tensor_without_an_address_is_refused_by_name() -> None:
    """A subclass may say so of itself, whatever it holds."""

    class Elsewhere(torch.Tensor):
        def data_ptr(self) -> int:
            return 0

    layers = model(((5, 7),), torch.float32)
    layers.As[0] = layers.As[0].as_subclass(Elsewhere)
    with pytest.raises(TypeError, match="number 0 of A, a Elsewhere, has no address"):
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
