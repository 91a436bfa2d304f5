"""Bad input to each public name: an error that names the argument and what it was, and nothing changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apo
from apo import proximal
from tests.apo.helpers import closure_of, mlp, objective, same, weights

NAN, INF = float("nan"), float("inf")
Bad = tuple[dict[str, Any], type[Exception], str]

SHARED_BY_ALL: list[Bad] = [
    ({"interval": -1}, ValueError, "interval must be an integer >= 0, but got -1"),
    ({"interval": 2.5}, TypeError, "interval must be an integer, but got 2.5"),
    ({"interval": None}, TypeError, "interval must be an integer, but got None"),
    ({"interval": True}, TypeError, "interval must be an integer, but got True"),
    ({"warmup": -1}, ValueError, "warmup must be an integer >= 0, but got -1"),
    ({"warmup": "10"}, TypeError, "warmup must be an integer, but got '10'"),
    ({"meta_lr": NAN}, ValueError, "meta_lr must be a finite number >= 0, but got nan"),
    ({"meta_lr": -1}, ValueError, "meta_lr must be a finite number >= 0, but got -1"),
    ({"meta_optimizer": "sgd"}, ValueError, "meta_optimizer must be one of .*'rmsprop'.*, but got 'sgd'"),
    ({"meta_optimizer": None}, ValueError, "meta_optimizer must be one of .*, but got None"),
    ({"objective": None}, TypeError, "objective must be an apo.ProximalObjective, but got NoneType"),
    ({"objective": F.mse_loss}, TypeError, "objective must be an apo.ProximalObjective, but got function"),
    ({"process_group": "gloo"}, TypeError, "process_group must be a torch.distributed.ProcessGroup.*but got str"),
]
SHARED_BY_TWO: list[Bad] = [
    ({"bounds": (1, 0.1)}, ValueError, r"bounds must be rates 0 < least < greatest, but got \(1, 0.1\)"),
    ({"bounds": (0, 1)}, ValueError, r"bounds must be rates 0 < least < greatest, but got \(0, 1\)"),
    ({"bounds": (1e-3, INF)}, ValueError, "bounds must be a finite number >= 0, but got inf"),
    ({"bounds": 3}, TypeError, r"bounds must be a pair \(least, greatest\) of rates, but got 3"),
    ({"rescale_schedule": 1}, TypeError, "rescale_schedule must be True or False, but got 1"),
    ({"grad_scaler": "fp16"}, TypeError, "grad_scaler must be a torch.amp.GradScaler or None, but got str"),
]
ADAPTIVE_LR: list[Bad] = [
    ({"optimizer": "adam"}, TypeError, "optimizer must be a torch.optim.Optimizer, but got str"),
    ({"optimizer": torch.optim.SGD}, TypeError, "optimizer must be a torch.optim.Optimizer, but got type"),
    ({"meta_decay": 1}, ValueError, r"meta_decay must be a number in \[0, 1\), but got 1"),
    ({"meta_decay": "slow"}, TypeError, "meta_decay must be a number, but got 'slow'"),
    ({"reach": 0}, ValueError, "reach must be a finite number > 0, but got 0"),
    ({"reach": 1.5}, ValueError, "reach must be at most 1, but got 1.5"),
    ({"shared_lr": "yes"}, TypeError, "shared_lr must be True or False, but got 'yes'"),
]
APO: list[Bad] = [
    ({"model": 3}, TypeError, "model must be a torch.nn.Module, but got int"),
    ({"lr": -1}, ValueError, "lr must be a finite number >= 0, but got -1"),
    ({"lr": INF}, ValueError, "lr must be a finite number >= 0, but got inf"),
    ({"lr": None}, TypeError, "lr must be a number, but got None"),
    ({"momentum": 1.0}, ValueError, r"momentum must be a number in \[0, 1\), but got 1.0"),
    ({"weight_decay": "a"}, TypeError, "weight_decay must be a number, but got 'a'"),
    ({"decoupled_weight_decay": "yes"}, TypeError, "decoupled_weight_decay must be True or False, but got 'yes'"),
    ({"block_size": 0}, ValueError, "block_size must be an integer >= 1, but got 0"),
    ({"max_dim": 1.5}, TypeError, "max_dim must be an integer, but got 1.5"),
    ({"block_dtype": torch.int8}, ValueError, "block_dtype must be one of None, torch.float32.*but got torch.int8"),
    ({"block_dtype": torch.bfloat16}, ValueError, "block_dtype must be None for float64 weights, but got torch.bfl"),
    ({"method": "adam"}, TypeError, "method must be an apo.Method, but got 'adam'"),
    ({"lookahead": "far"}, ValueError, "lookahead must be one of 'whole', 'step', but got 'far'"),
    ({"adapt_lr": 1}, TypeError, "adapt_lr must be True or False, but got 1"),
    ({"lr_meta_lr": -0.1}, ValueError, "lr_meta_lr must be a finite number >= 0, but got -0.1"),
    ({"shared_lr": None}, TypeError, "shared_lr must be True or False, but got None"),
    ({"params": []}, ValueError, "optimizer got an empty parameter list"),
    ({"params": 3}, TypeError, "params must be parameters of the model or param groups.*but got 3"),
    ({"params": [torch.zeros(2)]}, ValueError, r"params must be parameters of the model, .*\(2,\)"),
    ({"params": [nn.Parameter(torch.zeros(2))]}, ValueError, r"params must be parameters of the model, .*\(2,\)"),
]
FULL: list[Bad] = [
    ({"model": None}, TypeError, "model must be a torch.nn.Module, but got NoneType"),
    ({"lr": 0}, ValueError, "lr must be a finite number > 0, but got 0"),
    ({"model": nn.Linear(200, 50)}, ValueError, "model must have 1 to 8192 trainable numbers, but has 10050"),
    ({"model": nn.ReLU()}, ValueError, "model must have 1 to 8192 trainable numbers, but has 0"),
]
OBJECTIVE: list[Bad] = [
    ({"model": 1}, TypeError, "model must be a torch.nn.Module, but got int"),
    ({"model": nn.Linear}, TypeError, "model must be a torch.nn.Module, but got type"),
    ({"inputs": None}, ValueError, "inputs must be given unless fsd_weight is 0 and no loss is given, but got None"),
    ({"inputs": None, "fsd_weight": 0, "loss": F.cross_entropy}, ValueError, "inputs must be given unless"),
    ({"inputs": torch.zeros(3)}, TypeError, "inputs must be an iterable of batches or a callable.*got Tensor"),
    ({"inputs": {"x": torch.zeros(3)}}, TypeError, "inputs must be an iterable of batches or a callable.*got dict"),
    ({"inputs": "train"}, TypeError, "inputs must be an iterable of batches or a callable.*got str"),
    ({"inputs": 3}, TypeError, "inputs must be an iterable of batches or a callable.*got int"),
    ({"discrepancy": "l1"}, ValueError, "discrepancy must be one of 'kl', .*but got 'l1'"),
    ({"discrepancy": 3}, TypeError, "discrepancy must be one of 'kl'.*or a callable.*but got 3"),
    ({"discrepancy": apo.KL}, TypeError, r"discrepancy must be .*a callable.*but got the class KL: make one, KL\(\)"),
    ({"fsd_weight": -1}, ValueError, "fsd_weight must be a finite number >= 0, but got -1"),
    ({"fsd_weight": NAN}, ValueError, "fsd_weight must be a finite number >= 0, but got nan"),
    ({"wsd_weight": "a"}, TypeError, "wsd_weight must be a number, but got 'a'"),
    ({"wsd_weight": INF}, ValueError, "wsd_weight must be a finite number >= 0, but got inf"),
    ({"mode": "test"}, ValueError, "mode must be one of 'eval', 'train', but got 'test'"),
    ({"outputs": 0}, TypeError, "outputs must be callable or None, but got 0"),
    ({"forward": "call"}, TypeError, "forward must be callable or None, but got 'call'"),
    ({"context": torch.no_grad()}, TypeError, "context must be callable .* makes a context.*but got"),
    ({"loss": 0}, TypeError, "loss must be callable or None, but got 0"),
    ({"mask": True}, TypeError, "mask must be a callable, an int, None or False, but got True"),
    ({"mask": torch.ones(3)}, TypeError, "mask must be a callable, an int, None or False, but got tensor"),
]
FRONT_ENDS: dict[str, list[Bad]] = {
    "AdaptiveLR": [*SHARED_BY_ALL, *SHARED_BY_TWO, *ADAPTIVE_LR],
    "APO": [*SHARED_BY_ALL, *SHARED_BY_TWO, *APO],
    "FullPreconditioner": [*SHARED_BY_ALL, *FULL],
}


def build(front_end: str, arguments: dict[str, Any], model: nn.Module, other: Tensor) -> Any:
    good: dict[str, Any] = {"objective": objective(model, other)}
    if front_end == "AdaptiveLR":
        good["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    else:
        good["model"] = model
    method = {field.name for field in fields(apo.Method)} & arguments.keys() if front_end == "APO" else set()
    if method:
        good["method"] = apo.Method(**{name: arguments[name] for name in method})
    own = {name: value for name, value in arguments.items() if name not in method}
    return getattr(apo, front_end)(**{**good, **own})


@pytest.mark.parametrize(("front_end", "bad"), [(name, bad) for name, all_ in FRONT_ENDS.items() for bad in all_])
def test_front_ends(front_end: str, bad: Bad) -> None:
    model, *_, other = mlp()
    before = weights(model)
    arguments, error, match = bad
    with pytest.raises(error, match=match):
        build(front_end, arguments, model, other)
    assert same(weights(model), before)


@pytest.mark.parametrize("bad", OBJECTIVE)
def test_objectives(bad: Bad) -> None:
    model, *_, other = mlp()
    arguments, error, match = bad
    with pytest.raises(error, match=match):
        apo.ProximalObjective(**{"model": model, "inputs": [other], **arguments})


Y = torch.zeros(2, 3)
CALLS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "KL of no tensors": (lambda: apo.KL()({}, {}), TypeError, "KL needs outputs that are tensors, but got dict: say"),
    "KL of two shapes": (lambda: apo.KL()(Y, Y.T), ValueError, r"KL needs outputs of one shape, but got \(2, 3\) and"),
    "KL of scalars": (
        lambda: apo.KL()(Y.sum(), Y.sum()), ValueError, r"'kl' needs outputs of examples by classes, but got shape \(\)"
    ),
    "KL's dim": (lambda: apo.KL(dim=0.5), TypeError, "dim must be an integer, but got 0.5"),  # type: ignore[arg-type]
    "KL's dim beyond": (
        lambda: apo.KL(5)(Y, Y), ValueError, r"KL needs outputs that have a dimension 5, but got shape \(2, 3\)"
    ),
    "SquaredError of a list": (lambda: apo.SquaredError()([Y], [Y]), TypeError, "SquaredError needs .* but got list"),
    "SquaredError's mean": (
        lambda: apo.SquaredError(mean="no"), TypeError, "mean must be True or False, but got 'no'"  # type: ignore[arg-type]
    ),
    "BernoulliKL of two shapes": (lambda: apo.BernoulliKL()(Y, Y.T), ValueError, "BernoulliKL needs outputs of one"),
    "GaussianKL of one": (lambda: apo.GaussianKL()(Y, Y), TypeError, "GaussianKL without a variance needs outputs tha"),
    "GaussianKL of a triple": (
        lambda: apo.GaussianKL()((Y, Y, Y), (Y, Y, Y)), TypeError, "GaussianKL without a variance needs outputs that"
    ),
    "GaussianKL's variance": (lambda: apo.GaussianKL(0), ValueError, "variance must be a finite number > 0, but got 0"),
    "theta of integers": (
        lambda: proximal.proximal_step(torch.arange(3), torch.sum), TypeError, "theta must be a floating-point vector, "
    ),
    "theta a matrix": (
        lambda: proximal.proximal_step(Y, torch.sum), TypeError, r"theta must be a floating-point vector.*\(2, 3\)"
    ),
    "no discrepancy": (
        lambda: proximal.proximal_step(Y[0], torch.sum, method=proximal.NATURAL_GRADIENT),
        ValueError, "discrepancy must be given for natural gradient unless fsd_weight is 0, but got None",
    ),
    "proximal wsd_weight": (
        lambda: proximal.proximal_step(Y[0], torch.sum, torch.sum, wsd_weight=-1), ValueError, "wsd_weight must be a f"
    ),
    "proximal tolerance": (
        lambda: proximal.proximal_step(Y[0], torch.sum, torch.sum, tolerance=NAN), ValueError, "tolerance must be a fi"
    ),
    "proximal iterations": (
        lambda: proximal.proximal_step(Y[0], torch.sum, torch.sum, iterations=0), ValueError, "iterations must be an i"
    ),
    "proximal method": (
        lambda: proximal.proximal_step(Y[0], torch.sum, torch.sum, method="newton"),  # type: ignore[arg-type]
        TypeError, "method must be an apo.proximal.ProximalMethod, but got 'newton'",
    ),
    "proximal loss": (
        lambda: proximal.proximal_step(Y[0], 3), TypeError, "loss must be callable, but got 3"  # type: ignore[arg-type]
    ),
    "proximal discrepancy": (
        lambda: proximal.proximal_step(Y[0], torch.sum, 3),  # type: ignore[arg-type]
        TypeError, "discrepancy must be callable or None, but got 3",
    ),
    "closed form weight": (
        lambda: proximal.closed_form_step(Y[0], Y[0], torch.eye(3), fsd_weight=-1), ValueError, "fsd_weight must be a "
    ),
    "closed form G": (
        lambda: proximal.closed_form_step(Y[0], Y[0], Y), ValueError, r"G must be \(3, 3\), but got shape \(2, 3\)"
    ),
    "closed form gradient": (
        lambda: proximal.closed_form_step(Y[0], Y[1, :2], torch.eye(3)), ValueError, r"gradient must be \(3,\), but got"
    ),
    "flat_model": (
        lambda: proximal.flat_model(3), TypeError, "model must be a torch.nn.Module, but got int"  # type: ignore[arg-type]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_discrepancies_and_proximal_methods(name: str) -> None:
    call, error, match = CALLS[name]
    with pytest.raises(error, match=match):
        call()


def _fails_by(loss: Callable[..., Any] | None = None, **settings: Any) -> Callable[..., Any]:
    """A step whose objective turns out to be bad."""

    def step(front_end: str, model: nn.Module, opt: Any, closure: Any) -> None:
        others = {name: value for name, value in settings.items() if name != "inputs"}
        opt.objective = objective(model, settings.get("inputs", torch.randn(12, 5).double()), loss=loss, **others)
        opt.step(closure)

    return step


def _loaded(change: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
    def load(front_end: str, model: nn.Module, opt: Any, closure: Any) -> None:
        state = copy.deepcopy(opt.state_dict())
        changed = change(state)
        opt.load_state_dict(state if changed is None else changed)

    return load


def _without_group(state: dict[str, Any]) -> None:
    state["param_groups"] = []


def _shorter_group(state: dict[str, Any]) -> None:
    state["param_groups"][0]["params"].pop()


def _without_params(state: dict[str, Any]) -> None:
    del state["param_groups"][0]["params"]


def _without_state(state: dict[str, Any]) -> None:
    del state["state"]


def _added(group: Any) -> Callable[..., Any]:
    return lambda front_end, model, opt, closure: opt.add_param_group(group)


STEPS: dict[str, tuple[Callable[..., Any], type[Exception], str]] = {
    "closure is a number": (lambda f, m, o, c: o.step(3), TypeError, r"closure must be callable: .*but got 3 .int"),
    "closure is the loss": (lambda f, m, o, c: o.step(c()), TypeError, "closure must be callable: .*but got tensor"),
    "meta_step of a number": (lambda f, m, o, c: o.meta_step("x"), TypeError, "closure must be callable: .*but got"),
    "no closure": (lambda f, m, o, c: (c(), o.step()), ValueError, r"closure must be given at a step that updates φ"),
    "no closure to meta_step": (lambda f, m, o, c: (c(), o.meta_step()), ValueError, "closure must be given at a step"),
    "closure returns None": (
        lambda f, m, o, c: o.step(lambda: c() and None), TypeError, "closure must return the loss, .* but got NoneType"
    ),
    "closure returns logits": (
        lambda f, m, o, c: o.step(lambda: c().expand(3)), TypeError, r"closure must return the loss, .*shape \(3,\)"
    ),
    "closure returns text": (
        lambda f, m, o, c: o.step(lambda: str(c())), TypeError, "closure must return the loss, .* but got str"
    ),
    "closure runs no backward": (
        lambda f, m, o, c: (c(), o.step(lambda: torch.zeros(()))), ValueError, "closure must clear the gradients"
    ),
    "loss of a batch without targets": (
        _fails_by(F.cross_entropy), TypeError, r"inputs must be pairs \(inputs, targets\).* but got Tensor"
    ),
    "loss of a triple": (
        _fails_by(F.cross_entropy, inputs=[(1, 2, 3)]), TypeError, "inputs must be pairs .* but got tuple of 3"
    ),
    "loss returns many numbers": (
        _fails_by(lambda y, t: y, inputs=[(torch.zeros(12, 5).double(), 0)]),
        TypeError, r"loss must return a tensor of one element, but got shape \(12, 3\)",
    ),
    "discrepancy returns many": (
        _fails_by(discrepancy=lambda new, old: new - old), TypeError, "discrepancy must return a tensor of one element"
    ),
    "discrepancy returns a float": (
        _fails_by(discrepancy=lambda new, old: 0.5), TypeError, "discrepancy must return a tensor .* but got float"
    ),
    "inputs is empty": (_fails_by(inputs=[]), ValueError, "inputs must hold at least one batch, but got an empty"),
    "inputs has run out": (_fails_by(inputs=iter([])), ValueError, "inputs has run out: it is an it|at least one"),
    "mask returns a number": (_fails_by(mask=lambda b: 3), TypeError, "mask must return a bool tensor, but got int"),
    "mask has another shape": (
        _fails_by(mask=lambda b: torch.ones(7)), ValueError, r"mask must return a bool tensor whose shape leads"
    ),
    "outputs are no tensor": (
        _fails_by(outputs=lambda y: "x"), TypeError, "KL needs outputs that are tensors, but got str: say which with"
    ),
    "load of nothing": (_loaded(lambda s: []), ValueError, "state_dict must come from .*something else"),
    "load of no groups": (_loaded(_without_group), ValueError, "state_dict must come from .*something else"),
    "load of a shorter group": (
        _loaded(_shorter_group), ValueError, r"state_dict must have param groups of \[4\] parameters, but got \[3\]"
    ),
    "load of a group without params": (
        _loaded(_without_params), ValueError, "state_dict must have param groups of .*but got"
    ),
    "load without state": (_loaded(_without_state), ValueError, "state_dict must have the entries .*'state'"),
    "load of a model's": (
        lambda f, m, o, c: o.load_state_dict(m.state_dict()), ValueError, "state_dict must come from .*something else"
    ),
    "load of Adam's": (
        lambda f, m, o, c: o.load_state_dict(torch.optim.Adam(m.parameters()).state_dict()),
        ValueError, "state_dict must come from .*something else",
    ),
    "group that is a list": (_added([]), (TypeError, ValueError), "param_group must be a dict|P is one matrix"),
    "group of held parameters": (
        lambda f, m, o, c: o.add_param_group({"params": [m[0].weight]}), ValueError, "more than one param|P is one mat"
    ),
    "group of a stranger": (
        _added({"params": [nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)]}),
        (TypeError, ValueError), r"parameters must be dense floating|params must be parameters of the model|P is one",
    ),
    "group with a bad lr": (
        lambda f, m, o, c: o.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "lr": -1.0}),
        ValueError, "lr.* must be a finite number >= 0, but got -1.0|params must be param|P is one matrix|Invalid",
    ),
}  # type: ignore[assignment]  # fmt: skip


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("name", STEPS)
def test_steps_loading_and_groups(front_end: str, name: str) -> None:
    """After the refusal weights, state and groups are as before, and a good step goes on."""
    call, error, match = STEPS[name]
    model, x, t, other = mlp()
    opt = build(front_end, {"interval": 1}, model, other)
    closure = closure_of(opt, model, x, t)
    opt.step(closure)
    good = opt.objective
    before, state = weights(model), str(opt.state_dict())
    with pytest.raises(error, match=match):
        call(front_end, model, opt, closure)
    assert same(weights(model), before)
    assert str(opt.state_dict()) == state
    opt.objective = good
    opt.step(closure)
    assert not same(weights(model), before)


def test_there_are_many_kinds() -> None:
    kinds = {str(bad) for all_ in (*FRONT_ENDS.values(), OBJECTIVE) for bad in all_}
    assert len(kinds) + len(CALLS) + len(STEPS) >= 60


def test_float64_beside_other_parameters() -> None:
    """Refused where it is built, where a group is added, and where a part of the model was cast."""
    match = r"params must be float64 all or none, but 1.weight is and 0.weight is torch.float32"
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2).double())
    goal = objective(model, torch.ones(2, 3))
    with pytest.raises(TypeError, match=match):
        apo.APO(model, goal)
    opt = apo.APO(model, goal, params=model[0].parameters())
    with pytest.raises(TypeError, match=match):
        opt.add_param_group({"params": list(model[1].parameters())})
    assert len(opt.param_groups) == 1
    model[1].float()
    opt.add_param_group({"params": list(model[1].parameters())})
    model[1].double()
    model[1].weight.grad = torch.ones_like(model[1].weight)
    before = weights(model)
    with pytest.raises(TypeError, match=match):
        opt.step(lambda: torch.zeros(()))
    assert same(weights(model), before)
