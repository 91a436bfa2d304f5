"""A trial over a zoo of modules: it leaves no trace, and measures no change where there is none."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import apo
from apo.trial.contents import Content

WIDTH, CLASSES = 8, 3


class Calls(nn.Module):
    """A module whose forward is given as a function of it and the input."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, CLASSES)
        for name, part in parts.items():
            setattr(self, name, part)
        self._call = [forward]  # not a number or a tensor: never put back

    def forward(self, x: Tensor) -> Tensor:
        return self._call[0](self, x)


def vectors(n: int) -> Tensor:
    return torch.randn(n, WIDTH)


def sequences(n: int) -> Tensor:
    return torch.randn(n, 5, WIDTH)


def tokens(n: int) -> Tensor:
    return torch.randint(1, 12, (n, 5))


def images(n: int) -> Tensor:
    return torch.randn(n, 2, 4, 4)


def padding(x: Tensor) -> Tensor:
    mask = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    mask[::2, -2:] = True
    return mask


def attention() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.attend(x, x, x, key_padding_mask=padding(x), need_weights=False)[0].mean(1))

    return Calls(forward, attend=nn.MultiheadAttention(WIDTH, 2, dropout=0.2, batch_first=True))


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.2, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=True)
    return Calls(lambda m, x: m.head(m.encoder(x, src_key_padding_mask=padding(x))[:, 0]), encoder=encoder)


def sequential(*parts: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), *parts, nn.Linear(WIDTH, CLASSES))


def recurrent(kind: Any, **settings: Any) -> nn.Module:
    cell = kind(WIDTH, WIDTH, 2, dropout=0.3, batch_first=True, **settings)

    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.backends.mkldnn.flags(enabled=False):  # it has an LSTM in bfloat16 for CPUs with AVX-512 alone
            return m.head(m.cell(x)[0][:, -1, :WIDTH])

    return Calls(forward, cell=cell)


def checkpointed(*, reentrant: bool) -> nn.Module:
    block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3), nn.Tanh())

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(checkpoint(m.block, m.stem(x), use_reentrant=reentrant))

    return Calls(forward, block=block, stem=nn.Linear(WIDTH, WIDTH))


def cached() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        with parametrize.cached():
            return m.head(m.inner(m.inner(x)))

    return Calls(forward, inner=parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)))


def old_spectral_norm() -> nn.Module:
    return sequential(torch.nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH)))


def bag() -> nn.Module:
    norm = nn.LayerNorm(WIDTH)
    return Calls(lambda m, x: m.head(m.norm(m.bag(x))), bag=nn.EmbeddingBag(12, WIDTH), norm=norm)


def renormalised() -> nn.Module:
    return Calls(lambda m, x: m.head(m.table(x).mean(1)), table=nn.Embedding(12, WIDTH, max_norm=0.5))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout2d(0.3), nn.Flatten(), nn.Linear(16, CLASSES)
    )


def tied() -> nn.Module:
    model = Calls(lambda m, x: m.b(torch.tanh(m.a(x)))[:, :CLASSES], a=nn.Linear(WIDTH, WIDTH), b=nn.Linear(WIDTH, 8))
    model.b.weight = model.a.weight
    return model


def drawing() -> nn.Module:
    """Random numbers of every kind, in eval mode too."""

    def forward(m: Any, x: Tensor) -> Tensor:
        scale = 1 + random.random() + float(np.random.rand())  # noqa: NPY002
        return m.head(F.dropout(x, 0.3) * scale + torch.rand_like(x))

    return Calls(forward)


def own_generators() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        scale = 1 + m.pythons.random() + float(m.numpys.random()) + float(m.numpys_old.rand())
        return m.head(x * scale + torch.rand(x.shape, generator=m.torchs))

    held = {"torchs": torch.Generator().manual_seed(1), "pythons": random.Random(2)}
    held |= {"numpys": np.random.default_rng(3), "numpys_old": np.random.RandomState(4)}
    return Calls(forward, **held)


def odd_buffers() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.sums[:2] += x[:2].detach().float()
        m.shared.running.add_(1)
        m.window[0, 1] += 1
        return m.head(x * m.mask + m.made[0]) * (1 + m.fixed.sum())

    model = Calls(forward, shared=nn.Module())
    model.register_buffer("mask", torch.full((1, 1), 0.5).expand(1, WIDTH))
    model.register_buffer("sums", torch.zeros(4, WIDTH))
    with torch.inference_mode():
        model.register_buffer("made", torch.ones(2))
    fixed = np.ones(3, dtype=np.float32)
    model.register_buffer("fixed", torch.frombuffer(fixed.tobytes(), dtype=torch.float32))  # read-only memory
    model.register_buffer("window", torch.arange(6.0).unfold(0, 3, 1))
    model.shared.register_buffer("running", torch.zeros(1))
    model.register_buffer("same", model.shared.running)
    return model


