"""Relative meta-steps: where they lead, their length, what they don't depend on, their state."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import apo
from apo import preconditioned
from apo.layers.preconditioner import PreconditionedLayer
from apo.phi.meta_optimizer import Learned
from apo.phi.relative_steps import RelativeSteps
from apo.phi.shared_storage import SharedSquares
from tests.apo.helpers import apo_of, closure_of, convnet, mlp, objective, precondition, weights

RATE = 0.1


def made(tensors: list[Tensor], rates: list[float], blocks: list[bool]) -> RelativeSteps:
    steps = RelativeSteps()
    each = zip(tensors, rates, blocks, strict=True)
    steps.add([Learned(tensor, rate, block=block) for tensor, rate, block in each])
    return steps


def stepped(tensor: Tensor, grads: list[Tensor], sizes: list[Tensor], *, block: bool) -> Tensor:
    """Where steps along these derivatives lead, which are made relative to where it is."""
    tensor = tensor.clone()
    steps = made([tensor], [RATE], [block])
    (own,) = steps.learned
    for grad, size in zip(grads, sizes, strict=True):
        steps.step([own.tensor.mT @ grad if block else own.tensor * grad], [size])
    return own.tensor


def drawn(*shape: int, count: int = 1) -> list[Tensor]:
    return list(torch.randn(count, *shape, dtype=torch.float64))


def test_a_gradient_that_stays_lengthens_what_it_sees_and_one_that_turns_shortens_it() -> None:
    """With V = G the step grows by ε in every direction, however large the gradient there; with V = −G it shrinks."""
    torch.manual_seed(0)
    columns = torch.linalg.qr(torch.randn(9, 4, dtype=torch.float64)).Q * torch.logspace(0, -4, 4, dtype=torch.float64)
    A = torch.randn(4, 4, dtype=torch.float64)
    size = 2 * columns.square().sum(0)
    for sign in (-1, 1):
        steps = made([A.clone()], [RATE], [True])
        steps.step([sign * 2 * columns.mT @ columns], [size])
        expected = A * (1 - sign * RATE * size / (size + 1e-6 * size.mean()))
        assert torch.allclose(steps.learned[0].tensor, expected, rtol=1e-9)


@pytest.mark.parametrize("shape", [(5, 5), (3, 4, 4)])
def test_no_step_of_a_block_is_longer_than_twice_the_rate(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    A, grad = drawn(*shape, count=2)
    for scale in (1e-30, 1.0, 1e30):
        for size, longest in (
            (torch.full(shape[:-1], 1e-3).double(), True),
            (torch.full(shape[:-1], 1e3).double(), False),
        ):
            change = torch.linalg.solve(A, stepped(A, [grad * scale], [size * scale], block=True)) - torch.eye(
                shape[-1]
            )
            lengths = change.norm(dim=(-2, -1))
            assert torch.allclose(lengths, torch.full_like(lengths, 2 * RATE)) == longest
            assert (lengths <= 2 * RATE * (1 + 1e-9)).all()
            assert torch.allclose(change, change.mT, atol=1e-12)
            # and downhill: to first order the change of Q is <grad, A change>
            assert (grad * (A @ change)).sum() < 0


def test_a_blocks_step_is_the_same_in_any_coordinates() -> None:
    torch.manual_seed(0)
    A, L, *grads = drawn(4, 4, count=5)
    sizes = [g.square().sum(0) for g in grads]
    expected = stepped(A, grads, sizes, block=True)
    # A = L X, so that dX = Lᵀ dA
    X = torch.linalg.solve(L, A)
    assert torch.allclose(L @ stepped(X, [L.mT @ g for g in grads], sizes, block=True), expected, rtol=1e-9)


def test_a_blocks_entries_are_measured_by_their_own_rows_sizes() -> None:
    """Where the gradient is smaller by d the derivative is by d and the size by d²: the step is the same."""
    torch.manual_seed(0)
    (R,) = drawn(4, 4)
    R = 0.3 * (R + R.mT)
    size, d = torch.rand(4).double() + 1, torch.logspace(0, -2, 4).double()
    A = torch.eye(4, dtype=torch.float64)
    plain, scaled = (made([A.clone()], [RATE], [True]) for _ in range(2))
    plain.step([R], [size])
    scaled.step([d[:, None] * R * d], [d**2 * size])
    assert torch.allclose(scaled.learned[0].tensor, plain.learned[0].tensor, rtol=1e-2)  # but for the least size
    assert (plain.learned[0].tensor - A).norm() > RATE / 10


def test_scalings_step_in_their_logarithm_by_the_ratio_of_the_means() -> None:
    torch.manual_seed(0)
    S, *grads = drawn(3, 5, count=4)
    sizes = [torch.rand(3, 5).double() + 1 for _ in grads]
    expected = stepped(S, grads, sizes, block=False)
    scales = torch.logspace(-8, 8, 15, dtype=torch.float64).reshape(3, 5)
    found = stepped(S * scales, [g / scales for g in grads], sizes, block=False)
    assert torch.allclose(found, expected * scales, rtol=1e-12)
    ratio = S * grads[0] / (sizes[0] + 1e-3 * sizes[0].mean())
    first = stepped(S, grads[:1], sizes[:1], block=False)
    assert torch.allclose((first / S).log(), -RATE * ratio.clamp(-1, 1), rtol=1e-9)
    assert ratio.abs().max() > 1 > ratio.abs().min()
    # a second step by the means, whose bias is taken out
    slopes = [S * grads[0], first * grads[1]]
    mean = (0.9 * slopes[0] + slopes[1]) / 1.9
    size = (0.99 * sizes[0] + sizes[1]) / 1.99
    second = stepped(S, grads[:2], sizes[:2], block=False)
    assert torch.allclose((second / first).log(), -RATE * (mean / (size + 1e-3 * size.mean())).clamp(-1, 1), rtol=1e-9)


def test_gradients_of_zero_or_none_change_nothing() -> None:
    for block in (True, False):
        for dtype in (torch.float32, torch.float64):
            A = torch.randn(4, 4, dtype=dtype)
            size = torch.zeros(4 if block else (4, 4), dtype=dtype)
            assert torch.equal(stepped(A, [torch.zeros_like(A)], [size], block=block), A)
            steps = made([A.clone()], [RATE], [block])
            steps.step([None], [None])
            assert torch.equal(steps.learned[0].tensor, A)
            assert steps.learned[0].count == 0


@pytest.mark.parametrize("block_size", [None, 3, 1])
def test_sizes_are_what_the_derivatives_are_where_the_gradient_stays(block_size: int | None) -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(4, 7), nn.MultiheadAttention(4, 2), nn.LayerNorm(5), nn.Embedding(6, 4)]).double()
    opt = apo.APO(model, objective(model, torch.zeros(1)), block_size=block_size)
    for layer in opt.layers:
        for tensor in layer.tensors():
            tensor.add_(0.3 * torch.randn_like(tensor))
    gradients = opt._arena.parts([torch.randn_like(p) for p in opt.parameters], opt.parameters)
    operator = opt._arena.operator
    slopes = operator.slopes(gradients, operator.keep(gradients), lengths=[1.0] * len(opt.layers))
    derivatives = opt._arena.of_phi(slopes.A, slopes.B, slopes.S)
    sizes = opt._arena.of_phi(slopes.size_A, slopes.size_B, slopes.size_S)
    names = [(layer, name) for layer in opt.layers for name in layer.learned]
    for (layer, name), size, found in zip(names, sizes, derivatives, strict=True):
        assert size is not None
        assert found is not None
        expected = -found if name == "S" else -found.diagonal(dim1=-2, dim2=-1)
        assert size.shape == expected.shape
        assert torch.allclose(size, expected, rtol=1e-12), f"{name} of {layer.view.name}"


def trained(monkeypatch: pytest.MonkeyPatch, moved_every: int, **settings: Any) -> tuple[apo.APO, list[Tensor]]:
    monkeypatch.setattr(preconditioned, "MOVED_EVERY", moved_every)
    model, x, t, other = convnet()
    opt = apo_of(model, objective(model, other), lr=0.05, fisher_start=0, **settings)
    for _ in range(12):
        opt.step(closure_of(opt, model, x, t))
    return opt, weights(model)


def test_moving_the_scale_of_p_to_the_rates_changes_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    left, expected = trained(monkeypatch, 1000)
    moved, found = trained(monkeypatch, 1)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(found, expected, strict=True))
    assert moved.param_groups[0]["lr"] != pytest.approx(left.param_groups[0]["lr"], rel=0.05)
    rms = moved._arena.root_mean_squares()
    assert all(x == pytest.approx(1) for *blocks, _ in rms for x in blocks)
    assert sum(math.log(S) for *_, S in rms) == pytest.approx(0, abs=1e-9)


def test_a_rate_at_its_bound_leaves_the_scale_to_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so does one that isn't learned."""
    _, expected = trained(monkeypatch, 1000, lr_meta_lr=0.0)
    opt, found = trained(monkeypatch, 1, lr_meta_lr=0.0, bounds=(0.05, 0.05 * (1 + 1e-12)))
    assert opt.param_groups[0]["lr"] == pytest.approx(0.05)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(found, expected, strict=True))
    opt, found = trained(monkeypatch, 1, adapt_lr=False)
    assert opt.param_groups[0]["lr"] == 0.05
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(found, expected, strict=True))


