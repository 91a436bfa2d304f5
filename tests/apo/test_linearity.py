"""What AdaptiveLR does with the optimizer that it wraps: which steps it takes, and that a trial leaves no trace."""

from __future__ import annotations

import copy
import math
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import apo
from apo.rates.log_rates import set_rate
from apo.wrapped.linearity import check_linear
from tests.apo.helpers import begun, closure_of, mlp, objective, same, weights
from tests.apo.optimizers import (
    BASES,
    Base,
    IgnoresRate,
    Langevin,
    Lookahead,
    RateInMomentum,
    RootRate,
    SetsItsRate,
    Watching,
    state_of,
)

each_base = pytest.mark.parametrize("name", BASES)


def seed() -> None:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002


def randomness() -> str:
    return repr((torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()))  # noqa: NPY002


@pytest.mark.parametrize("rule", ["rmsprop", "steady"])
@each_base
def test_steps_are_the_bases_own_at_the_learned_rates(name: str, rule: Any) -> None:
    """To the bit, with the same random numbers, state and gradients, at every step, trials or none."""
    (model, x, t, other), (twin, *_) = mlp(dtype=torch.float32), mlp(dtype=torch.float32)
    base = BASES[name](model.parameters())
    opt = apo.AdaptiveLR(base, objective(model, other), interval=2, warmup=4, meta_optimizer=rule)
    begun(opt)
    plain = BASES[name](twin.parameters())
    for _ in range(9):
        seed()
        opt.step(closure_of(opt, model, x, t))
        drawn = randomness()
        seed()
        closure_of(plain, twin, x, t)()
        for group, learned in zip(plain.param_groups, opt.param_groups, strict=True):
            group["lr"] = copy.deepcopy(learned["lr"])
        plain.step()
        assert same(weights(model), weights(twin))
        assert state_of(opt.optimizer) == state_of(plain)
        assert randomness() == drawn
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert opt.failed_trials == 0
    changed = float(opt.param_groups[0]["lr"]) != float(BASES[name](twin.parameters()).param_groups[0]["lr"])
    assert changed or rule == "steady"  # which may hold what it finds


def test_what_hooks_of_the_base_see_in_a_trial_is_forgotten() -> None:
    (model, x, t, other), (twin, *_) = mlp(dtype=torch.float32), mlp(dtype=torch.float32)
    base, plain = (Watching(m.parameters(), 0.1).watch(m) for m in (model, twin))
    opt = apo.AdaptiveLR(base, objective(model, 10 * other), interval=1)
    for step in range(6):
        if step == 3:
            before = base.square.clone()
            opt.meta_step(lambda: closure_of(opt, model, x, t)() + (math.inf if opt.in_trial else 0))
            assert opt.failed_trials == 1
            base.square.copy_(before)  # the closure at θ counts
        opt.step(closure_of(opt, model, x, t))
        closure_of(plain, twin, x, t)()
        plain.param_groups[0]["lr"] = opt.param_groups[0]["lr"]
        plain.step()
        assert torch.equal(base.square, plain.square)
        assert same(weights(model), weights(twin))


@each_base
@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("what", ["check", "meta_step", "refused", "stopped"])
def test_what_is_no_step_leaves_no_trace(name: str, after: int, what: str) -> None:
    """The check, a meta_step, a refused trial, an exception in one: only rates and counts may differ afterwards."""
    model, x, t, other = mlp(dtype=torch.float32)
    opt = apo.AdaptiveLR(BASES[name](model.parameters()), objective(model, other), interval=1)
    begun(opt)
    for _ in range(after):
        opt.step(closure_of(opt, model, x, t))
    closure_of(opt, model, x, t)()
    seed()
    rates = [float(g["lr"]) for g in opt.param_groups]
    before = weights(model), [p.grad.clone() for p in model.parameters()], state_of(opt.optimizer), randomness()
    held = [p.grad for p in model.parameters()]

    def closure() -> Tensor:
        loss = F.cross_entropy(model(x), t)
        for p, grad in zip(model.parameters(), torch.autograd.grad(loss, [*model.parameters()]), strict=True):
            p.grad = grad if opt.in_trial else p.grad
        if opt.in_trial and what == "refused":
            return loss + math.inf
        if opt.in_trial and what == "stopped":
            raise KeyboardInterrupt
        return loss

    if what == "check":
        check_linear(opt.optimizer)
    elif what == "meta_step":
        opt.meta_step(closure)
    elif what == "refused":
        opt.step(closure)
        assert opt.failed_trials == 1
    else:
        with pytest.raises(KeyboardInterrupt):
            opt.step(closure)
    if what in ("meta_step", "refused"):
        for group, rate in zip(opt.param_groups, rates, strict=True):
            set_rate(group, rate)
    assert same(weights(model), before[0])
    assert same([p.grad for p in model.parameters()], before[1])
    assert state_of(opt.optimizer) == before[2]
    assert randomness() == before[3]
    assert all(p.grad is grad for p, grad in zip(model.parameters(), held, strict=True))