def replaced_buffers() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.count = m.count + 1
        m.queue = torch.cat([m.queue, x.detach()[:1].float()])[-3:]
        m.pushed.data = torch.cat([m.pushed, x.detach()[:1].float()])
        if not hasattr(m, f"made_{int(m.count)}"):
            m.register_buffer(f"made_{int(m.count)}", torch.ones(1), persistent=False)
        return m.head(x + m.queue.mean() + m.count / 10)

    model = Calls(forward)
    for name, start in (("count", torch.zeros(())), ("queue", torch.zeros(3, WIDTH)), ("pushed", torch.zeros(1, 8))):
        model.register_buffer(name, start)
    return model


class FrozenNorm(nn.BatchNorm1d):
    """Its statistics stay as they are, whatever is asked."""

    def train(self, mode: bool = True) -> FrozenNorm:
        super().train(False)
        return self


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.head = nn.BatchNorm1d(WIDTH), nn.Dropout(0.3), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(x)))


def remembering() -> nn.Module:
    """A hidden state, counts, a cache, a loss on the side: in ordinary attributes."""

    def forward(m: Any, x: Tensor) -> Tensor:
        m.calls += 1
        m.seen.append(m.calls)
        m.cache[f"input {len(m.cache)}"] = x.detach()
        m.nested["sizes"].append(len(x))
        m.total += 1
        m.hidden = torch.tanh(m.hidden + x.detach().float().mean(0))
        m.average.mul_(0.9).add_(x.detach().float().mean(0), alpha=0.1)
        out = m.head(x + m.hidden + m.average + 0.1 * m.calls)
        m.loss_on_the_side = out.float().square().mean()
        return out

    held = {"calls": 0, "seen": [], "cache": {}, "nested": {"sizes": [1]}, "hidden": torch.zeros(WIDTH)}
    held |= {"average": torch.zeros(WIDTH), "total": np.zeros(2), "loss_on_the_side": None}
    return Calls(forward, **held)


def with_teacher(*, in_place: bool) -> nn.Module:
    """MoCo's: frozen weights that follow the others when the model is called."""

    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            for mean, p in zip(m.teacher.parameters(), m.head.parameters(), strict=True):
                if in_place:
                    mean.mul_(0.5).add_(p, alpha=0.5)
                else:
                    mean.data = mean.data * 0.5 + p.data * 0.5
            wanted = m.teacher(x)
        return m.head(x) + wanted

    return Calls(forward, teacher=nn.Linear(WIDTH, CLASSES).requires_grad_(False))


def observed() -> nn.Module:
    return sequential(torch.ao.quantization.FakeQuantize())


def compiled() -> nn.Module:
    return torch.compile(sequential(nn.Dropout(0.3), nn.BatchNorm1d(WIDTH)), backend="eager")


def scripted() -> nn.Module:
    return torch.jit.script(Scripted())


@dataclass
class Kind:
    make: Callable[[], nn.Module]
    batch: Callable[[int], Tensor] = vectors


ZOO = {
    "attention with padding": Kind(attention, sequences),
    "transformer encoder": Kind(transformer, sequences),
    "batch norm": Kind(lambda: sequential(nn.BatchNorm1d(WIDTH))),
    "batch norm, momentum None": Kind(lambda: sequential(nn.BatchNorm1d(WIDTH, momentum=None))),
    "instance norm": Kind(
        lambda: nn.Sequential(nn.InstanceNorm2d(2, track_running_stats=True), nn.Flatten(), nn.Linear(32, 3)), images
    ),
    "dropout": Kind(lambda: sequential(nn.Dropout(0.5), nn.AlphaDropout(0.2))),
    "LSTM": Kind(lambda: recurrent(nn.LSTM), sequences),
    "GRU": Kind(lambda: recurrent(nn.GRU, bidirectional=True), sequences),
    "checkpoint": Kind(lambda: checkpointed(reentrant=False)),
    "reentrant checkpoint": Kind(lambda: checkpointed(reentrant=True)),
    "spectral norm": Kind(lambda: sequential(parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)))),
    "old spectral norm": Kind(old_spectral_norm),
    "weight norm, cached": Kind(cached),
    "embedding bag": Kind(bag, tokens),
    "embedding with max_norm": Kind(renormalised, tokens),
    "convolutions": Kind(convolutions, images),
    "tied weights": Kind(tied),
    "drawing in eval mode": Kind(drawing),
    "own generators": Kind(own_generators),
    "odd buffers": Kind(odd_buffers),
    "replaced buffers": Kind(replaced_buffers),
    "train() overridden": Kind(lambda: sequential(FrozenNorm(WIDTH), nn.Dropout(0.3))),
    "ScriptModule": Kind(scripted),
    "compiled": Kind(compiled),
    "remembering": Kind(remembering),
    "teacher": Kind(lambda: with_teacher(in_place=True)),
    "teacher, data replaced": Kind(lambda: with_teacher(in_place=False)),
    "observed": Kind(observed),
}

