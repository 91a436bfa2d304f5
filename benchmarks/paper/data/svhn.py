"""SVHN's cropped digits: MATLAB files with ``X (32, 32, 3, N)`` and ``y (N, 1)``, where 10 stands for the digit 0."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.paper.data.examples import Dataset, Examples
from benchmarks.paper.data.images import normalised
from benchmarks.paper.data.source import Source, find

PUBLISHED = "http://ufldl.stanford.edu/housenumbers"
FILES = ("train_32x32.mat", "test_32x32.mat")


def read_mat(path: Path) -> tuple[Tensor, Tensor]:
    """``(images (N, 3, 32, 32) uint8, labels (N) from 0 to 9)``; ValueError where it holds no such arrays."""
    from scipy.io import loadmat  # comes with scikit-learn

    content = loadmat(str(path))
    X, y = content.get("X"), content.get("y")
    if X is None or y is None or X.ndim != 4 or X.shape[2] != 3 or X.shape[3] != y.size:
        raise ValueError(f"{path} must hold X (32, 32, 3, N) and y (N, 1), but holds {sorted(content)}")
    images = torch.from_numpy(np.ascontiguousarray(X.transpose(3, 2, 0, 1)))
    return images, torch.from_numpy(y.astype(np.int64)).flatten() % 10


def _read(folder: Path) -> Dataset:
    (images, t), (test, test_t) = (read_mat(find(folder, ("SVHN", "svhn", "."), name, PUBLISHED)) for name in FILES)
    x, test_x = normalised(images, test)
    return Dataset("SVHN", Examples((x,), t), Examples((test_x,), test_t), published=(73_257, 26_032))


SVHN = Source("SVHN", _read, FILES, PUBLISHED)
