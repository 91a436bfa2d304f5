"""The forward kernels against float64, in Triton's interpreter: every dtype, form of block, layout and epilogue."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import apo_kernels as ak
from apo_kernels import reference
from apo_kernels.aten import foreach_precondition_keep
from tests.apo_kernels.cases import make
from tests.apo_kernels.test_differentiable import TRANSFORMS
from tests.apo_kernels.triton.examples import DTYPES, EVEN, FORMS_BY_DTYPE, ODD, TOLERANCE, assert_close, model

pytest.importorskip("triton.language")
from apo_kernels.triton import config

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poison")]


@pytest.mark.parametrize(("dtype", "A", "B"), FORMS_BY_DTYPE)
def test_odd_shapes_in_one_call(dtype: torch.dtype, A: int | None, B: int | None) -> None:
    layers = model(ODD, dtype, A=A, B=B)
    found = ak.foreach_precondition(*layers.operands, backend="triton")
    for shape, Y, expected in zip(ODD, found, layers.expected(), strict=True):
        assert Y.dtype == dtype
        assert_close(Y, expected, dtype, f"{shape}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", [None, 64])
def test_operands_that_lie_well_are_used_as_they_are(dtype: torch.dtype, side: int | None) -> None:
    layers = model(EVEN, dtype, A=side, B=side)
    for Y, expected in zip(ak.foreach_precondition(*layers.operands, backend="triton"), layers.expected(), strict=True):
        assert_close(Y, expected, dtype)


@pytest.mark.parametrize("side", [None, 32])
def test_mixed_dtypes(side: int | None) -> None:
    layers = model(ODD, torch.bfloat16, A=side, B=side, block_dtype=torch.float32)
    more = model(EVEN, torch.float32, A=side, B=side)
    more.Ss = [S.half() for S in more.Ss]
    operands = [a + b for a, b in zip(layers.operands, more.operands, strict=True)]
    found = ak.foreach_precondition(*operands, backend="triton")
    for Y, expected in zip(found, layers.expected() + more.expected(), strict=True):
        assert_close(Y, expected, Y.dtype)


def strided(x: Tensor, how: str) -> Tensor:
    """``x`` in other strides, its neighbours in memory NaN."""
    if how == "transposed":
        return x.mT.contiguous().mT
    if how == "sliced":
        wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), torch.nan, dtype=x.dtype)
        wide[..., 1:-2] = x
        return wide[..., 1:-2]
    apart = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan, dtype=x.dtype)
    apart[..., ::2] = x
    return apart[..., ::2]


@pytest.mark.parametrize("how", ["transposed", "sliced", "spaced"])
@pytest.mark.parametrize("side", [None, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_operands(how: str, side: int | None, dtype: torch.dtype) -> None:
    layers = model(((33, 65), (72, 80)), dtype, A=side, B=side)
    operands = [[strided(x, how) for x in tensors] for tensors in layers.operands]
    for Y, expected in zip(ak.foreach_precondition(*operands, backend="triton"), layers.expected(), strict=True):
        assert_close(Y, expected, dtype)


def test_batches() -> None:
    G, S = torch.randn(2, 3, 9, 70), torch.randn(2, 3, 9, 70)
    A, B = torch.randn(2, 3, 70, 70), torch.randn(2, 3, 3, 4, 4)
    found = ak.precondition(G, A, B, S, backend="triton")
    assert_close(found, reference.precondition(*(x.double() for x in (G, A, B, S))), torch.float32)


def test_an_expanded_gradient() -> None:
    G = torch.ones(()).expand(40, 70)
    A, B, S = torch.randn(70, 70), torch.randn(40, 40), torch.randn(40, 70)
    found = ak.precondition(G, A, B, S, backend="triton")
    assert_close(found, reference.precondition(*(x.double() for x in (G, A, B, S))), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("A", "B"), [(None, None), (16, 16), (64, 8), (8, 64)])
def test_what_is_kept(dtype: torch.dtype, A: int | None, B: int | None) -> None:
    """As the path on ATen keeps it, ``B``'s side first where it is the wider."""
    layers = model(((33, 65), (130, 70), (7, 13)), dtype, A=A, B=B)
    Ys, kept = ak.foreach_precondition(*layers.operands, keep=True, backend="triton")
    wide = [[x.double() for x in tensors] for tensors in layers.operands]
    _, expected = foreach_precondition_keep(*wide)
    for Y, Y_expected in zip(Ys, layers.expected(), strict=True):
        assert_close(Y, Y_expected, dtype)
    for each, each_expected in zip(kept, expected, strict=True):
        for name, x, x_expected in zip("UMW", each, each_expected, strict=True):
            assert x.dtype == torch.float32
            assert_close(x, x_expected, dtype, name)


