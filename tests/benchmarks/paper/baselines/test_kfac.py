"""KFAC against dense float64 computations of what it approximates, and of what it does exactly."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common.fisher.damping import tikhonov
from benchmarks.paper.baselines import EKFAC, KFAC, Bernoulli, Categorical, Gaussian
from benchmarks.paper.baselines.kfac import inverse_by_attempts
from tests.benchmarks.paper.baselines.helpers import (
    Fixed,
    Listed,
    ListedGaussian,
    closure_of,
    gradient_of,
    joined,
    relative,
    softmax_fisher,
    step_of,
)

BOTH = pytest.mark.parametrize("baseline", [KFAC, EKFAC])


def factors(opt: KFAC | EKFAC, layer: nn.Module) -> tuple[Tensor, Tensor]:
    state = opt.state[layer.weight]
    return state["F_A"], state["F_B"]


def constant_softmax(inputs: int = 5) -> nn.Linear:
    """A softmax layer whose predictions are (½, ¼, ¼) whatever its input: its rows are equal.

    The output gradients are then independent of the inputs, which is KFAC's assumption: its Fisher block is exact.
    """
    model = nn.Linear(inputs, 3).double()
    with torch.no_grad():
        model.weight.copy_(torch.randn(inputs).expand(3, -1))
        model.bias.copy_(torch.tensor([0.5, 0.25, 0.25]).double().log())
    return model


def every_class(x: Tensor) -> Tensor:
    """Each example four times, to go with ``Listed([0, 0, 1, 2])``: the expectation over (½, ¼, ¼)."""
    return x.repeat_interleave(4, 0)


# ---- the exact Fisher matrix


@pytest.mark.parametrize("damping", [1e-1, 1e-4])
def test_kfac_is_the_fisher_of_a_softmax_layer_whose_predictions_do_not_depend_on_the_input(damping: float) -> None:
    model, x = constant_softmax(), torch.randn(20, 5).double()
    t = torch.randint(3, (80,))
    opt = KFAC(model, Listed([0, 0, 1, 2]), lr=1.0, momentum=0.0, damping=damping)
    P = step_of(opt, model, lambda: F.cross_entropy(model(every_class(x)), t))
    G = gradient_of(model, F.cross_entropy(model(every_class(x)), t))
    F_A, F_B = factors(opt, model)
    assert relative(torch.kron(F_B, F_A), softmax_fisher(model, model, x)) < 1e-12
    # π√γ written out: the damped block is (F_A + π√γ I) ⊗ (F_B + √γ/π I)
    pi = math.sqrt((F_A.trace() / 6) / (F_B.trace() / 3))
    eye_A, eye_B = torch.eye(6).double(), torch.eye(3).double()
    damped = torch.kron(F_B + damping**0.5 / pi * eye_B, F_A + damping**0.5 * pi * eye_A)
    assert relative(P.flatten(), torch.linalg.solve(damped, G.flatten())) < 1e-11


def test_without_damping_it_is_the_natural_gradient() -> None:
    """Softmax's Fisher is singular (logits may be shifted), but gradients lie in its range."""
    model, x = constant_softmax(), torch.randn(20, 5).double()
    t = torch.randint(3, (80,))
    opt = KFAC(model, Listed([0, 0, 1, 2]), lr=1.0, momentum=0.0, damping=1e-18)
    P = step_of(opt, model, lambda: F.cross_entropy(model(every_class(x)), t))
    G = gradient_of(model, F.cross_entropy(model(every_class(x)), t))
    natural = torch.linalg.pinv(softmax_fisher(model, model, x), hermitian=True, rtol=1e-10) @ G.flatten()
    assert relative(P.flatten(), natural) < 1e-6


def test_one_example_is_exact_too_whatever_the_weights() -> None:
    model = nn.Linear(4, 3, bias=False).double()
    with torch.no_grad():  # so that its predictions are (½, ¼, ¼)
        x = torch.randn(1, 4).double()
        logits = torch.tensor([0.5, 0.25, 0.25]).double().log()
        model.weight += torch.outer(logits - model(x)[0], x[0]) / x.square().sum()
    opt = KFAC(model, Listed([0, 0, 1, 2]), lr=0.0, damping=0.1)
    opt.step(closure_of(opt, lambda: F.cross_entropy(model(every_class(x)), torch.tensor([0, 1, 2, 0]))))
    F_A, F_B = factors(opt, model)
    assert relative(torch.kron(F_B, F_A), softmax_fisher(model, model, x)) < 1e-12


