"""The paper's theory: Eq. 4, Table 1, Theorem 1, Corollary 2."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import apo
import apo_kernels as ak
from apo.proximal import (
    DAMPED_NATURAL_GRADIENT,
    GRADIENT_DESCENT,
    HESSIAN_FREE,
    NATURAL_GRADIENT,
    PROXIMAL_POINT,
    TABLE_1,
    ProximalMethod,
    closed_form_step,
    flat_model,
    hessian,
    proximal_step,
)
from tests.apo.helpers import objective


def error(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


class Softmax:
    """A softmax regression with a reference class: loss, KL discrepancy and their closed forms."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.theta = torch.randn(8, dtype=torch.float64)
        self.x = torch.randn(30, 4, dtype=torch.float64)
        self.t = torch.randint(3, (30,))
        self.p = self.logits(self.theta).softmax(-1)

    def logits(self, theta: Tensor) -> Tensor:
        return torch.cat([self.x @ theta.view(4, 2), self.x.new_zeros(len(self.x), 1)], 1)

    def loss(self, u: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.logits(u)[:10], self.t[:10])

    def discrepancy(self, u: Tensor) -> Tensor:
        return apo.KL()(self.logits(u), self.logits(self.theta))

    def gradient(self) -> Tensor:
        """``E x (p − t)ᵀ`` over the batch of ten."""
        off = self.p[:10, :2] - nn.functional.one_hot(self.t[:10], 3)[:, :2]
        return (self.x[:10].T @ off / 10).flatten()

    def fisher(self, count: int = 30) -> Tensor:
        """``E (x xᵀ) ⊗ (diag p − p pᵀ)``, the free classes only."""
        p, x = self.p[:count, :2], self.x[:count]
        inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        return torch.einsum("ni,nj,nab->iajb", x, x, inner).reshape(8, 8) / count


def test_eq_4_is_the_minimum_of_the_linear_loss_and_the_quadratic_discrepancy() -> None:
    s = Softmax()
    G = hessian(s.discrepancy, s.theta)
    assert error(G, s.fisher()) < 1e-8
    eye = torch.eye(8, dtype=torch.float64)
    expected = s.theta - torch.linalg.inv(0.6 * s.fisher() + 0.2 * eye) @ s.gradient()
    assert error(closed_form_step(s.theta, s.gradient(), G, fsd_weight=0.6, wsd_weight=0.2), expected) < 1e-8
    step = proximal_step(s.theta, s.loss, s.discrepancy, method=DAMPED_NATURAL_GRADIENT, fsd_weight=0.6, wsd_weight=0.2)
    assert error(step, expected) < 1e-8


def test_gradient_descent_row() -> None:
    s = Softmax()
    step = proximal_step(s.theta, s.loss, method=GRADIENT_DESCENT, wsd_weight=4.0)
    assert error(step, s.theta - s.gradient() / 4) < 1e-8


def test_hessian_free_row() -> None:
    s = Softmax()
    # the Hessian of softmax regression is its Fisher matrix on the batch
    damped = s.fisher(10) + 0.3 * torch.eye(8, dtype=torch.float64)
    step = proximal_step(s.theta, s.loss, method=HESSIAN_FREE, wsd_weight=0.3)
    assert error(step, s.theta - torch.linalg.solve(damped, s.gradient())) < 1e-8


def test_natural_gradient_row() -> None:
    s = Softmax()
    step = proximal_step(s.theta, s.loss, s.discrepancy, method=NATURAL_GRADIENT, fsd_weight=2.0, wsd_weight=9.0)
    assert error(step, s.theta - torch.linalg.solve(2 * s.fisher(), s.gradient())) < 1e-8


def test_proximal_point_row_on_a_linear_regression() -> None:
    """Exact loss, FSD and WSD, all quadratic: a closed form."""
    torch.manual_seed(1)
    x, t, other = torch.randn(5, 7).double(), torch.randn(5).double(), torch.randn(20, 7).double()
    theta = torch.randn(7).double()
    step = proximal_step(
        theta,
        lambda u: (x @ u - t).square().sum() / 10,
        lambda u: (other @ (u - theta)).square().sum() / 40,
        fsd_weight=0.7,
        wsd_weight=0.05,
    )
    normal = x.T @ x / 5 + 0.7 * other.T @ other / 20 + 0.05 * torch.eye(7).double()
    assert error(step - theta, torch.linalg.solve(normal, x.T @ (t - x @ theta) / 5)) < 1e-8


def test_proximal_point_row_where_nothing_is_quadratic() -> None:
    """Its gradient vanishes, and no other row reaches its objective."""
    s = Softmax()

    def q(u: Tensor) -> Tensor:
        return s.loss(u) + 0.5 * s.discrepancy(u) + 0.05 * (u - s.theta).square().sum()

    step = proximal_step(s.theta, s.loss, s.discrepancy, fsd_weight=0.5, wsd_weight=0.1)
    u = step.clone().requires_grad_()
    (slope,) = torch.autograd.grad(q(u), u)
    assert slope.norm() < 1e-10
    for method in TABLE_1[:-1]:
        other = proximal_step(s.theta, s.loss, s.discrepancy, method=method, fsd_weight=0.5, wsd_weight=0.1)
        assert q(step) < q(other) - 1e-4


