"""Losses and metrics over whole sets of examples."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.paper.data import Examples
from benchmarks.paper.tasks import Task

CHUNK = 1000


def some(examples: Examples, count: int) -> Examples:
    """``count`` examples, always the same ones; all where there are fewer."""
    if len(examples) <= count:
        return examples
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0))
    return examples.take(order[:count].to(examples.targets.device))


@torch.no_grad()
def evaluate(task: Task, model: nn.Module, examples: Examples) -> tuple[float, float]:
    """The mean loss and metric, in eval mode; the random state and the modules' modes are left as they were."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    loss = metric = torch.zeros((), dtype=torch.float64, device=examples.targets.device)
    total = 0
    size = CHUNK if examples.pad is None else min(CHUNK, 100)  # logits of whole sentences are large
    for chosen in torch.split(torch.arange(len(examples), device=examples.targets.device), size):
        inputs, targets = examples.batch(chosen)
        outputs, targets = task.forward(model, inputs), task.targets(targets)
        loss = loss + len(targets) * task.loss.function(outputs, targets)
        metric = metric + len(targets) * task.loss.measure(outputs, targets)
        total += len(targets)
    for module, mode in modes:
        module.training = mode
    return float(loss) / total, float(metric) / total
