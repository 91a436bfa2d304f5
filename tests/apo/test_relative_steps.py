"""Relative meta-steps: their size, what they don't depend on, their state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from apo.relative_steps import RelativeSteps


def stepped(tensor: Tensor, grads: list[Tensor], *, block: bool, rate: float = 0.1) -> Tensor:
    """Where steps along these derivatives lead; a block's are made relative to where it is."""
    tensor = tensor.clone()
    steps = RelativeSteps([tensor], [rate], [block])
    for grad in grads:
        steps.step([tensor.mT @ grad if block else grad])
    return tensor


@pytest.mark.parametrize("shape", [(5, 5), (3, 4, 4)])
def test_a_block_changes_by_the_rates_share_whatever_the_gradients_scale(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    A, grad = torch.randn(2, *shape, dtype=torch.float64)
    for scale in (1e-30, 1.0, 1e30):
        change = torch.linalg.solve(A, stepped(A, [grad * scale], block=True)) - torch.eye(shape[-1])
        assert change.norm().item() == pytest.approx(0.1, rel=1e-9)
        assert torch.allclose(change, change.mT, atol=1e-12)
        # and downhill: to first order the change of Q is <grad, A change>
        assert (grad * (A @ change)).sum() < 0


def test_a_blocks_step_is_the_same_in_any_coordinates() -> None:
    torch.manual_seed(0)
    A, L, *grads = torch.randn(5, 4, 4, dtype=torch.float64)
    # A = L X, so that dX = Lᵀ dA
    X = torch.linalg.solve(L, A)
    expected = stepped(A, grads, block=True)
    assert torch.allclose(L @ stepped(X, [L.mT @ g for g in grads], block=True), expected, rtol=1e-9)


def test_scalings_step_in_their_logarithm() -> None:
    torch.manual_seed(0)
    S, *grads = torch.randn(4, 3, 5, dtype=torch.float64)
    expected = stepped(S, grads, block=False)
    scales = torch.logspace(-8, 8, 15, dtype=torch.float64).reshape(3, 5)
    found = stepped(S * scales, [g / scales for g in grads], block=False)
    assert torch.allclose(found, expected * scales, rtol=1e-12)
    first = stepped(S, grads[:1], block=False)
    assert torch.allclose((first / S).log(), -0.1 * (S * grads[0]).sign(), rtol=1e-9)


def test_gradients_of_zero_change_nothing() -> None:
    for block in (True, False):
        for dtype in (torch.float32, torch.float64):
            A = torch.randn(4, 4, dtype=dtype)
            assert torch.equal(stepped(A, [torch.zeros_like(A)], block=block), A)


def test_state_goes_on_to_the_bit() -> None:
    torch.manual_seed(0)
    start = [torch.randn(4, 4), torch.randn(2, 3, 3), torch.randn(4, 6)]
    grads = [[torch.randn_like(t) for t in start] for _ in range(6)]

    def made(tensors: list[Tensor]) -> RelativeSteps:
        return RelativeSteps(tensors, [0.1, 0.1, 0.03], [True, True, False])

    whole = [t.clone() for t in start]
    steps = made(whole)
    for g in grads[:3]:
        steps.step(g)
    steps.scale_rates(0.5)
    resumed = [t.clone() for t in whole]
    other = made(resumed)
    other.load_state_dict(copy.deepcopy(steps.state_dict()))
    for g in grads[3:]:
        steps.step(g)
        other.step(g)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