@pytest.mark.parametrize("name", ["Lookahead", "rate in momentum", "SGD", "Langevin"])
def test_the_slope_is_that_of_q_in_log_lr(name: str) -> None:
    """Against finite differences, also at steps that aren't proportional to the rate."""
    model, x, t, other = mlp()
    slopes: list[float] = []

    def make() -> apo.AdaptiveLR:
        base = BASES[name](model.parameters())
        return apo.AdaptiveLR(base, objective(model, other), interval=1, meta_lr=0.0, meta_optimizer="rmsprop")

    opt = make()
    taken = opt.rates.update
    opt.rates.update = lambda groups, found, *rest: (slopes.append(sum(found)), taken(groups, found, *rest))[1]  # type: ignore
    for step in range(6):
        h, values, before = 1e-5, [], len(slopes)
        if step > 3:  # both kinds of Lookahead's steps; what kind it is has shown itself by then
            for factor in (math.exp(h), math.exp(-h)):
                rate = opt.param_groups[0]["lr"]
                opt.param_groups[0]["lr"] = rate * factor
                seed()
                opt.meta_step(closure_of(opt, model, x, t))
                values.append(opt.last.objective)
                opt.param_groups[0]["lr"] = rate
            del slopes[before:]
        seed()
        opt.step(closure_of(opt, model, x, t))
        if values:
            assert slopes[-1] == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-5, abs=1e-9)
        else:
            opt.param_groups[0]["lr"] *= 1.01  # so that it can show itself
            opt.rates.meta_lr = 0.5 if step < 3 else 0.0


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda p: Langevin(p, 0.01, 0.5), "proportional to lr, or linear in it, but got Langevin"),
        (lambda p: IgnoresRate(p, 0.01), "proportional to lr, or linear in it, but got IgnoresRate"),
        (lambda p: RootRate(p, 0.01), "proportional to lr, or linear in it, but got RootRate"),
        (lambda p: torch.optim.Rprop(p, lr=0.01), "got Rprop: its state depends on the rate in a way that decides"),
        (lambda p: SetsItsRate(p, 0.01), "leave lr as it is set, because AdaptiveLR learns it, but got SetsItsRate"),
        (lambda p: torch.optim.SparseAdam(p), r"SparseAdam.step\(\) raised RuntimeError: SparseAdam does not support"),
        (lambda p: torch.optim.LBFGS(p), r"step\(\) that needs no closure, but got LBFGS"),
    ],
)
def test_steps_that_are_not_linear_are_refused_by_name(make: Callable[[Any], Base], match: str) -> None:
    model, x, t, other = mlp()
    base = make([*model.parameters()])
    opt = apo.AdaptiveLR(base, objective(model, other))
    closure_of(opt, model, x, t)()
    before, state, grads = weights(model), state_of(base), [p.grad.clone() for p in model.parameters()]
    seed()
    drawn = randomness()
    with pytest.raises((ValueError, TypeError), match=match):
        opt.step(lambda: F.cross_entropy(model(x), t))
    assert same(weights(model), before)
    assert same([p.grad for p in model.parameters()], grads)
    assert state_of(base) == state
    assert randomness() == drawn
    assert opt.steps == 0


@pytest.mark.parametrize("rate", [None, "0.1", -0.1, math.nan, torch.tensor([0.1, 0.2])])
def test_rates_that_are_none_are_refused_by_name(rate: Any) -> None:
    model, _, _, other = mlp()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    base.param_groups[0]["lr"] = rate
    with pytest.raises((ValueError, TypeError), match=r"optimizer.param_groups\[0\]\['lr'\] must be a"):
        apo.AdaptiveLR(base, objective(model, other))


