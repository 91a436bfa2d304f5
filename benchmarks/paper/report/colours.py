"""How optimizers are drawn: a colour each, the same in every figure."""

from __future__ import annotations

# Okabe and Ito's colours, which every kind of eye tells apart.
_COLOURS = {
    "sgd": "#999999",
    "sgdm": "#E69F00",
    "rmsprop": "#56B4E9",
    "adam": "#009E73",
    "adamw": "#009E73",
    "kfac": "#D55E00",
    "ekfac": "#CC79A7",
    "shampoo": "#F0E442",
    "apo": "#0072B2",
}


def colour(optimizer: str) -> str:
    """Of a base optimizer; its learned and scheduled forms share it. ``apo-lr`` alone is SGDm's."""
    base = optimizer.partition("+")[0]
    if base.startswith("apo-lr"):
        base = base.partition(":")[2] or "sgdm"
    return _COLOURS.get(base, "black")


def dashes(optimizer: str) -> str:
    """Solid at a fixed rate, dashed where the rate is learned, dotted under a manual schedule."""
    if optimizer.startswith("apo-lr"):
        return "--"
    return ":" if "+" in optimizer else "-"
