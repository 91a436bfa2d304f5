"""The start by sampled Fisher gradients: what is sampled, where it leads, that it leaves no trace."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import apo
import apo_kernels as ak
from apo.fisher.layout import ENERGY, Layout
from apo.fisher.start import FisherStart
from apo.layers.arena import Arena
from apo.layers.preconditioner import PreconditionedLayer
from apo.proximal import hessian
from tests.apo.helpers import apo_of, closure_of, mlp, objective, precondition, same, weights

DRAWS = 4000


def flat(parts: Any) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize(
    ("rho", "shape"),
    [
        (apo.KL(), (2, 3)),
        (apo.KL(dim=1), (1, 3, 2)),
        (apo.SquaredError(), (2, 2)),
        (apo.SquaredError(mean=True), (2, 2)),
        (apo.BernoulliKL(), (2, 2)),
        (apo.BernoulliKL(mean=True), (2, 2)),
        (apo.GaussianKL(variance=0.25), (2, 2)),
    ],
)
def test_samples_have_the_discrepancys_hessian_as_covariance(rho: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    old = torch.randn(shape).double()
    generator = torch.Generator().manual_seed(1)
    drawn = torch.stack([flat(rho.fisher_sample(old, generator)) for _ in range(DRAWS)])
    expected = hessian(lambda new: rho(new.view(shape), old), old.flatten())
    assert (drawn.T @ drawn / DRAWS - expected).abs().max() < 0.06 * expected.abs().max()


def test_samples_of_a_mean_and_a_log_variance() -> None:
    torch.manual_seed(0)
    old = torch.randn(2, 2, 1).double()
    generator = torch.Generator().manual_seed(1)
    rho = apo.GaussianKL()
    drawn = torch.stack([flat(rho.fisher_sample(tuple(old), generator)) for _ in range(DRAWS)])
    expected = hessian(lambda new: rho(tuple(new.view(2, 2, 1)), tuple(old)), old.flatten())
    assert (drawn.T @ drawn / DRAWS - expected).abs().max() < 0.06 * expected.abs().max()


SHAPES = [(None, 5, 4), (2, 5, 4), (2, 4, 3)]


@pytest.mark.parametrize(("block_size", "n", "m"), SHAPES)
def test_from_the_identity_to_the_inverse(block_size: int | None, n: int, m: int) -> None:
    """Theorem 1's ``F⁻¹``, up to scale: F a Kronecker product whose factors fit the blocks."""
    layer, factors = layer_and_factors(block_size, n, m)
    whiten(layer, torch.kron(*factors), delta=0.0, steps=500)
    assert away(layer, torch.kron(*factors)) < 1e-2


@pytest.mark.parametrize(("block_size", "n", "m", "delta"), [(None, 5, 4, 1.0), (2, 4, 3, 1e-2)])
def test_the_damped_inverse_is_a_fixed_point_that_attracts(
    block_size: int | None, n: int, m: int, delta: float
) -> None:
    """Theorem 1's ``(F + δI)⁻¹``, up to scale: in the factors' eigenbases S represents it."""
    layer, factors = layer_and_factors(block_size, n, m)
    F = torch.kron(*factors) + delta * torch.eye(m * n).double()
    for x, factor in ((layer.B, factors[0]), (layer.A, factors[1])):
        for i, square in enumerate(x if block_size else [x]):
            own = slice(i * square.shape[0], min((i + 1) * square.shape[0], len(factor)))
            square[: own.stop - own.start, : own.stop - own.start] = torch.linalg.eigh(factor[own, own]).eigenvectors
    basis = torch.kron(layer_basis(layer.B, m), layer_basis(layer.A, n))
    layer.S.copy_((basis.T @ F @ basis).diagonal().rsqrt().view(m, n))
    assert away(layer, F) < 1e-7
    whiten(layer, F - delta * torch.eye(m * n).double(), delta, steps=5)
    assert away(layer, F) < 1e-7
    layer.S.mul_(torch.exp(0.1 * torch.randn(m, n).double()))
    for x in (layer.A, layer.B):
        x.add_(0.02 * torch.randn_like(x) * (x != 0))
    assert away(layer, F) > 1.5e-2
    whiten(layer, F - delta * torch.eye(m * n).double(), delta, steps=1000, rate=0.1)
    assert away(layer, F) < 1e-2


