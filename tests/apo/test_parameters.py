"""Parameters that are frozen, empty, moved, materialised, replaced, tied or parametrized after construction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import apo
from tests.apo.helpers import closure_of, same, weights

FRONT_ENDS: dict[str, Callable[..., Any]] = {
    "AdaptiveLR": lambda model, goal: apo.AdaptiveLR(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), goal),
    "APO": lambda model, goal: apo.APO(model, goal, params=model.parameters()),
    "FullPreconditioner": apo.FullPreconditioner,
}
each_front_end = pytest.mark.parametrize("front_end", FRONT_ENDS)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3))


class Run:
    """A model under a front end, on data in the model's present dtype."""

    def __init__(self, front_end: str, model: nn.Module) -> None:
        self.model = model
        self.x, self.t, self.other = torch.randn(16, 5), torch.randint(3, (16,)), torch.randn(12, 5)
        self.opt = FRONT_ENDS[front_end](model, apo.ProximalObjective(model, lambda: self.other.to(self.dtype)))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def go(self, steps: int) -> list[float]:
        closure = closure_of(self.opt, self.model, self.x.to(self.dtype), self.t)
        return [float(self.opt.step(closure)) for _ in range(steps)]


@each_front_end
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_what_is_frozen_stays_and_the_rest_trains(front_end: str, name: str) -> None:
    """Frozen in mid-training, and trained again when it is thawed."""
    run = Run(front_end, net())
    run.go(3)
    layer = run.model[2]
    frozen, free = getattr(layer, name), getattr(layer, "bias" if name == "weight" else "weight")
    frozen.requires_grad_(False)
    before, before_free = frozen.clone(), free.detach().clone()
    losses = run.go(10)
    assert torch.equal(frozen, before)
    assert not torch.equal(free, before_free)
    assert losses[-1] < losses[0]
    frozen.requires_grad_(True)
    run.go(2)
    assert not torch.equal(frozen, before)


@pytest.mark.parametrize("front_end", ["AdaptiveLR", "APO"])
def test_a_bias_trains_whose_weight_was_frozen_before(front_end: str) -> None:
    model = net()
    for layer in (model[0], model[2], model[3]):
        layer.weight.requires_grad_(False)
    run = Run(front_end, model)
    before = weights(model)
    losses = run.go(20)
    for p, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, was) != p.requires_grad
    assert losses[-1] < losses[0]


@each_front_end
@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0)])
def test_empty_parameters(front_end: str, shape: tuple[int, ...]) -> None:
    model = net()
    model.register_parameter("empty", nn.Parameter(torch.zeros(shape)))
    run = Run(front_end, model)
    losses = run.go(15)
    assert losses[-1] < losses[0]
    run.opt.load_state_dict(run.opt.state_dict())


@each_front_end
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("begun", [False, True])
def test_moved_to_another_dtype(front_end: str, dtype: torch.dtype, begun: bool) -> None:
    """Before the first step, or between two: the state, learned or the base's, follows."""
    run = Run(front_end, net())
    run.go(3 if begun else 0)
    rate = run.opt.param_groups[0]["lr"]
    run.model.to(dtype)
    run.go(1)
    assert run.opt.param_groups[0]["lr"] < 30 * rate
    losses = run.go(8)
    assert losses[-1] < losses[0]
    assert run.opt.failed_trials == 0
    if front_end == "AdaptiveLR":
        assert {s["momentum_buffer"].dtype for s in run.opt.state.values()} == {dtype}
    if front_end == "APO":
        assert {layer.S.dtype for layer in run.opt.layers} == {torch.promote_types(dtype, torch.float32)}


@each_front_end
def test_there_and_back_is_as_if_it_hadnt_moved(front_end: str) -> None:
    runs = []
    for moved in (False, True):
        torch.manual_seed(1)
        run = Run(front_end, net())
        run.go(4)
        if moved:
            run.model.double().float()
        run.go(4)
        runs.append(weights(run.model))
    assert same(*runs)


def test_what_apo_has_learned_is_kept_when_the_model_moves() -> None:
    run = Run("APO", net())
    run.go(5)
    learned = [t.clone() for layer in run.opt.layers for t in layer.tensors()]
    run.model.double()
    run.opt.interval = run.opt.warmup = 0
    run.go(1)
    assert same([t.float() for layer in run.opt.layers for t in layer.tensors()], learned)


def on_meta() -> nn.Sequential:
    with torch.device("meta"):
        return net()


def materialised(model: nn.Sequential, how: str) -> None:
    if how == "to_empty":
        model.to_empty(device="cpu")
        for layer in (model[0], model[2], model[3]):
            layer.reset_parameters()
    else:
        model.load_state_dict(net().state_dict(), assign=True)