class SummedConv(nn.Module):
    """Logits that are a convolution's outputs, summed over places."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 2, stride=2, bias=False, **options).double()
        nn.init.zeros_(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).sum((2, 3))


def uncorrelated_patches() -> Tensor:
    """Images of four patches that appear with every combination of signs: patches don't correlate."""
    patches = torch.randn(6, 2, 4, 4).double()
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 4).reshape(-1, 1, 2, 2)
    grown = signs.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return torch.cat([patch[None] * grown for patch in patches])


def test_kfac_is_the_fisher_of_a_convolution_whose_places_do_not_correlate() -> None:
    """Grosse & Martens' assumptions hold: uncorrelated inputs at the places, output gradients alike at all of them
    and independent of the inputs (the weights are zero, so the predictions are uniform)."""
    model, x = SummedConv(), uncorrelated_patches()
    t = torch.randint(3, (3 * len(x),))
    loss = lambda: F.cross_entropy(model(x.repeat_interleave(3, 0)), t)  # noqa: E731
    opt = KFAC(model, Listed([0, 1, 2]), lr=1.0, momentum=0.0, damping=1e-18)
    P = step_of(opt, model.conv, loss)
    F_A, F_B = factors(opt, model.conv)
    fisher = softmax_fisher(model, model.conv, x)
    assert relative(torch.kron(F_B, F_A), fisher) < 1e-12
    natural = torch.linalg.pinv(fisher, hermitian=True, rtol=1e-10) @ gradient_of(model.conv, loss()).flatten()
    assert relative(P.flatten(), natural) < 1e-5


def test_one_step_solves_a_linear_regression() -> None:
    """½ the squared error, summed over outputs: its Hessian is E[ā āᵀ] ⊗ I, for any data."""
    model, x, y = nn.Linear(4, 2).double(), torch.randn(30, 4).double(), torch.randn(30, 2).double()
    opt = KFAC(model, ListedGaussian(), lr=1.0, momentum=0.0, damping=1e-20)
    opt.step(closure_of(opt, lambda: 0.5 * (model(x) - y).square().sum(1).mean()))
    best = torch.linalg.lstsq(torch.cat([x, torch.ones(30, 1).double()], 1), y).solution.T
    assert relative(joined(model.weight.detach(), model.bias.detach()), best) < 1e-7


# ---- the factors of each kind of layer, by loops


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(3, 4).double(), nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(x)))


def conv_net(**options: object) -> nn.Sequential:
    first = nn.Conv2d(2, 3, (3, 2), **options)
    return nn.Sequential(first, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)).double()


