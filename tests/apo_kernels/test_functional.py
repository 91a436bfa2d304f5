"""Forward, derivatives and step against the float64 reference: any shape, form, stride and dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import apo_kernels as ak
from apo_kernels import aten, reference
from apo_kernels.aten import operators
from tests.apo_kernels.cases import DTYPES, TOLERANCE, Layer, make, relative_error

sides = st.integers(1, 70)
block_sizes = st.one_of(st.none(), st.integers(1, 80))


def transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def strided(x: Tensor) -> Tensor:
    """Every other entry of something larger, filled with NaN in between."""
    shape = [2 * size + 1 for size in x.shape]
    larger = torch.full(shape, torch.nan, dtype=x.dtype)
    view = larger[tuple(slice(1, None, 2) for _ in shape)]
    return view.copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": transposed,
    "strided": strided,
}
layouts = st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 5)


def laid_out(layer: Layer, names: tuple[str, ...]) -> Layer:
    tensors = (layer.G, layer.A, layer.B, layer.S, layer.V)
    return Layer(*(LAYOUTS[name](x) for name, x in zip(names, tensors, strict=True)))


@given(m=sides, n=sides, b_A=block_sizes, b_B=block_sizes, dtype=st.sampled_from(DTYPES), layout=layouts)
def test_forward(m: int, n: int, b_A: int | None, b_B: int | None, dtype: torch.dtype, layout: tuple[str, ...]) -> None:
    layer = laid_out(make(m, n, b_A, b_B, dtype=dtype), layout)
    Y = ak.precondition(*layer.operands)
    assert Y.dtype == dtype
    assert Y.is_contiguous()
    assert relative_error(Y, layer.forward()) < TOLERANCE[dtype]


@given(
    m=sides,
    n=sides,
    b_A=block_sizes,
    b_B=block_sizes,
    dtype=st.sampled_from(DTYPES),
    layout=layouts,
    wanted=st.sampled_from(["ABS", "GABS", "S", "A", "B", "G", "SA", "BG", "SBAG"]),
    keep=st.booleans(),
    relative=st.booleans(),
)
def test_derivatives(
    m: int,
    n: int,
    b_A: int | None,
    b_B: int | None,
    dtype: torch.dtype,
    layout: tuple[str, ...],
    wanted: str,
    keep: bool,
    relative: bool,
) -> None:
    layer = laid_out(make(m, n, b_A, b_B, dtype=dtype), layout)
    before = [x.clone() for x in (*layer.operands, layer.V)]
    kept = ak.precondition(*layer.operands, keep=True)[1] if keep else None
    found = ak.precondition_vjp(*layer.operands, layer.V, kept=kept, wanted=wanted, relative=relative)
    wide = aten.accumulation_dtype(dtype)
    for name, derivative in zip(wanted, found, strict=True):
        operand = getattr(layer, name)
        assert derivative.dtype == wide
        assert derivative.shape == operand.shape
        assert derivative.is_contiguous()
        # Never rounded to 16 bits: only the float32 sums differ from float64's.
        assert relative_error(derivative, layer.derivatives(relative=relative)[name]) < TOLERANCE[wide]
    assert all(torch.equal(x, y) for x, y in zip(before, (*layer.operands, layer.V), strict=True))


@pytest.mark.parametrize(("b_A", "b_B"), [(None, None), (4, None), (None, 3), (4, 3), (1, 2)])
@pytest.mark.parametrize("batch", [(3,), (2, 2), (0,), (1,)])
@pytest.mark.parametrize(("m", "n"), [(5, 9), (9, 5)])
def test_batches_are_matrices_one_by_one(
    m: int, n: int, batch: tuple[int, ...], b_A: int | None, b_B: int | None
) -> None:
    layer = make(m, n, b_A, b_B, batch=batch)
    Y, kept = ak.precondition(*layer.operands, keep=True)
    for relative in (False, True):
        truth = [*layer.derivatives(relative=relative).values(), layer.forward()]
        for held, y in ((None, ak.precondition(*layer.operands)), (kept, Y)):
            of = ak.precondition_vjp(*layer.operands, layer.V, wanted="GABS", kept=held, relative=relative)
            for f, t in zip((*of, y), truth, strict=True):
                assert f.shape == t.shape
                assert relative_error(f, t) < 1e-12


def beyond(block: Tensor, side: int) -> Tensor:
    """The block, with NaN in what sticks out of its side."""
    count, b = block.shape[-3:-1]
    inside = torch.arange(count * b).view(count, b) < side
    return block.masked_fill(~(inside[:, :, None] & inside[:, None, :]), torch.nan)


def check_what_sticks_out(backend: str) -> None:
    layer = make(5, 7, 4, 4, dtype=torch.float32)
    own = layer.G, beyond(layer.A, 7), beyond(layer.B, 5), layer.S
    assert torch.isnan(own[1]).any()
    assert relative_error(ak.precondition(*own, backend=backend), layer.forward()) < 1e-5
    for relative in (False, True):
        found = ak.precondition_vjp(*own, layer.V, wanted="GABS", relative=relative, backend=backend)
        exact = reference.precondition_vjp(*(x.double() for x in (*own, layer.V)), relative=relative)
        for x, y, truth in zip(found, exact, layer.derivatives(relative=relative).values(), strict=True):
            assert relative_error(x, truth) < 1e-5
            assert relative_error(y, truth) < 1e-12


def test_what_sticks_out_of_a_side_is_not_read() -> None:
    check_what_sticks_out("aten")


@pytest.mark.parametrize(("m", "n"), [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize(("b_A", "b_B"), [(None, None), (2, 2)])
def test_empty(m: int, n: int, b_A: int | None, b_B: int | None) -> None:
    layer = make(m, n, b_A, b_B)
    Y = ak.precondition(*layer.operands)
    dG, dA, dB, dS = ak.precondition_vjp(*layer.operands, layer.V, wanted="GABS")
    assert Y.shape == dG.shape == dS.shape == (m, n)
    assert torch.equal(dA, torch.zeros_like(layer.A))
    assert torch.equal(dB, torch.zeros_like(layer.B))


@pytest.mark.parametrize(("b_A", "b_B"), [(None, None), (64, 64)])
@pytest.mark.parametrize(("m", "n"), [(300, 1001), (1001, 300), (260, 513)])
def test_large_odd_layers(m: int, n: int, b_A: int | None, b_B: int | None) -> None:
    """Where rows are aligned and derivatives go panel by panel."""
    layer = make(m, n, b_A, b_B, dtype=torch.float32)
    Y, kept = ak.precondition(*layer.operands, keep=True)
    assert relative_error(Y, layer.forward()) < 1e-5
    for held in (kept, None):
        for relative in (False, True):
            found = ak.precondition_vjp(*layer.operands, layer.V, kept=held, wanted="GABS", relative=relative)
            for derivative, truth in zip(found, layer.derivatives(relative=relative).values(), strict=True):
                assert relative_error(derivative, truth) < 1e-5
                assert derivative.is_contiguous()


def test_expanded_operands() -> None:
    layer = make(6, 4, batch=(3,))
    A, B = layer.A[:1].expand(3, 4, 4), layer.B[:1].expand(3, 6, 6)
    S = layer.S[:, :1, :1].expand(3, 6, 4)
    expected = reference.precondition(layer.G, A, B, S)
    assert relative_error(ak.precondition(layer.G, A, B, S), expected) < 1e-13


MIXES = [
    (torch.float32, torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float32, torch.float32, torch.float32),
    (torch.float16, torch.bfloat16, torch.float32, torch.float16),
]


@pytest.mark.parametrize("dtypes", MIXES, ids=str)
def test_mixed_dtypes(dtypes: tuple[torch.dtype, ...]) -> None:
    layer = make(20, 30, None, 8)
    G, A, B, S = (x.to(dtype) for x, dtype in zip(layer.operands, dtypes, strict=True))
    mixed = Layer(G, A, B, S, layer.V.to(G.dtype))
    Y = ak.precondition(G, A, B, S)
    assert Y.dtype == G.dtype
    assert relative_error(Y, mixed.forward()) < TOLERANCE[G.dtype]
    for derivative, truth in zip(
        ak.precondition_vjp(G, A, B, S, mixed.V, wanted="GABS"), mixed.derivatives().values(), strict=True
    ):
        assert derivative.dtype == torch.float32
        assert relative_error(derivative, truth) < 3e-5


@pytest.mark.parametrize(("scale_S", "scale_G"), [(1e-4, 1e4), (1e3, 1e-4)])
def test_squared_scalings_beyond_half_precision(scale_S: float, scale_G: float) -> None:
    """S² is near 1e-8 or 1e6 here: as float16 it would be nothing, or infinite."""
    layer = make(12, 9, dtype=torch.float32)
    S = (layer.S * scale_S).half()
    half = Layer((layer.G * scale_G).half(), layer.A.half(), layer.B.half(), S, layer.V.half())
    Y = ak.precondition(*half.operands)
    assert torch.isfinite(Y).all()
    assert relative_error(Y, half.forward()) < 2e-3  # some results are subnormal


def test_small_derivatives_of_half_precision_survive() -> None:
    """G and V near 1e-4: dS is near 1e-8, below what float16 can hold."""
    layer = make(12, 9, dtype=torch.float32)
    half = Layer(*(x.half() for x in (layer.G * 1e-4, layer.A, layer.B, layer.S, layer.V * 1e-4)))
    (dS,) = ak.precondition_vjp(*half.operands, half.V, wanted="S")
    assert dS.abs().max() < 1e-6
    assert relative_error(dS, half.derivatives()["S"]) < 1e-4


def test_operator_is_symmetric_and_positive() -> None:
    layer = make(7, 12, 5, None)
    P_G, P_V = ak.precondition(*layer.operands), ak.precondition(layer.V, *layer.operands[1:])
    torch.testing.assert_close((layer.V * P_G).sum(), (layer.G * P_V).sum())
    assert (layer.G * P_G).sum() > 0


def test_transposing_the_problem_transposes_the_result() -> None:
    layer = make(7, 12, 5, 3)
    G, A, B, S = layer.operands
    torch.testing.assert_close(ak.precondition(G.mT, B, A, S.mT), ak.precondition(G, A, B, S).mT)


def test_foreach_is_one_by_one() -> None:
    layers = [make(3, 4), make(0, 2), make(9, 70, 16, 4), make(70, 9, None, 64, seed=1), make(1, 1, batch=(2,))]
    Gs, As, Bs, Ss = (list(x) for x in zip(*(layer.operands for layer in layers), strict=True))
    Vs = [layer.V for layer in layers]
    Ys, kept = ak.foreach_precondition(Gs, As, Bs, Ss, keep=True)
    for held in (kept, None):
        grads = ak.foreach_precondition_vjp(Gs, As, Bs, Ss, Vs, kept=held)
        for layer, Y, (dA, dB, dS) in zip(layers, Ys, grads, strict=True):
            truth = layer.derivatives()
            assert relative_error(Y, layer.forward()) < 1e-12
            assert relative_error(dA, truth["A"]) < 1e-12
            assert relative_error(dB, truth["B"]) < 1e-12
            assert relative_error(dS, truth["S"]) < 1e-12
    plain = ak.foreach_precondition(Gs, As, Bs, Ss)
    assert all(relative_error(x, y) < 1e-13 for x, y in zip(plain, Ys, strict=True))


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_layers_of_one_form_are_computed_together(dtype: torch.dtype, relative: bool) -> None:
    """Each result is as if its layer were alone, and in memory of its own."""
    forms = [(8, 8, 4, 4), (7, 12, 5, None), (8, 8, 4, 4), (7, 12, 5, None), (8, 8, None, None), (8, 8, 4, 4)]
    layers = [make(*form, dtype=dtype, seed=seed) for seed, form in enumerate(forms)]
    layers += [make(3, 4, 2, 2, batch=(2, 3), dtype=dtype, seed=seed) for seed in (7, 8)]
    operands = [list(x) for x in zip(*(layer.operands for layer in layers), strict=True)]
    Vs, tolerance = [layer.V for layer in layers], TOLERANCE[dtype]
    Ys, kept = ak.foreach_precondition(*operands, keep=True)
    found = [Ys, ak.foreach_precondition(*operands)]
    for held in (kept, None):
        grads = ak.foreach_precondition_vjp(*operands, Vs, kept=held, wanted="GABS", relative=relative)
        for layer, each in zip(layers, grads, strict=True):
            for letter, x in zip("GABS", each, strict=True):
                assert relative_error(x, layer.derivatives(relative=relative)[letter]) < tolerance
        found += [list(each) for each in zip(*grads, strict=True)]
    thetas = [torch.zeros_like(layer.G) for layer in layers]
    ak.foreach_precondition_step_(thetas, *operands, lr=1.0)
    for results in (Ys, found[1], [-theta for theta in thetas]):
        for layer, Y in zip(layers, results, strict=True):
            assert relative_error(Y, layer.forward()) < tolerance
    every = [x for tensors in found for x in tensors] + [x for each in kept for x in each]
    assert len({x.untyped_storage().data_ptr() for x in every}) == len(every)
    assert all(x.is_contiguous() for tensors in found for x in tensors)


def test_layers_of_one_form_take_a_constant_number_of_operations() -> None:
    def count(length: int) -> int:
        layers = [make(8, 8, 4, 4, seed=seed) for seed in range(length)]
        operands = [list(x) for x in zip(*(layer.operands for layer in layers), strict=True)]
        with Count() as counted:
            ak.foreach_precondition(*operands)
        return counted.operations

    assert count(3) == count(9) == count(60)


class Count(TorchDispatchMode):
    """How many operations are dispatched inside."""

    operations = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("side", [None, 4])
def test_a_bound_step_is_the_step(side: int | None) -> None:
    """Also with other numbers, after a tensor has moved, and with a weight that isn't in the way of autograd."""
    layers = [make(6, 9, side, side, seed=seed) for seed in range(3)]
    operands = [list(x) for x in zip(*(layer.operands for layer in layers), strict=True)]
    thetas = [torch.nn.Parameter(torch.ones_like(layer.G)) for layer in layers]
    buffers = [torch.zeros_like(layer.G) for layer in layers]
    copies, copied = [theta.detach().clone() for theta in thetas], [v.clone() for v in buffers]
    with torch.no_grad():
        step = ak.BoundStep(thetas, *operands, momentum_buffers=buffers)
        for lr, momentum, decay in ((0.1, 0.9, 0.0), (0.2, 0.0, 0.1), (torch.tensor(0.3).double(), 0.5, 0.1)):
            step(lr=lr, momentum=momentum, weight_decay=decay)
            ak.foreach_precondition_step_(
                copies, *operands, lr=lr, momentum=momentum, momentum_buffers=copied, weight_decay=decay
            )
            for x, y in zip([*thetas, *buffers], [*copies, *copied], strict=True):
                assert torch.equal(x, y)
            thetas[1].data = thetas[1].data.clone()
            operands[0][0].mul_(-2)
    with pytest.raises(ValueError, match=r"^thetas\[0\] must not require grad"):
        step(lr=0.1)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"lr": -1.0}, "lr must be"),
        ({"momentum": 2.0}, "momentum must be"),
        ({"weight_decay": -1}, "weight_decay must"),
    ],
)
def test_a_bound_step_refuses_what_the_step_does(change: dict[str, Any], text: str) -> None:
    layer = make(3, 4)
    theta = torch.ones(3, 4, dtype=torch.float64)
    step = ak.BoundStep([theta], *([x] for x in layer.operands))
    with pytest.raises(ValueError, match=f"^{text}"):
        step(**{"lr": 0.1, **change})
    theta.data = torch.ones(4, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^thetas\[0\] must have Gs\[0\]'s shape"):
        step(lr=0.1)
    assert (theta == 1).all()
    with pytest.raises(ValueError, match=r"^Gs\[0\] must be read as it lies in memory, but is lazily negated"):
        ak.BoundStep([torch.ones(3, 4).double()], [torch._neg_view(layer.G)], [layer.A], [layer.B], [layer.S])
    with pytest.raises(ValueError, match=r"^thetas\[0\] is written and must not share memory"):
        ak.BoundStep([layer.G], *([x] for x in layer.operands))


def test_foreach_of_nothing() -> None:
    ak.BoundStep([], [], [], [], [])(lr=0.1)
    assert ak.foreach_precondition([], [], [], []) == []
    assert ak.foreach_precondition([], [], [], [], keep=True) == ([], [])
    assert ak.foreach_precondition_vjp([], [], [], [], []) == []
    ak.foreach_precondition_step_([], [], [], [], [], lr=0.1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("lr", [0.3, torch.tensor(0.3, dtype=torch.float64)], ids=["number", "tensor"])
def test_step(dtype: torch.dtype, momentum: float, weight_decay: float, lr: float | Tensor) -> None:
    layers = [make(5, 8, dtype=dtype), make(9, 6, 4, 2, dtype=dtype, seed=1)]
    Gs, As, Bs, Ss = (list(x) for x in zip(*(layer.operands for layer in layers), strict=True))
    thetas = [layer.V.clone() for layer in layers]
    buffers = [torch.randn_like(G) for G in Gs]
    expected = [
        reference.precondition_step(
            theta.double(),
            *layer.exact.operands,
            lr=lr,
            momentum=momentum,
            momentum_buffer=buffer.double(),
            weight_decay=weight_decay,
        )
        for theta, layer, buffer in zip(thetas, layers, buffers, strict=True)
    ]
    ak.foreach_precondition_step_(
        thetas, Gs, As, Bs, Ss, lr=lr, momentum=momentum, momentum_buffers=buffers, weight_decay=weight_decay
    )
    for theta, buffer, (exact_theta, exact_buffer) in zip(thetas, buffers, expected, strict=True):
        assert theta.dtype == buffer.dtype == dtype
        assert relative_error(theta, exact_theta) < TOLERANCE[dtype]
        assert relative_error(buffer, exact_buffer) < TOLERANCE[dtype]


def test_step_writes_strided_weights_and_leaves_their_neighbours() -> None:
    """A weight and its bias as columns of one matrix, the layout that front ends use."""
    layer = make(6, 5)
    joint = torch.randn(6, 8, dtype=torch.float64)
    before = joint.clone()
    ak.foreach_precondition_step_([joint[:, 1:6]], [layer.G], [layer.A], [layer.B], [layer.S], lr=1.0)
    torch.testing.assert_close(joint[:, 1:6], before[:, 1:6] - layer.forward())
    assert torch.equal(joint[:, 0], before[:, 0])
    assert torch.equal(joint[:, 6:], before[:, 6:])


def test_step_at_momentum_0_does_not_read_the_buffer() -> None:
    layer = make(4, 4)
    theta, buffer = torch.zeros(4, 4, dtype=torch.float64), torch.full((4, 4), torch.nan, dtype=torch.float64)
    ak.foreach_precondition_step_([theta], *([x] for x in layer.operands), lr=1.0, momentum_buffers=[buffer])
    torch.testing.assert_close(theta, -layer.forward())
    torch.testing.assert_close(buffer, layer.forward())


def test_step_takes_weights_that_require_grad_under_no_grad() -> None:
    layer = make(4, 4)
    theta = torch.zeros(4, 4, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        ak.foreach_precondition_step_([theta], *([x] for x in layer.operands), lr=1.0)
    torch.testing.assert_close(theta.detach(), -layer.forward())


def test_step_that_runs_out_of_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second layer's products fail: the first layer's weight must not have moved."""
    layers = [make(4, 4), make(5, 5)]
    thetas, buffers = [torch.ones_like(layer.G) for layer in layers], [torch.ones_like(layer.G) for layer in layers]
    product = operators.precondition

    def fails_on_the_second(G: Tensor, *operands: Tensor, **options: bool) -> Tensor:
        if G.shape == (5, 5):
            raise torch.OutOfMemoryError("no memory for this")
        return product(G, *operands, **options)

    monkeypatch.setattr(operators, "precondition", fails_on_the_second)
    operands = (list(x) for x in zip(*(layer.operands for layer in layers), strict=True))
    with pytest.raises(torch.OutOfMemoryError):
        ak.foreach_precondition_step_(thetas, *operands, lr=0.1, momentum=0.9, momentum_buffers=buffers)
    assert all(torch.equal(x, torch.ones_like(x)) for x in (*thetas, *buffers))


@pytest.mark.parametrize("name", ["thetas", "momentum_buffers"])
def test_step_refuses_inference_tensors_outside_of_their_mode(name: str) -> None:
    layer = make(4, 4)
    lists = [[x, x] for x in layer.operands]
    written = {key: [torch.zeros_like(layer.G) for _ in range(2)] for key in ("thetas", "momentum_buffers")}
    with torch.inference_mode():
        written[name][1] = torch.zeros_like(layer.G)
        bound = ak.BoundStep(written["thetas"], *lists, momentum_buffers=written["momentum_buffers"])
    match = rf"^{name}\[1\] must be a tensor that can be written outside of torch\.inference_mode"
    options: dict[str, Any] = {"lr": 1.0, "momentum": 0.5}
    thetas, buffers = written.values()
    with pytest.raises(ValueError, match=match):
        ak.foreach_precondition_step_(thetas, *lists, momentum_buffers=buffers, **options)
    with pytest.raises(ValueError, match=match):
        bound(**options)
    assert not any(x.any() for tensors in written.values() for x in tensors)
    with torch.inference_mode():
        bound(**options)
    assert relative_error(written["thetas"][1], -layer.forward()) < 1e-12
