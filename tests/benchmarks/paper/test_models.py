"""The networks: published counts, shapes, and a step of every optimizer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.kernels.shapes import MODELS
from benchmarks.paper import models
from benchmarks.paper.data import Dataset, Examples
from benchmarks.paper.data.parallel_text import Translation
from benchmarks.paper.data.vocabulary import CLOSE, OPEN, PAD, Vocabulary
from benchmarks.paper.models.mlp import sparse_init_
from benchmarks.paper.models.poisson import solution
from benchmarks.paper.tasks import TASKS, Batches, Task, named
from benchmarks.paper.tasks.translation import bleu, translate
from benchmarks.paper.training.optimizers import METHODS, method
from benchmarks.paper.training.training import Setting

PUBLISHED: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "LeNet-5, grey": (lambda: models.lenet(channels=1), 61_706),
    "AlexNet, 2.47M": (models.alexnet, 2_472_266),
    "VGG16, 14.71M of convolutions": (models.vgg16, 14_714_688 + 512 * 10 + 10),
    "ResNet-18": (models.resnet18, 11_173_962),
    "ResNet-32, 0.46M": (models.resnet32, 464_154),
    "ResNet-34, 21.28M": (models.resnet34, 21_282_122),
    "WRN-28-10, 36.5M": (models.wide_resnet_28_10, 36_479_194),
    "autoencoder": (models.autoencoder, 2_837_314),
    "CNN, as its docstring says": (models.small_cnn, 33_946),
    # 3,152,384 a layer of the encoder of Vaswani et al.'s base model, 4,204,032 of the decoder, 512 for the one word
    "Transformer, base": (lambda: models.Transformer(1, hidden=2048), 6 * (3_152_384 + 4_204_032) + 512),
    # fairseq's transformer_iwslt_de_en has 39,469,056 with its 8,848 + 6,632 words
    "Transformer for IWSLT'14": (lambda: models.Transformer(8_848 + 6_632), 39_469_056),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_the_published_ones(name: str) -> None:
    build, count = PUBLISHED[name]
    with torch.device("meta"):
        assert sum(p.numel() for p in build().parameters()) == count


@pytest.mark.parametrize(
    ("name", "build"), [("lenet", models.lenet), ("vgg16", models.vgg16), ("resnet18", models.resnet18)]
)
def test_layers_are_those_of_the_throughput_benchmark(name: str, build: Callable[[], nn.Module]) -> None:
    with torch.device("meta"):
        layers = [m for m in build().modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    found = sorted((len(x.weight), x.weight[0].numel()) for x in layers)
    assert found == sorted((m, n - 1) for m, n in MODELS[name])  # there a bias is one more column


def test_option_a_shortcuts_pad_with_zeros() -> None:
    block = models.resnet32(width=0.5)[3][5].eval()
    assert block.stride == 2
    with torch.no_grad():
        block.second_norm.weight.zero_()  # what is left is the shortcut
        x = torch.rand(2, 8, 4, 4)
        y = block(x)
    assert torch.equal(y[:, 4:12], x[:, :, ::2, ::2])
    assert not y[:, :4].any()
    assert not y[:, 12:].any()


def test_the_autoencoder_starts_sparse() -> None:
    model = sparse_init_(models.mlp(64, 100, 5, activation=nn.Sigmoid))
    assert (model[0].weight != 0).sum(1).tolist() == [15] * 100
    assert not model[0].bias.any()


def small_transformer() -> models.Transformer:
    return models.Transformer(20, width=16, layers=1, heads=2, hidden=32, longest=12).eval()


def test_the_transformer_looks_neither_ahead_nor_at_padding() -> None:
    model = small_transformer()
    source, target = torch.randint(4, 20, (2, 5)), torch.randint(4, 20, (2, 6))
    source[0, 3:] = PAD
    out = model(source, target)
    changed = target.clone()
    changed[:, 4:] = torch.randint(4, 20, (2, 2))
    assert torch.allclose(model(source, changed)[:, :4], out[:, :4], atol=1e-6)
    assert not torch.allclose(model(source, changed)[:, 4:], out[:, 4:], atol=1e-3)
    assert torch.allclose(model(source[:1, :3], target[:1]), out[:1], atol=1e-5)


def test_the_gpt_looks_not_ahead() -> None:
    model = models.GPT(20, width=8, layers=2, heads=2, longest=6)
    text = torch.randint(20, (2, 6))
    changed = text.clone()
    changed[:, 4:] = (text[:, 4:] + 1) % 20
    assert torch.allclose(model(changed)[:, :4], model(text)[:, :4], atol=1e-6)
    assert not torch.allclose(model(changed)[:, 4:], model(text)[:, 4:], atol=1e-3)


def test_the_solution_of_poissons_equation_has_no_residual() -> None:
    model = models.Poisson().double()
    x = torch.rand(10, 1, dtype=torch.float64)
    assert model(x).shape == (12, 1)
    assert model(x).abs().max() > 1
    model.u.forward = solution
    with torch.no_grad():  # as an evaluation does
        assert model(x).abs().max() < 1e-9


def test_translating_takes_the_likeliest_word_up_to_the_end() -> None:
    model = small_transformer()
    source = torch.randint(4, 20, (3, 5))
    said = translate(model, source, longest=8)
    assert said[:, 0].tolist() == [OPEN] * 3
    for row, sentence in zip(said, source, strict=True):
        for place in range(1, len(row)):
            if CLOSE in row[:place]:
                assert row[place] == PAD
            else:
                assert row[place] == model(sentence[None], row[None, :place])[0, -1].argmax()


def test_bleu_of_what_the_model_says(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sacrebleu")
    sentences = ["two men walk in the park .", "a dog sees two cats ."]
    words = Vocabulary(sentences, 60)
    said = torch.full((2, 30), PAD)
    for row, sentence in zip(said, sentences, strict=True):
        numbers = [OPEN, *words.encode(sentence), CLOSE]
        row[: len(numbers)] = torch.tensor(numbers)
    examples = Examples((said, said), said, pad=PAD)
    monkeypatch.setattr(
        "benchmarks.paper.tasks.translation.translate", lambda model, source, longest: said[: len(source)]
    )
    data = Dataset("x", examples, examples, extra=Translation(words, sentences))
    assert bleu(small_transformer(), data)["BLEU"] == pytest.approx(100)
    wrong = Dataset("x", examples, examples, extra=Translation(words, sentences[::-1]))
    assert bleu(small_transformer(), wrong)["BLEU"] < 30
    assert bleu(small_transformer(), data.held_out(0.5)) == {}


NARROW: dict[str, Callable[[], nn.Module]] = {
    "LeNet": models.lenet,
    "AlexNet": lambda: models.alexnet(width=0.05),
    "VGG16": lambda: models.vgg16(width=0.05),
    "ResNet-18": lambda: models.resnet18(width=0.05),
    "ResNet-32": lambda: models.resnet32(width=0.2),
    "ResNet-34": lambda: models.resnet34(width=0.05),
    "WRN-28-10": lambda: models.wide_resnet_28_10(width=0.02),
    "MLP 784-1000-1000-10": lambda: models.mlp(784, 8, 8, 10),
    "autoencoder 784-1000-500-250-30": lambda: models.autoencoder((784, 16, 8, 6, 4)),
    "Transformer 6+6, 512": lambda: models.Transformer(20, width=8, heads=2, hidden=8, longest=12),
    "MLP 9-100-100-1": lambda: models.mlp(9, 100, 100, 1),
    "CNN": models.small_cnn,
    "GPT 2, 128": lambda: models.GPT(20, width=8, layers=1, heads=2, longest=6),
    "PINN 1-32-32-1": lambda: models.Poisson(8),
    "linear 6-6-10": lambda: models.linear_network(6, 6, 10).double(),
}


def examples_for(task: Task, name: str) -> Examples:
    if name.startswith("Transformer"):
        words = torch.randint(4, 20, (8, 6))
        words[:4, 4:] = PAD
        return Examples((words, words), words, pad=PAD)
    if name.startswith("GPT"):
        text = torch.randint(20, (8, 7))
        return Examples((text[:, :-1],), text[:, 1:])
    if name.startswith("PINN"):
        return Examples((torch.rand(8, 1),), torch.zeros(8, 1))
    if name.startswith("MLP 9"):
        return Examples((torch.randn(8, 9),), torch.randn(8, 1))
    if name.startswith("linear"):
        return Examples((torch.randn(8, 6, dtype=torch.float64),), torch.randn(8, 10, dtype=torch.float64))
    if name.startswith(("MLP", "autoencoder")):
        x = torch.rand(8, 784)
        return Examples((x,), x if name.startswith("auto") else torch.randint(10, (8,)))
    return Examples((torch.randn(8, 3, 32, 32),), torch.randint(10, (8,)))


def settle(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    """Give batch norms the running statistics of a batch: trials are evaluated with them, and refused if far off."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    if norms:
        model(*inputs)