CONVOLUTIONS = [
    {},
    {"stride": 2, "padding": (2, 1)},
    {"dilation": 2, "padding": 2, "bias": False},
    {"padding": "same", "dilation": (1, 2)},
    {"padding": 1, "padding_mode": "circular"},
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_factors_of_a_convolution_are_those_of_its_places(options: dict[str, object]) -> None:
    model, x = conv_net(**options), torch.randn(4, 2, 5, 6).double()
    model(x)
    cotangent = torch.randn(4, 3).double()
    opt = KFAC(model, Fixed(cotangent), lr=0.0)
    opt.step(closure_of(opt, lambda: F.cross_entropy(model(x), torch.tensor([0, 1, 2, 0]))))
    conv = model[0]
    s = conv(x)
    Ds = torch.autograd.grad((model[1:](s) * cotangent).sum(), s)[0]
    # the input that a place sees, by the derivative of its output: no unfolding, no rule for padding
    F_A, F_B, places = 0, 0, s[0, 0].numel()
    for i in range(4):
        for row in range(s.shape[2]):
            for column in range(s.shape[3]):
                a = gradient_of(conv, conv(x[i : i + 1])[0, 0, row, column])[0]
                F_A = F_A + torch.outer(a, a) / (4 * places)
                F_B = F_B + torch.outer(Ds[i, :, row, column], Ds[i, :, row, column]) / 4
    found = factors(opt, conv)
    assert relative(found[0], F_A) < 1e-12
    assert relative(found[1], F_B) < 1e-12


def test_factors_on_sequences_are_those_of_the_tokens() -> None:
    """The loss is a mean over 4 · 5 tokens, which are its terms: each counts as an example."""
    model, x, cotangent = Sequences(), torch.randn(4, 5, 3).double(), torch.randn(4, 5, 3).double()
    opt = KFAC(model, Fixed(cotangent), lr=0.0)
    opt.step(closure_of(opt, lambda: F.cross_entropy(model(x).flatten(0, 1), torch.randint(3, (20,)))))
    flat = KFAC(model, Fixed(cotangent.flatten(0, 1)), lr=0.0)
    flat.step(closure_of(flat, lambda: F.cross_entropy(model(x.flatten(0, 1)), torch.randint(3, (20,)))))
    Ds = cotangent.flatten(0, 1)
    a = torch.cat([torch.tanh(model.inner(x)).flatten(0, 1), torch.ones(20, 1).double()], 1).detach()
    assert relative(factors(opt, model.out)[0], a.T @ a / 20) < 1e-12
    assert relative(factors(opt, model.out)[1], Ds.T @ Ds / 20) < 1e-12
    for layer in (model.inner, model.out):
        for got, want in zip(factors(opt, layer), factors(flat, layer), strict=True):
            assert relative(got, want) < 1e-12


def test_the_calls_of_a_tied_weight_are_positions() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
            self.second.weight, self.second.bias = self.first.weight, self.first.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

    model, x, cotangent = Twice(), torch.randn(6, 3).double(), torch.randn(6, 3).double()
    opt = KFAC(model, Fixed(cotangent), lr=0.0)
    opt.step(closure_of(opt, lambda: F.cross_entropy(model(x), torch.randint(3, (6,)))))
    s = model.first(x)
    inner = torch.autograd.grad((model.second(torch.tanh(s)) * cotangent).sum(), s)[0]
    one = torch.ones(12, 1).double()
    a = torch.cat([torch.cat([x, torch.tanh(s).detach()]), one], 1)
    F_A, F_B = factors(opt, model.first)
    assert relative(F_A, a.T @ a / 12) < 1e-12
    assert relative(F_B, (inner.T @ inner + cotangent.T @ cotangent) / 6) < 1e-12
    assert len(opt.layers) == 1


def test_the_empirical_fisher_is_that_of_the_examples_own_gradients() -> None:
    model, x, t = constant_softmax(), torch.randn(7, 5).double(), torch.randint(3, (7,))
    opt = KFAC(model, "categorical", lr=0.0, fisher="empirical")
    opt.step(closure_of(opt, lambda: F.cross_entropy(model(x), t)))
    Ds = model(x).detach().softmax(-1) - F.one_hot(t, 3)
    assert relative(factors(opt, model)[1], Ds.T @ Ds / 7) < 1e-12


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_accumulated_halves_are_one_batch(fisher: str) -> None:
    x, t, cotangent = torch.randn(8, 5).double(), torch.randint(3, (8,)), torch.randn(4, 3).double()
    model = constant_softmax()
    whole = KFAC(model, Fixed(cotangent.repeat(2, 1)), lr=0.0, fisher=fisher)
    whole.step(closure_of(whole, lambda: F.cross_entropy(model(x), t)))
    halves = KFAC(model, Fixed(cotangent), lr=0.0, fisher=fisher)

    def closure() -> Tensor:
        halves.zero_grad()
        for part in (slice(4), slice(4, 8)):
            loss = F.cross_entropy(model(x[part]), t[part]) / 2
            loss.backward()
        return loss

    halves.step(closure)
    for got, want in zip(factors(halves, model), factors(whole, model), strict=True):
        assert relative(got, want) < 1e-12


@BOTH
@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_an_activation_in_place_changes_nothing(baseline: type[KFAC], fisher: str) -> None:
    found = []
    for inplace in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=inplace), nn.Linear(6, 3)).double()
        x, t = torch.randn(9, 4).double(), torch.randint(3, (9,))
        opt = baseline(model, "categorical", lr=0.1, fisher=fisher)
        for _ in range(3):
            opt.step(closure_of(opt, lambda: F.cross_entropy(model(x), t)))  # noqa: B023
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---- draws


