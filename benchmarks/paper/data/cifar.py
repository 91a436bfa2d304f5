"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), in the binary or in the python version, whichever is there.

Binary: for each image its label bytes (one; for CIFAR-100 the coarse label, then the fine one) and 3,072 bytes, the
red, the green and the blue plane of 32 × 32. Python: a pickled dictionary with ``data (N, 3072)`` and ``labels``.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.paper.data.examples import Dataset, Examples
from benchmarks.paper.data.images import normalised
from benchmarks.paper.data.source import MissingData, Source

PIXELS = 3 * 32 * 32


class Files(NamedTuple):
    """One form of one data set: where it lies, its training files and its test file."""

    places: Sequence[str]
    train: Sequence[str]
    test: str


class Form(NamedTuple):
    """CIFAR-10 or CIFAR-100."""

    name: str
    published: str
    label_bytes: int
    labels: bytes
    binary: Files
    pickled: Files


PUBLISHED = "https://www.cs.toronto.edu/~kriz/cifar.html"
TEN = Form(
    "CIFAR-10",
    PUBLISHED,
    1,
    b"labels",
    Files(("cifar-10-batches-bin", "."), [f"data_batch_{i}.bin" for i in range(1, 6)], "test_batch.bin"),
    Files(("cifar-10-batches-py", "."), [f"data_batch_{i}" for i in range(1, 6)], "test_batch"),
)
HUNDRED = Form(
    "CIFAR-100",
    PUBLISHED,
    2,
    b"fine_labels",
    Files(("cifar-100-binary", "."), ["train.bin"], "test.bin"),
    Files(("cifar-100-python", "."), ["train"], "test"),
)


def read_binary(path: Path, label_bytes: int = 1) -> tuple[Tensor, Tensor]:
    """``(images (N, 3, 32, 32) uint8, labels (N))`` of a binary file; of two labels the second, the fine one.

    Raises:
        ValueError: its length is no whole number of records.
    """
    content = np.fromfile(path, np.uint8)
    record = label_bytes + PIXELS
    if not content.size or content.size % record:
        raise ValueError(f"{path} must hold records of {record} bytes, but holds {content.size} bytes")
    rows = torch.from_numpy(content.reshape(-1, record))
    return rows[:, label_bytes:].reshape(-1, 3, 32, 32), rows[:, label_bytes - 1].long()


def read_pickled(path: Path, labels: bytes = b"labels") -> tuple[Tensor, Tensor]:
    """The same of a file of the python version.

    Raises:
        ValueError: it isn't a dictionary of arrays. Nothing else is unpickled: a pickle could run any program.
    """
    try:
        content = _Arrays(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        images, classes = content[b"data"], content[labels]
        return torch.tensor(np.asarray(images, np.uint8)).reshape(-1, 3, 32, 32), torch.tensor(classes).long()
    except (pickle.UnpicklingError, KeyError, TypeError, EOFError, RuntimeError) as error:
        raise ValueError(f"{path} must be a batch of the python version of CIFAR, but: {error}") from error


class _Arrays(pickle.Unpickler):
    """Arrays, and what plain dictionaries hold."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.split(".")[0], name) in {("numpy", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}:
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):  # how Python 2's bytes were kept
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no array")


def _read(folder: Path | None, form: Form) -> Dataset:
    """The version that is there. A missing training file makes the data a part, which their label says."""
    assert folder is not None
    for files in (form.binary, form.pickled):
        for place in files.places:
            there = [folder / place / name for name in files.train if (folder / place / name).is_file()]
            test = folder / place / files.test
            if not there or not test.is_file():
                continue
            if files is form.binary:
                batches = [read_binary(path, form.label_bytes) for path in (*there, test)]
            else:
                batches = [read_pickled(path, form.labels) for path in (*there, test)]
            images, labels = (torch.cat(parts) for parts in zip(*batches[:-1], strict=True))
            x, test_x = normalised(images, batches[-1][0])
            return Dataset(
                form.name, Examples((x,), labels), Examples((test_x,), batches[-1][1]), published=(50_000, 10_000)
            )
    binary, pickled = form.binary, form.pickled
    raise MissingData(
        f"{form.name} is missing in {folder}: it needs {binary.places[0]}/{binary.train[0]} and {binary.test}, or "
        f"{pickled.places[0]}/{pickled.train[0]} and {pickled.test}. It is published at {form.published}"
    )


def _source(form: Form) -> Source:
    files = [f"{form.binary.places[0]}/{name}" for name in (form.binary.train[0], form.binary.test)]
    return Source(form.name, lambda folder: _read(folder, form), files, form.published)


CIFAR10 = _source(TEN)
CIFAR100 = _source(HUNDRED)