@pytest.mark.parametrize("name", NARROW)
def test_every_optimizer_takes_a_step_on_every_network(name: str) -> None:
    """At reduced width."""
    task = next(task for task in TASKS.values() if task.model_name == name)
    examples = examples_for(task, name)
    for optimizer in [*METHODS, "apo-lr", "apo-lr:adam"]:
        torch.manual_seed(0)
        model = NARROW[name]()
        batches = Batches(examples, 8, seed=0)
        chosen = method(optimizer)
        hyper = chosen.hyper({"lr": 1e-3}, "fp32")
        made = chosen.make(Setting(task, model, batches), hyper)
        getattr(made, "train", lambda: None)()  # of schedule-free methods
        inputs, targets = batches.batch(0)
        settle(model, inputs)
        before = [p.detach().clone() for p in model.parameters()]

        def closure() -> torch.Tensor:
            made.zero_grad()  # noqa: B023
            loss = task.loss_of(model, inputs, targets)  # noqa: B023
            loss.backward()
            return loss

        for _ in range(2 if optimizer == "soap" else 1):  # its first step begins the bases and nothing else
            loss = made.step(closure)
        moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
        assert sum(moved) > 0.8 * len(moved), optimizer  # a gradient may be too small to show
        assert all(p.isfinite().all() for p in model.parameters()), optimizer
        assert torch.isfinite(loss)


def test_tasks_agree_with_their_networks() -> None:
    assert {task.model_name for task in TASKS.values()} >= NARROW.keys()
    assert named("iwslt14").parameters() == 31_543_296 + 512 * 8000
    assert named("mnist").parameters() == 1_796_010
    for name in ("ill-conditioned", "diabetes", "digits", "digits-autoencoder"):
        task = named(name)
        data = task.data()
        inputs, targets = Batches(data.train, task.batch_size, seed=0).batch(0)
        loss = task.loss_of(task.model(0), inputs, targets)
        assert loss.isfinite()
        assert loss.dim() == 0


def test_low_precision_losses_are_summed_in_float32() -> None:
    task, x = named("digits-autoencoder"), torch.rand(100, 64)
    y = torch.randn(100, 64).half()
    loss = task.loss.function(y, x.half())
    exact = F.binary_cross_entropy_with_logits(y.double(), x.half().double(), reduction="sum") / 100
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
