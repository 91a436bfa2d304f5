"""Gradients and KFAC factors of nets that train on scikit-learn's digits.

The factors are those of :mod:`benchmarks.common.fisher.layers`, with targets sampled from the model's own predictions,
in the scale of Grosse & Martens (2016): for a convolution ``F_A = E[Σ_t ā_t ā_tᵀ]`` and
``F_B = E[Σ_t Ds_t Ds_tᵀ] / |T|``, over its positions ``t ∈ T``. The nets train in float64, so that nothing is rounded.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common.fisher.capture import Capture
from benchmarks.common.fisher.layers import FactoredLayer, factored_layers, sums_of_squares
from benchmarks.common.fisher.likelihood import Categorical
from benchmarks.common.steps import take_steps
from benchmarks.kernels.stability.problem import LayerFactors

DECAY = 0.95
BATCH = 64


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def conv_net() -> nn.Module:
    first, second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
    return nn.Sequential(first, nn.ReLU(), nn.MaxPool2d(2), second, nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))


NETS = {"mlp": mlp, "conv": conv_net}


class Recorder:
    """The running averages of ``F_A`` and ``F_B`` for every linear and convolutional layer of a model.

    After ``k`` batches the old average keeps a weight of ``min(1 − 1/k, 0.95)``, as the KFAC paper has it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = factored_layers(model)
        self.factors: dict[FactoredLayer, tuple[Tensor, Tensor]] = {}
        self.batches = 0

    def update(self, x: Tensor, generator: torch.Generator) -> None:
        """Take one batch ``x`` into the averages."""
        with Capture(self.model, self.layers, Categorical(), "sampled", generator) as capture:
            self.model(x)
        self.batches += 1
        keep = min(1 - 1 / self.batches, DECAY)
        for layer in self.layers:
            a, Ds = layer.positions(*capture.calls[layer][0])
            sum_A, sum_B, count = sums_of_squares(a, Ds)
            new = sum_A / len(a), sum_B / count
            old = self.factors.get(layer, new)
            self.factors[layer] = old[0].lerp(new[0], 1 - keep), old[1].lerp(new[1], 1 - keep)


def record(net: str, moments: Sequence[int], seed: int = 0) -> Iterator[LayerFactors]:
    """The cases of a net's layers at the given training steps: the factors so far, and the gradient of the batch."""
    digits = load_digits()
    x, y = torch.from_numpy(digits.images)[:, None] / 16, torch.from_numpy(digits.target)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = NETS[net]().double()
    generator = torch.Generator().manual_seed(seed)
    recorder = Recorder(model)

    def loss_at(step: int) -> Callable[[], Tensor]:
        batch = torch.randint(len(x), (BATCH,), generator=generator)
        recorder.update(x[batch], generator)
        return lambda: F.cross_entropy(model(x[batch]), y[batch])

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step, _ in enumerate(take_steps(optimizer, loss_at, range(1, max(moments) + 1)), 1):
        if step in moments:
            for number, layer in enumerate(recorder.layers, 1):
                G = layer.gradient().clone()
                yield LayerFactors(f"{net} layer {number}, step {step}", "recorded", G, *recorder.factors[layer])
