"""APO, the preconditioned optimizer: its step, its matrix views, groups, dtypes, failures, plan."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apo
from apo.layers.matrix_view import matrix_views
from tests.apo.helpers import closure_of, convnet, mlp, objective, same, scattered, weights


def test_without_meta_updates_it_starts_as_momentum_sgd() -> None:
    for decoupled in (False, True):
        model, x, t, other = convnet()
        twin, *_ = convnet()
        opt = apo.APO(
            model,
            objective(model, other),
            lr=0.1,
            momentum=0.9,
            weight_decay=0.01,
            decoupled_weight_decay=decoupled,
            interval=0,
        )
        plain = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=0 if decoupled else 0.01)
        for _ in range(4):
            opt.step(closure_of(opt, model, x, t))
            closure_of(plain, twin, x, t)()
            with torch.no_grad():
                for p in twin.parameters():
                    p.mul_(1 - 0.1 * 0.01 * decoupled)
            plain.step()
        for a, b in zip(weights(model), weights(twin), strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


def test_the_step_is_eq_10_with_the_bias_as_a_column() -> None:
    model, x, t, other = mlp()
    opt = apo.APO(model, objective(model, other), lr=0.3, momentum=0, interval=0, block_size=None)
    for layer in opt.layers:
        for tensor in layer.tensors():
            tensor.add_(0.2 * torch.randn_like(tensor))
    before = weights(model)
    opt.step(closure_of(opt, model, x, t))
    for layer, linear, (weight, bias) in zip(opt.layers, (model[0], model[2]), (before[:2], before[2:]), strict=True):
        G = torch.cat([linear.weight.grad, linear.bias.grad[:, None]], 1)
        P = layer.B @ (layer.S**2 * (layer.B.T @ G @ layer.A)) @ layer.A.T
        assert torch.allclose(linear.weight, weight - 0.3 * P[:, :-1], rtol=1e-12, atol=1e-14)
        assert torch.allclose(linear.bias, bias - 0.3 * P[:, -1], rtol=1e-12, atol=1e-14)


MODULES: dict[str, tuple[nn.Module, dict[str, tuple[int, ...]]]] = {
    "linear": (nn.Linear(3, 4), {"weight + bias": (4, 4)}),
    "linear without bias": (nn.Linear(3, 4, bias=False), {"weight": (4, 3)}),
    "linear to one": (nn.Linear(3, 1, bias=False), {"weight": (1, 3)}),
    "bilinear": (nn.Bilinear(2, 3, 4), {"weight + bias": (4, 7)}),
    "conv1d": (nn.Conv1d(2, 4, 3), {"weight + bias": (4, 7)}),
    "conv2d": (nn.Conv2d(2, 4, 3, groups=2), {"weight + bias": (4, 10)}),
    "conv3d": (nn.Conv3d(2, 4, 2), {"weight + bias": (4, 17)}),
    "transposed": (nn.ConvTranspose2d(3, 5, 2), {"weight + bias": (5, 13)}),
    "transposed, groups": (nn.ConvTranspose2d(4, 6, 2, groups=2), {"weight": (4, 12), "bias": (1, 6)}),
    "norm": (nn.LayerNorm(5), {"weight": (1, 5), "bias": (1, 5)}),
    "embedding": (nn.Embedding(9, 4), {"weight": (9, 4)}),
    "attention": (
        nn.MultiheadAttention(4, 2, add_bias_kv=True),
        {
            "in_proj_weight + in_proj_bias": (3, 4, 5),
            "bias_k": (1, 4),
            "bias_v": (1, 4),
            "out_proj.weight + bias": (4, 5),
        },
    ),
    "attention of other widths": (
        nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
        {
            "q_proj_weight": (4, 4),
            "k_proj_weight": (4, 3),
            "v_proj_weight": (4, 5),
            "in_proj_bias": (1, 12),
            "out_proj.weight + bias": (4, 5),
        },
    ),
    "gru": (nn.GRU(3, 2), {"weight_ih_l0 + bias_ih_l0": (6, 4), "weight_hh_l0 + bias_hh_l0": (6, 3)}),
}


@pytest.mark.parametrize("name", MODULES)
def test_matrix_views(name: str) -> None:
    module, expected = MODULES[name]
    views = matrix_views(module, module.parameters())
    assert {v.name: v.shape for v in views} == expected
    for view in views:
        parts = [torch.randn_like(p) for p in view.parameters]
        matrices = view.matrices(parts)
        assert [x.shape[-1] for x in matrices if x is not None] == list(view.widths)
        matrix = view.joined(matrices)
        assert matrix.shape == view.shape
        back = scattered(view, matrix)
        assert all(torch.equal(a, b) for a, b in zip(parts, back, strict=True))


def test_rows_of_a_matrix_are_outputs() -> None:
    """The bias's column has to lie beside what adds to the same output."""
    for module, outputs in ((nn.Conv2d(2, 4, 3), 4), (nn.ConvTranspose2d(3, 5, 2), 5), (nn.Linear(3, 4), 4)):
        (view,) = matrix_views(module, module.parameters())
        x = torch.randn(2, 3) if isinstance(module, nn.Linear) else torch.randn(2, module.in_channels, 5, 5)
        for row in range(outputs):
            with torch.no_grad():
                before = module(x)
                change = torch.zeros(view.shape)
                change[row] = torch.randn(view.n)
                for p, part in zip(view.parameters, scattered(view, change), strict=True):
                    p.add_(part)
                moved = (module(x) - before).abs().transpose(0, 1).flatten(1).sum(1)
            assert moved[row] > 0
            assert moved.sum() == moved[row]


