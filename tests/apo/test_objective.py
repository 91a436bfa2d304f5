"""What the objective accepts and refuses."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import apo
from tests.apo.helpers import begun, closure_of, mlp, objective, same, weights

FRONT_ENDS: dict[str, Any] = {
    "AdaptiveLR": lambda model, goal: apo.AdaptiveLR(torch.optim.SGD(model.parameters(), lr=0.1), goal),
    "APO": apo.APO,
    "FullPreconditioner": apo.FullPreconditioner,
}


@pytest.mark.parametrize("make", FRONT_ENDS.values(), ids=FRONT_ENDS)
def test_an_objective_of_a_model_that_is_not_trained_is_refused(make: Any) -> None:
    model, other = nn.Linear(5, 3), nn.Linear(5, 3)
    with pytest.raises(ValueError, match=r"objective must be of the model.* Linear, shares no parameter"):
        make(model, objective(other, torch.randn(9, 5)))


def test_an_objective_is_accepted_where_its_model_may_be_the_one_that_is_trained() -> None:
    model, part = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)), nn.Linear(5, 3)
    x = torch.randn(9, 5)
    apo.APO(model, objective(model[0], x))
    apo.APO(part, objective(model, x, forward=lambda _, x: part(x)))
    apo.APO(part, objective(nn.Identity(), x))
    apo.APO(part, apo.ProximalObjective(model, fsd_weight=0.0))
    flat = torch.zeros(18, requires_grad=True)
    part.weight.data, part.bias.data = flat.data[:15].view(3, 5), flat.data[15:]
    apo.AdaptiveLR(torch.optim.SGD([flat], lr=0.1), objective(part, x))


class Returning(nn.Module):
    """A linear layer whose output is wrapped."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(5, 3).double()
        self.wrap = wrap

    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        return self.wrap(self.linear(x) * scale)


class HuggingFaceOutput(OrderedDict[str, Any]):
    """Their outputs: a mapping whose entries are attributes too."""

    @property
    def logits(self) -> Tensor:
        return self["logits"]


WRAPS: dict[str, Any] = {
    "tensor": lambda y: y,
    "tuple": lambda y: (y, "state"),
    "list": lambda y: [y],
    "Hugging Face": lambda y: HuggingFaceOutput(loss=y.sum(), logits=y),
    "mapping": lambda y: {"out": y},
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_what_models_return(wrap: str) -> None:
    """All terms are those of a model that returns the bare tensor."""
    x, t, other = torch.randn(8, 5).double(), torch.randint(3, (8,)), torch.randn(9, 5).double()
    found = []
    for name in (wrap, "tensor"):
        model = Returning(WRAPS[name])
        opt = apo.AdaptiveLR(torch.optim.SGD(model.parameters(), lr=0.5), objective(model, other))
        opt.step(closure_of(opt, model, x, t, lambda y, t, model=model: F.cross_entropy(model.linear(x), t)))
        found.append(opt.last)
    assert found[0] == found[1]
    assert found[0].fsd > 0


def test_a_choice_of_outputs_and_of_the_call() -> None:
    model = Returning(lambda y: {"a": {"b": y}})
    goal = objective(
        model, torch.randn(9, 5).double(), outputs=lambda r: r["a"]["b"], forward=lambda m, x: m(x, scale=3.0)
    )
    anchor = goal.anchor(goal.draw())
    assert anchor is not None
    assert torch.equal(anchor.outputs, model.linear(anchor.batch) * 3)


@pytest.mark.parametrize("batch", [torch.ones(2, 5), (torch.ones(2, 5), 2.0), {"x": torch.ones(2, 5), "scale": 2.0}])
def test_batches_are_tensors_tuples_or_mappings(batch: Any) -> None:
    model = Returning(lambda y: y).float()
    goal = objective(model, lambda: batch)
    anchor = goal.anchor(goal.draw())
    assert anchor is not None
    assert torch.equal(anchor.outputs, model.linear(torch.ones(2, 5)) * (1 if isinstance(batch, Tensor) else 2))


def test_outputs_that_are_views_of_the_weights_are_kept_apart() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3).double())

        def forward(self, x: Tensor) -> Tensor:
            return self.weight

    model = Table()
    opt = apo.AdaptiveLR(torch.optim.SGD(model.parameters(), lr=0.5), objective(model, torch.zeros(1)))
    opt.step(closure_of(opt, model, torch.zeros(1), torch.randint(3, (4,))))
    assert opt.last.fsd > 0


def test_inputs_are_gone_through_again_and_again() -> None:
    model, *_ = mlp()
    batches = [torch.zeros(2, 5), torch.ones(2, 5)]
    goal = objective(model, batches)
    assert [goal.draw()[0, 0].item() for _ in range(5)] == [0, 1, 0, 1, 0]
    once = objective(model, iter(batches))
    once.draw(), once.draw()
    with pytest.raises(ValueError, match="inputs has run out: it is an iterator"):
        once.draw()
    with pytest.raises(ValueError, match="inputs must hold at least one batch"):
        objective(model, []).draw()


