"""Types for options of commands. argparse names the option whose value they refuse."""

import math
from argparse import ArgumentTypeError
from collections.abc import Callable, Collection


def names_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """Names by comma, each of ``known``; ``none`` for none."""

    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip() and text != "none"]
        for name in names:
            if name not in known:
                raise ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return names

    return parse


def above_0(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ArgumentTypeError(f"must be above 0 and finite, but got {text}")
    return value


def at_least_1(text: str) -> int:
    if int(text) < 1:
        raise ArgumentTypeError(f"must be >= 1, but got {text}")
    return int(text)
