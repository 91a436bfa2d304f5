"""Device functions that must be exact, entry by entry, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton.language")
import triton
import triton.language as tl

from apo_kernels.triton.primitives import power_of_two, storable

pytestmark = pytest.mark.interpret


@triton.jit
def round_all(x, y, TYPE: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, N)
    tl.store(y + at, storable(tl.load(x + at), TYPE))


@triton.jit
def scale_all(x, k, inverse, TARGET: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, N)
    scale, undo = power_of_two(tl.load(x + at), TARGET)
    tl.store(k + at, scale)
    tl.store(inverse + at, undo)


@pytest.mark.parametrize(("dtype", "type_"), [(torch.bfloat16, tl.bfloat16), (torch.float16, tl.float16)])
def test_rounding_is_that_of_torch(dtype: torch.dtype, type_: object) -> None:
    """To nearest, ties to even, with infinities and the numbers that round to them."""
    near = torch.randn(4096)
    ties = (near.to(dtype).float() * (1 + torch.finfo(dtype).eps / 2)).float()
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.finfo(dtype).max, 1e-30, -3e-8, 6e-8])
    x = torch.cat([near, ties, special.repeat(1024)])
    y = torch.empty(x.shape, dtype=dtype)
    round_all[(1,)](x, y, type_, x.numel())
    assert torch.equal(y, x.to(dtype))
    nan = torch.full((16,), torch.nan)
    round_all[(1,)](nan, found := torch.empty(16, dtype=dtype), type_, 16)
    assert found.isnan().all()


@pytest.mark.parametrize("target", [2, 4])
def test_powers_of_two(target: int) -> None:
    x = torch.cat([2.0 ** torch.linspace(-100, 100, 1023), torch.tensor([0.0])])
    k, inverse = torch.empty_like(x), torch.empty_like(x)
    scale_all[(1,)](x, k, inverse, target, x.numel())
    assert torch.equal(k * inverse, torch.ones_like(x))
    assert (k.log2() == k.log2().round()).all()
    scaled = (x * k)[:-1]
    assert ((scaled >= 2**target) & (scaled < 2 ** (target + 1))).all()
    assert k.isfinite().all()