def test_draws_have_the_second_moments_of_the_fisher_matrix() -> None:
    """And mean zero; within five standard errors, of 40,000 draws."""
    generator, n = torch.Generator().manual_seed(3), 40_000
    z = torch.tensor([0.3, -1.0, 0.8]).double()
    p, q = z.softmax(-1), z.sigmoid()
    cases = [
        (Categorical(), p.diag() - torch.outer(p, p)),
        (Bernoulli(), (q * (1 - q)).diag()),
        (Gaussian(), torch.eye(3).double()),
    ]
    for likelihood, want in cases:
        drawn = likelihood.sample(z.expand(n, 3), generator)
        products = drawn[:, :, None] * drawn[:, None, :]
        assert ((products.mean(0) - want).abs() <= 5 * products.std(0) / n**0.5 + 1e-12).all()
        assert (drawn.mean(0).abs() <= 5 * drawn.std(0) / n**0.5).all()
        assert likelihood.terms(z.expand(n, 3)) == n


def test_the_sampled_fisher_tends_to_the_true_one() -> None:
    """Of a hidden layer: F_B of 30,000 drawn copies of the examples against all classes enumerated."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, copies = torch.randn(3, 3).double(), 10_000
    opt = KFAC(model, "categorical", lr=0.0)
    t = torch.zeros(3 * copies, dtype=torch.long)
    opt.step(closure_of(opt, lambda: F.cross_entropy(model(x.repeat(copies, 1)), t)))
    want = 0
    s = model[0](x)
    log_p = model[1:](s).log_softmax(-1)
    for c in range(3):
        Ds = torch.autograd.grad(-log_p[:, c].sum(), s, retain_graph=True)[0]
        want = want + (Ds * log_p[:, c : c + 1].exp()).T @ Ds / 3
    assert relative(factors(opt, model[0])[1], want) < 0.03


# ---- averages, damping, failures


def test_averages_start_plain_and_go_on_exponentially() -> None:
    model = nn.Linear(3, 3).double()
    xs = torch.randn(6, 5, 3).double()
    opt = KFAC(model, "categorical", lr=0.0, decay=0.75)
    mean = 0
    for k, x in enumerate(xs, 1):
        opt.step(closure_of(opt, lambda: F.cross_entropy(model(x), torch.zeros(5, dtype=torch.long))))  # noqa: B023
        a = torch.cat([x, torch.ones(5, 1).double()], 1)
        keep = min(1 - 1 / k, 0.75)
        mean = keep * mean + (1 - keep) * a.T @ a / 5
        assert relative(factors(opt, model)[0], mean) < 1e-12
    assert keep == 0.75


def test_intervals_say_when_factors_and_inverses_are_made() -> None:
    model = nn.Linear(3, 3).double()
    opt = KFAC(model, "categorical", lr=0.0, factor_interval=3, inverse_interval=4, warmup=2)
    seen = []
    for _ in range(9):
        state = opt.state[model.weight]
        held = state.get("inverse_A")
        before = state.get("batches", 0)
        x = torch.randn(5, 3).double()
        opt.step(closure_of(opt, lambda: F.cross_entropy(model(x), torch.zeros(5, dtype=torch.long))))  # noqa: B023
        seen.append((state["batches"] > before, state["inverse_A"] is not held))
    assert [a for a, _ in seen] == [True, True, False, True, False, False, True, False, False]
    assert [b for _, b in seen] == [True, True, False, False, True, False, False, False, True]


def test_damping_does_not_depend_on_which_factor_holds_the_scale() -> None:
    a, b = torch.randn(20, 5).double(), torch.randn(20, 3).double()
    F_A, F_B = a.T @ a, b.T @ b
    damped = []
    for c in (1.0, 49.0):
        delta_A, delta_B = tikhonov(F_A * c, F_B / c, 0.3)
        damped.append(torch.kron(F_B / c + delta_B * torch.eye(3).double(), F_A * c + delta_A * torch.eye(5).double()))
    assert relative(damped[1], damped[0]) < 1e-12
    assert tikhonov(torch.zeros(2, 2), F_B, 0.04) == (0.2, 0.2)


@pytest.mark.parametrize(("least", "failures"), [(0.0, 0), (-5e-4, 2), (-0.5, 5)])
def test_a_factor_that_rounding_made_indefinite_is_damped_more_and_counted(least: float, failures: int) -> None:
    Q = torch.linalg.qr(torch.randn(6, 6).double())[0]
    factor = (Q * torch.tensor([least, 0.1, 0.2, 0.5, 1.0, 2.0]).double()) @ Q.T
    inverse, failed = inverse_by_attempts(factor, 1e-5)
    assert failed == failures
    damped = factor + 1e-5 * 10**failures * torch.eye(6).double()
    assert torch.linalg.eigvalsh(inverse).min() > 0
    assert relative(inverse, torch.linalg.inv(damped)) < 1e-9


def test_a_factor_of_zeros_is_damped_by_rounding() -> None:
    zero, failed = inverse_by_attempts(torch.zeros(3, 3), 0.0)
    assert zero.isfinite().all()
    assert failed == 1


@BOTH
def test_a_batch_that_is_not_finite_is_left_out_and_counted(baseline: type[KFAC]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
    opt = baseline(model, "categorical", lr=0.1)
    good, t = torch.randn(5, 3), torch.randint(3, (5,))
    opt.step(closure_of(opt, lambda: F.cross_entropy(model(good), t)))
    before = [p.detach().clone() for p in model.parameters()]
    state = {k: v.clone() for k, v in opt.state[model[0].weight].items() if isinstance(v, Tensor)}
    bad = good.clone()
    bad[0, 0] = math.inf
    opt.step(closure_of(opt, lambda: F.cross_entropy(model(bad), t)))
    assert (opt.nonfinite_factors, opt.skipped_steps, opt.steps) == (2, 1, 2)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for name in ("F_A", "F_B", "momentum_buffer"):
        assert torch.equal(state[name], opt.state[model[0].weight][name])


def test_a_factor_out_of_range_is_left_out_and_counted() -> None:
    """The outputs are finite, for the weights are zero; the squares of the inputs aren't."""
    model = nn.Linear(3, 3)
    nn.init.zeros_(model.weight)
    opt, t = KFAC(model, "categorical", lr=0.0), torch.randint(3, (5,))
    x = torch.randn(5, 3)
    opt.step(closure_of(opt, lambda: F.cross_entropy(model(x), t)))
    held = opt.state[model.weight]["F_A"].clone()
    opt.step(closure_of(opt, lambda: F.cross_entropy(model(x * 1e30), t)))
    assert torch.equal(opt.state[model.weight]["F_A"], held)
    assert opt.nonfinite_factors == 1


