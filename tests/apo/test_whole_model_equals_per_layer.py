"""The optimizer equals its arithmetic written layer by layer (:mod:`tests.apo.per_layer`)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apo
from apo.safeguards.promise import Promise
from tests.apo.helpers import weights
from tests.apo.per_layer import PerLayer

Settings = dict[str, Any]

STEPS = 200
FEW = 60
LAMBDAS: Settings = {"fsd_weight": 1.0, "wsd_weight": 0.1}
"""λ_WSD is large, and targets can be learned: runs then contract, and rounding isn't amplified (2e-13 at most; with
λ_WSD of 0.01, up to 1e-11)."""


class Mlp(nn.Module):
    """Sides that blocks of 4 don't divide, and a branch that training leaves out at every third step."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.branch, self.last = nn.Linear(5, 9), nn.Linear(9, 9), nn.Linear(9, 3)
        self.features = 5

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, 5, generator=generator)
        return x, x

    def forward(self, x: Tensor, *, whole: bool = True) -> Tensor:
        x = torch.tanh(self.first(x))
        found: Tensor = self.last(x + torch.tanh(self.branch(x)) if whole else x)
        return found


class ConvNet(nn.Module):
    """Convolutions to and fro, one of them grouped, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.GroupNorm(2, 4),
            nn.Tanh(),
            nn.ConvTranspose2d(4, 3, 2, stride=2),
            nn.Tanh(),
            nn.ConvTranspose2d(3, 3, 2, groups=3),
            nn.AvgPool2d(3),
            nn.Flatten(),
            nn.Linear(27, 3),
        )
        self.features = 32

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, 2, 4, 4, generator=generator)
        return x, x.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layers(x)
        return found


class Transformer(nn.Module):
    """A layer over an embedding."""

    def __init__(self, *, key_bias: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        layer.self_attn = nn.MultiheadAttention(8, 2, bias=key_bias, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.last = nn.Linear(8, 3)
        self.features = 11

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randint(11, (count, 6), generator=generator)
        return x, F.one_hot(x, 11).sum(1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.encoder(self.embedding(x)).mean(1))
        return found


@dataclass
class Case:
    """What is trained, and how.

    Attributes:
        group: settings of the only param group.
        groups: settings of two groups in its place, by halves of the parameters.
        method: of :class:`apo.Method`.
        settings: of :class:`apo.APO`.
        own_loss: whether the objective has a loss of its own.
        most_promised: the greatest predicted decrease of a step, over the loss.
        scaled: whether a GradScaler scales the loss.
        odd: by what the batches of some steps are multiplied.
        steps: how many are compared.
        same_rate: whether the rates are compared too.
        shown: what shows that the run met what it is about.
    """

    model: Callable[[], Any] = Mlp
    group: Settings = field(default_factory=dict)
    groups: tuple[Settings, ...] = ()
    method: Settings = field(default_factory=dict)
    settings: Settings = field(default_factory=lambda: {"interval": 1})
    own_loss: bool = False
    most_promised: float = Promise.MOST
    same_rate: bool = True
    scaled: bool = False
    odd: dict[int, float] = field(default_factory=dict)
    steps: int = STEPS
    shown: Callable[[PerLayer], bool] = lambda _: True


def without_key_bias() -> nn.Module:
    return Transformer(key_bias=False)


def failed(reference: PerLayer) -> bool:
    return {0, 150} <= set(reference.failed)


def bounded(reference: PerLayer) -> bool:
    return bool(reference.bounded)


TWO_GROUPS = (
    {"lr": 0.2, "momentum": 0.5, "block_size": 3, "weight_decay": 0.02},
    {"lr": 0.05, "momentum": 0.9, "block_size": None, "weight_decay": 0.01, "decoupled_weight_decay": False},
)


def groups_of(case: Case, model: nn.Module) -> list[Settings]:
    own = list(model.parameters())
    if not case.groups:
        return [{"params": own, "block_size": 4, **case.group}]
    half = len(own) // 4 * 2
    return [{"params": p, **group} for p, group in zip((own[:half], own[half:]), case.groups, strict=True)]


CASES = {
    "mlp": Case(),
    "conv net": Case(ConvNet),
    # The key bias has a gradient of 0, but for rounding. Alone in its square, that steps on noise: A's scale is then
    # arbitrary, and with it the rate, to which S answers (with decay the rate alone counts, and weights would differ).
    # In a square with others its column of A grows from 1e-15 to 1e-3 in ten steps: 1e-11 after 5 steps, 1e-4 after 10.
    "transformer": Case(Transformer, same_rate=False),
    "transformer, key bias in a square with others": Case(Transformer, group={"block_size": 3}, steps=3),
    "transformer, attention without biases": Case(
        without_key_bias, group={"block_size": 3, "weight_decay": 0.02}, steps=FEW
    ),
    "full blocks, no momentum": Case(group={"block_size": None, "momentum": 0.0}, steps=FEW),
    "sides without blocks": Case(method={"max_dim": 6}, steps=FEW),
    "two groups": Case(groups=TWO_GROUPS),
    "two groups, each with its rate": Case(groups=TWO_GROUPS, method={"shared_lr": False}, steps=FEW),
    "L2": Case(group={"weight_decay": 0.02, "decoupled_weight_decay": False}),
    "decoupled decay": Case(group={"weight_decay": 0.02}),
    "next step": Case(group={"momentum": 0.3}, method={"lookahead": "step"}),
    "adam": Case(method={"meta_optimizer": "adam"}, steps=FEW),
    "rmsprop": Case(method={"meta_optimizer": "rmsprop"}, steps=FEW),
    "failed trials": Case(group={"lr": 100.0}, odd={150: 1000.0}, method={"look_back": False}, shown=failed),
    "failed trials, rate as it is": Case(
        group={"lr": 100.0}, method={"adapt_lr": False}, shown=lambda reference: 0 in reference.failed
    ),
    "scaler": Case(scaled=True),
    "own loss": Case(own_loss=True),
    "interval 3": Case(settings={"interval": 3, "warmup": 12}, most_promised=0.3, shown=bounded),
}


def run(case: Case) -> tuple[PerLayer, nn.Module, apo.APO, nn.Module]:
    """Both after these steps, with the models that they trained."""
    torch.manual_seed(0)
    model = case.model().double()
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)

    teacher = torch.randn(model.features, 3, generator=generator).double()

    def batch() -> tuple[Tensor, Tensor]:
        x, features = model.draw(32, generator)
        p = F.softmax(2 * features.double() @ teacher / math.sqrt(model.features), -1)
        return x.double() if x.is_floating_point() else x, torch.multinomial(p, 1, generator=generator).squeeze(1)

    batches = [(batch(), batch()) for _ in range(STEPS)]
    for at, factor in case.odd.items():
        batches[at][0][0].mul_(factor)

    def other_batch() -> Any:
        return batches[opt.steps][1] if case.own_loss else batches[opt.steps][1][0]

    own_loss = F.cross_entropy if case.own_loss else None
    goal = apo.ProximalObjective(model, other_batch, **LAMBDAS, loss=own_loss)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=20) if case.scaled else None
    method = apo.Method(fisher_start=0, **case.method)
    opt = apo.APO(model, goal, groups_of(case, model), **case.settings, grad_scaler=scaler, method=method)
    reference = PerLayer(twin, groups_of(case, twin), discrepancy=apo.KL(), **LAMBDAS, **case.settings, method=method)

    for i, ((x, t), (other, t_other)) in enumerate(batches[: case.steps]):
        kwargs = {"whole": i % 3 != 2} if isinstance(model, Mlp) else {}

        def loss_of(trained: nn.Module, x: Tensor = x, t: Tensor = t, kwargs: Settings = kwargs) -> Tensor:
            return F.cross_entropy(trained(x, **kwargs), t)

        def closure(loss_of: Any = loss_of) -> Tensor:
            opt.zero_grad()
            loss: Tensor = loss_of(model)
            (loss if scaler is None else scaler.scale(loss)).backward()
            return loss

        def own(outputs: Tensor, t: Tensor = t_other) -> Tensor:
            return F.cross_entropy(outputs, t)

        opt.step(closure)
        if scaler is not None:
            scaler.update()
        reference.step(partial(loss_of, twin), partial(twin, other), own if case.own_loss else None)
    return reference, twin, opt, model


def difference(model: nn.Module, twin: nn.Module) -> float:
    """The largest of a parameter's relative differences."""
    pairs = zip(weights(model), weights(twin), strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


@pytest.mark.parametrize("name", CASES)
def test_equal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    monkeypatch.setattr(Promise, "MOST", case.most_promised)
    reference, twin, opt, model = run(case)
    assert case.shown(reference)
    assert opt.failed_trials == len(reference.failed)
    assert difference(model, twin) < 1e-12
    if case.same_rate:
        assert [g["lr"] for g in opt.param_groups] == pytest.approx([g.lr for g in reference.groups], rel=1e-12)
