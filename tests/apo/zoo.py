"""A zoo of modules, each with what a trial may trip over, and a run of an optimizer on one of them."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import apo

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
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=0.9), goal, **settings
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
    """To the bit, but that a NaN equals a NaN."""
    if isinstance(a, Tensor):
        alike = isinstance(b, Tensor) and (a.shape, a.dtype) == (b.shape, b.dtype)
        return alike and bool(((a == b) | (a.isnan() & b.isnan())).all())
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