def layer_and_factors(block_size: int | None, n: int, m: int) -> tuple[PreconditionedLayer, list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Linear(n, m, bias=False).double()
    (layer,) = apo.APO(model, objective(model, torch.zeros(1, n)), block_size=block_size).layers
    return layer, [spread(side, block) for side, block in ((m, layer.B), (n, layer.A))]


def whiten(layer: PreconditionedLayer, F: Tensor, delta: float, steps: int, rate: float = 0.05) -> None:
    """Steps by the exact second moment."""
    roots = torch.linalg.cholesky(F).T * math.sqrt(len(F))
    start = FisherStart(1)
    start.RATE = rate
    start.BETA = 1 - 1e-9  # the mean of all that is seen
    arena = Arena()
    arena.take_in([layer])
    for _ in range(steps):
        start.prepare([layer])
        for w in roots:
            start.look(arena, [[w.view(layer.view.shape)]])
        start.step([layer], delta)


def away(layer: PreconditionedLayer, F: Tensor) -> float:
    """How far P is from F's inverse, both divided by their norms."""
    P, inverse = dense(layer), torch.linalg.inv(F)
    return float((P / P.norm() - inverse / inverse.norm()).norm())


def layer_basis(block: Tensor, side: int) -> Tensor:
    return block if block.ndim == 2 else torch.block_diag(*block)[:side, :side]


@pytest.mark.parametrize("settings", [{"block_size": None}, {"block_size": 2}, {"block_size": 2, "max_dim": 4}])
def test_energies_of_noise_are_those_expected(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 4, bias=False).double()
    (layer,) = apo_of(model, objective(model, torch.zeros(1, 5)), **settings).layers
    for x in layer.tensors():
        x.add_(0.3 * torch.randn_like(x) * (x != 0 if x is layer.S else 1))
    rest = 5 % layer.A.shape[-1]
    if settings["block_size"] and rest and "A" in layer.learned:  # what sticks out stays the identity
        layer.A[-1, rest:] = layer.A[-1, :, rest:] = 0
        layer.A[-1, rest:, rest:] = torch.eye(len(layer.A[-1]) - rest).double()
    arena, start = Arena(), FisherStart(1)
    arena.take_in([layer])
    start.BETA = 1 - 1e-9  # the mean of all that is seen
    start.prepare([layer])
    for w in torch.eye(20).double():  # E over noise is the sum over an orthonormal basis
        start.look(arena, [[w.view(4, 5)]])
    totals = {
        name: 20 * part.buffers[ENERGY] / layer.parts["S"].buffers[start.WEIGHT]
        for name, part in zip(layer.learned, layer.phi, strict=True)
    }
    layout = Layout([layer])
    (total,) = layout.noise([kind.together()[0] for kind in layout.kinds])
    ((piece,),) = layout.groups
    expected = {"S": piece.S**2 * piece.a * piece.b}
    noises = {
        id(side.own): x for kind in layout.kinds for side, x in zip(kind.sides, kind.along(kind.noise), strict=True)
    }
    for name in layer.learned[:-1]:
        x, noise = layer.parts[name].tensor, noises[id(layer.parts[name])]
        expected[name] = x.mT @ x * ak.by_square(noise, x).unsqueeze(-2)
    assert total.isclose(expected["S"].sum())
    for name, x in expected.items():
        assert torch.allclose(x, totals[name], rtol=1e-6), name


def spread(side: int, block: Tensor) -> Tensor:
    """A positive definite factor within the blocks, of condition 100 or so."""
    width = block.shape[-1]
    blocks = []
    for first in range(0, side, width):
        size = min(width, side - first)
        Q = torch.linalg.qr(torch.randn(size, size).double()).Q
        blocks.append(Q * torch.logspace(0, -2, size).double() @ Q.T)
    return torch.block_diag(*blocks)


def dense(layer: PreconditionedLayer) -> Tensor:
    """P as a matrix over the flattened weight."""
    m, n = layer.view.shape
    return torch.stack([precondition([layer], [e.view(m, n)])[0].flatten() for e in torch.eye(m * n).double()])


def test_what_sticks_out_of_a_side_stays_the_identity() -> None:
    model, x, t, other = mlp()
    opt = apo.APO(model, objective(model, other), block_size=4, method=apo.Method(fisher_start=300, adapt_lr=False))
    for _ in range(30):
        opt.step(closure_of(opt, model, x, t))
    A = opt.layers[0].A  # of side 6: two squares of 4
    assert torch.equal(A[1, 2:, 2:], torch.eye(2).double())
    assert not A[1, :2, 2:].any()
    assert (A[1, :2, :2] - torch.eye(2)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_what_is_frozen_keeps_its_scale(name: str) -> None:
    """Its samples are zero, which would be read as no curvature; it may be thawed later."""
    model, x, t, other = mlp()
    opt = apo.APO(
        model, objective(model, other), params=model.parameters(), block_size=1, method=apo.Method(adapt_lr=False)
    )
    getattr(model[0], name).requires_grad_(False)
    for _ in range(20):
        opt.step(closure_of(opt, model, x, t))
    S = opt.layers[0].S
    frozen, free = (S[:, :-1], S[:, -1]) if name == "weight" else (S[:, -1], S[:, :-1])
    assert torch.equal(frozen, torch.ones_like(frozen))
    assert not torch.equal(free, torch.ones_like(free))


def test_what_takes_part_may_change() -> None:
    """As one that was built anew then: what is kept from step to step is of the layers and tensors there are."""
    model, x, t, other = mlp()
    opt = apo.APO(model, objective(model, other), params=list(model.parameters()))
    for frozen in ((), ("weight",), ("bias",)):
        twin = copy.deepcopy(model)
        fresh = apo.APO(twin, objective(twin, other), params=list(twin.parameters()))
        fresh.load_state_dict(opt.state_dict())
        for one, net in ((opt, model), (fresh, twin)):
            for name in ("weight", "bias"):
                getattr(net[0], name).requires_grad_(name not in frozen)
            for _ in range(3):
                one.step(closure_of(one, net, x, t))
        assert same(weights(model), weights(twin))


def test_it_draws_from_a_generator_of_its_own() -> None:
    """The global one stays where it is without a start."""
    states, runs = [], []
    for updates in (0, 5):
        model, x, t, other = mlp()
        opt = apo.APO(model, objective(model, other), method=apo.Method(fisher_start=updates))
        for _ in range(3):
            opt.step(closure_of(opt, model, x, t))
        states.append(torch.get_rng_state())
        runs.append(weights(model))
    assert torch.equal(*states)
    assert not same(*runs)  # it did draw


def test_it_ends_and_lets_go_of_what_it_held() -> None:
    model, x, t, other = mlp()
    opt = apo.APO(model, objective(model, other), method=apo.Method(fisher_start=4))
    first = opt.plan().memory_bytes
    assert "S_energy" in opt.state[model[0].weight]
    for _ in range(4):
        opt.step(closure_of(opt, model, x, t))
    assert "S_energy" not in opt.state[model[0].weight]
    assert opt.plan().memory_bytes < first
    late = opt.state_dict()
    assert set(late["state"][0]) == set(
        apo.APO(model, objective(model, other), method=apo.Method(fisher_start=4)).state_dict()["state"][0]
    )


@pytest.mark.parametrize("at", [2, 6])
def test_resumed_to_the_bit_while_it_lasts_and_after(at: int) -> None:
    model, x, t, other = mlp()
    opt = apo.APO(model, objective(model, other), method=apo.Method(fisher_start=4))
    for _ in range(at):
        opt.step(closure_of(opt, model, x, t))
    twin = copy.deepcopy(model)
    resumed = apo.APO(twin, objective(twin, other), method=apo.Method(fisher_start=4))
    resumed.load_state_dict(opt.state_dict())
    for one, net in ((opt, model), (resumed, twin)):
        for _ in range(4):
            one.step(closure_of(one, net, x, t))
    assert same(weights(model), weights(twin))


def test_a_callable_discrepancy_gets_no_start() -> None:
    model, x, t, other = mlp()
    kl = apo.KL()
    runs = []
    for updates in (0, 50):
        model, x, t, other = mlp()
        goal = objective(model, other, discrepancy=lambda new, old: kl(new, old))
        opt = apo.APO(model, goal, method=apo.Method(fisher_start=updates))
        for _ in range(5):
            opt.step(closure_of(opt, model, x, t))
        runs.append(weights(model))
    assert same(*runs)


def test_a_sample_that_is_not_finite_is_left_out() -> None:
    """The step is the one that is taken without a start."""
    runs, drawn = [], []

    def sample(outputs: Tensor, generator: torch.Generator) -> list[Tensor]:
        drawn.append(outputs)
        return [torch.full_like(outputs, math.inf)]

    def look(*_: Any) -> None:
        raise AssertionError

    for updates in (0, 300):
        model, x, t, other = mlp()
        opt = apo.APO(model, objective(model, other), method=apo.Method(fisher_start=updates))
        opt.objective.fisher_sample = sample  # type: ignore[method-assign]
        opt._start.look = look  # type: ignore[method-assign]
        opt.step(closure_of(opt, model, x, t))
        runs.append(weights(model))
    assert len(drawn) == 1
    assert same(*runs)