@pytest.mark.parametrize("how", ["to_empty", "assign"])
def test_apo_takes_up_a_model_that_was_on_meta(how: str) -> None:
    run = Run("APO", on_meta())
    materialised(run.model, how)
    losses = run.go(10)
    assert losses[-1] < losses[0]
    assert {id(p) for p in run.model.parameters()} == {id(p) for p in run.opt.parameters}


def replaced_by_assign(model: nn.Sequential) -> None:
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)


def replaced_by_weight_norm(model: nn.Sequential) -> None:
    parametrizations.weight_norm(model[0])


def replaced_by_old_weight_norm(model: nn.Sequential) -> None:
    nn.utils.weight_norm(model[0])


def tied_later(model: nn.Sequential) -> None:
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())


REPLACED: dict[str, Callable[[nn.Sequential], None]] = {
    "load_state_dict(assign=True)": replaced_by_assign,
    "weight_norm": replaced_by_weight_norm,
    "weight_norm of old": replaced_by_old_weight_norm,
    "another tensor in its place": tied_later,
}


@each_front_end
@pytest.mark.parametrize("how", REPLACED)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_replaced_parameters_are_refused_by_name(front_end: str, how: str) -> None:
    run = Run(front_end, net())
    run.go(2)
    REPLACED[how](run.model)
    before, state = weights(run.model), str(run.opt.state_dict())
    name = "2.weight" if how.startswith("another") else "0.weight"
    with pytest.raises(ValueError, match=f"after the model's parameters are final, but {name} was replaced since"):
        run.go(1)
    assert same(weights(run.model), before)
    assert str(run.opt.state_dict()) == state


@pytest.mark.parametrize("front_end", ["AdaptiveLR", "FullPreconditioner"])
@pytest.mark.parametrize("how", ["to_empty", "assign"])
def test_others_refuse_a_model_that_was_on_meta(front_end: str, how: str) -> None:
    """The base, or P, holds the old parameters."""
    run = Run(front_end, on_meta())
    materialised(run.model, how)
    with pytest.raises(ValueError, match=r"but 0.weight was replaced since: a Parameter of torch.float32 on meta by"):
        run.go(1)


@each_front_end
def test_groups_whose_parameters_were_swapped_are_refused(front_end: str) -> None:
    """As accelerate's prepare does for FSDP: in the model and in the groups."""
    run = Run(front_end, net())
    new = {p: nn.Parameter(p.detach().clone()) for p in run.model.parameters()}
    for module in run.model.modules():
        for name, p in list(module._parameters.items()):
            module._parameters[name] = new[p] if p is not None else None
    for group in run.opt.param_groups:
        group["params"] = [new[p] for p in group["params"]]
    with pytest.raises(ValueError, match=r"0.weight was replaced since.*build the optimizer after"):
        run.go(1)


@each_front_end
def test_parameters_that_only_moved_within_their_module_train_on(front_end: str) -> None:
    """Parametrizations and pruning, registered and removed in mid-training, and a module that was taken out."""
    run = Run(front_end, net())
    run.go(2)
    parametrizations.spectral_norm(run.model[0])
    run.go(3)
    parametrize.remove_parametrizations(run.model[0], "weight")
    prune.l1_unstructured(run.model[2], "weight", 0.5)
    losses = run.go(10)
    assert losses[-1] < losses[0]
    assert int((run.model[2].weight == 0).sum()) >= 18
    prune.remove(run.model[2], "weight")
    del run.model[2]
    before = run.model[0].weight.detach().clone()
    run.opt.zero_grad()
    run.go(4)  # the first trials, at a rate for the net that it was, may be refused
    assert not torch.equal(run.model[0].weight, before)


@each_front_end
def test_tied_weights_stay_tied(front_end: str) -> None:
    model = net()
    model.insert(3, nn.Linear(6, 6))
    model[3].weight = model[2].weight
    run = Run(front_end, model)
    losses = run.go(10)
    assert losses[-1] < losses[0]
    assert model[3].weight is model[2].weight


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@each_front_end
@pytest.mark.usefixtures("process_group")
def test_an_optimizer_is_built_after_the_sharding(front_end: str) -> None:
    from torch.distributed.fsdp import fully_shard

    run = Run(front_end, net())
    fully_shard(run.model)
    with pytest.raises(ValueError, match=r"0.weight was replaced since: a Parameter.*by a DTensor"):
        run.go(1)
    if front_end == "FullPreconditioner":
        with pytest.raises(ValueError, match=r"FullPreconditioner isn't served on DTensors.*use APO"):
            Run(front_end, run.model)
    else:
        losses = Run(front_end, run.model).go(10)
        assert losses[-1] < losses[0]


def test_a_loaded_state_has_nothing_of_the_models() -> None:
    """A model's own load_state_dict writes in place and replaces nothing."""
    run = Run("APO", net())
    run.go(2)
    run.model.load_state_dict(net(5).state_dict())
    held = [p for p in run.model.parameters() if isinstance(p, Tensor)]
    run.go(2)
    assert [id(p) for p in held] == [id(p) for p in run.opt.parameters]
