"""What models return, and padding: the function-space term doesn't depend on either."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apo


class NamedPair(NamedTuple):
    loss: Tensor
    logits: Tensor


@dataclass
class Scores:
    loss: Tensor
    scores: Tensor


RETURNED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "logits": lambda y, loss: y,
    "(loss, logits)": lambda y, loss: (loss, y),
    "[loss, logits]": lambda y, loss: [loss, y],
    "(logits, loss)": lambda y, loss: (y, loss),
    "(None, logits)": lambda y, loss: (None, y),
    "(logits, None)": lambda y, loss: (y, None),
    "(loss of shape (1,), logits)": lambda y, loss: (loss[None], y),
    "named tuple": lambda y, loss: NamedPair(loss, y),
    "dataclass": lambda y, loss: Scores(loss, y),
    "dict": lambda y, loss: {"loss": loss, "logits": y},
    "dict of other names": lambda y, loss: {"loss": loss, "scores": y},
    "dict without a loss": lambda y, loss: {"loss": None, "aux": [y], "logits": y},
    "ordered dict": lambda y, loss: OrderedDict(loss=loss, scores=y),
}


class Wrapped(nn.Module):
    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.wrap = nn.Linear(8, 4), wrap

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x)
        return self.wrap(y, y.square().mean())


def check_that_outputs_are_found(wrap: Callable[[Tensor, Tensor], Any]) -> None:
    model, x = Wrapped(wrap), torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    opt = apo.AdaptiveLR(torch.optim.SGD(model.parameters(), lr=0.1), apo.ProximalObjective(model, [x]))

    def closure() -> Tensor:
        opt.zero_grad()
        loss = model.linear(x).square().mean()
        loss.backward()
        return loss

    with torch.no_grad():
        old = model.linear(x)
        weight, bias = (p.clone() for p in model.parameters())
    closure()
    with torch.no_grad():
        new = F.linear(x, weight - 0.1 * model.linear.weight.grad, bias - 0.1 * model.linear.bias.grad)
    opt.meta_step(closure)
    assert opt.last.fsd == pytest.approx(apo.KL()(new, old).item(), rel=1e-3)


@pytest.mark.parametrize("name", RETURNED)
def test_the_outputs_are_found_beside_the_loss(name: str) -> None:
    check_that_outputs_are_found(RETURNED[name])


@pytest.mark.parametrize("name", ["SequenceClassifierOutput", "CausalLMOutputWithPast", "TokenClassifierOutput"])
def test_hugging_face_outputs(name: str) -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    kind = getattr(outputs, name)
    check_that_outputs_are_found(lambda y, loss: kind(loss=loss, logits=y, hidden_states=(2 * y, y)))


class Tagger(nn.Module):
    """A class for each token; ``padding`` is told to the embedding or not."""

    def __init__(self, padding: int | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(30, 16, padding_idx=padding), nn.Linear(16, 30)

    def forward(self, input_ids: Tensor, attention_mask: Any = None, labels: Any = None) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.embedding(input_ids)))
        return out


def tokens() -> Tensor:
    return torch.randint(1, 30, (16, 8), generator=torch.Generator().manual_seed(0))


def padded(t: Tensor, length: int, value: int = 0, *, left: bool = False) -> Tensor:
    more = length - t.shape[1]
    return F.pad(t, (more, 0) if left else (0, more), value=value)


def token_loss(y: Tensor, targets: Any) -> Tensor:
    targets = targets["labels"] if isinstance(targets, dict) else targets
    return F.cross_entropy(y.flatten(0, 1), targets.flatten(), ignore_index=-100)


def fsd(padding: int | None, batch: Any, **settings: Any) -> float:
    model = Tagger(padding)
    goal = apo.ProximalObjective(model, [batch], **settings)
    opt = apo.AdaptiveLR(torch.optim.SGD(model.parameters(), lr=0.5), goal)
    t = tokens()

    def closure() -> Tensor:
        opt.zero_grad()
        loss = F.cross_entropy(model(t).flatten(0, 1), (t * 7 % 30).flatten())
        loss.backward()
        return loss

    opt.step(closure)
    assert opt.failed_trials == 0
    return float(opt.last.fsd)


def ones(t: Tensor, length: int) -> Tensor:
    return padded(torch.ones_like(t), length)


PADDED: dict[str, Callable[[Tensor, int], float]] = {
    "the embedding's padding_idx": lambda t, n: fsd(0, padded(t, n)),
    "padded on the left": lambda t, n: fsd(0, padded(t, n, left=True)),
    "32-bit tokens": lambda t, n: fsd(0, padded(t, n).int()),
    "an attention_mask": lambda t, n: fsd(None, {"input_ids": padded(t, n), "attention_mask": ones(t, n)}),
    "a boolean attention_mask": lambda t, n: fsd(
        None, {"input_ids": padded(t, n), "attention_mask": ones(t, n).bool()}
    ),
    "a callable": lambda t, n: fsd(None, padded(t, n), mask=lambda batch: batch != 0),
    "a callable of floats": lambda t, n: fsd(None, padded(t, n), mask=lambda batch: (batch != 0).float()),
    "an ignored label": lambda t, n: fsd(None, {"input_ids": padded(t, n), "labels": padded(t, n, -1)}, mask=-1),
    "an ignored target": lambda t, n: fsd(
        None, (padded(t, n), padded(t, n, -7)), mask=-7, loss=lambda y, t: token_loss(y, t.where(t != -7, -100))
    ),
    "labels of -100": lambda t, n: fsd(None, {"input_ids": padded(t, n), "labels": padded(t, n, -100)}),
    "labels of -100 in a loss": lambda t, n: fsd(
        None, {"input_ids": padded(t, n), "labels": padded(t, n, -100)}, loss=token_loss
    ),
    "targets of -100": lambda t, n: fsd(None, (padded(t, n), padded(t, n, -100)), loss=token_loss),
    "classes not last": lambda t, n: fsd(
        0, padded(t, n), discrepancy=apo.KL(1), outputs=lambda y: y.movedim(-1, 1)
    ),
    "squared error": lambda t, n: fsd(0, padded(t, n), discrepancy="mse"),
    "Bernoulli": lambda t, n: fsd(0, padded(t, n), discrepancy="bernoulli"),
}  # fmt: skip


@pytest.mark.parametrize("how", PADDED)
def test_padding_doesnt_dilute(how: str) -> None:
    """A batch that needs none, and the same padded to twelve times its length."""
    short, long = (PADDED[how](tokens(), length) for length in (8, 96))
    assert short > 0
    assert long == pytest.approx(short, rel=1e-4)


def test_unless_every_position_is_to_count() -> None:
    assert fsd(0, padded(tokens(), 96), mask=False) < 0.5 * fsd(0, tokens(), mask=False)


@pytest.mark.parametrize("batch", [torch.zeros(4, 8, dtype=torch.int64)])
def test_where_no_position_counts_the_term_is_zero(batch: Tensor) -> None:
    assert fsd(0, batch) == 0
    assert fsd(None, batch, mask=lambda b: torch.zeros_like(b, dtype=torch.bool)) == 0