class Resets:
    """A loader of the kind that is its own iterator, and begins anew when it is asked for one."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches, self.at = batches, 0

    def __iter__(self) -> Resets:
        self.at = 0
        return self

    def __next__(self) -> Tensor:
        self.at += 1
        if self.at > len(self.batches):
            raise StopIteration
        return self.batches[self.at - 1]


def test_inputs_that_are_their_own_iterator_may_begin_anew() -> None:
    goal = objective(mlp()[0], Resets([torch.zeros(2, 5), torch.ones(2, 5)]))
    assert [goal.draw()[0, 0].item() for _ in range(5)] == [0, 1, 0, 1, 0]


def test_a_loader_whose_workers_persist_may_be_the_training_s_too() -> None:
    """It has one iterator, which is reset for each pass; the objective goes through its own."""
    loader = DataLoader(TensorDataset(torch.arange(4.0)), 1, num_workers=1, persistent_workers=True)
    goal = apo.ProximalObjective(mlp()[0], loader)
    for _ in range(2):
        seen = []
        for (x,) in loader:
            seen.append(x.item())
            goal.draw()
            goal.draw()
        assert seen == [0, 1, 2, 3]


def test_a_function_that_makes_an_iterator_is_refused() -> None:
    def batches() -> Iterator[Tensor]:
        yield torch.zeros(2, 5)

    goal = objective(mlp()[0], batches)
    with pytest.raises(TypeError, match="inputs must give batches, but gave an iterator of them, a generator"):
        goal.checked_draw()


def test_predicted_classes_are_not_what_is_compared() -> None:
    model = Returning(lambda y: (y.argmax(-1), y))
    goal = objective(model, torch.randn(9, 5).double())
    assert goal.anchor(goal.draw()).outputs.shape == (9, 3)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_outputs_without_a_graph_are_refused_by_name(front_end: str) -> None:
    model = Returning(lambda y: y.detach())
    x, t = torch.randn(8, 5).double(), torch.randint(3, (8,))
    opt = FRONT_ENDS[front_end](model, objective(model, x))
    before = weights(model)
    with pytest.raises(ValueError, match=r"outputs must depend on the model's weights.*outputs=lambda"):
        opt.step(closure_of(opt, model, x, t, lambda y, t: F.cross_entropy(model.linear(x), t)))
    assert same(before, weights(model))


class DetectsInEval(nn.Module):
    """As detectors do: something to be lost from in train mode, something else in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y if self.training else y[:, :2]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="notes came with Python 3.11")
@pytest.mark.parametrize("own_loss", [False, True])
def test_errors_of_eval_mode_are_explained(own_loss: bool) -> None:
    model, x, t = DetectsInEval(), torch.randn(8, 5).double(), torch.full((8,), 2)
    for mode in ("eval", "train"):
        goal = apo.ProximalObjective(
            model, lambda: (x, t) if own_loss else x, loss=F.cross_entropy if own_loss else None, mode=mode
        )
        opt = apo.AdaptiveLR(torch.optim.SGD(model.parameters(), lr=0.1), goal)
        if mode == "train":
            opt.step(closure_of(opt, model, x, t))
            continue
        with pytest.raises(IndexError, match="out of bounds") as caught:
            opt.step(closure_of(opt, model, x, t))
        assert "mode='train'" in caught.value.__notes__[0]


def test_no_batch_is_drawn_at_fsd_weight_zero() -> None:
    model, x, t, _ = mlp()
    opt = apo.AdaptiveLR(torch.optim.SGD(model.parameters(), lr=0.5), objective(model, None, fsd_weight=0))
    opt.step(closure_of(opt, model, x, t))
    assert opt.last.fsd == 0
    assert opt.last.objective == pytest.approx(opt.last.loss + 0.2 * opt.last.wsd)


def test_front_ends_fill_in_the_weight_that_was_left_open() -> None:
    model, *_, other = mlp()
    goal = objective(model, other, fsd_weight=None, wsd_weight=None)
    assert apo.AdaptiveLR(torch.optim.SGD(model.parameters(), lr=0.5), goal).objective.fsd_weight == 0.3
    pairs = [(other, torch.zeros(12, dtype=torch.long))]
    fresh = apo.ProximalObjective(model, pairs, loss=F.cross_entropy)
    assert apo.AdaptiveLR(torch.optim.SGD(model.parameters(), lr=0.5), fresh).objective.fsd_weight == 0.1
    assert apo.AdaptiveLR(torch.optim.SGD(model.parameters(), lr=0.5), goal).objective.wsd_weight == 0
    of_apo = apo.APO(model, goal).objective
    assert (of_apo.fsd_weight, of_apo.wsd_weight) == (1, 1e-4)
    given = apo.APO(model, objective(model, other, fsd_weight=None, wsd_weight=0.0)).objective
    assert (given.fsd_weight, given.wsd_weight) == (1, 0)
    assert goal.fsd_weight is None
    assert goal.wsd_weight is None


def test_a_loss_of_its_own_is_taken_on_the_other_batch_without_the_closure() -> None:
    model, x, t, other = mlp()
    targets = torch.randint(3, (12,))
    for fsd_weight in (0, 0.7):
        goal = objective(model, [(other, targets)], loss=F.cross_entropy, fsd_weight=fsd_weight)
        opt = apo.AdaptiveLR(torch.optim.SGD(model.parameters(), lr=0.5), goal, meta_lr=0)
        begun(opt)
        closure, calls = closure_of(opt, model, x, t), []
        old = model(other).detach()
        opt.step(lambda closure=closure, calls=calls: (calls.append(0), closure())[1])
        assert len(calls) == 1
        # A meta-rate of 0: the step taken is the trial.
        new = model(other).detach()
        assert opt.last.loss == pytest.approx(F.cross_entropy(new, targets).item(), rel=1e-12)
        assert opt.last.fsd == pytest.approx(apo.KL()(new, old).item() if fsd_weight else 0, rel=1e-9)
        assert opt.last.objective == pytest.approx(
            opt.last.loss + fsd_weight * opt.last.fsd + 0.2 * opt.last.wsd, rel=1e-12
        )