@pytest.mark.parametrize("rate", [np.float32(0.1), np.float64(0.1), torch.tensor(0.1), torch.tensor([0.1]), 1])
def test_rates_of_other_types_are_taken(rate: Any) -> None:
    model, x, t, other = mlp()
    start, base = float(rate), RateInMomentum(model.parameters(), copy.deepcopy(rate))
    opt = apo.AdaptiveLR(base, objective(model, other), meta_optimizer="rmsprop")
    opt.step(closure_of(opt, model, x, t))
    assert type(base.param_groups[0]["lr"]) in (type(rate), float)
    assert float(base.param_groups[0]["lr"]) != start


def test_groups_that_share_one_tensor_as_their_rate_learn_their_own() -> None:
    model, x, t, other = mlp()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    rates = []
    for lr in (torch.tensor(0.01, dtype=torch.float64), 0.01):
        model.load_state_dict(mlp()[0].state_dict())
        groups = [{"params": [*model[0].parameters()]}, {"params": [*model[2].parameters()]}]
        opt = apo.AdaptiveLR(torch.optim.Adam(groups, lr=lr), objective(model, other), meta_optimizer="rmsprop")
        for _ in range(5):
            opt.step(closure_of(opt, model, x, t))
        rates.append([float(g["lr"]) for g in opt.param_groups])
    assert rates[0] == pytest.approx(rates[1], rel=1e-9)
    assert rates[0][0] != rates[0][1]


class Clones(TorchDispatchMode):
    """The greatest number of bytes that copies held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, int] = {}
        self.live, self.most = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given:
                self._track(x)
        return out

    def _track(self, x: Tensor) -> None:
        size = x.untyped_storage().nbytes()
        self.live += size
        self.most = max(self.most, self.live)
        weakref.finalize(x, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("started", [False, True])
def test_the_check_holds_one_copy_of_the_weights(dtype: torch.dtype, started: bool) -> None:
    """In their own dtype; also where the optimizer has states, as after a checkpoint was loaded."""
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 4), nn.Linear(4, 4)).to(dtype)
    base = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(1 + started):
        model(torch.randn(3, 256, dtype=dtype)).square().sum().backward()
        if started:
            base.step()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    with Clones() as clones:
        assert check_linear(base)
    assert size <= clones.most < 1.2 * size


def third_party() -> Iterator[Any]:
    pytorch_optimizer, schedulefree = pytest.importorskip("pytorch_optimizer"), pytest.importorskip("schedulefree")
    for name in sorted(pytorch_optimizer.get_supported_optimizers()):
        yield pytorch_optimizer.load_optimizer(name)
    for name in ("SGDScheduleFree", "AdamWScheduleFree", "RAdamScheduleFree", "AdamWScheduleFreePaper"):
        yield getattr(schedulefree, name)


def cleaned(base: Base) -> str:
    groups = [{k: v for k, v in g.items() if not k.startswith("apo_")} for g in base.param_groups]
    return repr([dict(base.state), groups])


def built(kind: Any, model: nn.Module) -> Base | None:
    """With its defaults, or what it can't do without; None where it can't be built."""
    params = [*model.parameters()]
    split = [{"params": params[::2], "use_muon": True}, {"params": params[1::2], "use_muon": False}]
    for make in (
        lambda: kind(params),
        lambda: kind(params, lr=1e-3),
        lambda: kind(split),
        lambda: kind(model),
        lambda: kind(model, lr=1e-3),
        lambda: kind(params, num_iterations=10),
        lambda: kind(params, num_data=64),
    ):
        try:
            return make()
        except Exception:  # noqa: PERF203
            continue
    return None


@pytest.mark.filterwarnings("ignore")
def test_every_third_party_optimizer_is_served_rightly_or_refused_by_name() -> None:
    """Its first step is the base's own at the learned rate, to the bit, or an error names it and nothing changed."""
    served, refused = [], []
    for kind in third_party():
        (model, x, t, other), (twin, *_) = mlp(dtype=torch.float32), mlp(dtype=torch.float32)
        seed()
        base = built(kind, model)
        seed()
        plain = built(kind, twin)
        name = kind.__name__
        if base is None or plain is None or name in ("LOMO", "AdaLOMO"):  # these step in the backward itself
            continue
        for one in (base, plain):
            one.train() if hasattr(one, "train") else None
        try:
            opt = apo.AdaptiveLR(base, objective(model, other))
        except ValueError as error:
            assert "'lr'" in str(error)  # noqa: PT017
            refused.append(name)
            continue
        start, state = weights(model), cleaned(base)
        seed()
        try:
            opt.step(closure_of(opt, model, x, t))
        except (ValueError, TypeError) as error:
            assert str(error).startswith("optimizer must"), (name, error)  # noqa: PT017
            assert name in str(error), (name, error)  # noqa: PT017
            assert same(weights(model), start), name
            assert cleaned(base) == state, name
            refused.append(name)
            continue
        closure_of(plain, twin, x, t)()
        for group, learned in zip(plain.param_groups, opt.param_groups, strict=True):
            group["lr"] = learned["lr"]
        seed()
        if opt.failed_trials == 0:
            plain.step()
        assert same(weights(model), weights(twin)), name
        served.append(name)
    assert len(served) > 100
    assert {"AdaMod", "SWATS", "SOAP", "Muon", "Kron", "ScalableShampoo", "Ranger", "SGDScheduleFree"} <= set(served)
    assert {"ASGD", "Fromage", "LBFGS", "AliG", "MADGRAD"} <= set(refused)