# ---- the step


@BOTH
def test_the_step_is_clipped_to_the_kl_bound_and_not_lengthened(baseline: type[KFAC]) -> None:
    lr, kappa = 0.5, 1e-3
    x, t = torch.randn(20, 5).double(), torch.randint(3, (20,))
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    start = [p.detach().clone() for p in model.parameters()]
    moves = {}
    for clip in (None, kappa, 1e6):
        with torch.no_grad():
            for p, s in zip(model.parameters(), start, strict=True):
                p.copy_(s)
        opt = baseline(model, "categorical", lr=lr, momentum=0.0, kl_clip=clip, damping=1e-2)
        opt.step(closure_of(opt, lambda: F.cross_entropy(model(x), t)))
        moves[clip] = [(s - p).detach() for s, p in zip(start, model.parameters(), strict=True)]
    with torch.no_grad():
        for p, s in zip(model.parameters(), start, strict=True):
            p.copy_(s)
    grads = torch.autograd.grad(F.cross_entropy(model(x), t), list(model.parameters()))
    product = {clip: lr * sum((m * g).sum() for m, g in zip(moves[clip], grads, strict=True)) for clip in moves}
    assert product[None] > kappa
    assert all(torch.equal(a, b) for a, b in zip(moves[None], moves[1e6], strict=True))
    # the move is lr·ν·P, and lr²·ν²·⟨P, G⟩ = κ: so ν = κ / (lr²·ν·⟨P, G⟩)
    nu = (moves[kappa][0].norm() / moves[None][0].norm()).item()
    assert product[kappa].item() * nu == pytest.approx(kappa, rel=1e-9)


