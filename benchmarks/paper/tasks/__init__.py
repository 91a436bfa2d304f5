"""The paper's tasks, and small ones that need no files. A file a task or a family of them.

>>> task = named("diabetes")
>>> data, model = task.data(), task.model(seed=0)
>>> batches = Batches(data.train, task.batch_size, seed=0)
>>> inputs, targets = batches.batch(step=0)
>>> loss = task.loss_of(model, inputs, targets)
>>> objective = task.objective(model, batches.other, fsd_weight=3.0)
"""

from __future__ import annotations

from benchmarks.paper.tasks import colour_images, diabetes, digits, ill_conditioned, mnist, translation, uci
from benchmarks.paper.tasks.batches import Batches
from benchmarks.paper.tasks.losses import Loss
from benchmarks.paper.tasks.task import StepSchedule, Task

__all__ = ["TASKS", "Batches", "Loss", "StepSchedule", "Task", "named"]

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        ill_conditioned.TASK,
        diabetes.TASK,
        digits.CLASSIFIER,
        digits.AUTOENCODER,
        *uci.TASKS,
        mnist.AUTOENCODER,
        mnist.CLASSIFIER,
        *colour_images.TASKS,
        *translation.TASKS,
    )
}


def named(name: str) -> Task:
    """The task of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, but got {name!r}")
    return TASKS[name]