def test_tied_frozen_and_unused_weights() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 9)
            self.embed = nn.Embedding(9, 4)
            self.head.weight = self.embed.weight  # tied: an embedding's
            self.frozen = nn.Linear(4, 4)
            self.unused = nn.Linear(4, 4)
            self.frozen.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.frozen(self.embed(x)))

    torch.manual_seed(0)
    model = Net()
    opt = apo.APO(model, objective(model, torch.randint(9, (7,))), interval=1)
    assert [layer.view.name for layer in opt.layers] == ["head.weight", "head.bias", "unused.weight + bias"]
    assert opt.layers[0].learned == "AS"
    frozen, unused = weights(model.frozen), weights(model.unused)
    x, t = torch.randint(9, (8,)), torch.randint(9, (8,))
    losses = [opt.step(closure_of(opt, model, x, t)).item() for _ in range(30)]
    assert losses[-1] < losses[0]
    assert same(weights(model.frozen), frozen)
    assert same(weights(model.unused), unused)
    assert "not trained: frozen.weight (frozen)" in str(opt.plan())


def test_a_bias_frozen_later_is_left_alone() -> None:
    model, x, t, other = mlp()
    opt = apo.APO(model, objective(model, other), interval=1)
    opt.step(closure_of(opt, model, x, t))
    model[0].bias.requires_grad_(False)
    opt.zero_grad()
    before = model[0].bias.detach().clone()
    moved = model[0].weight.detach().clone()
    opt.step(closure_of(opt, model, x, t))
    assert torch.equal(model[0].bias, before)
    assert not torch.equal(model[0].weight, moved)


def test_sparse_gradients_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 3))
    opt = apo.APO(model, objective(model, torch.randint(9, (7,))))
    before = weights(model)
    with pytest.raises(TypeError, match=r"the gradient of 0.weight must be dense.*sparse=False"):
        opt.step(closure_of(opt, model, torch.randint(9, (8,)), torch.randint(3, (8,))))
    assert same(weights(model), before)


def test_sides_and_their_blocks() -> None:
    model = nn.Sequential(nn.Linear(10, 40), nn.Embedding(100, 12))
    _, other = model, torch.zeros(1)
    opt = apo.APO(model, objective(model, other), block_size=8, method=apo.Method(max_dim=30))
    linear, embedding = opt.layers
    assert (linear.A.shape, linear.B.shape) == ((2, 8, 8), (40, 1, 1))
    assert (embedding.A.shape, embedding.B.shape) == ((2, 8, 8), (100, 1, 1))
    assert linear.learned == embedding.learned == "AS"
    full = apo.APO(model, objective(model, other), block_size=None, method=apo.Method(max_dim=None))
    assert full.layers[0].B.shape == (40, 40)
    assert full.layers[0].learned == "ABS"


