"""Data that need no file: scikit-learn's sets, which stand in for published ones, and what is drawn from a seed."""

from pathlib import Path

import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor

from benchmarks.paper.data.examples import Dataset, Examples, reconstruction, split, standardised
from benchmarks.paper.data.source import Source

CONDITION = 1e10
INPUTS, OUTPUTS, SAMPLES = 6, 10, 1000


def _digits(_: Path) -> Dataset:
    """1,437 and 360 images of 8 × 8, scaled to [0, 1]."""
    x, test_x, t, test_t = _parts(*load_digits(return_X_y=True))
    return Dataset("digits", Examples((x / 16,), t.long()), Examples((test_x / 16,), test_t.long()))


def _diabetes(_: Path) -> Dataset:
    """353 and 89 patients of 10 features, both sides standardised by the training examples."""
    x, test_x, t, test_t = _parts(*load_diabetes(return_X_y=True))
    x, test_x = standardised(x, test_x)
    t, test_t = standardised(t[:, None], test_t[:, None])
    return Dataset("diabetes", Examples((x,), t), Examples((test_x,), test_t))


def _parts(inputs: object, targets: object) -> list[Tensor]:
    both = [torch.tensor(values, dtype=torch.float64).float() for values in (inputs, targets)]
    return [values[chosen] for values in both for chosen in split(len(values))]


def ill_conditioned_map(generator: torch.Generator) -> Tensor:
    """``A (10, 6)`` float64 with singular values spaced evenly in log from 1 to 1e-10.

    Linear regression with it is that of Rahimi & Recht 2017, reference [68] of the paper.
    """
    left, right = (torch.randn(rows, INPUTS, generator=generator, dtype=torch.float64) for rows in (OUTPUTS, INPUTS))
    values = torch.logspace(0, -torch.log10(torch.tensor(CONDITION)).item(), INPUTS, dtype=torch.float64)
    U, V = torch.linalg.qr(left).Q, torch.linalg.qr(right).Q
    A: Tensor = U * values @ V.T
    return A


def _made(_: Path) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    A = ill_conditioned_map(generator)
    train, test = (torch.randn(SAMPLES, INPUTS, generator=generator, dtype=torch.float64) for _ in range(2))
    return Dataset("t = Ax", Examples((train,), train @ A.T), Examples((test,), test @ A.T))


def _points(_: Path) -> Dataset:
    """Of (0, 1), drawn for training and evenly spaced for the test. What is wanted there is a residual of 0."""
    x, test_x = torch.rand(8192, 1, generator=torch.Generator().manual_seed(0)), torch.linspace(0, 1, 200)[:, None]
    return Dataset("points", Examples((x,), torch.zeros_like(x)), Examples((test_x,), torch.zeros_like(test_x)))


DIGITS = Source("scikit-learn's digits", _digits, stand_in="MNIST")
DIGITS_IMAGES = Source(DIGITS.name, lambda _: reconstruction(_digits(_)), stand_in="MNIST")
DIABETES = Source("scikit-learn's diabetes", _diabetes, stand_in="UCI regression")
ILL_CONDITIONED = Source("t = Ax, κ(A) = 1e10, x ~ N(0, I)", _made)
POINTS = Source("points of (0, 1)", _points)
