"""The training loop: a batch per step, its loss as often as the optimizer asks, and the optimizer's own steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.common.steps import take_steps, weights_to_judge


def test_steps_are_those_of_a_loop_written_out() -> None:
    x = torch.randn(5, 8, 3)
    models = [nn.Linear(3, 1, dtype=torch.float32) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ours, theirs = (torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in models)
    found = list(take_steps(ours, lambda step: lambda: models[0](x[step]).square().mean(), range(5)))
    for step in range(5):
        theirs.zero_grad()
        loss = models[1](x[step]).square().mean()
        loss.backward()
        theirs.step()
        assert torch.equal(found[step], loss)
        assert not found[step].requires_grad
    assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_weights_to_judge_are_there_within_the_context_alone() -> None:
    weight = nn.Parameter(torch.ones(2))

    class Averaging(torch.optim.SGD):
        def eval(self) -> None:
            weight.data += 1

        def train(self) -> None:
            weight.data -= 1

    for kind, within in ((Averaging, 2.0), (torch.optim.SGD, 1.0)):
        with weights_to_judge(kind([weight], lr=0.1)):
            assert weight.tolist() == [within, within]
        assert weight.tolist() == [1.0, 1.0]


def test_a_batch_is_drawn_once_for_an_optimizer_that_calls_the_closure_often() -> None:
    weight = nn.Parameter(torch.ones(2))
    drawn: list[int] = []
    asked: list[int] = []

    def loss_at(step: int) -> Callable[[], Tensor]:
        drawn.append(step)

        def loss() -> Tensor:
            asked.append(step)
            return weight.square().sum()

        return loss

    optimizer = torch.optim.LBFGS([weight], max_iter=4)
    for step, _ in zip((3, 4), take_steps(optimizer, loss_at, (3, 4)), strict=True):
        assert drawn[-1] == step  # the next is drawn when it is asked for
    assert drawn == [3, 4]
    assert asked.count(3) > 1