@pytest.mark.parametrize(("side_A", "side_B"), [(None, None), (8, 16)])
@pytest.mark.parametrize(
    ("dtype_A", "dtype_B"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)],
)
def test_what_is_kept_of_blocks_of_two_dtypes(
    side_A: int | None, side_B: int | None, dtype_A: torch.dtype, dtype_B: torch.dtype
) -> None:
    """Some layers are worked on transposed, beside others that aren't; and so through autograd, which keeps."""
    layers = model(((16, 8), (8, 16), (70, 33), (12, 12)), torch.float32, A=side_A, B=side_B)
    layers.As = [A.to(dtype_A) for A in layers.As]
    layers.Bs = [B.to(dtype_B) for B in layers.Bs]
    _, expected = foreach_precondition_keep(*([x.double() for x in tensors] for tensors in layers.operands))
    Ys, kept = ak.foreach_precondition(*layers.operands, keep=True, backend="triton")
    for each, each_expected in zip(kept, expected, strict=True):
        for name, x, x_expected in zip("UMW", each, each_expected, strict=True):
            assert_close(x, x_expected, torch.float32, name)
    As = [A.clone().requires_grad_() for A in layers.As]
    watched = ak.foreach_precondition(layers.Gs, As, layers.Bs, layers.Ss, backend="triton")
    for Y, same, Y_expected in zip(Ys, watched, layers.expected(), strict=True):
        assert_close(Y, Y_expected, torch.float32)
        assert_close(same.detach(), Y_expected, torch.float32)


@pytest.mark.parametrize("name", ["Gs", "As", "Bs", "Ss", "Vs"])
@pytest.mark.parametrize("side", [None, 8])
def test_lazily_negated_operands(name: str, side: int | None) -> None:
    """Their memory holds the opposite of what they are."""
    layers = model(((12, 20),), torch.float32, A=side, B=side)
    setattr(layers, name, [torch._neg_view(x) for x in getattr(layers, name)])
    (found,) = ak.foreach_precondition(*layers.operands, backend="triton")
    assert_close(found, layers.expected()[0], torch.float32)
    (grads,) = ak.foreach_precondition_vjp(*layers.operands, layers.Vs, wanted="GABS", backend="triton")
    for letter, x in zip("GABS", grads, strict=True):
        assert_close(x, layers.expected_vjp()[0][letter], torch.float32, letter)


