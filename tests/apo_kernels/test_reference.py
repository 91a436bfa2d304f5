"""The specification against the paper's own words: vec(P(G)) = (A ⊗ B) diag(vec(S))² (A ⊗ B)ᵀ vec(G), Eq. 9."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import apo_kernels as ak
from apo_kernels import reference
from tests.apo_kernels.cases import make, relative_error


@pytest.mark.parametrize(("b_A", "b_B"), [(None, None), (3, None), (2, 4), (1, 1), (9, 9)])
def test_forward_is_equation_9(b_A: int | None, b_B: int | None) -> None:
    layer = make(4, 7, b_A, b_B)
    A = layer.A if b_A is None else ak.blocks_to_dense(layer.A, 7)
    B = layer.B if b_B is None else ak.blocks_to_dense(layer.B, 4)
    # Column-major vec, as in the paper: vec(BXAᵀ) = (A ⊗ B) vec(X).
    basis = torch.kron(A.contiguous(), B.contiguous())
    P = basis @ torch.diag(layer.S.mT.flatten() ** 2) @ basis.mT
    expected = (P @ layer.G.mT.flatten()).reshape(7, 4).mT
    assert relative_error(reference.precondition(*layer.operands), expected) < 1e-13


@pytest.mark.parametrize(("b_A", "b_B"), [(None, None), (3, None), (2, 4), (1, 1), (9, 9)])
def test_derivatives_are_autograds(b_A: int | None, b_B: int | None) -> None:
    layer = make(4, 7, b_A, b_B)
    leaves = [x.requires_grad_() for x in layer.operands]
    expected = torch.autograd.grad(reference.precondition(*leaves), leaves, layer.V)
    found = reference.precondition_vjp(*layer.operands, layer.V)
    assert all(relative_error(f, e) < 1e-13 for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize(("b_A", "b_B"), [(None, None), (3, None), (2, 4), (1, 1), (9, 9)])
def test_relative_derivatives_are_autograds_at_blocks_times_one_and_a_bit(b_A: int | None, b_B: int | None) -> None:
    layer = make(4, 7, b_A, b_B)
    E_A, E_B = torch.zeros_like(layer.A).requires_grad_(), torch.zeros_like(layer.B).requires_grad_()
    A, B = (layer.A if b_A is None else whole(layer.A, 7)), (layer.B if b_B is None else whole(layer.B, 4))
    Y = reference.precondition(layer.G, A + A @ E_A, B + B @ E_B, layer.S)
    expected = torch.autograd.grad(Y, (E_A, E_B), layer.V)
    _, found_A, found_B, _ = reference.precondition_vjp(*layer.operands, layer.V, relative=True)
    assert relative_error(found_A, expected[0]) < 1e-13
    assert relative_error(found_B, expected[1]) < 1e-13


def whole(stack: Tensor, side: int) -> Tensor:
    """With zeros where the last square sticks out."""
    return ak.blocks_from_dense(ak.blocks_to_dense(stack, side), stack.shape[-1])


def test_step_is_sgd_where_the_preconditioner_is_the_identity() -> None:
    theta, G = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    weight = theta.clone().requires_grad_()
    sgd = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    eye = [torch.eye(5, dtype=torch.float64), torch.eye(3, dtype=torch.float64), torch.ones_like(G)]
    buffer = torch.zeros_like(G)
    for _ in range(3):
        weight.grad = G.clone()
        sgd.step()
        theta, buffer = reference.precondition_step(theta, G, *eye, lr=0.1, momentum=0.9, momentum_buffer=buffer)
    assert relative_error(theta, weight.detach()) < 1e-14
