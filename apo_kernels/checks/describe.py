"""How errors describe what they got."""

from __future__ import annotations

from torch import Tensor

__all__ = ["LISTS", "described", "kind_of", "length_text", "shape_text"]

LISTS = (list, tuple)


def kind_of(x: object) -> str:
    return f"a {type(x).__name__}" if isinstance(x, Tensor) else f"{x!r} of type {type(x).__name__}"


def described(x: object) -> str:
    return f"a {x.dtype} tensor of shape {tuple(x.shape)} on {x.device}" if isinstance(x, Tensor) else kind_of(x)


def shape_text(*sizes: object) -> str:
    return f"({', '.join(map(str, sizes))})"


def length_text(x: object) -> str:
    return f"a {type(x).__name__} of {len(x)}" if isinstance(x, LISTS) else kind_of(x)