@pytest.mark.parametrize("side", [None, 16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("momentum", "buffer", "decay", "tensor_lr"),
    [(0.0, False, 0.0, False), (0.9, True, 0.1, True), (0.0, True, 0.0, True), (0.5, True, 0.0, False)],
)
def test_the_update(
    side: int | None, dtype: torch.dtype, momentum: float, buffer: bool, decay: float, tensor_lr: bool
) -> None:
    shapes = ((1, 1), (7, 13), (33, 65), (0, 5), (66, 130))
    layers = model(shapes, dtype, A=side, B=side, scale=1.0)
    thetas = [torch.randn(m, n).to(dtype) for m, n in shapes]
    thetas[2] = thetas[2].mT.contiguous().mT
    # At momentum 0 the buffers' content isn't to be read.
    buffers = [torch.randn(m, n) if momentum else torch.full((m, n), torch.nan) for m, n in shapes]
    expected = [
        reference.precondition_step(
            theta.double(), *(x.double() for x in each), lr=0.1, momentum=momentum,
            momentum_buffer=v.double() if momentum else None, weight_decay=decay,
        )
        for theta, v, *each in zip(thetas, buffers, *layers.operands, strict=True)
    ]  # fmt: skip
    started = [theta.double() for theta in thetas]
    ak.foreach_precondition_step_(
        thetas,
        *layers.operands,
        lr=torch.tensor(0.1) if tensor_lr else 0.1,
        momentum=momentum,
        momentum_buffers=buffers if buffer else None,
        weight_decay=decay,
        backend="triton",
    )
    directions = layers.expected()
    for theta, v, old, P, (theta_expected, v_expected) in zip(
        thetas, buffers, started, directions, expected, strict=True
    ):
        assert_close(theta, theta_expected, dtype, "θ", (old, 0.1 * P))
        if buffer:
            assert_close(v, v_expected, dtype, "v", (P,))


def test_a_graph_from_before_the_update_refuses_to_go_back() -> None:
    layers = model(((7, 13), (33, 65)), torch.float32, A=None, B=None, scale=1.0)
    thetas = [torch.randn(G.shape, requires_grad=True) for G in layers.operands[0]]
    squares = [theta.square().sum() for theta in thetas]
    with torch.no_grad():
        ak.foreach_precondition_step_(thetas, *layers.operands, lr=0.1, backend="triton")
    for square in squares:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            square.backward()


@pytest.mark.parametrize(("side_A", "side_B"), [(100, None), (None, 100), (72, 136)])
def test_each_weight_is_stepped_once(side_A: int | None, side_B: int | None) -> None:
    """Also where a tile of the grouped GEMM reaches beyond its square, into what another product writes."""
    layers = model(((66, 300), (300, 66)), torch.float32, A=side_A, B=side_B, scale=1.0)
    thetas, buffers = [torch.randn_like(G) for G in layers.Gs], [torch.randn_like(G) for G in layers.Gs]
    expected = [
        reference.precondition_step(
            theta.double(), *(x.double() for x in each), lr=0.1, momentum=0.9, momentum_buffer=v.double(),
            weight_decay=0.1,
        )
        for theta, v, *each in zip(thetas, buffers, *layers.operands, strict=True)
    ]  # fmt: skip
    ak.foreach_precondition_step_(
        thetas, *layers.operands, lr=0.1, momentum=0.9, momentum_buffers=buffers, weight_decay=0.1, backend="triton"
    )
    for theta, v, (theta_expected, v_expected) in zip(thetas, buffers, expected, strict=True):
        assert_close(theta, theta_expected, torch.float32, "θ")
        assert_close(v, v_expected, torch.float32, "v")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slab", [16, 32, 64])
def test_slabs_of_a_tile(dtype: torch.dtype, slab: int) -> None:
    layers = model(((33, 65), (64, 50)), dtype, A=64, B=64)
    with config.override(tile_forward={"slab": slab}):
        found = ak.foreach_precondition(*layers.operands, backend="triton")
    for Y, expected in zip(found, layers.expected(), strict=True):
        assert_close(Y, expected, dtype)


def test_small_tiles_of_the_gemm_give_what_large_ones_do() -> None:
    """Many tiles a product, several turns of the loop, remainders in all three directions."""
    layers = model(((68, 30),), torch.float32)
    small = {"rows": 32, "cols": 16, "depth": 16}
    with config.override(right=small, scale=small, left=small, out=small):
        found = ak.foreach_precondition(*layers.operands, backend="triton")
    assert_close(found[0], layers.expected()[0], torch.float32)


@pytest.mark.parametrize("side", [None, 64])
@pytest.mark.parametrize("scale", [1e-6, 1e-4, 1e-2, 3.0])
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_float16_keeps_its_accuracy_at_any_scale(side: int | None, scale: float, spread: float) -> None:
    """Gradients down to 1e-7 and S from 1e-3 to 1e2; the result is widened, for it would leave float16's range."""
    layers = model(((96, 120),), torch.float16, A=side, B=side, scale=scale, spread=spread)
    _, kept = ak.foreach_precondition(*layers.operands, keep=True, backend="triton")
    G, A, B, S = ([x.double() for x in tensors] for tensors in layers.operands)
    _, expected = foreach_precondition_keep(G, A, B, S)
    for name, x, x_expected in zip("UMW", kept[0], expected[0], strict=True):
        error = (x.double() - x_expected).norm() / x_expected.norm()
        assert error <= TOLERANCE[torch.float16] / 2, f"{name} {error:.1e}"


@pytest.mark.parametrize("how", ["jvp", "dual", "grad", "vmap"])
def test_transforms_are_served_by_the_definition(how: str) -> None:
    layer = make(3, 4, 2, None, dtype=torch.float32)

    def of(f: Callable[..., Tensor], **options: str) -> Callable[..., Tensor]:
        return lambda S: f(*layer.operands[:3], S, **options)

    found = TRANSFORMS[how](of(ak.precondition, backend="triton"), layer.S, layer.V)
    expected = TRANSFORMS[how](of(reference.precondition), layer.S, layer.V)
    torch.testing.assert_close(found, expected)
