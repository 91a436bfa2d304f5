"""MNIST's idx files: a magic number (0, 0, type, dimensions), big-endian sizes, then unsigned bytes."""

import gzip
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.paper.data.examples import Dataset, Examples, reconstruction
from benchmarks.paper.data.source import Source, find

PUBLISHED = "http://yann.lecun.com/exdb/mnist (copies: https://ossci-datasets.s3.amazonaws.com/mnist)"
PLACES = ("MNIST/raw", "MNIST", "mnist", ".")
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
UNSIGNED_BYTES = 8


def read_idx(path: Path) -> Tensor:
    """The tensor of unsigned bytes in an idx file, gzipped or not; ValueError where it isn't one."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != UNSIGNED_BYTES:
        raise ValueError(f"{path} must be an idx file of unsigned bytes, but starts with {content[:4]!r}")
    dimensions = content[3]
    start = 4 + 4 * dimensions
    shape = struct.unpack(f">{dimensions}I", content[4:start]) if len(content) >= start else ()
    values = np.frombuffer(content, np.uint8, offset=min(start, len(content)))
    if len(shape) != dimensions or values.size != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{path} must hold {shape} bytes after its header, but holds {values.size}")
    return torch.tensor(values.reshape(shape))


def _mnist(folder: Path) -> Dataset:
    """Images as rows of 784 in [0, 1]."""
    images, labels, test_images, test_labels = (read_idx(find(folder, PLACES, name, PUBLISHED)) for name in FILES)
    train = Examples((images.flatten(1) / 255,), labels.long())
    test = Examples((test_images.flatten(1) / 255,), test_labels.long())
    return Dataset("MNIST", train, test, published=(60_000, 10_000))


MNIST = Source("MNIST", _mnist, FILES, PUBLISHED)
MNIST_IMAGES = Source("MNIST", lambda folder: reconstruction(_mnist(folder)), FILES, PUBLISHED)
