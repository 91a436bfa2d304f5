"""EKFAC against dense float64 computations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common.fisher import layers as layers_module
from benchmarks.paper.baselines import EKFAC
from tests.benchmarks.paper.baselines.helpers import (
    Fixed,
    Listed,
    closure_of,
    example_gradients,
    gradient_of,
    relative,
    softmax_fisher,
    step_of,
)


def pieces(opt: EKFAC, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """``(S, Q_B ⊗ Q_A)``."""
    state = opt.state[layer.weight]
    return state["S"], torch.kron(state["Q_B"], state["Q_A"])


def net(kind: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A model, the layer that is looked at, and inputs of 5 examples."""
    if kind == "linear":
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        return model, model[0], torch.randn(5, 4).double()
    if kind == "convolution":
        model = nn.Sequential(nn.Conv2d(2, 3, 2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(75, 3)).double()
        return model, model[0], torch.randn(5, 2, 4, 4).double()

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.inner(x)).sum(1))

    pooled = Pooled()
    return pooled, pooled.inner, torch.randn(5, 6, 4).double()


@pytest.mark.parametrize("chunk", [1, 1 << 24])
@pytest.mark.parametrize("kind", ["linear", "convolution", "sequence"])
def test_S_is_the_diagonal_of_the_fisher_in_the_eigenbasis(
    kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exact rescale: ``S = diag(Qᵀ F Q)`` with the dense second moment of the examples' gradients."""
    monkeypatch.setattr(layers_module, "CHUNK", chunk)
    model, layer, x = net(kind)
    cotangent = torch.randn(5, 3).double()
    opt = EKFAC(model, Fixed(cotangent), lr=0.0, warmup=0, inverse_interval=10)
    for _ in range(2):
        opt.step(closure_of(opt, lambda: F.cross_entropy(model(x), torch.tensor([0, 1, 2, 0, 1]))))
    S, Q = pieces(opt, layer)
    g = example_gradients(model, layer, x, cotangent).flatten(1)
    fisher = g.T @ g / 5
    state = opt.state[layer.weight]
    from_kfac = torch.outer(torch.linalg.eigvalsh(state["F_B"]), torch.linalg.eigvalsh(state["F_A"]))
    exact = (Q.T @ fisher @ Q).diagonal().reshape(S.shape)
    # the start from KFAC's eigenvalues counts as one batch, then came two
    assert relative(S, (from_kfac + 2 * exact) / 3) < 1e-10
    # the best diagonal in that basis, so nearer to the Fisher matrix than KFAC's
    error = [(Q @ d.flatten().diag() @ Q.T - fisher).norm() for d in (exact, from_kfac)]
    assert error[0] < error[1]


@pytest.mark.parametrize("kind", ["linear", "convolution", "sequence"])
@pytest.mark.parametrize("damping", [1e-1, 1e-4])
def test_the_step_is_that_of_the_dense_matrix(kind: str, damping: float) -> None:
    model, layer, x = net(kind)
    t = torch.tensor([0, 1, 2, 0, 1])
    G = gradient_of(layer, F.cross_entropy(model(x), t)).flatten()
    opt = EKFAC(model, "categorical", lr=1.0, momentum=0.0, damping=damping)
    P = step_of(opt, layer, lambda: F.cross_entropy(model(x), t))
    S, Q = pieces(opt, layer)
    dense = Q @ S.flatten().diag() @ Q.T + damping * torch.eye(len(Q)).double()
    assert relative(P.flatten(), torch.linalg.solve(dense, G)) < 1e-10


@pytest.mark.parametrize("damping", [1e-1, 1e-3])
def test_where_kfac_is_exact_ekfac_is_the_damped_natural_gradient(damping: float) -> None:
    """A softmax layer with equal rows; here the damping is exact too: ``(F + γ I)⁻¹ g``."""
    model = nn.Linear(5, 3).double()
    with torch.no_grad():
        model.weight.copy_(torch.randn(5).expand(3, -1))
        model.bias.copy_(torch.tensor([0.5, 0.25, 0.25]).double().log())
    x, t = torch.randn(20, 5).double(), torch.randint(3, (80,))
    loss = lambda: F.cross_entropy(model(x.repeat_interleave(4, 0)), t)  # noqa: E731
    opt = EKFAC(model, Listed([0, 0, 1, 2]), lr=1.0, momentum=0.0, damping=damping)
    P = step_of(opt, model, loss)
    fisher = softmax_fisher(model, model, x)
    G = gradient_of(model, loss())
    want = torch.linalg.solve(fisher + damping * torch.eye(18).double(), G.flatten())
    assert relative(P.flatten(), want) < 1e-10


def test_a_new_basis_starts_the_moments_anew() -> None:
    model = nn.Linear(4, 3).double()
    opt = EKFAC(model, "categorical", lr=0.0, warmup=0, inverse_interval=3)
    counts = []
    for _ in range(7):
        x = torch.randn(6, 4).double()
        opt.step(closure_of(opt, lambda: F.cross_entropy(model(x), torch.zeros(6, dtype=torch.long))))  # noqa: B023
        counts.append(opt.state[model.weight]["S_batches"])
    assert counts == [2, 3, 4, 2, 3, 4, 2]


def test_a_decomposition_that_fails_keeps_the_old_basis_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Linear(4, 3), torch.randn(6, 4)
    opt = EKFAC(model, "categorical", lr=0.1, warmup=5)
    closure = closure_of(opt, lambda: F.cross_entropy(model(x), torch.zeros(6, dtype=torch.long)))
    opt.step(closure)
    basis = opt.state[model.weight]["Q_A"]

    def fail(matrix: Tensor) -> Tensor:
        raise torch.linalg.LinAlgError("failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    before = model.weight.detach().clone()
    opt.step(closure)
    assert opt.failed_inverses == 2
    assert opt.state[model.weight]["Q_A"] is basis
    assert not torch.equal(model.weight, before)
