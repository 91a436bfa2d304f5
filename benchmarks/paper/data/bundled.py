"""Data that need no file: scikit-learn's bundled sets, which stand in for published ones."""

from __future__ import annotations

from pathlib import Path

import torch
from sklearn.datasets import load_diabetes, load_digits

from benchmarks.paper.data.examples import Dataset, Examples, standardised
from benchmarks.paper.data.source import Source


def _digits(_: Path | None) -> Dataset:
    """1,437 and 360 images of 8 × 8, scaled to [0, 1], shuffled once and for all."""
    train, test, t, test_t = _split(*load_digits(return_X_y=True))
    return Dataset("digits", Examples((train / 16,), t.long()), Examples((test / 16,), test_t.long()))


def _digits_images(folder: Path | None) -> Dataset:
    """The same with the images for targets."""
    found = _digits(folder)
    return Dataset(
        found.name,
        Examples(found.train.inputs, found.train.inputs[0]),
        Examples(found.test.inputs, found.test.inputs[0]),
    )


def _diabetes(_: Path | None) -> Dataset:
    """353 and 89 patients of 10 features, both sides standardised by the training examples."""
    train, test, t, test_t = _split(*load_diabetes(return_X_y=True))
    train, test = standardised(train, test)
    t, test_t = standardised(t[:, None], test_t[:, None])
    return Dataset("diabetes", Examples((train,), t), Examples((test,), test_t))


def _split(inputs: object, targets: object) -> tuple[torch.Tensor, ...]:
    """A fifth to test on."""
    x = torch.tensor(inputs, dtype=torch.float64).float()
    t = torch.tensor(targets, dtype=torch.float64).float()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[: len(x) * 4 // 5], order[len(x) * 4 // 5 :]
    return x[train], x[test], t[train], t[test]


DIGITS = Source("scikit-learn's digits", _digits, stand_in="MNIST")
DIGITS_IMAGES = Source("scikit-learn's digits", _digits_images, stand_in="MNIST")
DIABETES = Source("scikit-learn's diabetes", _diabetes, stand_in="UCI regression")