def test_momentum_and_weight_decay_are_of_the_preconditioned_gradient_and_decoupled() -> None:
    x, t = torch.randn(20, 5).double(), torch.randint(3, (20,))
    model = nn.Linear(5, 3).double()
    opt = KFAC(model, "categorical", lr=0.1, momentum=0.8, weight_decay=0.3, damping=0.1)
    weight, v = model.weight.detach().clone(), 0
    for _ in range(3):
        opt.step(closure_of(opt, lambda: F.cross_entropy(model(x), t)))
        state = opt.state[model.weight]
        G = joined(model.weight.grad, model.bias.grad)
        v = 0.8 * v + (state["inverse_B"] @ G @ state["inverse_A"])[:, :-1]
        weight = (1 - 0.1 * 0.3) * weight - 0.1 * v
        assert relative(model.weight.detach(), weight) < 1e-12


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.scale = nn.Parameter(torch.ones(()))
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.unused = nn.Linear(8, 8)
        self.out = nn.Linear(8, 11)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.encoder(self.embed(x) * self.scale))


@BOTH
def test_what_has_no_factors_steps_like_sgd(baseline: type[KFAC]) -> None:
    model, x = Everything(), torch.randint(11, (4, 6))
    model.out.bias.requires_grad_(False)
    opt = baseline(model, "categorical", lr=0.1, momentum=0.9)
    loss = lambda: F.cross_entropy(model(x).flatten(0, 1), x.flatten())  # noqa: E731
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    opt.step(closure_of(opt, loss))
    factored = (model.encoder.linear1, model.encoder.linear2, model.unused)
    assert [layer.modules for layer in opt.layers] == [(module,) for module in factored]
    for name, p in model.named_parameters():
        if name.startswith(("encoder.linear", "unused", "out.bias")):
            continue
        assert torch.equal(p.detach(), before[name] - 0.1 * p.grad), name


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_the_closure_runs_once_undisturbed_and_no_hook_stays(fisher: str) -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(4)
        return nn.Sequential(
            nn.Conv2d(1, 2, 3),
            nn.BatchNorm2d(2),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(32, 3),
        )

    x, t = torch.randn(6, 1, 6, 6), torch.randint(3, (6,))
    plain, model = build(), build()
    torch.manual_seed(5)
    F.cross_entropy(plain(x), t).backward()
    opt = KFAC(model, "categorical", lr=0.0, fisher=fisher)
    torch.manual_seed(5)
    opt.step(closure_of(opt, lambda: F.cross_entropy(model(x), t)))
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    for a, b in zip(plain.buffers(), model.buffers(), strict=True):
        assert torch.equal(a, b)

    def failing() -> Tensor:
        model(x)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        opt.step(failing)
    assert not any(m._forward_hooks for m in model.modules())
    assert opt.steps == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be"),
        ({"damping": float("nan")}, "damping must be"),
        ({"fisher": "true"}, "fisher must be one of"),
        ({"decay": 1.0}, "decay must be"),
        ({"inverse_interval": 0}, "inverse_interval must be"),
        ({"kl_clip": 0.0}, "kl_clip must be"),
    ],
)
def test_bad_arguments_are_refused_by_name(options: dict[str, object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        KFAC(nn.Linear(2, 2), **{"lr": 0.1, **options})


def test_a_closure_must_be_there_and_call_the_model() -> None:
    model = nn.Linear(2, 2)
    opt = KFAC(model, lr=0.1)
    with pytest.raises(ValueError, match="closure must be given"):
        opt.step()
    with pytest.raises(ValueError, match="closure must call the model"):
        opt.step(lambda: torch.zeros(()))
    pair = nn.Sequential(nn.Linear(2, 2))
    pair.register_forward_hook(lambda module, inputs, output: (output, output))
    opt = KFAC(pair, lr=0.1)
    with pytest.raises(TypeError, match="must return the tensor"):
        opt.step(closure_of(opt, lambda: pair(torch.randn(3, 2))[0].sum()))
