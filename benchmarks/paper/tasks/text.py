"""The next character of English text, by a small GPT."""

import torch
from torch import Tensor, nn

from benchmarks.paper.data.text import CHARACTERS, ENGLISH, WINDOW
from benchmarks.paper.models import GPT
from benchmarks.paper.tasks.losses import TRANSLATION
from benchmarks.paper.tasks.task import Task


def _outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """Logits ``(N·T, characters)``: loss and discrepancy are means over characters."""
    logits: Tensor = model(*inputs)
    return logits.flatten(0, 1)


TASKS = (
    Task(
        name="gpt",
        title="next characters of English text, GPT of 2 layers",
        model_name="GPT 2, 128",
        build=lambda: GPT(CHARACTERS, longest=WINDOW),
        source=ENGLISH,
        loss=TRANSLATION,
        batch_size=16,
        epochs=1,
        forward=_outputs,
        targets=torch.flatten,
        evaluated=500,
    ),
)
