"""Shampoo against dense float64 computations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from benchmarks.common.fisher.damping import inverse_root
from benchmarks.paper.baselines import Shampoo, shampoo
from tests.benchmarks.paper.baselines.helpers import relative

SHAPES = [(5,), (4, 6), (3, 4, 5), (3, 2, 3, 2)]
EACH_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)


def run(gradients: list[Tensor], **options: object) -> tuple[Tensor, Shampoo, Tensor]:
    """The last step of rate 1 without momentum for these gradients."""
    p = nn.Parameter(torch.zeros(gradients[0].shape, dtype=gradients[0].dtype))
    opt = Shampoo([p], **{"lr": 1.0, "momentum": 0.0, "damping": 1e-2, **options})
    for g in gradients:
        before = p.detach().clone()
        p.grad = g.clone()
        opt.step()
    return before - p.detach(), opt, p


def dense(gradients: list[Tensor], damping: float, decay: float = 1.0) -> Tensor:
    """``(H₁ ⊗ … ⊗ Hₖ) vec(G)``, one dense matrix, each factor a power by singular values."""
    shape = gradients[0].shape
    weights = [1.0 if decay == 1 else (1 - decay) * decay ** (len(gradients) - 1 - i) for i in range(len(gradients))]
    total = 1.0 if decay == 1 else sum(weights)
    matrix = torch.ones(1, 1).double()
    for axis, side in enumerate(shape):
        H = torch.zeros(side, side).double()
        others = [i for i in range(len(shape)) if i != axis]
        for w, g in zip(weights, gradients, strict=True):
            H += w / total * torch.tensordot(g, g, (others, others))
        U, s, _ = torch.linalg.svd(H)
        matrix = torch.kron(matrix, U @ (s + damping).pow(-1 / (2 * len(shape))).diag() @ U.T)
    return (matrix @ gradients[-1].flatten()).reshape(shape)


def random_gradients(shape: tuple[int, ...], count: int = 3) -> list[Tensor]:
    return [torch.randn(shape).double() for _ in range(count)]


@EACH_SHAPE
@pytest.mark.parametrize("decay", [1.0, 0.8])
def test_the_step_is_that_of_the_dense_matrix(shape: tuple[int, ...], decay: float) -> None:
    """L^(-1/4) G R^(-1/4) for a matrix, sums or averages without bias of three gradients."""
    gradients = random_gradients(shape)
    step, _, _ = run(gradients, decay=decay)
    assert relative(step, dense(gradients, 1e-2, decay)) < 1e-10


def test_a_matrix_by_the_papers_formula() -> None:
    """Powers of the root give back the statistics: ``(L^(-1/4))⁻⁴ = ε I + Σ G Gᵀ``."""
    gradients = random_gradients((4, 6))
    step, opt, p = run(gradients)
    L, R = opt.state[p]["roots"][0][0], opt.state[p]["roots"][0][1]
    back = torch.linalg.matrix_power(torch.linalg.inv(L), 4)
    assert relative(back, 1e-2 * torch.eye(4).double() + sum(g @ g.T for g in gradients)) < 1e-10
    back = torch.linalg.matrix_power(torch.linalg.inv(R), 4)
    assert relative(back, 1e-2 * torch.eye(6).double() + sum(g.T @ g for g in gradients)) < 1e-10
    assert relative(step, L @ gradients[-1] @ R) < 1e-12


def test_the_first_step_of_a_matrix_is_orthogonal() -> None:
    """``(GGᵀ)^(-1/4) G (GᵀG)^(-1/4)`` has singular values one: where it is exact, by theory."""
    step, _, _ = run([torch.randn(5, 5).double()], damping=1e-12)
    assert (torch.linalg.svdvals(step) - 1).abs().max() < 1e-5


@EACH_SHAPE
@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_blocks_are_parameters_of_their_own(shape: tuple[int, ...], block_size: int) -> None:
    gradients = random_gradients(shape)
    step, _, _ = run(gradients, block_size=block_size)

    def cut(tensor: Tensor, axis: int = 0) -> list[Tensor]:
        if axis == tensor.ndim:
            return [tensor]
        return [piece for part in tensor.split(block_size, axis) for piece in cut(part, axis + 1)]

    each = zip(*[cut(g) for g in gradients], strict=True)
    for got, own in zip(cut(step), each, strict=True):
        assert relative(got, run(list(own))[0]) < 1e-12


def test_a_long_side_gets_no_preconditioner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shampoo, "MAX_DIM", 5)
    gradients = random_gradients((3, 7))
    step, _, _ = run(gradients)  # k = 1
    L = 1e-2 * torch.eye(3).double() + sum(g @ g.T for g in gradients)
    values, Q = torch.linalg.eigh(L)
    assert relative(step, Q @ values.pow(-0.5).diag() @ Q.T @ gradients[-1]) < 1e-10


def test_dimensions_of_length_one_and_scalars() -> None:
    gradients = random_gradients((1, 5))
    assert relative(run(gradients)[0], run([g[0] for g in gradients])[0][None]) < 1e-12
    gradients = [torch.tensor(2.0).double(), torch.tensor(-3.0).double()]
    assert run(gradients)[0].item() == pytest.approx(-3 / math.sqrt(13.01))


def test_statistics_take_every_gradient_and_roots_are_made_at_intervals() -> None:
    gradients = random_gradients((3, 4), 9)
    p = nn.Parameter(torch.zeros(3, 4).double())
    opt = Shampoo([p], lr=1.0, momentum=0.0, damping=1e-2, interval=4, warmup=2)
    for k, g in enumerate(gradients):
        before = p.detach().clone()
        p.grad = g.clone()
        opt.step()
        seen = {0: 1, 1: 2, 2: 2, 3: 2, 4: 5, 5: 5, 6: 5, 7: 5, 8: 9}[k]
        assert relative(before - p.detach(), dense_apply(gradients[:seen], g)) < 1e-10


def dense_apply(gradients: list[Tensor], g: Tensor) -> Tensor:
    """The roots of some matrices' sum, applied to another."""
    roots = []
    for H in (sum(x @ x.T for x in gradients), sum(x.T @ x for x in gradients)):
        values, Q = torch.linalg.eigh(H)
        roots.append(Q @ (values + 1e-2).pow(-0.25).diag() @ Q.T)
    return roots[0] @ g @ roots[1]