def test_what_a_scheduler_overwrites_is_given_no_scale() -> None:
    """Which would be lost: LambdaLR sets the rate from its own base after each step."""
    for scheduled in (False, True):
        model, x, t, other = mlp()
        opt = apo.APO(model, objective(model, other), lr=0.003)
        scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="something else, such as a LambdaLR, sets the lr")
            for _ in range(40):
                opt.step(closure_of(opt, model, x, t))
                if scheduled:
                    scheduler.step()
                    assert opt.param_groups[0]["lr"] == 0.003
        growths = [math.prod(own) ** 2 for own in opt._arena.root_mean_squares()]
        assert (min(growths) > 3) == scheduled


def test_groups_rates_keep_their_ratio_or_take_their_own_layers_scale() -> None:
    model, *_, other = mlp()
    for shared in (True, False):
        groups = [{"params": model[0].parameters(), "lr": 0.01}, {"params": model[2].parameters(), "lr": 0.03}]
        opt = apo.APO(model, objective(model, other), groups, method=apo.Method(shared_lr=shared))
        for layer, scale in zip(opt.layers, (2.0, 3.0), strict=True):
            layer.A.mul_(scale)
        G = [torch.randn_like(layer.S) for layer in opt.layers]

        def steps(opt: apo.APO = opt, G: list[Tensor] = G) -> list[Tensor]:
            rates = [group["lr"] for group in opt.param_groups]
            return [rate * Y for rate, Y in zip(rates, precondition(opt.layers, G), strict=True)]

        before = steps()
        opt._move_scale_to_rates()
        assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(steps(), before, strict=True))
        first, second = (group["lr"] for group in opt.param_groups)
        assert (first, second) == pytest.approx((0.06, 0.18) if shared else (0.04, 0.27))


