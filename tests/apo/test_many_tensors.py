"""Copies, inner products and norms of many tensors, which go by few operations whatever their number."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from apo import inner_products
from apo.trial import copies_of, write
from apo.trial.contents import Content
from apo.wrapped.snapshot import Gradients, OptimizerSnapshot
from tests.apo.test_operations import Operations


def drawn(count: int, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> list[Tensor]:
    return [torch.randn(3, i % 4 + 1).to(dtypes[i % len(dtypes)]) for i in range(count)]


def of_every_kind() -> list[Tensor]:
    with torch.inference_mode():
        inference = torch.randn(3)
    return [
        *drawn(6, (torch.float32, torch.bfloat16, torch.float64)),
        nn.Parameter(torch.randn(2, 3)),
        torch.arange(4),
        torch.randn(4, 6).t()[1:3],
        torch.randn(3, 1).expand(3, 4),
        torch.eye(3).to_sparse(),
        torch.empty(0, 2),
        torch.randn(3, dtype=torch.complex64).conj(),
        inference,
    ]


def test_copies_hold_what_the_tensors_held() -> None:
    tensors = of_every_kind()
    wanted = [x.detach().clone() for x in tensors]
    found = copies_of(tensors)
    for x, copy, own in zip(tensors, found, wanted, strict=True):
        assert (copy.dtype, copy.shape, copy.layout, copy.requires_grad) == (x.dtype, x.shape, x.layout, False)
        assert torch.equal(copy.to_dense(), own.to_dense())
        if x.layout is torch.strided:
            assert copy.stride() == own.stride()
            assert x.numel() == 0 or copy.data_ptr() != x.data_ptr()


def test_what_was_copied_is_written_back() -> None:
    tensors = [x for x in of_every_kind() if not x.is_inference() and 0 not in x.stride()]
    wanted = copies_of(tensors)
    with torch.no_grad():
        for x in tensors:
            x.zero_()
    write(tensors, wanted)
    assert all(torch.equal(x.to_dense(), own.to_dense()) for x, own in zip(tensors, wanted, strict=True))


def of_an_optimizer(tensors: list[Tensor]) -> None:
    """Its state and gradients, taken and put back."""
    parameters = [nn.Parameter(x) for x in tensors]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    for p, x in zip(parameters, tensors, strict=True):
        p.grad, optimizer.state[p] = x, {"momentum_buffer": x.detach()}
    for each in (OptimizerSnapshot(optimizer), Gradients(parameters)):
        each.restore()


def of_buffers(tensors: list[Tensor]) -> None:
    """As a trial holds them."""
    Content.of(tensors)


@pytest.mark.parametrize(
    "work",
    [
        lambda xs: write(xs, copies_of(xs)),
        lambda xs: inner_products._together(xs, xs),
        lambda xs: inner_products.norms(xs),
        of_an_optimizer,
        of_buffers,
    ],
    ids=["copies", "inner products", "norms", "an optimizer", "buffers"],
)
def test_operations_do_not_grow_with_their_number(work: Callable[[list[Tensor]], object]) -> None:
    counts = []
    for number in (2, 20):
        tensors = drawn(number)
        with Operations() as found:
            work(tensors)
        counts.append(found.counts.total())
    assert counts[0] == counts[1] <= 8


@pytest.mark.parametrize("of_pairs", [inner_products.inner_products, inner_products._together])
@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float64,), (torch.bfloat16, torch.float32)])
def test_inner_products(
    of_pairs: Callable[[list[Tensor], list[Tensor]], Tensor], dtypes: tuple[torch.dtype, ...]
) -> None:
    torch.manual_seed(0)
    xs, ys = drawn(7, dtypes), drawn(7)
    found = of_pairs(xs, ys)
    wanted = torch.stack([(x.double() * y.double()).sum() for x, y in zip(xs, ys, strict=True)])
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)
    assert found.dtype is torch.promote_types(dtypes[0], torch.float32)
    xs[3][0] = math.nan
    assert of_pairs(xs, ys).isnan().tolist() == [i == 3 for i in range(7)]