FRONT_ENDS: dict[str, Callable[..., Any]] = {
    "AdaptiveLR": lambda model, goal, lr, **settings: apo.AdaptiveLR(
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr), goal, **settings
    ),
    "APO": lambda model, goal, lr, **settings: apo.APO(model, goal, lr=lr, **settings),
}


def bf16() -> AbstractContextManager[None]:
    return torch.autocast("cpu", torch.bfloat16)


def seed(value: int) -> None:
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002


class Run:
    """A model of a kind, its optimizer and a closure that also trains a stranger: a weight of nobody's model."""

    def __init__(
        self, kind: str, front_end: str, *, mode: Any = "eval", autocast: str = "none", **settings: Any
    ) -> None:
        seed(0)
        self.model = ZOO[kind].make()
        self.x, other = ZOO[kind].batch(6), ZOO[kind].batch(4)
        self.t = torch.randint(CLASSES, (6,))
        self.stranger = torch.ones((), requires_grad=True)
        inside = bf16 if autocast == "inside" else nullcontext
        self.outside = bf16 if autocast == "outside" else nullcontext
        goal = apo.ProximalObjective(self.model, lambda: other, mode=mode, context=inside, fsd_weight=1)
        self.opt = FRONT_ENDS[front_end](self.model, goal, settings.pop("lr", 0.1), **settings)
        self.inside = inside

    def closure(self) -> float:
        self.model.train()
        self.opt.zero_grad()
        with self.inside():
            loss = F.cross_entropy(self.model(self.x) * self.stranger, self.t)
        loss.backward()
        return loss.item()  # a number, so that the graph says nothing of what it was made from

    def step(self) -> None:
        with self.outside():
            self.opt.step(self.closure)

    def traces(self) -> list[Any]:
        """All that isn't the optimizer's: what it may be compared by."""
        own = {id(p) for p in self.opt.parameters}
        found: list[Any] = [torch.get_rng_state(), random.getstate(), np.random.get_state()]  # noqa: NPY002
        found += [self.stranger.grad]
        for name, module in self.model.named_modules():
            found.append((name, module.training, sorted(module.__dict__)))
            found += [(key, buffer) for key, buffer in module._buffers.items()]
            found += [(p.detach(), p.grad) for p in module._parameters.values() if p is not None and id(p) not in own]
            found += [(key, value) for key, value in sorted(module.__dict__.items()) if key in REMEMBERED]
            found += [module.dropout] if isinstance(module, nn.RNNBase) else []
        return [contents(x) for x in found]


REMEMBERED = {"calls", "seen", "cache", "nested", "hidden", "average", "total", "torchs", "pythons", "numpys"}
REMEMBERED |= {"numpys_old", "loss_on_the_side", "weight"}