def test_a_layer_of_no_gradient_keeps_its_preconditioner() -> None:
    model, x, t, other = mlp()
    opt = apo.APO(model, objective(model, other), method=apo.Method(adapt_lr=False))
    for _ in range(3):
        opt.step(closure_of(opt, model, x, t))
    first: PreconditionedLayer = opt.layers[0]
    before = [tensor.clone() for tensor in first.tensors()]
    model[0].requires_grad_(False)
    for _ in range(3):
        opt.step(closure_of(opt, model, x, t))
        assert model[0].weight.grad is None
    assert all(torch.equal(a, b) for a, b in zip(first.tensors(), before, strict=True))
    assert opt.failed_trials == 0


@pytest.mark.parametrize("lie", ["as in storage", "close together", "apart"])
@pytest.mark.parametrize("b", [3, 4, 5])
@pytest.mark.parametrize("without", [None, 1])
def test_slopes_are_taken_together_however_they_lie(lie: str, b: int, without: int | None) -> None:
    """What was found of each block stands where the block does."""
    torch.manual_seed(0)
    learned = []
    for shape in ((2,), (3,), (1,), (3, 2)):
        buffers = {"slope": torch.zeros(*shape, b, b), "size": torch.zeros(*shape, b)}
        learned.append(Learned(torch.randn(*shape, b, b), block=True, buffers=buffers))
    squares = SharedSquares(learned)
    count, step = sum(squares.counts), squares.slope.stride(0) if lie == "as in storage" else b * b
    stack = torch.randn(5 + count * step).as_strided((count, b, b), (step, b, 1), 5)
    found, at = {}, 0
    for i, (own, squared) in enumerate(zip(learned, squares.counts, strict=True)):
        slope = torch.randn(own.tensor.shape) if lie == "apart" else stack[at : at + squared].view(own.tensor.shape)
        if i != without:
            found[own] = slope, torch.randn(own.tensor.shape[:-1])
        at += squared
    slopes, sizes = squares.together(found)
    at = 0
    for own, squared in zip(learned, squares.counts, strict=True):
        for whole, part in zip((slopes, sizes), found.get(own, ()), strict=False):
            assert torch.equal(whole[at : at + squared].reshape(part.shape), part)
        at += squared


def test_slopes_of_squares_that_lie_apart_are_taken_as_they_lie() -> None:
    """Squares of side 3 lie 16 elements apart."""
    torch.manual_seed(0)
    squares = SharedSquares(made(drawn(2, 3, 3) + drawn(3, 3, 3), [RATE] * 2, [True] * 2).learned)
    squares.slope.copy_(torch.randn(5, 3, 3))
    held = {own: (own.buffers["slope"], own.buffers["size"]) for own in squares.learned}
    apart = {own: (slope.clone(), size) for own, (slope, size) in held.items()}
    for found in (held, apart):
        slope, _ = squares.together(found)
        assert torch.equal(slope, squares.slope)
        assert (slope.data_ptr() == squares.slope.data_ptr()) == (found is held)
