"""What a trial has no part in goes on as without one: other threads, compiled graphs, what forward passes write into
parameters and objects of others."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apo
from tests.apo.helpers import same, weights

Step = Callable[[], Any]


def adaptive(model: nn.Module, goal: apo.ProximalObjective) -> Any:
    base = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    return apo.AdaptiveLR(base, goal, interval=1, warmup=0, meta_lr=0.0)


def preconditioned(model: nn.Module, goal: apo.ProximalObjective) -> Any:
    return apo.APO(model, goal, lr=1e-30, interval=1, warmup=0)


FRONT_ENDS = {"AdaptiveLR": adaptive, "APO": preconditioned}
each_front_end = pytest.mark.parametrize("front_end", FRONT_ENDS)


def batches() -> Callable[[], tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)

    def draw() -> tuple[Tensor, Tensor]:
        return torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator)

    return draw


def without_closure(model: nn.Module, front_end: str, run: Any = None) -> Step:
    """A step by gradients in ``.grad``, with a loss on B′."""
    draw, run = batches(), run or model
    opt = FRONT_ENDS[front_end](model, apo.ProximalObjective(run, batches(), loss=F.cross_entropy))

    def step() -> None:
        opt.zero_grad()
        x, t = draw()
        F.cross_entropy(run(x), t).backward()
        opt.step()

    return step


def with_closure(model: nn.Module, front_end: str) -> Step:
    draw = batches()
    opt = FRONT_ENDS[front_end](model, apo.ProximalObjective(model, lambda: draw_others()[0]))
    draw_others = batches()

    def step() -> None:
        x, t = draw()

        def closure() -> Tensor:
            opt.zero_grad()
            loss = F.cross_entropy(model(x), t)
            loss.backward()
            return loss

        opt.step(closure)

    return step


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))


@each_front_end
@pytest.mark.parametrize("full", [False, True])
def test_trials_compile_a_model_once_more_and_no_further(front_end: str, full: bool) -> None:
    """Once for eval mode, however many trials there are."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = small()
    step = without_closure(model, front_end, torch.compile(model, backend=backend, fullgraph=full))
    for _ in range(12):
        step()
    assert len(graphs) == 2


def plain_run(steps: int, done: Callable[[], None] = lambda: None) -> tuple[list[Tensor], int]:
    """Weights and batch norm's count after plain steps of a model of its own."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 3))
    opt, draw = torch.optim.SGD(model.parameters(), lr=0.1), batches()
    for _ in range(steps):
        opt.zero_grad()
        x, t = draw()
        F.cross_entropy(model.train()(x), t).backward()
        opt.step()
    done()
    return weights(model), int(model[1].num_batches_tracked)


@each_front_end
def test_another_thread_trains_as_alone(front_end: str) -> None:
    alone = plain_run(300)
    beside: list[tuple[list[Tensor], int]] = []
    stop = Event()
    other = Thread(target=lambda: beside.append(plain_run(300, stop.set)))
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    step = without_closure(model, front_end)
    other.start()
    while other.is_alive() and not stop.is_set():
        step()
    other.join()
    assert same(beside[0][0], alone[0])
    assert beside[0][1] == alone[1]


def test_two_front_ends_in_two_threads_train_as_alone() -> None:
    """And torch is as it was afterwards."""

    def trained(front_end: str, step_of: Callable[..., Step], seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
        step = step_of(model, front_end)
        for _ in range(30):
            step()
        return weights(model)

    backward, train = torch.autograd.backward, nn.Module.train
    jobs = [*itertools.product(FRONT_ENDS, (with_closure, without_closure))]
    alone = [trained(*job, seed) for seed, job in enumerate(jobs)]
    found: dict[int, list[Tensor]] = {}
    threads = [
        Thread(target=lambda seed=seed, job=job: found.update({seed: trained(*job, seed)}))
        for seed, job in enumerate(jobs)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(found[seed], expected) for seed, expected in enumerate(alone))
    assert (torch.autograd.backward, nn.Module.train) == (backward, train)


class Momentum(nn.Module):
    """A key encoder that each forward pass in train or eval mode draws towards the query encoder."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key = nn.Linear(6, 3), nn.Linear(6, 3).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.key.weight.lerp_(self.query.weight, 0.1)
        return self.query(x) + self.key(x)


@dataclass
class Running:
    count: int = 0
    mean: float = 0.0


