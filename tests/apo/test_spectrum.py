"""The spectrum says what P does to each curvature, and leaves training as it is."""

from __future__ import annotations

import copy
import math
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apo
import apo_kernels as ak
from apo.fisher.spectrum import SpectrumRow, _along_basis
from tests.apo.helpers import apo_of, closure_of, convnet, mlp, objective, weights


def linear() -> tuple[nn.Linear, Tensor]:
    """A layer whose Fisher matrix under squared error is ``I ⊗ E xxᵀ``, of curvatures from 1 to 1e-4."""
    torch.manual_seed(0)
    scales = torch.logspace(0, -2, 5).double()
    return nn.Linear(5, 4, bias=False).double(), torch.randn(200, 5).double() * scales


def test_sgd_steps_as_far_in_all_directions() -> None:
    model, x = linear()
    found = apo.APO(model, objective(model, x, discrepancy="mse"), lr=0.3).spectrum()
    assert all(row.gain == pytest.approx(0.3) for row in found.rows)
    decades = [row.decade for row in found.of("weight")]
    assert decades == sorted(decades, reverse=True)
    assert decades[0] - decades[-1] >= 3
    assert sum(row.directions for row in found.of()) + found.flat == 20


@pytest.mark.parametrize("layers", [1, 2, 20])
def test_a_picture_has_a_line_for_each_layer(layers: int) -> None:
    """Through what the rows say; level where P is the inverse. Only a few lines are named."""
    figure = pytest.importorskip("matplotlib.figure").Figure()
    names = [*(f"{i}.weight" for i in range(layers)), "all"]
    rows = [SpectrumRow(name, decade, 3, 10.0**decade, 0.1, 2.0) for name in names for decade in (0, -1, -3)]
    axes = figure.subplots()
    apo.Spectrum(tuple(rows), samples=32, flat=0).draw(axes)
    assert [line.get_label() for line in axes.lines] == names
    for line in axes.lines:
        assert list(line.get_xdata()) == [1.0, 0.1, 1e-3]
        assert list(line.get_ydata()) == [2.0] * 3
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert (axes.get_legend() is None) == (layers == 20)
    figure.canvas.draw()


def test_curvatures_are_those_of_the_fisher_matrix() -> None:
    model, x = linear()
    opt = apo.APO(model, objective(model, x, discrepancy="mse"))
    expected = torch.linalg.eigvalsh(x.T @ x / len(x))
    mean = math.exp(expected.log().mean())
    found = opt.spectrum(samples=2000).of()
    total = math.prod(row.curvature**row.directions for row in found) ** (1 / 20)
    scale = sample_scale(opt, x)
    assert total == pytest.approx(scale * mean, rel=0.1)


def sample_scale(opt: apo.APO, x: Tensor) -> float:
    """What the discrepancy's Fisher matrix is of the outputs': ½ mean square error has 1/outputs or so."""
    y = torch.zeros(len(x), 4).double().requires_grad_()
    H = torch.autograd.functional.hvp(
        lambda new: opt.objective.discrepancy(new, torch.zeros_like(new)), y, torch.ones_like(y)
    )
    return float(H[1].mean() * len(x))


def test_the_share_is_the_same_for_all_where_p_is_the_inverse() -> None:
    model, x = linear()
    goal = objective(model, x, discrepancy="mse", wsd_weight=0.0)
    opt = apo.APO(model, goal, block_size=None)
    before = [row.share for row in opt.spectrum(samples=500).of()]
    assert max(before) > 500 * min(before)
    (layer,) = opt.layers
    layer.A.copy_(torch.linalg.cholesky(torch.linalg.inv(x.T @ x)))
    shares = [row.share for row in opt.spectrum(samples=500).of()]
    assert max(shares) < 1.5 * min(shares)


@pytest.mark.parametrize("settings", [{"block_size": None}, {"block_size": 3}, {"block_size": 2, "max_dim": 4}])
def test_p_along_a_direction_is_that_of_the_kernel(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(5, 4), nn.MultiheadAttention(4, 2), nn.Embedding(6, 3), nn.LayerNorm(3)]).double()
    for layer in apo_of(model, objective(model, torch.zeros(1)), **settings).layers:
        for x in layer.tensors():
            x.add_(0.3 * torch.randn_like(x) * (x != 0))
        first, second = torch.randn(2, 8, *layer.S.shape).double()
        f, p = _along_basis(layer, first, second)
        bases = [
            torch.linalg.eigh((x @ x.mT).sum(0)).eigenvectors if side.learned else torch.eye(x.shape[-2]).double()
            for x, side in ((first, layer.sides[1]), (first.mT, layer.sides[0]))
        ]
        U, V = (basis.expand(*layer.S.shape[:-2], *basis.shape[-2:]) for basis in bases)
        for i, j in product(range(layer.S.shape[-2]), range(layer.S.shape[-1])):
            direction = U[..., :, i, None] * V[..., None, :, j]
            P = ak.precondition(direction, layer.A, layer.B, layer.S)
            assert torch.allclose(p[..., i, j], (direction * P).sum((-2, -1)), rtol=1e-10)
            assert torch.allclose(f[..., i, j], (direction * second).sum((-2, -1)).square().mean(0), rtol=1e-10)


@pytest.mark.parametrize("problem", [mlp, convnet])
def test_it_leaves_training_as_it_is(problem: Any) -> None:
    model, x, t, other = problem()
    opt = apo.APO(model, objective(model, other), interval=2)
    for _ in range(5):
        opt.step(closure_of(opt, model, x, t))
    twin = copy.deepcopy((model, opt))
    torch.manual_seed(1)
    text = str(opt.spectrum(other, samples=4))
    after = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(3))
    assert "all" in text
    ends = []
    for own_model, own in ((model, opt), twin):
        for _ in range(5):
            own.step(closure_of(own, own_model, x, t))
        ends.append([*weights(own_model), *own_model.buffers(), *(p.grad for p in own_model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_what_has_no_spectrum_is_refused() -> None:
    model, _, _, other = mlp()
    with pytest.raises(ValueError, match="fsd_weight above 0"):
        apo.APO(model, objective(model, other, fsd_weight=0.0)).spectrum()
    with pytest.raises(ValueError, match=r"samples must be .* 2"):
        apo.APO(model, objective(model, other)).spectrum(samples=1)

    class Own:
        def __call__(self, new: Tensor, old: Tensor) -> Tensor:
            return F.mse_loss(new, old)

    with pytest.raises(ValueError, match="Own has none"):
        apo.APO(model, objective(model, other, discrepancy=Own())).spectrum()