def test_groups_added_to_the_base_are_learned_from_the_next_step() -> None:
    model, x, t, other = mlp()
    base = torch.optim.SGD(model[2].parameters(), lr=0.1, momentum=0.9)
    opt = apo.AdaptiveLR(base, objective(model, other), interval=1, meta_optimizer="rmsprop")
    opt.step(closure_of(opt, model, x, t))
    base.add_param_group({"params": [*model[0].parameters()], "lr": 0.01})
    before, updates = weights(model[0]), base.param_groups[0]["apo_rate_updates"]
    opt.step(closure_of(opt, model, x, t))
    assert not same(weights(model[0]), before)
    assert base.param_groups[1]["lr"] != 0.01
    assert base.param_groups[0]["apo_rate_updates"] == updates + 1
    assert opt.steps == 2


def test_maximizing_is_minimizing_the_negative() -> None:
    runs = []
    for maximize in (False, True):
        model, x, t, other = mlp()
        base = torch.optim.Adam(model.parameters(), lr=1e-2, maximize=maximize)
        opt = apo.AdaptiveLR(base, objective(model, other))
        sign = -1 if maximize else 1
        for _ in range(8):
            opt.step(closure_of(opt, model, x, t, lambda y, t, sign=sign: sign * F.cross_entropy(y, t)))
        runs.append((weights(model), opt.param_groups[0]["lr"], opt.last.objective, sign * opt.last.loss))
    for a, b in zip(runs[0][0], runs[1][0], strict=True):
        assert torch.allclose(a, b, rtol=1e-10)
    assert runs[0][1:] == pytest.approx(runs[1][1:], rel=1e-9)


def test_sparse_gradients_are_left_as_they_were() -> None:
    table = nn.Embedding(9, 4, sparse=True)
    base = torch.optim.SparseAdam(table.parameters(), lr=0.1)
    table(torch.tensor([1, 1, 3])).square().sum().backward()
    before, grad = weights(table), table.weight.grad
    values, indices = grad._values().clone(), grad._indices().clone()
    assert check_linear(base)
    assert table.weight.grad is grad
    assert torch.equal(grad._values(), values)
    assert torch.equal(grad._indices(), indices)
    assert same(weights(table), before)
    assert not base.state


def test_a_wrappers_own_state_dict_is_saved_and_goes_on_to_the_bit() -> None:
    """Whatever its form: here the inner optimizer's is a part of it."""

    class Saving(Lookahead):
        def state_dict(self) -> Any:
            return {"inner": self.inner.state_dict(), "count": self.count, "slow": [*self.slow.values()]}

        def load_state_dict(self, state_dict: Any) -> None:
            self.inner.load_state_dict(state_dict["inner"])
            self.param_groups, self.state = self.inner.param_groups, self.inner.state
            self.count = state_dict["count"]
            self.slow = dict(zip(self.slow, state_dict["slow"], strict=True))

    runs = []
    for _ in range(2):
        model, x, t, other = mlp()
        base = Saving(torch.optim.Adam(model.parameters(), lr=1e-2))
        runs.append((model, apo.AdaptiveLR(base, objective(model, other), interval=2, warmup=3), x, t))
    (model, opt, x, t), (model2, opt2, *_) = runs
    for _ in range(5):
        opt.step(closure_of(opt, model, x, t))
    model2.load_state_dict(model.state_dict())
    opt2.load_state_dict(opt.state_dict())
    for _ in range(4):
        opt.step(closure_of(opt, model, x, t))
        opt2.step(closure_of(opt2, model2, x, t))
    assert same(weights(model), weights(model2))
    assert opt.param_groups[0]["lr"] == opt2.param_groups[0]["lr"]