def test_groups_have_their_own_settings() -> None:
    model, x, t, other = mlp()
    groups = [
        {"params": [model[0].weight], "lr": 0.0, "block_size": 1},
        {"params": [model[0].bias, *model[2].parameters()], "momentum": 0.0},
    ]
    opt = apo.APO(model, objective(model, other), groups, lr=0.1, interval=1)
    assert [layer.view.name for layer in opt.layers] == ["0.weight", "0.bias", "2.weight + bias"]
    before = model[0].weight.detach().clone()
    for _ in range(5):
        opt.step(closure_of(opt, model, x, t))
    assert torch.equal(model[0].weight, before)  # a rate of 0 freezes
    assert opt.layers[2].momentum is None
    assert opt.param_groups[1]["lr"] != 0.1


def test_a_group_added_later() -> None:
    model, x, t, other = mlp()
    opt = apo.APO(model, objective(model, other), model[2].parameters(), interval=1)
    opt.step(closure_of(opt, model, x, t))
    opt.add_param_group({"params": model[0].parameters(), "lr": 0.05})
    before = weights(model[0])
    opt.step(closure_of(opt, model, x, t))
    assert not same(weights(model[0]), before)
    assert len(opt.layers) == 2


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_of_blocks_apart_from_the_weights(weights_dtype: torch.dtype, block_dtype: torch.dtype | None) -> None:
    model, x, t, other = mlp(dtype=weights_dtype)
    opt = apo.APO(model, objective(model, other), lr=0.05, method=apo.Method(block_dtype=block_dtype, meta_lr=0.03))
    losses = [opt.step(closure_of(opt, model, x, t)).item() for _ in range(40)]
    assert losses[-1] < 0.7 * losses[0]
    for layer in opt.layers:
        assert layer.S.dtype == torch.float32
        assert layer.operands[0].dtype == (block_dtype or torch.float32)
        assert (layer.operands[2].float() - layer.S).abs().max() <= 0.01 * layer.S.abs().max()
        assert not torch.equal(layer.S, torch.ones_like(layer.S))


@pytest.mark.parametrize(("meta_optimizer", "share"), [("relative", 0.5), ("adam", 0.5), ("rmsprop", 0.8)])
def test_learning_the_preconditioner_beats_leaving_it(meta_optimizer: str, share: float) -> None:
    """On an ill-conditioned regression, at one rate."""
    losses = []
    for meta_lr in (0.0, 0.02):
        torch.manual_seed(0)
        model = nn.Linear(8, 8, bias=False).double()
        scale = torch.logspace(0, -2, 8).double()
        x = torch.randn(200, 8).double() * scale
        t = x @ torch.randn(8, 8).double()
        goal = objective(
            model, lambda x=x: x[torch.randint(200, (32,))], discrepancy="mse", fsd_weight=1.0, wsd_weight=0.0
        )
        opt = apo.APO(
            model,
            goal,
            lr=0.1,
            interval=1,
            method=apo.Method(
                meta_lr=meta_lr,
                meta_optimizer=meta_optimizer,
                lookahead="whole" if meta_optimizer == "relative" else "step",
                adapt_lr=False,
            ),
        )
        for _ in range(300):
            batch = torch.randint(200, (32,))
            opt.step(closure_of(opt, model, x[batch], t[batch], lambda y, t: (y - t).square().sum() / (2 * len(y))))
        losses.append(F.mse_loss(model(x), t).item())
    assert losses[1] < share * losses[0]