class Counting(nn.Module):
    """Counts its calls, and averages its inputs, in an object of another kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 3)
        self.replaces = kind == "replaced"
        self.held: Any = {
            "dataclass": lambda: Running(),
            "namespace": lambda: SimpleNamespace(count=0, mean=0.0),
            "replaced": lambda: Running(),
            "in a list": lambda: [Running()],
            "bytes": lambda: bytearray(8),
            "callable": lambda: Meter(),
        }[kind]()

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.held, bytearray):
            self.held[0] += 1
        elif isinstance(self.held, Meter):
            self.held(x)
        elif self.replaces:
            self.held = Running(self.held.count + 1, x.mean().item())
        else:
            own = self.held[0] if isinstance(self.held, list) else self.held
            own.count += 1
            own.mean += 0.1 * (x.mean().item() - own.mean)
        return self.linear(x)

    def found(self) -> str:
        return repr(vars(self.held) if isinstance(self.held, Meter) else self.held)


class Meter:
    def __init__(self) -> None:
        self.seen = torch.zeros(6)

    def __call__(self, x: Tensor) -> None:
        self.seen += x.mean(0)


@each_front_end
@pytest.mark.parametrize("step_of", [with_closure, without_closure])
def test_frozen_parameters_that_a_forward_pass_writes(front_end: str, step_of: Callable[..., Step]) -> None:
    model, alone = Momentum(), Momentum()
    step, draw = step_of(model, front_end), batches()
    opt = torch.optim.AdamW(alone.query.parameters(), lr=1e-3 if front_end == "AdaptiveLR" else 0.0, weight_decay=0.01)
    for _ in range(5):
        step()
        opt.zero_grad()
        x, t = draw()
        F.cross_entropy(alone(x), t).backward()
        opt.step()
    assert torch.equal(model.key.weight, alone.key.weight)


@each_front_end
def test_so_where_the_closure_hands_on_a_loss_of_before(front_end: str) -> None:
    """The forward pass was outside of the step."""
    model, alone, draw = Momentum(), Momentum(), batches()
    opt = FRONT_ENDS[front_end](model, apo.ProximalObjective(model, batches(), loss=F.cross_entropy))
    for _ in range(5):
        x, t = draw()
        opt.zero_grad()
        loss = F.cross_entropy(model(x), t)
        loss.backward()
        alone.query.load_state_dict(model.query.state_dict())
        alone(x)
        opt.step(lambda loss=loss: loss)
    assert torch.equal(model.key.weight, alone.key.weight)


@each_front_end
def test_parameters_of_others_that_the_first_forward_pass_makes(front_end: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LazyLinear(3))
    goal = apo.ProximalObjective(model, batches(), loss=F.cross_entropy)
    own = model[0].parameters()
    opt: Any = apo.APO(model, goal, own) if front_end == "APO" else apo.AdaptiveLR(torch.optim.Adam(own), goal)
    x, t = batches()()
    for _ in range(3):
        F.cross_entropy(model(x), t).backward()
        opt.step()
    assert opt.failed_trials == 0


@each_front_end
@pytest.mark.parametrize("step_of", [with_closure, without_closure])
@pytest.mark.parametrize("kind", ["dataclass", "namespace", "replaced", "in a list", "bytes", "callable"])
def test_objects_that_a_forward_pass_writes(front_end: str, step_of: Callable[..., Step], kind: str) -> None:
    model, alone = Counting(kind), Counting(kind)
    step, draw = step_of(model, front_end), batches()
    for _ in range(5):
        step()
        alone(draw()[0])
    assert model.found() == alone.found()


@each_front_end
def test_a_step_under_inference_mode(front_end: str) -> None:
    """As torch's own optimizers take it; the trials still differentiate."""
    runs = []
    for mode in (False, True):
        model, draw = small().eval(), batches()
        opt = FRONT_ENDS[front_end](model, apo.ProximalObjective(model, batches(), loss=F.cross_entropy))
        for _ in range(3):
            opt.zero_grad()
            x, t = draw()
            F.cross_entropy(model(x), t).backward()
            with torch.inference_mode(mode):
                opt.step()
        assert opt.failed_trials == 0
        runs.append(weights(model))
    assert same(*runs)


@each_front_end
def test_references_to_what_is_gone(front_end: str) -> None:
    """A proxy whose object is gone raises at every look but for its type's."""
    model, draw = small(), batches()
    opt = FRONT_ENDS[front_end](model, apo.ProximalObjective(model, batches(), loss=F.cross_entropy))
    owner = Meter()
    for holder in (model, opt, opt.optimizer if isinstance(opt, apo.AdaptiveLR) else opt):
        holder.owner, holder.owners = weakref.proxy(owner), [weakref.proxy(owner)]
    del owner
    for _ in range(3):
        x, t = draw()
        opt.zero_grad()
        F.cross_entropy(model(x), t).backward()
        opt.step()
    assert opt.failed_trials == 0
    copy.deepcopy(opt.state_dict())
