"""Words of a translation: byte-pair encoding (Sennrich et al. 2016), learned on the training text.

A sentence is cut into words and signs; one that follows a space carries a mark, so that joining the pieces gives the
sentence back and BLEU is taken on plain text.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from heapq import heapify, heappop, heappush
from itertools import pairwise, takewhile

PAD, OPEN, CLOSE, UNKNOWN = range(4)
SPECIAL = ("<pad>", "<open>", "<close>", "<unknown>")
SPACE = "▁"
_PART = re.compile(r"\s?(?:\w+|[^\w\s])")

Pair = tuple[str, str]


class Vocabulary:
    """At most ``size`` pieces of words, the four special ones included, and their numbers."""

    def __init__(self, sentences: Iterable[str], size: int) -> None:
        counts = Counter(part for sentence in sentences for part in _parts(sentence))
        letters = Counter[str]()
        for word, count in counts.items():
            letters.update({letter: count * word.count(letter) for letter in word})
        kept = [letter for letter, _ in letters.most_common(size - len(SPECIAL))]
        self.merges = {pair: rank for rank, pair in enumerate(_learned(counts, size - len(SPECIAL) - len(kept)))}
        self.pieces = list(dict.fromkeys([*SPECIAL, *kept, *(a + b for a, b in self.merges)]))
        self.numbers = {piece: number for number, piece in enumerate(self.pieces)}
        self._cut = lru_cache(maxsize=100_000)(self._cut_word)

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, sentence: str) -> list[int]:
        """The pieces' numbers; a letter that was never seen is UNKNOWN."""
        return [self.numbers.get(piece, UNKNOWN) for part in _parts(sentence) for piece in self._cut(part)]

    def decode(self, numbers: Sequence[int]) -> str:
        """The sentence, up to the first CLOSE."""
        said = takewhile(lambda number: number != CLOSE, numbers)
        pieces = ("?" if number == UNKNOWN else self.pieces[number] for number in said if number not in (PAD, OPEN))
        return "".join(pieces).replace(SPACE, " ").strip()

    def _cut_word(self, word: str) -> tuple[str, ...]:
        """Merge the earliest-learned pair, until none is left."""
        pieces = list(word)
        while len(pieces) > 1:
            ranks = [self.merges.get(pair, len(self.merges)) for pair in pairwise(pieces)]
            best = min(range(len(ranks)), key=ranks.__getitem__)
            if ranks[best] == len(self.merges):
                break
            pieces[best : best + 2] = [pieces[best] + pieces[best + 1]]
        return tuple(pieces)


def _parts(sentence: str) -> list[str]:
    return [part.replace(" ", SPACE) for part in _PART.findall(" " + " ".join(sentence.split()))]


def _learned(counts: Counter[str], pieces_wanted: int) -> list[Pair]:
    """The most frequent pairs, one after the other, until ``pieces_wanted`` new pieces are made.

    Only words that hold the merged pair are counted again. The heap may hold a pair with a count it no longer has.
    """
    words = [(list(word), count) for word, count in sorted(counts.items())]
    pairs = Counter[Pair]()
    where: dict[Pair, set[int]] = defaultdict(set)
    for number, (pieces, count) in enumerate(words):
        for pair in pairwise(pieces):
            pairs[pair] += count
            where[pair].add(number)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapify(heap)
    found: list[Pair] = []
    made: set[str] = set()
    while len(made) < pieces_wanted and heap:
        negative, best = heappop(heap)
        if pairs[best] != -negative:
            if pairs[best] > 1:
                heappush(heap, (-pairs[best], best))
            continue
        if pairs[best] < 2:
            break
        found.append(best)
        made.add(best[0] + best[1])  # "a" + "bc" and "ab" + "c" make the same piece
        grown: set[Pair] = set()
        for number in where.pop(best):
            pieces, count = words[number]
            for pair in pairwise(pieces):
                pairs[pair] -= count
            _merge(pieces, best)
            for pair in pairwise(pieces):
                pairs[pair] += count
                where[pair].add(number)
                grown.add(pair)
        for pair in grown:
            heappush(heap, (-pairs[pair], pair))
    return found


def _merge(pieces: list[str], pair: Pair) -> None:
    """Join the pair wherever it stands, from the left."""
    place = 0
    while place < len(pieces) - 1:
        if (pieces[place], pieces[place + 1]) == pair:
            pieces[place : place + 2] = [pair[0] + pair[1]]
        place += 1