def test_failed_trials_are_left_out_counted_and_shrink_the_step() -> None:
    for adapt_lr in (True, False):
        model, x, t, other = mlp()
        opt = apo.APO(model, objective(model, other), lr=1e3, method=apo.Method(adapt_lr=adapt_lr))
        before = weights(model)
        opt.step(closure_of(opt, model, x, t))
        assert opt.failed_trials == 1
        assert same(weights(model), before)
        assert opt.param_groups[0]["lr"] == pytest.approx(1e3 / math.e if adapt_lr else 1e3)
        losses = [opt.step(closure_of(opt, model, x, t)).item() for _ in range(100)]
        assert opt.failed_trials < 30
        assert losses[-1] < 0.5 * losses[0]


def test_no_step_between_trials_promises_more_than_there_is_to_gain() -> None:
    model, x, t, other = mlp()
    opt = apo.APO(model, objective(model, other), lr=0.01, momentum=0.9, interval=10, warmup=1)
    opt.step(closure_of(opt, model, x, t))
    assert opt.last is not None
    most = 2 * max(opt.last.loss, opt.last.base)
    for scale, bounded in ((1.0, False), (1e4, True)):
        for layer in opt.layers:
            layer.S.mul_(scale)
            layer.momentum.zero_()
        before = weights(model)
        opt.step(closure_of(opt, model, x, t))
        steps = [b - p for b, p in zip(before, model.parameters(), strict=True)]
        # the whole way that momentum will carry it, by the gradient at its start
        promise = sum(10 * (p.grad * step).sum() for p, step in zip(model.parameters(), steps, strict=True)).item()
        assert (promise == pytest.approx(most, rel=1e-9)) == bounded
        assert 0 < promise <= most * (1 + 1e-9)


def test_a_trial_that_is_finite_with_an_infinite_gradient_moves_no_phi() -> None:
    model, x, t, other = mlp()
    opt = apo.APO(model, objective(model, other), interval=1)

    def infinite(grad: Tensor) -> Tensor:
        return grad * float("inf") if opt.in_trial else grad

    opt.step(closure_of(opt, model, x, t))
    phi = [layer.S.clone() for layer in opt.layers]
    handle = model[0].weight.register_hook(infinite)
    rate = opt.param_groups[0]["lr"]
    opt.step(closure_of(opt, model, x, t))
    handle.remove()
    assert opt.accepted
    assert opt.failed_trials == 1
    assert opt.param_groups[0]["lr"] == rate
    assert same(phi, [layer.S for layer in opt.layers])
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("meta_optimizer", ["relative", "adam"])
def test_plan_names_every_parameter_and_its_cost(meta_optimizer: str) -> None:
    model = nn.Sequential(nn.Linear(100, 80), nn.LayerNorm(80), nn.Linear(80, 10))
    opt = apo.APO(
        model,
        objective(model, torch.zeros(1, 100)),
        lr=0.01,
        block_size=64,
        method=apo.Method(meta_optimizer=meta_optimizer),
    )
    plan = opt.plan()
    assert [row.name for row in plan.rows] == ["0.weight + bias", "1.weight", "1.bias", "2.weight + bias"]
    first = plan.rows[0]
    assert (first.A, first.B) == ("2 x 64", "2 x 64")
    assert first.shape == (80, 101)
    # 2 products of 2 · m · (64² + 37²) and 2 of 2 · n · (64² + 16²)
    assert first.step_flops == 4 * 80 * (64**2 + 37**2) + 4 * 101 * (64**2 + 16**2)
    opt.step(closure_of(opt, model, torch.randn(4, 100), torch.randint(10, (4,))))
    held = [t for layer in opt.layers for t in (layer.A, layer.B, layer.S, layer.momentum)]
    learned = [t for layer in opt.layers for t in layer.tensors()]
    if meta_optimizer == "relative":
        averages = [x for own in opt.meta.learned for x in own.buffers.values() if x.ndim]
    else:
        averages = 2 * learned
    assert plan.memory_bytes == sum(t.nbytes for t in (*held, *averages))
    text = str(plan)
    assert all(row.name in text for row in plan.rows)
    assert repr(plan) == text


def test_a_model_without_trainable_parameters_is_refused() -> None:
    model = nn.ReLU()
    with pytest.raises(ValueError, match="model must have parameters that require grad"):
        apo.APO(model, objective(model, torch.zeros(1)))
