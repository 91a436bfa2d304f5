"""Running text as windows of characters: Multi30k's English side, or Python's help texts where there are no files."""

from pathlib import Path

import torch

from benchmarks.paper.data.examples import Dataset, Examples
from benchmarks.paper.data.parallel_text import PUBLISHED_MULTI30K, read_lines
from benchmarks.paper.data.source import Source, find

CHARACTERS = 96
"""The printable ones of ASCII are 1 to 95, all others 0: ends of lines, of which there are many, and few accents."""

WINDOW = 64
TESTED = 500
"""So many windows at the end are tested on, or a tenth of a shorter text."""


def windows(text: str) -> Examples:
    """The text cut into windows ``(N, 64)``. The targets are the same one character later."""
    codes = torch.frombuffer(bytearray(text, "utf-32-le"), dtype=torch.int32).long() - 31
    codes = torch.where(codes < CHARACTERS, codes.clamp_min(0), 0)
    count = (len(codes) - 1) // WINDOW
    inputs, targets = (codes[start : start + count * WINDOW].reshape(count, WINDOW) for start in (0, 1))
    return Examples((inputs,), targets)


def _dataset(name: str, text: str) -> Dataset:
    every = torch.arange(len(examples := windows(text)))
    kept = len(every) - min(TESTED, len(every) // 10)
    return Dataset(name, examples.take(every[:kept]), examples.take(every[kept:]))


def _multi30k(folder: Path) -> Dataset:
    lines = read_lines(find(folder, ("multi30k", "."), "train.en", PUBLISHED_MULTI30K))
    return _dataset("Multi30k", "\n".join(lines))


def _help(_: Path) -> Dataset:
    from pydoc_data.topics import topics

    return _dataset("help", "\n".join(topics.values()))


HELP = Source("Python's help texts", _help, stand_in="Multi30k")
ENGLISH = Source("Multi30k's English side", _multi30k, ("multi30k/train.en",), PUBLISHED_MULTI30K, without=HELP)