def test_a_method_of_ones_own_and_the_small_step_limit() -> None:
    """Heavily damped, every row that has a WSD goes along the gradient."""
    s = Softmax()
    newton = ProximalMethod("second order in both", "second", "second", True)
    for method in (GRADIENT_DESCENT, HESSIAN_FREE, DAMPED_NATURAL_GRADIENT, PROXIMAL_POINT, newton):
        step = proximal_step(s.theta, s.loss, s.discrepancy, method=method, wsd_weight=1e6)
        assert error((step - s.theta) * 1e6, -s.gradient()) < 1e-5


@pytest.mark.parametrize(("fsd_weight", "wsd_weight"), [(1.0, 0.1), (0.3, 0.03), (0.0, 0.5)])
def test_theorem_1(fsd_weight: float, wsd_weight: float) -> None:
    """A full preconditioner, meta-learned on the linearised loss with the quadratic discrepancy, batch by batch."""
    torch.manual_seed(0)
    d, n = 4, 32
    model = nn.Linear(d, 1, bias=False).double()
    x = torch.linalg.qr(torch.randn(n, d).double())[0] @ torch.randn(d, d).double() * 4
    # of a linear model the discrepancy is quadratic as it is
    goal = objective(model, x, discrepancy="mse", fsd_weight=fsd_weight, wsd_weight=wsd_weight)
    opt = apo.FullPreconditioner(model, goal, lr=1.0, meta_lr=0.1)
    start = model.weight.detach().clone()
    gradients = torch.randn(16, 1, d).double()
    G = x.T @ x / n
    expected = torch.linalg.inv(fsd_weight * G + wsd_weight * torch.eye(d).double())

    for i in range(2500):
        g = gradients[i % len(gradients)]

        def closure(g: Tensor = g) -> Tensor:
            opt.zero_grad()
            loss = (g * model.weight).sum()  # linearised
            loss.backward()
            return loss

        opt.meta_step(closure)
        for own in opt.meta.learned:
            own.rate *= 0.998
    assert torch.equal(model.weight, start)
    assert error(opt.P, expected) < 1e-3


def test_corollary_2() -> None:
    """The structured preconditioner reaches KFAC's on a deep linear network, layer by layer.

    There KFAC's assumptions hold exactly: activations and back-propagated derivatives are independent, so that a
    layer's Fisher block is ``E[a aᵀ] ⊗ E[s sᵀ]``, with Gaussian outputs and their KL as the FSD. Layers' Fisher
    blocks don't mix when each is perturbed alone (KFAC's block-diagonal assumption).
    """
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(a, b, bias=False) for a, b in ((4, 4), (4, 4), (4, 6))]).double()
    x = torch.randn(64, 4).double() @ torch.randn(4, 4).double()
    theta, f = flat_model(model)
    old = f(theta, x)
    kl = apo.GaussianKL(variance=1.0)
    first = 0
    activations, after = x, [layer.weight.detach() for layer in model]
    for i, layer in enumerate(model):
        m, n = layer.weight.shape
        # KFAC's factors: of the layer's inputs, and of what the outputs' noise back-propagates
        down = torch.eye(m).double()
        for W in after[i + 1 :]:
            down = W @ down
        left, right = down.T @ down, activations.T @ activations / len(x)
        A, B = (torch.eye(k).double().requires_grad_() for k in (n, m))
        S = torch.full((m, n), 0.5).double().requires_grad_()
        gradients = torch.eye(m * n).double().view(-1, m, n)  # E g gᵀ is non-singular
        optimizer = torch.optim.LBFGS([A, B, S], max_iter=400, tolerance_change=0, line_search_fn="strong_wolfe")
        before, here, behind = theta[:first], theta[first : first + m * n], theta[first + m * n :]

        def fsd(step: Tensor, before: Tensor = before, here: Tensor = here, behind: Tensor = behind) -> Tensor:
            return kl(f(torch.cat([before, here - step.flatten(), behind]), x), old)

        def q(
            A: Tensor = A, B: Tensor = B, S: Tensor = S, G: Tensor = gradients, fsd: Callable[[Tensor], Tensor] = fsd
        ) -> Tensor:
            """The approximate meta-objective: linearised loss, KL, λ_FSD = 1, λ_WSD = 0."""
            steps = ak.precondition(G, *(z.expand(len(G), *z.shape) for z in (A, B, S)))
            return torch.vmap(fsd)(steps).mean() - (G * steps).sum() / len(G)

        def closure(optimizer: torch.optim.Optimizer = optimizer, q: Callable[[], Tensor] = q) -> Tensor:
            optimizer.zero_grad()
            value = q()
            value.backward()
            return value

        optimizer.step(closure)
        fresh = torch.randn(20, m, n).double()
        with torch.no_grad():
            learned = torch.stack([ak.precondition(G, A, B, S) for G in fresh])
            kfac = torch.linalg.inv(left) @ fresh @ torch.linalg.inv(right)
        assert error(learned, kfac) < 1e-2, f"layer {i}"
        activations = activations @ layer.weight.detach().T
        first += m * n
