"""Translation from German with a Transformer of 6 + 6 layers (Table 2), scored by BLEU."""

import torch
from torch import Tensor, nn

from benchmarks.paper.data import Dataset, Source
from benchmarks.paper.data.parallel_text import IWSLT14, LONGEST, MULTI30K, WORDS, Translation
from benchmarks.paper.data.vocabulary import CLOSE, OPEN, PAD
from benchmarks.paper.models import Transformer
from benchmarks.paper.tasks.losses import TRANSLATION
from benchmarks.paper.tasks.task import Task


def _outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """Logits ``(tokens, words)`` of what isn't padding: loss and discrepancy are means over tokens."""
    logits: Tensor = model(*inputs)
    return logits[inputs[1] != PAD]


@torch.no_grad()
def translate(model: Transformer, source: Tensor, longest: int = LONGEST) -> Tensor:
    """The likeliest next word each time, until all sentences are closed: ``(N, T)`` from OPEN on."""
    encoded = model.encode(source)
    said = torch.full((len(source), 1), OPEN, device=source.device)
    closed = torch.zeros(len(source), dtype=torch.bool, device=source.device)
    while said.shape[1] < longest and not closed.all():
        word = torch.where(closed, PAD, model.decode(said, *encoded)[:, -1].argmax(-1))
        said = torch.cat([said, word[:, None]], 1)
        closed |= word == CLOSE
    return said


def bleu(model: nn.Module, data: Dataset) -> dict[str, float]:
    """``{"BLEU": …}`` of greedy translations of the test; empty without references (a held-out part) or sacrebleu."""
    found = data.extra
    if not isinstance(found, Translation) or not isinstance(model, Transformer):
        return {}
    try:
        from sacrebleu import corpus_bleu
    except ImportError:
        return {}
    was_training = model.training
    model.eval()
    said: list[str] = []
    for chosen in torch.split(torch.arange(len(data.test), device=data.test.targets.device), 100):
        (source, _), _ = data.test.batch(chosen)
        longest = min(LONGEST, source.shape[1] + 20)
        said += [found.vocabulary.decode(row) for row in translate(model, source, longest).tolist()]
    model.train(was_training)
    return {"BLEU": float(corpus_bleu(said, [list(found.references)]).score)}


def _task(name: str, title: str, source: Source, epochs: int, place: str, width: int, hidden: int) -> Task:
    return Task(
        name=name,
        title=f"{title}, Transformer of 6 + 6 layers, width {width}",
        place=place,
        model_name=f"Transformer 6+6, {width}",
        build=lambda: Transformer(WORDS, width=width, hidden=hidden, longest=LONGEST, pad=PAD),
        source=source,
        loss=TRANSLATION,
        batch_size=64,
        epochs=epochs,
        forward=_outputs,
        targets=lambda targets: targets[targets != PAD],
        evaluated=1_000,
        judged_by="metric",
        precisions=("fp32", "bf16"),  # masked attention overflows in float16
        score=bleu,
    )


TASKS = (
    _task("iwslt14", "IWSLT'14", IWSLT14, 50, "Table 2", 512, 1024),
    _task("multi30k", "Multi30k", MULTI30K, 30, "Table 2, smaller data", 512, 1024),
    _task("multi30k-narrow", "Multi30k", MULTI30K, 30, "", 128, 256),
)
