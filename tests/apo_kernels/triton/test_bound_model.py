"""What a bound model's calls look at each time, in Triton's interpreter beside ATen."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import apo_kernels as ak

pytest.importorskip("triton.language")
from tests.apo_kernels.triton.whole_models import layers, step

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poison")]


def square(backend: str) -> ak.ModelPreconditioner:
    eye = torch.eye(6)
    return ak.ModelPreconditioner([eye], [eye.clone()], [torch.ones(6, 6)], widths=[(6,)], backend=backend)


ONCE: dict[str, Any] = {"lr": [1.0], "momentum": [0.0], "weight_decay": [0.0]}


@pytest.mark.parametrize("backend", ["aten", "triton"])
@pytest.mark.parametrize("form", ["strides", "dtype", "buffer", "buffer in place", "weight in place"])
def test_tensors_at_known_places_but_of_another_form_are_written_as_they_are(backend: str, form: str) -> None:
    bound, G, memory = square(backend), torch.randn(6, 6), torch.zeros(36)
    theta, v = memory.view(6, 6), torch.zeros(6, 6)
    bound.step_([(theta,)], [(G,)], [v], **ONCE)
    memory.zero_()
    if form == "strides":
        theta = theta.t()
    elif form == "dtype":
        theta = torch.empty(0, dtype=torch.bfloat16).set_(memory.untyped_storage(), 0, (6, 6), (6, 1))
    elif form == "buffer":
        v = v.t()
    elif form == "buffer in place":
        v.t_()
    else:
        theta.t_()
    bound.step_([(theta,)], [(G,)], [v], **ONCE)
    assert torch.allclose(theta.float(), -G, atol=0.05)
    assert torch.allclose(v, G)


@pytest.mark.parametrize("backend", ["aten", "triton"])
@pytest.mark.parametrize("name", ["thetas", "Gs", "momentum_buffers", "momentum_buffers in place"])
def test_tensors_at_known_places_but_of_another_shape_are_refused(backend: str, name: str) -> None:
    bound, memory, (theta, G, v) = square(backend), torch.zeros(6, 9), torch.zeros(3, 6, 6)
    tensors = {"thetas": theta, "Gs": G, "momentum_buffers": v}
    which = name.split()[0]

    def step() -> None:
        parts = {key: [x] if key == "momentum_buffers" else [(x,)] for key, x in tensors.items()}
        bound.step_(*parts.values(), **ONCE)

    tensors[which] = memory[:, :6]
    step()
    if "in place" in name:
        tensors[which].set_(memory.untyped_storage(), 0, (4, 9), (9, 1))
    else:
        tensors[which] = memory[:, :4]
    with pytest.raises(ValueError, match=rf"{which}\[0\].* must be a .*tensor of shape \(6, 6\)"):
        step()
    assert not memory.any()


@pytest.mark.parametrize("entry", [1e20, torch.nan])
def test_without_a_bound_a_wide_layer_stops_no_other(entry: float) -> None:
    eye = torch.eye
    Ss = [torch.ones(4, 4), torch.ones(3, 70)]
    bound = ak.ModelPreconditioner([eye(4), eye(70)], [eye(4), eye(3)], Ss, widths=[(4,), (70,)], backend="triton")
    thetas = [torch.zeros_like(S) for S in Ss]
    Gs = [(torch.ones(4, 4),), (torch.full((3, 70), entry),)]
    twice: dict[str, Any] = {name: numbers * 2 for name, numbers in ONCE.items()}
    assert bound.step_([(x,) for x in thetas], Gs, [None] * 2, **twice).item() == 1
    assert (thetas[0] == -1).all()
    assert torch.equal(thetas[1].isnan(), Gs[1][0].isnan())
    narrow = [torch.full((4, 4), entry)]
    thetas = [torch.zeros_like(S) for S in Ss]
    bound.step_([(x,) for x in thetas], [tuple(narrow), (torch.ones(3, 70),)], [None] * 2, **twice)
    assert (thetas[1] == -1).all()


def test_a_process_without_gradients_and_nothing_to_promise() -> None:
    own = layers([(7, 12)], torch.float32)
    own.Gs = [None]
    assert step(own, own.bind(), 0.0, total=lambda x: x).item() == 1


@pytest.mark.parametrize("backend", ["aten", "triton"])
def test_nothing_to_promise_keeps_a_promise_of_nothing(backend: str) -> None:
    """Zero gradients: momentum is carried."""
    bound, theta, v = square(backend), torch.zeros(6, 6), torch.ones(6, 6)
    settings = {**ONCE, "momentum": [0.5]}
    assert bound.step_([(theta,)], [(torch.zeros(6, 6),)], [v], **settings, most=0.0, shares=[1.0]).item() == 1
    assert (theta == -0.5).all()
