"""States: present from construction, restored to the bit in every usual way, and apart from what goes on."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import apo
from tests.apo.helpers import closure_of, same, weights

ROOT = Path(__file__).parents[2]


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))


def groups(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), "lr": 1e-2}]  # type: ignore[index]


def adaptive(base: Callable[[Any], Any], **settings: Any) -> Callable[..., Any]:
    return lambda model, goal: apo.AdaptiveLR(base(model.parameters()), goal, interval=2, **settings)


class KeepsElsewhere(torch.optim.SGD):
    """A base with state outside ``optimizer.state``, which only its own state_dict knows."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.held = {"count": torch.zeros(())}

    def step(self, closure: Any = None) -> Any:
        self.held["count"] += 1
        return super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "held": self.held}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.held = dict(state_dict["held"])
        super().load_state_dict({name: part for name, part in state_dict.items() if name != "held"})


MADE: dict[str, Callable[..., Any]] = {
    "AdaptiveLR of momentum": adaptive(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    "AdaptiveLR of AdamW": adaptive(lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True)),
    "AdaptiveLR of RMSprop": adaptive(lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True)),
    "AdaptiveLR by Adam": adaptive(lambda p: torch.optim.AdamW(p, lr=1e-2), meta_optimizer="adam"),
    "AdaptiveLR of groups": lambda model, goal: apo.AdaptiveLR(torch.optim.AdamW(groups(model)), goal, interval=2),
    "APO by relative": lambda model, goal: apo.APO(model, goal, interval=2),
    "APO by adam": lambda model, goal: apo.APO(model, goal, method=apo.Method(meta_optimizer="adam")),
    "APO by rmsprop": lambda model, goal: apo.APO(
        model, goal, block_size=2, method=apo.Method(meta_optimizer="rmsprop")
    ),
    "APO of groups": lambda model, goal: apo.APO(model, goal, groups(model), method=apo.Method(shared_lr=False)),
    "APO with 16-bit blocks": lambda model, goal: apo.APO(
        model, goal, momentum=0, method=apo.Method(block_dtype=torch.bfloat16)
    ),
    "FullPreconditioner by adam": lambda model, goal: apo.FullPreconditioner(model, goal, interval=2),
    "FullPreconditioner by rmsprop": lambda model, goal: apo.FullPreconditioner(model, goal, meta_optimizer="rmsprop"),
}
each = pytest.mark.parametrize("name", MADE)
OUTSIDE = adaptive(KeepsElsewhere)


class Run:
    def __init__(self, make: Callable[..., Any], seed: int = 0) -> None:
        self.model = net(seed)
        generator = torch.Generator().manual_seed(1)
        self.x, self.t = torch.randn(16, 5, generator=generator), torch.randint(3, (16,), generator=generator)
        self.opt = make(self.model, apo.ProximalObjective(self.model, [torch.randn(12, 5, generator=generator)]))

    def go(self, steps: int) -> Run:
        for _ in range(steps):
            self.opt.step(closure_of(self.opt, self.model, self.x, self.t))
        self.opt.zero_grad()
        return self


def equal(a: Any, b: Any) -> bool:
    """To the bit, with NaN equal to itself."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b or (a != a and b != b))


def go_on_alike(one: Run, other: Run) -> None:
    assert equal(one.opt.state_dict(), other.opt.state_dict())
    one.go(5)
    other.go(5)
    assert same(weights(one.model), weights(other.model))
    assert equal(one.opt.state_dict(), other.opt.state_dict())


@each
@pytest.mark.parametrize("flat", [False, True])
def test_distributed_checkpoints(name: str, flat: bool, tmp_path: Path) -> None:
    """As torchtitan, FSDP and Lightning write and read them, also before the first step."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    first = Run(MADE[name])
    assert get_optimizer_state_dict(first.model, first.opt, options=options)
    first.go(5)
    saved = get_optimizer_state_dict(first.model, first.opt, options=options)
    dcp.save({"model": get_model_state_dict(first.model), "optimizer": saved}, checkpoint_id=tmp_path)
    second = Run(MADE[name], seed=3)
    found = {
        "model": get_model_state_dict(second.model),
        "optimizer": get_optimizer_state_dict(second.model, second.opt, options=options),
    }
    dcp.load(found, checkpoint_id=tmp_path)
    set_model_state_dict(second.model, found["model"])
    set_optimizer_state_dict(second.model, second.opt, found["optimizer"], options=options)
    go_on_alike(first, second)


