"""Parallel text, one sentence per line, plain or gzipped: Multi30k and IWSLT'14, German to English."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.paper.data.examples import Dataset, Examples
from benchmarks.paper.data.source import Source, find, open_text
from benchmarks.paper.data.vocabulary import CLOSE, OPEN, PAD, Vocabulary

WORDS = 8000
"""Pieces of words in the vocabulary that both languages share."""

LONGEST = 100
"""A training pair of more pieces is left out; a longer sentence to translate is cut."""


@dataclass(frozen=True)
class Translation:
    """What translating needs beside tensors: the words, and the test's references as plain text."""

    vocabulary: Vocabulary
    references: Sequence[str]


def read_lines(path: Path) -> list[str]:
    """The lines, with subword marks of other tools (``"@@ "``) taken out."""
    with open_text(path) as file:
        return [line.strip().replace("@@ ", "") for line in file]


def _read(name: str, paths: Sequence[Path], sizes: tuple[int, int]) -> Dataset:
    """``paths``: German and English to train on, then to test on."""
    german, english, test_german, test_english = map(read_lines, paths)
    for i, sides in ((0, (german, english)), (2, (test_german, test_english))):
        if len(sides[0]) != len(sides[1]):
            names = " and ".join(path.name for path in paths[i : i + 2])
            raise ValueError(f"{names} must have as many lines, but have {[*map(len, sides)]}")
    words = Vocabulary([*german, *english], WORDS)
    pairs = [(words.encode(de), words.encode(en)) for de, en in zip(german, english, strict=True)]
    train = [(de, en) for de, en in pairs if 0 < len(de) < LONGEST and 0 < len(en) < LONGEST]
    pairs = [(words.encode(de), words.encode(en)) for de, en in zip(test_german, test_english, strict=True)]
    test = [(de[: LONGEST - 1], en[: LONGEST - 1]) for de, en in pairs]
    extra = Translation(words, tuple(test_english))
    return Dataset(name, _examples(train), _examples(test), published=sizes, extra=extra)


def _examples(pairs: Sequence[tuple[list[int], list[int]]]) -> Examples:
    """The decoder is given a sentence from OPEN on, and is to say it up to CLOSE."""
    source = _padded([[*de, CLOSE] for de, _ in pairs])
    given = _padded([[OPEN, *en] for _, en in pairs])
    wanted = _padded([[*en, CLOSE] for _, en in pairs])
    return Examples((source, given), wanted, pad=PAD)


def _padded(sentences: Sequence[list[int]]) -> Tensor:
    out = torch.full((len(sentences), max(map(len, sentences))), PAD)
    for row, sentence in zip(out, sentences, strict=True):
        row[: len(sentence)] = torch.tensor(sentence)
    return out


def _source(name: str, places: Sequence[str], test: str, published: str, sizes: tuple[int, int]) -> Source:
    """``places``: folders where the files may lie; ``test``: what those to test on are called."""
    files = [f"{part}.{side}" for part in ("train", test) for side in ("de", "en")]

    @lru_cache(maxsize=1)  # learning the words takes seconds, and every run of a search reads the same
    def read(folder: Path) -> Dataset:
        return _read(name, [find(folder, places, file, published) for file in files], sizes)

    return Source(name, lambda folder: read(folder.resolve()), [f"{places[0]}/{file}" for file in files], published)


PUBLISHED_MULTI30K = "https://github.com/multi30k/dataset (data/task1/raw)"
_IWSLT14 = "https://wit3.fbk.eu (as prepared by fairseq's examples/translation/prepare-iwslt14.sh)"
_IWSLT14_PLACES = ("iwslt14.tokenized.de-en", "iwslt14", ".")
MULTI30K = _source(
    "Multi30k German–English", ("multi30k", "."), "test_2016_flickr", PUBLISHED_MULTI30K, (29_000, 1_000)
)
IWSLT14 = _source("IWSLT'14 German–English", _IWSLT14_PLACES, "test", _IWSLT14, (160_239, 6_750))
