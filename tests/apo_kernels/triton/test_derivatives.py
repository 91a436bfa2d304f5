"""The derivatives' kernels against float64, in Triton's interpreter."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

import apo_kernels as ak
from tests.apo_kernels.test_functional import check_what_sticks_out
from tests.apo_kernels.triton.examples import DTYPES, EVEN, FORMS_BY_DTYPE, ODD, TOLERANCE, Model, assert_close, model
from tests.apo_kernels.triton.test_forward import strided

pytest.importorskip("triton.language")
from apo_kernels.triton import config

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poison")]


def check(layers: Model, dtype: torch.dtype, wanted: str = "GABS", *, relative: bool = False) -> None:
    found = ak.foreach_precondition_vjp(*layers.operands, layers.Vs, wanted=wanted, relative=relative, backend="triton")
    for G, each, expected in zip(layers.Gs, found, layers.expected_vjp(relative=relative), strict=True):
        for letter, x in zip(wanted, each, strict=True):
            assert x.dtype == torch.float32
            assert x.is_contiguous()
            assert_close(x, expected[letter], dtype, f"d{letter} of {tuple(G.shape)}")


@pytest.mark.parametrize(("dtype", "A", "B"), FORMS_BY_DTYPE)
def test_odd_shapes_in_one_call(dtype: torch.dtype, A: int | None, B: int | None) -> None:
    check(model(ODD, dtype, A=A, B=B), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", [None, 64])
def test_operands_that_lie_well_are_used_as_they_are(dtype: torch.dtype, side: int | None) -> None:
    check(model(EVEN, dtype, A=side, B=side), dtype)


@pytest.mark.parametrize("wanted", ["".join(w) for k in (1, 2, 3) for w in combinations("GABS", k)])
@pytest.mark.parametrize("side", [None, 16])
def test_what_isnt_wanted_changes_nothing(wanted: str, side: int | None) -> None:
    check(model(((33, 70), (7, 13)), torch.float32, A=side, B=side), torch.float32, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("A", "B"), [(None, None), (16, None), (1, 30)])
@pytest.mark.parametrize("wanted", ["GABS", "BS"])
def test_relative_to_the_blocks(dtype: torch.dtype, A: int | None, B: int | None, wanted: str) -> None:
    check(model(((33, 70), (7, 13), (0, 5)), dtype, A=A, B=B), dtype, wanted, relative=True)


def test_what_sticks_out_of_a_side_is_not_read() -> None:
    check_what_sticks_out("triton")


@pytest.mark.parametrize("how", ["transposed", "sliced", "spaced"])
@pytest.mark.parametrize("side", [None, 30])
def test_strided_operands(how: str, side: int | None) -> None:
    plain = model(((33, 65), (72, 80)), torch.bfloat16, A=side, B=side)
    lists = (plain.Gs, plain.As, plain.Bs, plain.Ss, plain.Vs)
    check(Model(*([strided(x, how) for x in tensors] for tensors in lists)), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slab", [16, 32])
def test_slabs_of_a_tile(dtype: torch.dtype, slab: int) -> None:
    with config.override(tile_backward={"slab": slab, "split": slab // 32}):
        check(model(((33, 65), (64, 50)), dtype, A=64, B=64), dtype)


def test_small_tiles_of_the_gemm_give_what_large_ones_do() -> None:
    small = {"rows": 32, "cols": 16, "depth": 16}
    with config.override(right=small, pair=small, left_dB=small, dA_dG=small):
        check(model(((68, 30),), torch.float32), torch.float32)


@pytest.mark.parametrize("side", [None, 8])
def test_the_same_bits_in_every_run(side: int | None) -> None:
    layers = model(((130, 200),), torch.float32, A=side, B=side)
    first, second = (ak.foreach_precondition_vjp(*layers.operands, layers.Vs, backend="triton")[0] for _ in range(2))
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("side", [None, 64])
@pytest.mark.parametrize(("scale_G", "scale_V"), [(1e-6, 1e-6), (1e-6, 3.0), (3.0, 1e-5), (1e-2, 1e-2)])
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_float16_keeps_its_accuracy_at_any_scale(
    side: int | None, scale_G: float, scale_V: float, spread: float
) -> None:
    layers = model(((96, 120),), torch.float16, A=side, B=side, scale=scale_G, spread=spread)
    layers.Vs = [(torch.randn(96, 120) * scale_V).half()]
    found = ak.foreach_precondition_vjp(*layers.operands, layers.Vs, wanted="GABS", backend="triton")[0]
    for letter, x in zip("GABS", found, strict=True):
        expected = layers.expected_vjp()[0][letter]
        error = (x.double() - expected).norm() / expected.norm()
        assert error <= TOLERANCE[torch.float16], f"d{letter} {error:.1e}"


@pytest.mark.parametrize("side", [None, 64])
def test_float16_scales_by_magnitudes_not_by_values(side: int | None) -> None:
    """Largest where negative, in the operands and in their products."""
    layers = model(((40, 66),), torch.float16, A=side, B=side)
    layers.Gs, layers.Ss, layers.Vs = ([-x.abs() * 100 for x in xs] for xs in (layers.Gs, layers.Ss, layers.Vs))
    layers.As = [x.abs() for x in layers.As]
    layers.Bs = [x.abs() for x in layers.Bs]
    check(layers, torch.float16)


@pytest.mark.parametrize("side", [None, 8])
def test_through_autograd(side: int | None) -> None:
    layers = model(((12, 70),), torch.float32, A=side, B=side)
    leaves = [tensors[0].requires_grad_() for tensors in layers.operands]
    ak.precondition(*leaves, backend="triton").backward(layers.Vs[0])
    for x, letter in zip(leaves, "GABS", strict=True):
        assert x.grad is not None
        with torch.no_grad():
            assert_close(x.grad, layers.expected_vjp()[0][letter], torch.float32, letter)