def contents(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.detach().clone()
    if isinstance(x, torch.Generator):
        return x.get_state()
    if isinstance(x, random.Random):
        return x.getstate()
    if isinstance(x, np.random.Generator):
        return contents(x.bit_generator.state)
    if isinstance(x, np.random.RandomState):
        return contents(x.get_state())
    if isinstance(x, (tuple, list)):
        return [contents(y) for y in x]
    if isinstance(x, dict):
        return {k: contents(v) for k, v in x.items()}
    return copy.deepcopy(x)


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return bool(a == b)


def assert_equal(a: list[Any], b: list[Any]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert equal(x, y), (x, y)


each_kind = pytest.mark.parametrize("kind", ZOO)
each_front_end = pytest.mark.parametrize("front_end", FRONT_ENDS)
each_mode = pytest.mark.parametrize("mode", ["train", "eval"])
each_autocast = pytest.mark.parametrize("autocast", ["none", "outside", "inside"])


@each_kind
@each_front_end
@each_mode
@each_autocast
def test_a_step_of_no_length_has_no_fsd_and_leaves_no_trace(
    kind: str, front_end: str, mode: str, autocast: str
) -> None:
    """The step with a trial disturbs no more than the closure at θ does."""
    plain, tried = (
        Run(kind, front_end, mode=mode, autocast=autocast, lr=1e-30, interval=meta, warmup=0) for meta in (0, 1)
    )
    found = []
    for run in (plain, tried):
        seed(1)
        run.step()
        found.append(run.traces())
    assert tried.opt.last is not None
    assert tried.opt.last.fsd == 0
    assert tried.opt.failed_trials == 0
    assert_equal(*found)


class Stop(Exception):
    pass


@contextmanager
def stopped_after(model: nn.Module, calls: int) -> Iterator[None]:
    """Raise once the model has been called so many times."""
    left = [calls]

    def count(module: nn.Module, *_: Any) -> None:
        if not torch.compiler.is_compiling() and module is model:  # dynamo can't trace a model that a hook holds
            left[0] -= 1
            if left[0] == 0:
                raise Stop

    handle = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        yield
    finally:
        handle.remove()


@each_kind
@each_front_end
@pytest.mark.parametrize("calls", [2, 3, 4])
def test_an_exception_leaves_all_as_the_closure_did(kind: str, front_end: str, calls: int) -> None:
    """Whether it comes at the anchor (2), in the closure at θ′ (3) or at B′ there (4)."""
    expected, stopped = (Run(kind, front_end, mode="train", lr=0.05) for _ in range(2))
    for run in (expected, stopped):
        seed(1)
        run.step()  # so that there are states
    seed(2)
    expected.closure()
    wanted = expected.traces()
    state, versions = repr(stopped.opt.state_dict()), [p._version for p in stopped.opt.parameters]
    seed(2)
    with pytest.raises(Stop), stopped_after(stopped.model, calls):
        stopped.step()
    assert_equal(wanted, stopped.traces())
    assert repr(stopped.opt.state_dict()) == state
    for a, b in zip(expected.model.parameters(), stopped.model.parameters(), strict=True):
        assert equal(a.detach(), b.detach())
        assert equal(a.grad, b.grad)
    if kind != "embedding with max_norm":  # which writes its weights whenever it is called
        assert [p._version for p in stopped.opt.parameters] == versions


@each_kind
@each_front_end
@pytest.mark.parametrize("looked_at", [True, False])
def test_a_refused_trial_leaves_all_as_the_closure_did(
    kind: str, front_end: str, looked_at: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nobody looks whether a tensor changed, as on a GPU: then all are written at once."""
    if not looked_at:
        monkeypatch.setattr(Content, "LOOKED_AT", frozenset())
    expected, refused = (Run(kind, front_end, lr=1e30) for _ in range(2))
    seed(1)
    expected.closure()
    wanted = expected.traces()
    seed(1)
    refused.step()
    assert_equal(wanted, refused.traces())
    if refused.opt.failed_trials:  # norms may take any step
        for a, b in zip(expected.model.parameters(), refused.model.parameters(), strict=True):
            assert equal(a.detach(), b.detach())


@each_front_end
def test_modules_that_the_objective_doesnt_know_are_met_when_they_are_called(front_end: str) -> None:
    """One called by ``forward=``, one by the closure alone: flags, statistics and dropout."""
    runs = []
    for meta in (0, 1):
        seed(0)
        model = nn.Linear(WIDTH, CLASSES)
        before, after = (nn.Sequential(nn.BatchNorm1d(n), nn.Dropout(0.5)) for n in (WIDTH, CLASSES))
        x, other, t = vectors(6), vectors(4), torch.randint(CLASSES, (6,))
        goal = apo.ProximalObjective(model, lambda other=other: other, forward=lambda m, b, f=before: m(f(b)))
        opt = FRONT_ENDS[front_end](model, goal, 1e-30, interval=meta, warmup=0)
        modes: list[bool] = []
        handle = after[1].register_forward_hook(lambda m, *_, modes=modes: modes.append(m.training))

        def closure(model: Any = model, opt: Any = opt, x: Any = x, t: Any = t, f: Any = before, g: Any = after) -> Any:
            opt.zero_grad()
            loss = F.cross_entropy(g(model(f(x))), t)
            loss.backward()
            return loss

        opt.step(closure)
        handle.remove()
        grads = [p.grad for m in (before, after) for p in m.parameters()]
        runs.append([contents([*before.buffers(), *after.buffers(), *grads]), before.training, torch.get_rng_state()])
    assert opt.last.fsd == 0
    assert modes == [True, False]
    assert_equal(*runs)


@each_front_end
def test_a_graph_from_before_a_meta_step_is_still_good(front_end: str) -> None:
    run = Run("tied weights", front_end)
    loss = F.cross_entropy(run.model(run.x), run.t)
    run.opt.meta_step(run.closure)
    assert run.opt.last.step_norm > 0
    loss.backward()


@each_front_end
def test_attributes_hold_no_graph_of_the_trial(front_end: str) -> None:
    """The loss on the side is the closure's at θ, which a trainer may log."""
    run = Run("remembering", front_end)
    seen = []
    handle = run.model.register_forward_hook(lambda m, *_: seen.append(m.loss_on_the_side))
    run.step()
    handle.remove()
    assert len(seen) == 4
    assert run.model.loss_on_the_side is seen[0]


@each_front_end
def test_anomaly_detection_doesnt_take_a_trial_that_leaps_for_one(front_end: str) -> None:
    run = Run("dropout", front_end, lr=1e30)
    with torch.autograd.set_detect_anomaly(True):
        run.step()
        assert torch.is_anomaly_enabled()
    assert run.opt.failed_trials == 1


@each_front_end
def test_another_optimizer_that_steps_in_the_backward_steps_once(front_end: str) -> None:
    """As ``register_post_accumulate_grad_hook`` lets it: not at a trial."""
    run = Run("tied weights", front_end, interval=1)
    other = torch.optim.SGD([run.stranger], lr=0.1)

    def step(_: Tensor) -> None:
        other.step()
        other.zero_grad()

    run.stranger.register_post_accumulate_grad_hook(step)
    (expected,) = torch.autograd.grad(F.cross_entropy(run.model(run.x) * run.stranger, run.t), [run.stranger])
    run.step()
    assert run.stranger.item() == pytest.approx(1 - 0.1 * expected.item(), rel=1e-6)


@each_front_end
def test_copies_that_a_closure_makes_of_the_model_are_whole(front_end: str) -> None:
    """In a trial too: they can be pickled, and switched to train and back."""
    run = Run("dropout", front_end, interval=1)
    copies = []

    def closure() -> float:
        copies.append(pickle.loads(pickle.dumps(run.model)))
        copies.append(copy.deepcopy(run.model))
        loss = run.closure()
        assert [m.training for m in run.model.modules()] == [not run.opt.in_trial] * 5
        return loss

    run.opt.step(closure)
    assert len(copies) == 4
    for model in [run.model, *copies]:
        for mode in (True, False):
            assert model.train(mode) is model
            assert all(m.training == mode for m in model.modules())


@each_front_end
@pytest.mark.parametrize("where", ["inputs", "mask", "outputs", "discrepancy", "backward"])
def test_what_the_objective_calls_may_raise(front_end: str, where: str) -> None:
    expected, run = (Run("remembering", front_end, interval=1) for _ in range(2))
    goal, armed = run.opt.objective, [False]

    def stop(value: Any, *_: Any) -> Any:
        if armed and armed.pop():
            raise Stop
        return value

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return stop(grad)

    def with_samples(rho: Any) -> Any:
        rho.fisher_sample = true.fisher_sample
        return rho

    batch, true = goal.inputs(), goal.discrepancy
    if where == "inputs":
        goal.inputs = lambda: stop(batch)
    elif where == "mask":
        goal.mask = lambda b: stop(torch.ones(len(b), dtype=torch.bool))
    elif where == "outputs":
        goal._outputs = stop
    elif where == "discrepancy":
        goal.discrepancy = with_samples(lambda new, old: stop(true(new, old)))
    else:
        goal.discrepancy = with_samples(lambda new, old: true(Backward.apply(new), old))
    for each in (expected, run):
        seed(1)
        each.step()
    seed(2)
    expected.closure()
    wanted, state, before = (
        expected.traces(),
        repr(run.opt.state_dict()),
        [p.detach().clone() for p in run.opt.parameters],
    )
    seed(2)
    armed[:] = [True]
    with pytest.raises(Stop):
        run.step()
    assert not armed
    assert_equal(wanted, run.traces())
    assert repr(run.opt.state_dict()) == state
    assert all(map(torch.equal, before, run.opt.parameters))
    run.step()
    assert run.opt.failed_trials == 0
