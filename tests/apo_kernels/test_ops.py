"""The operator under autograd, opcheck, torch.compile and the FLOP counter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import get_first_incompatible_cudagraph_node
from torch.utils.flop_counter import FlopCounterMode

import apo_kernels as ak
from tests.apo_kernels.cases import Layer, make, relative_error

FORMS = [(None, None), (3, None), (None, 2), (3, 2), (1, 1), (9, 9)]
SHAPES = [(5, 7), (7, 5)]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def watched(layer: Layer) -> list[Tensor]:
    return [x.requires_grad_() for x in layer.operands]


@pytest.mark.parametrize(("b_A", "b_B"), FORMS)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_gradcheck_of_all_operands(m: int, n: int, b_A: int | None, b_B: int | None) -> None:
    operands = watched(make(m, n, b_A, b_B))
    assert torch.autograd.gradcheck(ak.precondition, operands)
    assert torch.autograd.gradcheck(torch.ops.apo_kernels.precondition, operands)


@pytest.mark.parametrize(("b_A", "b_B"), FORMS)
def test_gradgradcheck_of_all_operands(b_A: int | None, b_B: int | None) -> None:
    assert torch.autograd.gradgradcheck(ak.precondition, watched(make(3, 4, b_A, b_B)))


def test_gradcheck_of_batches_and_lists() -> None:
    assert torch.autograd.gradcheck(ak.precondition, watched(make(3, 4, 2, None, batch=(2,))))
    first, second = watched(make(3, 4)), watched(make(5, 2, 2, 1))

    def both(*flat: Tensor) -> tuple[Tensor, ...]:
        return tuple(ak.foreach_precondition(*([flat[i], flat[i + 4]] for i in range(4))))

    assert torch.autograd.gradcheck(both, (*first, *second))


@pytest.mark.parametrize("name", "GABS")
def test_one_operand_alone_can_be_watched(name: str) -> None:
    layer = make(4, 6, 4, None)
    getattr(layer, name).requires_grad_()
    ak.precondition(*layer.operands).backward(layer.V)
    found = getattr(layer, name).grad
    with torch.no_grad():
        (expected,) = ak.precondition_vjp(*layer.operands, layer.V, wanted=name)
    assert relative_error(found, expected) < 1e-13
    assert all(getattr(layer, other).grad is None for other in "GABS" if other != name)


def test_results_that_nothing_used_get_no_gradient() -> None:
    first, second = watched(make(3, 4)), watched(make(5, 2))
    Ys = ak.foreach_precondition(*([x, y] for x, y in zip(first, second, strict=True)))
    Ys[1].sum().backward()
    assert all(x.grad is None for x in first)
    assert all(x.grad is not None for x in second)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_have_their_operands_dtype(dtype: torch.dtype) -> None:
    layer = make(6, 9, dtype=dtype)
    operands = watched(layer)
    ak.precondition(*operands).backward(layer.V)
    for name, truth in layer.derivatives().items():
        grad = getattr(layer, name).grad
        assert grad.dtype == dtype
        assert relative_error(grad, truth) < 1e-2


def lists(*layers: Layer) -> list[list[Tensor]]:
    return [list(x) for x in zip(*(layer.operands for layer in layers), strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("b_A", "b_B"), [(None, None), (3, 2)])
def test_opcheck(b_A: int | None, b_B: int | None, dtype: torch.dtype) -> None:
    layers = make(5, 7, b_A, b_B, dtype=dtype), make(2, 3, dtype=dtype)
    ops = torch.ops.apo_kernels
    operands = lists(*layers)
    Vs = [layer.V for layer in layers]
    kept = [x for each in ak.foreach_precondition(*operands, keep=True)[1] for x in each]
    thetas, buffers = [V.clone() for V in Vs], [V.clone() for V in Vs]
    torch.library.opcheck(ops.foreach_precondition_vjp.default, (*operands, Vs, [], "ABS"))
    torch.library.opcheck(ops.foreach_precondition_vjp.default, (*operands, Vs, kept, "GS"))
    torch.library.opcheck(ops.foreach_precondition_vjp.default, (*operands, Vs, kept, "AB", None, True))
    step = ops.foreach_precondition_step_.default
    torch.library.opcheck(step, (thetas, *operands, buffers, 0.1, None, 0.9, 0.1))
    torch.library.opcheck(step, (thetas, *operands, [], 0.0, torch.tensor(0.1), 0.0, 0.0))
    watch = [watched(layer) for layer in layers]
    torch.library.opcheck(ops.precondition.default, watch[0])
    torch.library.opcheck(ops.foreach_precondition.default, lists(*layers))
    torch.library.opcheck(ops.foreach_precondition_keep.default, lists(*layers))


def test_opcheck_of_a_layer_with_aligned_products() -> None:
    """Whose kept products are no contiguous tensors."""
    layer = make(200, 401, dtype=torch.float32)
    torch.library.opcheck(torch.ops.apo_kernels.foreach_precondition_keep.default, lists(layer))


def test_compile_fullgraph_with_gradients() -> None:
    def loss(G: Tensor, A: Tensor, B: Tensor, S: Tensor) -> Tensor:
        return (ak.precondition(2 * G, A, B, S) - G).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="inductor")
    operands = watched(make(5, 7, None, 2, dtype=torch.float32))
    torch.testing.assert_close(compiled(*operands), loss(*operands))
    found = torch.autograd.grad(compiled(*operands), operands)
    expected = torch.autograd.grad(loss(*operands), operands)
    torch.testing.assert_close(found, expected)


def test_compile_fullgraph_of_the_whole_meta_step() -> None:
    """Forward that keeps, derivatives that reuse, update in place: as a front end would compile them."""

    def meta_step(
        thetas: list[Tensor], buffers: list[Tensor], operands: list[list[Tensor]], Vs: list[Tensor], lr: Tensor
    ) -> tuple[list[Tensor], list[tuple[Tensor, ...]], Tensor]:
        Ys, kept = ak.foreach_precondition(*operands, keep=True)
        grads = ak.foreach_precondition_vjp(*operands, Vs, kept=kept)
        single = ak.precondition_vjp(*(x[0] for x in operands), Vs[0], wanted="S")[0]
        ak.foreach_precondition_step_(thetas, *operands, lr=lr, momentum=0.9, momentum_buffers=buffers)
        return Ys, grads, single

    layers = make(5, 7, dtype=torch.float32), make(6, 4, 3, 3, dtype=torch.float32)

    def arguments() -> tuple[list[Tensor], list[Tensor], list[list[Tensor]], list[Tensor], Tensor]:
        Vs = [layer.V for layer in layers]
        zeros = [torch.zeros_like(V) for V in Vs]
        return [V.clone() for V in Vs], zeros, lists(*layers), Vs, torch.tensor(0.1)

    eager, compiled = arguments(), arguments()
    expected = meta_step(*eager)
    found = torch.compile(meta_step, fullgraph=True, backend="aot_eager")(*compiled)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(compiled[:2], eager[:2])


@pytest.mark.parametrize("keep", [False, True])
def test_no_graph_is_captured_around_the_operators(keep: bool) -> None:
    """By inductor's own check for ``mode="reduce-overhead"``: the memory that a plan keeps would be the graph's."""
    layer = make(3, 4, dtype=torch.float32)

    def call(*operands: Tensor) -> Tensor:
        found = ak.precondition(*operands, keep=keep)
        return found[0] if keep else found

    traced: list[torch.fx.GraphModule] = []
    torch.compile(call, fullgraph=True, backend=lambda module, _: traced.append(module) or module.forward)(
        *layer.operands
    )
    node = get_first_incompatible_cudagraph_node(traced[0])
    assert node is not None
    assert node.target.namespace == "apo_kernels"
    for name in ("precondition", *(f"foreach_precondition{end}" for end in ("", "_keep", "_vjp", "_step_"))):
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.apo_kernels, name).default.tags


def test_compiled_bad_input_is_named() -> None:
    compiled = torch.compile(ak.precondition, fullgraph=True, backend="eager")
    layer = make(5, 7, dtype=torch.float32)
    with pytest.raises(Exception, match=r"S must have G's shape \(5, 7\)"):
        compiled(layer.G, layer.A, layer.B, layer.S[:4])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_derivatives_by_hand_have_no_graph(backend: str) -> None:
    layer = make(4, 6, dtype=torch.float32)
    expected = ak.precondition_vjp(*layer.operands, layer.V)
    compiled = torch.compile(ak.precondition_vjp, fullgraph=True, backend=backend)
    found = compiled(*watched(layer), layer.V)
    assert not any(x.requires_grad for x in found)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_calls_refuse_what_eager_ones_do(fullgraph: bool) -> None:
    layer = make(4, 4, dtype=torch.float32)
    theta, G = layer.V, layer.G

    def refuses(call: Callable[..., object], match: str, *given: Tensor) -> None:
        torch._dynamo.reset()
        with pytest.raises(ValueError, match=match):
            call(*given)
        with pytest.raises(Exception, match=match):
            torch.compile(call, fullgraph=fullgraph, backend="aot_eager")(*given)

    def step(theta: Tensor, G: Tensor, A: Tensor, B: Tensor, S: Tensor) -> None:
        ak.foreach_precondition_step_([theta], [G], [A], [B], [S], lr=0.1)

    def tied(theta: Tensor, *operands: Tensor) -> None:
        ak.foreach_precondition_step_([theta] * 2, *([x] * 2 for x in operands), lr=0.1)

    refuses(step, r"thetas\[0\] is written and must not share memory with Gs\[0\]", G, *layer.operands)
    refuses(step, r"thetas\[0\] is written and must not share memory with Gs\[0\]", G.mT, *layer.operands)
    refuses(tied, r"thetas\[0\] is written and must not share memory with thetas\[1\]", theta, *layer.operands)
    operands = watched(layer)
    refuses(lambda *o: ak.precondition(*o, keep=True), "G must not require grad", *operands)
    refuses(lambda *o: ak.foreach_precondition(*([x] for x in o), keep=True), r"Gs\[0\] must not require", *operands)
    refuses(step, r"thetas\[0\] must not require grad", theta.requires_grad_(), *layer.operands)


def count(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize(("m", "n"), [(6, 10), (10, 6), (8, 8), (96, 700)])
@pytest.mark.parametrize(("b_A", "b_B"), [(None, None), (4, 4), (4, None), (None, 4), (1, 4), (64, 3)])
def test_flops_are_those_of_the_formula(m: int, n: int, b_A: int | None, b_B: int | None) -> None:
    layer = make(m, n, b_A, b_B)
    assert count(lambda: ak.precondition(*layer.operands)) == ak.precondition_flops(m, n, b_A, b_B)
    kept = ak.precondition(*layer.operands, keep=True)[1]
    for held in (None, kept):
        for wanted in ("ABS", "GABS", "S", "A", "B", "G"):
            for relative in (False, True):
                how = {"wanted": wanted, "relative": relative}
                found = count(lambda: ak.precondition_vjp(*layer.operands, layer.V, kept=held, **how))  # noqa: B023
                assert found == ak.precondition_vjp_flops(m, n, b_A, b_B, kept=held is not None, **how)


def test_flops_of_full_blocks_are_the_designs() -> None:
    m, n = 6, 10
    assert ak.precondition_flops(m, n) == 4 * m * n * (m + n)
    assert ak.precondition_vjp_flops(m, n, kept=True) == 6 * m * n**2 + 8 * m**2 * n
    assert ak.precondition_vjp_flops(m, n) == 8 * m * n**2 + 12 * m**2 * n
    assert ak.precondition_vjp_flops(m, n, kept=True, relative=True) == 6 * m * n * (m + n)
    assert ak.precondition_vjp_flops(m, n, relative=True) == 8 * m * n * (m + n)
    # The wider side is the one with the fewer products, whichever it is.
    assert ak.precondition_vjp_flops(n, m, kept=True) == ak.precondition_vjp_flops(m, n, kept=True)
    # Whole blocks of b cost 8b FLOP a weight in place of 4(m + n).
    assert ak.precondition_flops(64, 128, 16, 16) == 8 * 16 * 64 * 128


def test_no_more_flops_than_autograd() -> None:
    for m, n in ((6, 10), (10, 6), (9, 9)):
        layer = make(m, n)
        blocks = [layer.A.requires_grad_(), layer.B.requires_grad_(), layer.S.requires_grad_()]

        def autograd(G: Tensor = layer.G, V: Tensor = layer.V, blocks: list[Tensor] = blocks) -> None:
            A, B, S = blocks
            torch.autograd.grad(B @ ((S * S) * (B.mT @ G @ A)) @ A.mT, blocks, V)

        ours = ak.precondition_flops(m, n) + ak.precondition_vjp_flops(m, n, kept=True)
        assert ours <= count(autograd)


@pytest.mark.parametrize("needed", ["ABS", "GABS"])
def test_operators_report_their_flops(needed: str) -> None:
    layer = make(6, 10, 4, None, batch=(2,))
    for name in needed:
        getattr(layer, name).requires_grad_()

    def train() -> None:
        ak.precondition(*layer.operands).backward(layer.V)

    formula = ak.precondition_flops(6, 10, 4, None, batch=2)
    formula += ak.precondition_vjp_flops(6, 10, 4, None, batch=2, wanted=needed, kept=True)
    assert count(train) == formula
