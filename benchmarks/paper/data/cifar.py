"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), in the binary or in the python version, whichever is there.

Binary: for each image its label bytes (one; for CIFAR-100 the coarse label, then the fine one) and 3,072 bytes, the
red, the green and the blue plane of 32 × 32. Python: a pickled dictionary with ``data (N, 3072)`` and ``labels``.
"""

import io
import pickle
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.paper.data.examples import Dataset, Examples
from benchmarks.paper.data.images import normalised
from benchmarks.paper.data.source import MissingData, Source

PIXELS = 3 * 32 * 32
PUBLISHED = "https://www.cs.toronto.edu/~kriz/cifar.html"


class Version(NamedTuple):
    """One of the forms that a data set is published in."""

    folder: str
    train: Sequence[str]
    test: str
    read: Callable[[Path], tuple[Tensor, Tensor]]


def read_binary(path: Path, label_bytes: int = 1) -> tuple[Tensor, Tensor]:
    """``(images (N, 3, 32, 32) uint8, labels (N))`` of a binary file; of two labels the second, the fine one."""
    content = np.fromfile(path, np.uint8)
    record = label_bytes + PIXELS
    if not content.size or content.size % record:
        raise ValueError(f"{path} must hold records of {record} bytes, but holds {content.size} bytes")
    rows = torch.from_numpy(content.reshape(-1, record))
    return rows[:, label_bytes:].reshape(-1, 3, 32, 32), rows[:, label_bytes - 1].long()


def read_pickled(path: Path, labels: bytes = b"labels") -> tuple[Tensor, Tensor]:
    """The same of a file of the python version; ValueError where it isn't a dictionary of arrays."""
    try:
        content = _Arrays(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        images, classes = content[b"data"], content[labels]
        return torch.tensor(np.asarray(images, np.uint8)).reshape(-1, 3, 32, 32), torch.tensor(classes).long()
    except (pickle.UnpicklingError, KeyError, TypeError, EOFError, RuntimeError) as error:
        raise ValueError(f"{path} must be a batch of the python version of CIFAR, but: {error}") from error


class _Arrays(pickle.Unpickler):
    """Arrays, and what plain dictionaries hold. Nothing else: a pickle could run any program."""

    def find_class(self, module: str, name: str) -> Any:
        arrays = module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype")
        if arrays or (module, name) == ("_codecs", "encode"):  # the latter is how Python 2's bytes were kept
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no array")


def _source(name: str, *versions: Version) -> Source:
    def read(folder: Path) -> Dataset:
        """The version that is there. A missing training file makes the data a part, which their label says."""
        for version in versions:
            for place in (folder / version.folder, folder):
                there = [place / part for part in version.train if (place / part).is_file()]
                if there and (place / version.test).is_file():
                    images, labels = (torch.cat(parts) for parts in zip(*map(version.read, there), strict=True))
                    test_images, test_labels = version.read(place / version.test)
                    x, test_x = normalised(images, test_images)
                    return Dataset(name, Examples((x,), labels), Examples((test_x,), test_labels), (50_000, 10_000))
        needed = ", or ".join(f"{each.folder}/{each.train[0]} and {each.test}" for each in versions)
        raise MissingData(f"{name} is missing in {folder}: it needs {needed}. It is published at {PUBLISHED}")

    first = versions[0]
    return Source(name, read, [f"{first.folder}/{part}" for part in (first.train[0], first.test)], PUBLISHED)


CIFAR10 = _source(
    "CIFAR-10",
    Version("cifar-10-batches-bin", [f"data_batch_{i}.bin" for i in range(1, 6)], "test_batch.bin", read_binary),
    Version("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], "test_batch", read_pickled),
)
CIFAR100 = _source(
    "CIFAR-100",
    Version("cifar-100-binary", ["train.bin"], "test.bin", partial(read_binary, label_bytes=2)),
    Version("cifar-100-python", ["train"], "test", partial(read_pickled, labels=b"fine_labels")),
)