@pytest.mark.parametrize("name", [name for name in MADE if not name.startswith("AdaptiveLR")])
def test_the_state_is_whole_from_construction(name: str) -> None:
    """Except a base's own, which makes it at its first step."""
    fresh, begun = Run(MADE[name]).opt.state_dict(), Run(MADE[name]).go(3).opt.state_dict()
    assert fresh["state"].keys() == begun["state"].keys() != set()
    for place, state in fresh["state"].items():
        assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in begun["state"][place].items()}
        assert all(isinstance(v, Tensor) for v in state.values())
    for group in begun["param_groups"]:
        scalars = [v for k, v in group.items() if k != "params"]
        assert all(v is None or isinstance(v, (int, float, str, torch.dtype)) for v in scalars)


@pytest.mark.parametrize("name", [*MADE, "a base that keeps its state elsewhere"])
def test_saved_and_loaded_states_are_apart_from_what_goes_on(name: str) -> None:
    make = MADE.get(name, OUTSIDE)
    first = Run(make).go(4)
    saved = first.opt.state_dict()
    held = copy.deepcopy(saved)
    first.go(3)
    assert equal(saved, held)
    second = Run(make, seed=3)
    second.opt.load_state_dict(saved)
    assert equal(second.opt.state_dict(), held)
    second.go(3)
    assert equal(saved, held)
    loaded = second.opt.state_dict()
    for state in saved["state"].values():
        for tensor in state.values():
            tensor.fill_(7)
    assert equal(second.opt.state_dict(), loaded)


def test_a_base_that_keeps_its_state_elsewhere() -> None:
    first = Run(OUTSIDE).go(6)
    assert first.opt.optimizer.held["count"] == 6  # neither trials nor probes count
    second = Run(OUTSIDE, seed=3)
    second.opt.load_state_dict(first.opt.state_dict())
    second.model.load_state_dict(first.model.state_dict())
    go_on_alike(first, second)


@each
def test_a_fresh_process_goes_on_to_the_bit(name: str, tmp_path: Path) -> None:
    """What ``torch.load(weights_only=True)`` reads, here by new objects; once below in another process."""
    first = Run(MADE[name]).go(4)
    file = io.BytesIO()
    torch.save([first.model.state_dict(), first.opt.state_dict()], file)
    file.seek(0)
    second = Run(MADE[name], seed=3)
    for part, state in zip((second.model, second.opt), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    go_on_alike(first, second)


def test_in_another_process(tmp_path: Path) -> None:
    runs = {name: Run(MADE[name]).go(4) for name in MADE}
    torch.save({name: [r.model.state_dict(), r.opt.state_dict()] for name, r in runs.items()}, tmp_path / "saved.pt")
    program = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from tests.apo.test_checkpoints import MADE, Run, weights\n"
        "ended = {}\n"
        "for name, (model, opt) in torch.load(sys.argv[1] + '/saved.pt', weights_only=True).items():\n"
        "    run = Run(MADE[name], seed=3); run.model.load_state_dict(model); run.opt.load_state_dict(opt)\n"
        "    ended[name] = weights(run.go(5).model)\n"
        "torch.save(ended, sys.argv[1] + '/ended.pt')\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, check=True, timeout=120)
    for name, ended in torch.load(tmp_path / "ended.pt", weights_only=True).items():
        assert same(ended, weights(runs[name].go(5).model)), name


@each
def test_a_state_from_before_the_first_step_undoes_training(name: str) -> None:
    fresh, used = Run(MADE[name]), Run(MADE[name], seed=3).go(4)
    used.opt.load_state_dict(fresh.opt.state_dict())
    used.model.load_state_dict(fresh.model.state_dict())
    fresh.go(4)
    used.go(4)
    assert same(weights(fresh.model), weights(used.model))


@each
def test_hooks_on_states_run(name: str) -> None:
    opt, seen = Run(MADE[name]).go(2).opt, []
    opt.register_state_dict_pre_hook(lambda *_: seen.append("before saving"))
    opt.register_state_dict_post_hook(lambda _, state: {**state, "extra": seen.append("after saving")})
    opt.register_load_state_dict_pre_hook(
        lambda _, state: {k: v for k, v in state.items() if k != seen.append("before loading") and k != "extra"}
    )
    opt.register_load_state_dict_post_hook(lambda *_: seen.append("after loading"))
    state = opt.state_dict()
    assert "extra" in state
    opt.load_state_dict(state)
    assert list(dict.fromkeys(seen)) == ["before saving", "after saving", "before loading", "after loading"]