def test_grafting_keeps_the_direction_and_takes_the_gradients_length() -> None:
    gradients = random_gradients((4, 6))
    own, _, _ = run(gradients)
    step, _, _ = run(gradients, grafting=True)
    assert relative(step, own / own.norm() * gradients[-1].norm()) < 1e-9


def test_momentum_and_weight_decay() -> None:
    p = nn.Parameter(torch.randn(3, 4).double())
    opt = Shampoo([p], lr=0.1, momentum=0.8, weight_decay=0.3, damping=1e-2)
    weight, v = p.detach().clone(), 0
    gradients = random_gradients((3, 4))
    for k, g in enumerate(gradients):
        p.grad = g.clone()
        opt.step()
        v = 0.8 * v + dense(gradients[: k + 1], 1e-2)
        weight = (1 - 0.1 * 0.3) * weight - 0.1 * v
        assert relative(p.detach(), weight) < 1e-10


def test_a_root_that_fails_keeps_the_old_one_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.randn(3, 4)
    _, opt, p = run([g])
    roots = [root.clone() for root in opt.state[p]["roots"][0].values()]

    def fail(matrix: Tensor) -> Tensor:
        raise torch.linalg.LinAlgError("failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    before = p.detach().clone()
    p.grad = 2 * g
    opt.step()
    assert opt.failed_roots == 2
    assert all(torch.equal(a, b) for a, b in zip(roots, opt.state[p]["roots"][0].values(), strict=True))
    assert relative(before - p.detach(), roots[0] @ (2 * g) @ roots[1]) < 1e-6


def test_a_gradient_that_is_not_finite_is_left_out_and_counted() -> None:
    _, opt, p = run([torch.randn(3, 4)])
    before, statistics = p.detach().clone(), opt.state[p]["statistics"][0][0].clone()
    p.grad = torch.full((3, 4), math.nan)
    opt.step()
    assert (opt.steps, opt.skipped_steps) == (2, 1)
    assert torch.equal(p, before)
    assert torch.equal(opt.state[p]["statistics"][0][0], statistics)


def test_noise_below_the_rounding_error_is_not_blown_up() -> None:
    """Of a singular float32 matrix without damping."""
    g = torch.randn(30, 2)
    root = inverse_root(g @ g.T, 0.0, 0.25)
    assert torch.linalg.matrix_norm(root, 2) <= (g.square().sum() * 30 * 1.2e-7) ** -0.25 * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.5}, "decay must be"),
        ({"interval": 0}, "interval must be"),
        ({"block_size": 0}, "block_size must be"),
        ({"damping": -1.0}, "damping must be"),
    ],
)
def test_bad_arguments_are_refused_by_name(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shampoo([nn.Parameter(torch.zeros(2))], **{"lr": 0.1, **options})


@pytest.mark.parametrize("shape", [(5,), (4, 6)], ids=str)
def test_the_trajectory_is_that_of_pytorch_optimizer(shape: tuple[int, ...]) -> None:
    """A further check where that package is installed; the dense ones above need nothing."""
    other = pytest.importorskip("pytorch_optimizer")
    target = torch.randn(shape).double()
    curvature = torch.rand(shape).double() + 0.1
    ends = []
    for make in (
        lambda p: Shampoo([p], lr=0.3, momentum=0.0, damping=1e-4, interval=1),
        lambda p: other.Shampoo([p], lr=0.3, momentum=0.0, matrix_eps=1e-4, preconditioning_compute_steps=1),
    ):
        p = nn.Parameter(torch.zeros(shape).double())
        opt = make(p)
        for _ in range(20):
            p.grad = (curvature * (p - target)).detach()
            opt.step()
        ends.append(p.detach().clone())
    assert relative(ends[0], ends[1]) < 1e-8
