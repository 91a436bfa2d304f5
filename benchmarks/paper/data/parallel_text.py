"""Parallel text, a sentence a line, plain or gzipped: Multi30k and IWSLT'14, German to English."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

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


class Corpus(NamedTuple):
    """Files of a corpus: folders, the names of the training and test parts, and where they are published."""

    name: str
    places: Sequence[str]
    train: str
    test: str
    published: str
    sizes: tuple[int, int]


def read_lines(path: Path) -> list[str]:
    """The lines, with subword marks of other tools (``"@@ "``) taken out."""
    with open_text(path) as file:
        return [line.strip().replace("@@ ", "") for line in file]


@lru_cache(maxsize=2)  # learning the words takes seconds, and every run of a search reads the same
def _encoded(folder: Path, corpus: Corpus) -> Dataset:
    (german, english), (test_german, test_english) = (
        [read_lines(find(folder, corpus.places, f"{part}.{side}", corpus.published)) for side in ("de", "en")]
        for part in (corpus.train, corpus.test)
    )
    for part, sides in ((corpus.train, (german, english)), (corpus.test, (test_german, test_english))):
        if len(sides[0]) != len(sides[1]):
            raise ValueError(f"{part}.de and {part}.en must have as many lines, but have {[*map(len, sides)]}")
    words = Vocabulary([*german, *english], WORDS)
    pairs = [(words.encode(de), words.encode(en)) for de, en in zip(german, english, strict=True)]
    train = [(de, en) for de, en in pairs if 0 < len(de) < LONGEST and 0 < len(en) < LONGEST]
    pairs = [(words.encode(de), words.encode(en)) for de, en in zip(test_german, test_english, strict=True)]
    test = [(de[: LONGEST - 1], en[: LONGEST - 1]) for de, en in pairs]
    extra = Translation(words, tuple(test_english))
    return Dataset(corpus.name, _examples(train), _examples(test), published=corpus.sizes, extra=extra)


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


def _source(corpus: Corpus) -> Source:
    files = [f"{corpus.places[0]}/{part}.{side}" for part in (corpus.train, corpus.test) for side in ("de", "en")]
    return Source(corpus.name, lambda folder: _encoded(folder.resolve(), corpus), files, corpus.published)


MULTI30K = _source(
    Corpus(
        name="Multi30k German–English",
        places=("multi30k", "."),
        train="train",
        test="test_2016_flickr",
        published="https://github.com/multi30k/dataset (data/task1/raw)",
        sizes=(29_000, 1_000),
    )
)
IWSLT14 = _source(
    Corpus(
        name="IWSLT'14 German–English",
        places=("iwslt14.tokenized.de-en", "iwslt14", "."),
        train="train",
        test="test",
        published="https://wit3.fbk.eu (as prepared by fairseq's examples/translation/prepare-iwslt14.sh)",
        sizes=(160_239, 6_750),
    )
)
