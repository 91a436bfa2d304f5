"""The paper's tasks, and small ones that need no files. A file for each family of tasks.

>>> task = named("diabetes")
>>> data, model = task.data(), task.model(seed=0)
>>> batches = Batches(data.train, task.batch_size, seed=0)
>>> inputs, targets = batches.batch(step=0)
>>> loss = task.loss_of(model, inputs, targets)
>>> objective = task.objective(model, batches.other, fsd_weight=3.0)
"""

from benchmarks.paper.tasks import colour_images, digit_images, physics, regression, text, translation
from benchmarks.paper.tasks.batches import Batches
from benchmarks.paper.tasks.losses import Loss
from benchmarks.paper.tasks.task import Task

__all__ = ["TASKS", "Batches", "Loss", "Task", "named"]

_SMALL = (*regression.SMALL, *digit_images.SMALL, *text.TASKS, *physics.TASKS)
_PAPERS = (*regression.UCI, *digit_images.PAPER, *colour_images.TASKS, *translation.TASKS)
TASKS: dict[str, Task] = {task.name: task for task in (*_SMALL, *_PAPERS)}


def named(name: str) -> Task:
    """The task of that name; ValueError where there is none."""
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, but got {name!r}")
    return TASKS[name]
