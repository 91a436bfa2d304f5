"""Block-diagonal stacks and the matrices that they stand for."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import apo_kernels as ak


@given(size=st.integers(0, 40), b=st.integers(1, 50), batch=st.sampled_from([(), (2,), (2, 3)]))
def test_dense_and_back(size: int, b: int, batch: tuple[int, ...]) -> None:
    stack = torch.randn(*batch, -(-size // b), b, b)
    dense = ak.blocks_to_dense(stack, size)
    assert dense.shape == (*batch, size, size)
    again = ak.blocks_from_dense(dense, b)
    assert torch.equal(ak.blocks_to_dense(again, size), dense)
    # What sticks out of the matrix is dropped, nothing else is.
    whole = size // b
    assert torch.equal(again[..., :whole, :, :], stack[..., :whole, :, :])


def test_dense_is_block_diag() -> None:
    stack = torch.randn(3, 4, 4)
    assert torch.equal(ak.blocks_to_dense(stack, 10), torch.block_diag(*stack)[:10, :10])


@pytest.mark.parametrize("b", [None, 1, 3, 4, 20])
def test_identity_block_is_the_identity(b: int | None) -> None:
    block = ak.identity_block(10, b, scale=0.5, dtype=torch.float64)
    dense = block if b is None else ak.blocks_to_dense(block, 10)
    assert torch.equal(dense, 0.5 * torch.eye(10, dtype=torch.float64))


def test_dense_is_differentiable() -> None:
    stack = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ak.blocks_to_dense(x, 5), stack)


def test_by_square_cuts_a_side_as_the_blocks_do() -> None:
    side = torch.arange(1.0, 11.0).view(2, 5)
    found = ak.by_square(side, torch.zeros(2, 3, 2, 2))
    assert torch.equal(found, torch.tensor([[[1.0, 2], [3, 4], [5, 0]], [[6, 7], [8, 9], [10, 0]]]))
    assert ak.by_square(side, torch.zeros(2, 5, 5)) is side


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: ak.identity_block(4, scale=math.nan), "scale must be finite, but is nan"),
        (lambda: ak.identity_block(4, 2, scale=True), "scale must be a number, but got True"),
        (lambda: ak.precondition_flops(4, -1), "n must be at least 0, but got -1"),
        (lambda: ak.precondition_flops(4.0, 4), "m must be an int"),
        (lambda: ak.precondition_flops(4, 4, 0), "block_size_A must be at least 1, but got 0"),
        (lambda: ak.precondition_vjp_flops(4, 4, None, 0), "block_size_B must be at least 1"),
        (lambda: ak.precondition_vjp_flops(4, 4, batch=-1), "batch must be at least 0"),
        (
            lambda: ak.precondition_vjp_flops(4, 4, wanted="V"),
            "wanted must be one or more different letters from 'GABS', but got 'V'",
        ),
    ],
)
def test_what_the_small_functions_refuse(call: Callable[[], object], match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        call()
