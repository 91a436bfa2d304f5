"""AdaptiveLR: which optimizers it takes, groups, bounds, schedules, failures."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import apo
from apo.wrapped.linearity import check_linear
from tests.apo.helpers import begun, closure_of, mlp, objective, same, weights

Make = Callable[[Any], torch.optim.Optimizer]

LINEAR: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "capturable Adam": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-3)),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-3),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-3),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
}

NOT_LINEAR: dict[str, Make] = {
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=1e-2),
}


def stepped(make: Make, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.optim.Optimizer]:
    model, x, t, _ = mlp(dtype=dtype)
    opt = make(model.parameters())
    closure_of(opt, model, x, t)()
    return model, opt


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_optimizers_are_taken_and_left_as_they_were(name: str, dtype: torch.dtype) -> None:
    if name == "capturable Adam" and dtype == torch.bfloat16:
        pytest.skip("torch keeps the rate in float32, and refuses to mix")
    model, opt = stepped(LINEAR[name], dtype)
    rate = opt.param_groups[0]["lr"]
    before, value, state = weights(model), float(rate), str(opt.state_dict())
    assert check_linear(opt)
    assert same(weights(model), before)
    assert str(opt.state_dict()) == state
    assert opt.param_groups[0]["lr"] is rate
    assert float(rate) == value  # a tensor may have been written


@pytest.mark.parametrize("name", ["lion", "optimi"])
def test_two_optimizers_of_third_parties(name: str) -> None:
    if name == "lion":
        make: Make = lambda p: pytest.importorskip("lion_pytorch").Lion(p, lr=1e-4)  # noqa: E731
    else:
        make = lambda p: pytest.importorskip("optimi").StableAdamW(p, lr=1e-3, triton=False)  # noqa: E731
    model, x, t, other = mlp(dtype=torch.float32)
    opt = apo.AdaptiveLR(make(model.parameters()), objective(model, other))
    closure = closure_of(opt, model, x, t)
    first = opt.step(closure).item()
    for _ in range(150):
        last = opt.step(closure).item()
    assert last < first / 2
    assert opt.param_groups[0]["lr"] > 2e-3


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_others_are_refused_before_anything_is_changed(name: str) -> None:
    model, x, t, other = mlp()
    base = NOT_LINEAR[name](model.parameters())
    opt = apo.AdaptiveLR(base, objective(model, other))
    before = weights(model)
    with pytest.raises(ValueError, match=f"optimizer must take steps that are proportional to lr.*but got {name}"):
        opt.step(closure_of(opt, model, x, t))
    assert same(weights(model), before)
    assert not base.state
    assert opt.steps == 0


def test_an_optimizer_that_needs_a_closure_is_refused() -> None:
    model, x, t, other = mlp()
    opt = apo.AdaptiveLR(torch.optim.LBFGS(model.parameters()), objective(model, other))
    with pytest.raises(TypeError, match=r"step\(\) that needs no closure, but got LBFGS"):
        opt.step(closure_of(opt, model, x, t))


def test_the_real_step_is_the_optimizers_own_at_the_new_rate() -> None:
    model, x, t, other = mlp()
    twin, *_ = mlp()
    base = torch.optim.Adam(model.parameters(), lr=1e-2)
    opt = apo.AdaptiveLR(base, objective(model, other), interval=1, meta_optimizer="rmsprop")
    plain = torch.optim.Adam(twin.parameters(), lr=1e-2)
    for _ in range(5):
        opt.step(closure_of(opt, model, x, t))
        closure_of(plain, twin, x, t)()
        plain.param_groups[0]["lr"] = opt.param_groups[0]["lr"]
        plain.step()
    assert opt.param_groups[0]["lr"] != 1e-2
    for a, b in zip(weights(model), weights(twin), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=0)


def test_one_rate_a_group_or_one_factor_for_all() -> None:
    for shared in (False, True):
        model, x, t, other = mlp()
        groups = [{"params": model[0].parameters(), "lr": 0.4}, {"params": model[2].parameters()}]
        base = torch.optim.SGD(groups, lr=0.1)
        opt = apo.AdaptiveLR(base, objective(model, other), shared_lr=shared, meta_optimizer="rmsprop")
        for _ in range(10):
            opt.step(closure_of(opt, model, x, t))
        ratio = opt.param_groups[0]["lr"] / opt.param_groups[1]["lr"]
        assert (ratio == pytest.approx(4)) == shared
        assert opt.param_groups[1]["lr"] != 0.1


def test_a_group_added_later_is_learned_too() -> None:
    model, x, t, other = mlp()
    base = torch.optim.SGD(model[2].parameters(), lr=0.1)
    opt = apo.AdaptiveLR(base, objective(model, other), interval=1, meta_optimizer="rmsprop")
    closure = closure_of(opt, model, x, t)
    opt.step(closure)
    opt.add_param_group({"params": model[0].parameters(), "lr": 0.01})
    opt.step(closure)
    assert opt.param_groups is opt.optimizer.param_groups
    assert opt.param_groups[1]["lr"] != 0.01


def test_bounds_hold_and_a_rate_of_zero_stays() -> None:
    model, x, t, other = mlp()
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}]
    opt = apo.AdaptiveLR(torch.optim.SGD(groups, lr=0.1), objective(model, other), bounds=(0.05, 0.2))
    before = weights(model[0])
    for _ in range(30):
        opt.step(closure_of(opt, model, x, t))
        assert 0.05 <= opt.param_groups[1]["lr"] <= 0.2
    assert opt.param_groups[0]["lr"] == 0
    assert same(weights(model[0]), before)


def test_schedulers_see_and_steer_the_learned_rate() -> None:
    model, x, t, other = mlp()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = apo.AdaptiveLR(base, objective(model, other), interval=1, meta_optimizer="rmsprop")
    scheduler = torch.optim.lr_scheduler.MultiplicativeLR(opt, lambda _: 0.5)
    opt.step(closure_of(opt, model, x, t))
    learned = opt.param_groups[0]["lr"]
    scheduler.step()
    assert learned != 0.1
    assert opt.param_groups[0]["lr"] == learned / 2
    assert scheduler.get_last_lr() == [learned / 2]


def test_failed_trials_shrink_the_rate_until_steps_are_taken_again() -> None:
    model, x, t, other = mlp()
    base = torch.optim.SGD(model.parameters(), lr=1e4, momentum=0.9)
    opt = apo.AdaptiveLR(base, objective(model, other))
    before = weights(model)
    opt.step(closure_of(opt, model, x, t))
    assert opt.failed_trials == 1
    assert same(weights(model), before)
    assert not base.state  # the momentum hasn't seen the gradient of a step that was left out
    assert opt.param_groups[0]["lr"] == pytest.approx(1e4 / math.e)
    losses = [opt.step(closure_of(opt, model, x, t)).item() for _ in range(100)]
    assert opt.failed_trials < 20
    assert losses[-1] < 0.2 * losses[0]


def test_a_gradient_that_is_not_finite_is_left_out() -> None:
    model, x, t, other = mlp()
    opt = apo.AdaptiveLR(torch.optim.Adam(model.parameters(), lr=1e-2), objective(model, other), interval=1)
    opt.step(closure_of(opt, model, x, t))
    before, rate = weights(model), opt.param_groups[0]["lr"]
    opt.step(closure_of(opt, model, x * float("nan"), t))
    assert same(weights(model), before)
    assert opt.param_groups[0]["lr"] < rate
    opt.step(closure_of(opt, model, x, t))
    assert all(p.isfinite().all() for p in model.parameters())
    assert opt.failed_trials == 1


def test_sparse_gradients_where_the_optimizer_takes_them() -> None:
    runs = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(9, 4, sparse=sparse), nn.Linear(4, 3)).double()
        x, t, other = torch.randint(9, (8,)), torch.randint(3, (8,)), torch.randint(9, (6,))
        opt = apo.AdaptiveLR(torch.optim.SGD(model.parameters(), lr=0.1), objective(model, other), interval=1)
        for _ in range(4):
            opt.step(closure_of(opt, model, x, t))
        runs.append((weights(model), opt.param_groups[0]["lr"]))
    (dense, dense_rate), (sparse_weights, sparse_rate) = runs
    assert sparse_rate == pytest.approx(dense_rate, rel=1e-10)
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(dense, sparse_weights, strict=True))


def test_parameters_on_two_devices_are_refused() -> None:
    params = [torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True, device="meta")]
    model = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"parameters must lie on one device, but got .'cpu', 'meta'."):
        apo.AdaptiveLR(torch.optim.SGD(params, lr=0.1), objective(model, torch.zeros(1)))


def test_larger_fsd_weight_is_more_cautious() -> None:
    rates = []
    for fsd_weight in (0.1, 30.0):
        model, x, t, other = mlp(dtype=torch.float32)
        goal = objective(model, other, fsd_weight=fsd_weight, wsd_weight=0.0)
        opt = apo.AdaptiveLR(torch.optim.SGD(model.parameters(), lr=0.1), goal)
        for _ in range(60):
            opt.step(closure_of(opt, model, x, t))
        rates.append(opt.param_groups[0]["lr"])
    assert rates[0] > 5 * rates[1]


@pytest.mark.parametrize("meta_optimizer", ["steady", "rmsprop"])
def test_trials_of_rmsprop_go_as_far_as_its_later_steps(meta_optimizer: str) -> None:
    """Its first ones are ten times as long. The step that is taken is its own, all the same."""
    model, x, t, other = mlp()
    plain = copy.deepcopy(model)
    base = torch.optim.RMSprop(model.parameters(), lr=1e-3, eps=1e-30)
    opt = apo.AdaptiveLR(base, objective(model, other), interval=1, meta_lr=0.0, meta_optimizer=meta_optimizer)
    opt.step(closure_of(opt, model, x, t))
    entries = sum(p.numel() for p in model.parameters())
    length = 1e-3 * math.sqrt(entries) * (1 if meta_optimizer == "steady" else 10)
    assert opt.metrics()["step_norm"] == pytest.approx(length, rel=1e-6)
    expected = torch.optim.RMSprop(plain.parameters(), lr=1e-3, eps=1e-30)
    expected.step(closure_of(expected, plain, x, t))
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=0)


def test_the_interval_grows_from_1_over_the_warmup() -> None:
    model, x, t, other = mlp()
    opt = apo.AdaptiveLR(torch.optim.SGD(model.parameters(), lr=0.1), objective(model, other), interval=4, warmup=12)
    calls: list[int] = []

    def closure() -> Tensor:
        calls[-1] += 1
        return closure_of(opt, model, x, t)()

    for _ in range(17):
        calls.append(0)
        opt.step(closure)
    assert [i for i, count in enumerate(calls) if count == 2] == [0, 1, 2, 3, 4, 5, 6, 8, 9, 12, 16]


def test_steps_without_closure_where_none_is_needed() -> None:
    model, x, t, other = mlp()
    opt = apo.AdaptiveLR(torch.optim.SGD(model.parameters(), lr=0.1), objective(model, other), interval=0)
    before = weights(model)
    closure_of(opt, model, x, t)()
    assert opt.step() is None
    assert not same(weights(model), before)
    opt.interval = 10
    opt.steps = 10
    with pytest.raises(ValueError, match="closure must be given at a step that updates φ"):
        opt.step()


def test_an_adaptive_optimizer_is_not_adapted_again() -> None:
    model, _, _, other = mlp()
    opt = apo.APO(model, objective(model, other))
    with pytest.raises(TypeError, match="optimizer must not adapt itself already, but got APO"):
        apo.AdaptiveLR(opt, objective(model, other))


def test_a_shorter_reach_doesnt_let_the_whole_step_leap() -> None:
    """Half-way w goes from 0.1 to -1.3, which passes; the whole way it would go to -2.7."""
    model = nn.Linear(2, 1, bias=False).double()
    goal = apo.ProximalObjective(model, discrepancy="mse", fsd_weight=0)
    x = torch.tensor([[1.0, 0.0]]).double()
    for lr, failed in ((28.0, 1), (14.0, 0)):
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[0.1, 10.0]]))  # the latter gives the weights their length
        opt = apo.AdaptiveLR(torch.optim.SGD(model.parameters(), lr=lr), goal, meta_lr=0, reach=0.5)
        begun(opt)
        opt.step(closure_of(opt, model, x, None, lambda y, _: y.square().sum() / 2))
        assert opt.failed_trials == failed
        assert model.weight[0, 0].item() == pytest.approx(0.1 if failed else -1.3)
        assert opt.param_groups[0]["lr"] == pytest.approx(lr / math.e if failed else lr)
