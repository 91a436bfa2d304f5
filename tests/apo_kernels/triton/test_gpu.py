"""The kernels on a GPU: ``pytest -m gpu``.

Every kernel and dtype against float64 and against what cuBLAS makes of the same products, offsets beyond int32, graph
capture and replay, bitwise repetition, and compute-sanitizer where it is installed.
"""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys

import pytest
import torch

import apo_kernels as ak
from apo_kernels import reference
from apo_kernels.aten import foreach_precondition_keep
from tests.apo_kernels.triton import whole_models
from tests.apo_kernels.triton.examples import DTYPES, EVEN, ODD, TOLERANCE, Model, assert_close, model

pytest.importorskip("triton.language")
from apo_kernels.triton import graphs

pytestmark = pytest.mark.gpu

WIDE = ((512, 577), (300, 1200), (1024, 1024), (64, 2048))
FORMS = [(None, None), (64, 64), (32, 32), (16, 16), (8, 8), (1, 1), (30, 8), (None, 64), (1, None), (100, 33)]


@pytest.fixture(autouse=True)
def _float32_is_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("shapes", [ODD, EVEN, WIDE], ids=["odd", "even", "wide"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("A", "B"), FORMS)
def test_against_float64(shapes: tuple[tuple[int, int], ...], dtype: torch.dtype, A: int | None, B: int | None) -> None:
    layers = model(shapes, dtype, A=A, B=B, device="cuda")
    for Y, expected in zip(ak.foreach_precondition(*layers.operands, backend="triton"), layers.expected(), strict=True):
        assert_close(Y, expected, dtype)
    found = ak.foreach_precondition_vjp(*layers.operands, layers.Vs, wanted="GABS", backend="triton")
    for shape, each, expected_each in zip(shapes, found, layers.expected_vjp(), strict=True):
        for letter, x in zip("GABS", each, strict=True):
            assert_close(x, expected_each[letter], dtype, f"d{letter} of {shape}")


@pytest.mark.parametrize("shapes", [ODD, EVEN], ids=["odd", "even"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", [None, 64, 16])
def test_what_a_forward_keeps(side: int | None, dtype: torch.dtype, shapes: tuple[tuple[int, int], ...]) -> None:
    layers = model(shapes, dtype, A=side, B=side, device="cuda")
    Ys, kept = ak.foreach_precondition(*layers.operands, keep=True, backend="triton")
    _, expected = foreach_precondition_keep(*([x.double() for x in tensors] for tensors in layers.operands))
    for Y, Y_expected in zip(Ys, layers.expected(), strict=True):
        assert_close(Y, Y_expected, dtype)
    for shape, each, each_expected in zip(shapes, kept, expected, strict=True):
        for name, x, x_expected in zip("UMW", each, each_expected, strict=True):
            assert_close(x, x_expected, dtype, f"{name} of {shape}")


@pytest.mark.parametrize("precision", ["ieee", "tf32x3", "tf32"])
@pytest.mark.parametrize("side", [None, 32])
def test_precisions_of_float32(precision: str, side: int | None) -> None:
    layers = model(WIDE, torch.float32, A=side, B=side, device="cuda")
    found = ak.foreach_precondition(*layers.operands, backend=f"triton:{precision}")
    for Y, expected in zip(found, layers.expected(), strict=True):
        error = ((Y.double() - expected).norm() / expected.norm()).item()
        assert error <= (4e-3 if precision == "tf32" else TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_at_most_twice_that_of_cublas(dtype: torch.dtype) -> None:
    layers = model(WIDE, dtype, device="cuda")
    found = ak.foreach_precondition(*layers.operands, backend="triton")
    for each, Y, expected in zip(zip(*layers.operands, strict=True), found, layers.expected(), strict=True):
        plain = reference.precondition(*each)
        error, its_error = ((x.double() - expected).norm().item() for x in (Y, plain))
        assert error <= 2 * its_error


@pytest.mark.parametrize("side", [None, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_update(side: int | None, dtype: torch.dtype) -> None:
    layers = model(WIDE, dtype, A=side, B=side, scale=1.0, device="cuda")
    thetas = [torch.randn_like(G) for G in layers.Gs]
    buffers = [torch.randn_like(G, dtype=torch.float32) for G in layers.Gs]
    expected = [
        reference.precondition_step(
            theta.double(), *(x.double() for x in each), lr=0.1, momentum=0.9, momentum_buffer=v.double(),
            weight_decay=0.1,
        )
        for theta, v, *each in zip(thetas, buffers, *layers.operands, strict=True)
    ]  # fmt: skip
    ak.foreach_precondition_step_(
        thetas, *layers.operands, lr=torch.tensor(0.1, device="cuda"), momentum=0.9, momentum_buffers=buffers,
        weight_decay=0.1, backend="triton",
    )  # fmt: skip
    for theta, v, P, (theta_expected, v_expected) in zip(thetas, buffers, layers.expected(), expected, strict=True):
        assert_close(theta, theta_expected, dtype, "θ", (v_expected,))
        assert_close(v, v_expected, dtype, "v", (P,))


def test_offsets_beyond_int32() -> None:
    """A matrix of more than 2³¹ entries; its last rows are those of a small problem."""
    m, n, b = 70_000, 32_768, 64
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GB of GPU memory")
    G = torch.randn(m, n, dtype=torch.bfloat16, device="cuda") * 1e-2
    S = torch.ones(m, n, dtype=torch.bfloat16, device="cuda")
    A = torch.randn(n // b, b, b, dtype=torch.bfloat16, device="cuda") / 8
    B = torch.randn(-(-m // b), b, b, dtype=torch.bfloat16, device="cuda") / 8
    Y = ak.precondition(G, A, B, S, backend="triton")
    top = m - m % b
    small = ak.precondition(G[top:].clone(), A, B[-1:].clone(), S[top:].clone(), backend="triton")
    assert torch.equal(Y[top:], small)


def _step(layers: Model, thetas: list[torch.Tensor], lr: torch.Tensor) -> None:
    ak.foreach_precondition_step_(thetas, *layers.operands, lr=lr, backend="triton")


@pytest.mark.parametrize("same_stream", [True, False])
@pytest.mark.parametrize("side", [None, 64])
def test_a_captured_graph_does_what_the_call_does(side: int | None, same_stream: bool) -> None:
    layers = model(WIDE, torch.bfloat16, A=side, B=side, device="cuda")
    thetas, copies = ([torch.zeros_like(G) for G in layers.Gs] for _ in range(2))
    lr = torch.tensor(0.1, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        _step(layers, thetas, lr)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream if same_stream else None):
        _step(layers, thetas, lr)
    for x in thetas:
        x.zero_()
    for rate in (0.1, 0.3):
        lr.fill_(rate)
        for G in layers.Gs:
            G.normal_()
        graph.replay()
        _step(layers, copies, lr)
        for x, y in zip(thetas, copies, strict=True):
            assert torch.equal(x, y)


def test_what_a_graph_reads_is_let_go_with_it() -> None:
    layers = model(WIDE, torch.bfloat16, device="cuda")
    thetas, lr = [torch.zeros_like(G) for G in layers.Gs], torch.tensor(0.1, device="cuda")
    _step(layers, thetas, lr)
    before = len(graphs.kept_for_graphs())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _step(layers, thetas, lr)
    graph.replay()
    torch.cuda.synchronize()
    assert len(graphs.kept_for_graphs()) > before
    del graph
    gc.collect()
    graphs.release_of_gone_graphs()
    assert len(graphs.kept_for_graphs()) == before


def test_compiled_with_graphs() -> None:
    """``reduce-overhead`` warms up and records in a pool of its own, in which no plan may leave anything."""
    layers = model(WIDE, torch.bfloat16, A=64, B=64, device="cuda")

    @torch.compile(mode="reduce-overhead")
    def call(Gs: list[torch.Tensor]) -> list[torch.Tensor]:
        Ys = ak.foreach_precondition([2 * G for G in Gs], layers.As, layers.Bs, layers.Ss, backend="triton")
        return [Y + 1 for Y in Ys]

    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        for Y, expected in zip(call(layers.Gs), layers.expected(), strict=True):
            assert_close(Y, 2 * expected + 1, torch.bfloat16)


@pytest.mark.parametrize("side", [None, 8, 64])
def test_the_same_bits_in_every_run(side: int | None) -> None:
    layers = model(WIDE, torch.bfloat16, A=side, B=side, device="cuda")
    first = ak.foreach_precondition_vjp(*layers.operands, layers.Vs, wanted="GABS", backend="triton")
    for _ in range(5):
        again = ak.foreach_precondition_vjp(*layers.operands, layers.Vs, wanted="GABS", backend="triton")
        for each, each_first in zip(again, first, strict=True):
            for x, y in zip(each, each_first, strict=True):
                assert torch.equal(x, y)


MODEL_FORMS = [(64, 64, True), (64, 64, False), (16, 8, True), (1, 64, True), (30, 1, False), (None, None, False)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("A", "B", "pad"), MODEL_FORMS)
@pytest.mark.parametrize("share", [None, 0.25])
def test_steps_of_a_whole_model(dtype: torch.dtype, A: int | None, B: int | None, pad: bool, share: float) -> None:
    whole_models.check_step(whole_models.of_form(dtype, A, B, pad).to("cuda"), dtype, share)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("A", "B", "pad"), MODEL_FORMS)
def test_slopes_of_a_whole_model(dtype: torch.dtype, A: int | None, B: int | None, pad: bool) -> None:
    own = whole_models.of_form(dtype, A, B, pad).to("cuda")
    learned = ["ABS"] * len(own.Ss)
    bound = own.bind(learned=learned)
    whole_models.check_trial(own, bound, dtype)
    kept = bound.keep(own.Gs)
    whole_models.check_slopes(own, bound, kept, dtype, learned)
    first, second = (bound.slopes(own.Vs, kept, lengths=own.lr) for _ in range(2))
    for x, y in zip(first[:6], second[:6], strict=True):
        assert all(torch.equal(one, other) for one, other in zip(x, y, strict=True) if one is not None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_whole_models_tiles_are_many(dtype: torch.dtype) -> None:
    """Those that lie well have a launch apart."""
    own = whole_models.layers([(512, 1024), (300, 500), (1024, 2048)], dtype, pad=True).to("cuda")
    whole_models.check_step(own, dtype, 0.25)
    bound = own.bind()
    whole_models.check_slopes(own, bound, bound.keep(own.Gs), dtype, ["ABS"] * 3, 5)


@pytest.mark.parametrize("same_stream", [True, False])
def test_a_captured_step_of_a_whole_model(same_stream: bool) -> None:
    """With its promise; a replay reads what lies there then."""
    torch.manual_seed(0)
    own = whole_models.layers([(64, 128), (33, 65)], torch.bfloat16).to("cuda")
    torch.manual_seed(0)
    copy = whole_models.layers([(64, 128), (33, 65)], torch.bfloat16).to("cuda")
    bound, other = own.bind(), copy.bind()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        whole_models.step(own, bound, 0.1)
    whole_models.step(copy, other, 0.1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream if same_stream else None):
        whole_models.step(own, bound, 0.1)
    for _ in range(3):
        for one, another in zip(own.Gs, copy.Gs, strict=True):
            for x, y in zip(one, another, strict=True):
                y.copy_(x.normal_())
        graph.replay()
        whole_models.step(copy, other, 0.1)
        for one, another in zip(own.thetas, copy.thetas, strict=True):
            for x, y in zip(one, another, strict=True):
                assert torch.equal(x, y)


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("b", [1, 3, 16, 30, 64])
def test_relative_steps(b: int, each: bool) -> None:
    count = 200
    X, slope, new = (torch.randn(count, b, b, device="cuda") for _ in range(3))
    size, new_size = torch.rand(count, b, device="cuda"), torch.rand(count, b, device="cuda")
    number = torch.rand(count, device="cuda") if each else 0.1
    options = {"betas": (0.5, 0.9), "floor": 1e-6, "longest": 2.0}
    wide = number.double() if each else number
    exact = [x.double() for x in (X, slope, size, new, new_size)]
    ak.relative_step_squares_(*exact, rate=wide, correction=wide, **options)
    ak.relative_step_squares_(
        X, slope, size, new, new_size, rate=number, correction=number, backend="triton", **options
    )
    for x, y in zip((X, slope, size), exact, strict=False):
        assert_close(x, y, torch.float32)
    lengths = [8, 20_000, count * b * b]
    flat = [torch.rand(sum(lengths), device="cuda") for _ in range(5)]
    exact = [x.double() for x in flat]
    number = torch.rand(3, device="cuda") if each else 0.1
    wide = number.double() if each else number
    given = {"lengths": lengths, "betas": (0.9, 0.99), "floor": 1e-3}
    ak.relative_step_scalings_(*exact, rate=wide, correction=wide, **given)
    ak.relative_step_scalings_(*flat, rate=number, correction=number, backend="triton", **given)
    for x, y in zip(flat[:3], exact, strict=False):
        assert_close(x, y, torch.float32)


def test_it_is_chosen() -> None:
    layers = model(EVEN, torch.bfloat16, device="cuda")
    assert ak.explain(None, layers.Gs).startswith("triton: ")
    assert ak.explain(None, [G.double() for G in layers.Gs]).startswith("aten: ")


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None or os.environ.get("APO_KERNELS_SANITIZED"):
        pytest.skip("needs compute-sanitizer")
    selected = f"{__file__}::test_against_float64"
    result = subprocess.run(
        [
            sanitizer,
            "--tool",
            tool,
            "--error-exitcode",
            "9",
            sys.executable,
            "-m",
            "pytest",
            "-q",
            selected,
            "-k",
            "odd",
        ],
        env={**os.environ, "APO_KERNELS_SANITIZED": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:]
