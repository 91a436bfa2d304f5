"""Refusing bad arguments: the error names the argument, its value and what it must be."""

import math


def number(name: str, value: float, *, above: bool = False, below: float = math.inf) -> float:
    """A finite number, at least 0 (greater where ``above``) and less than ``below``."""
    if not (math.isfinite(value) and (value > 0 if above else value >= 0) and value < below):
        bounds = f"{'>' if above else '>='} 0" + (f" and < {below:g}" if below < math.inf else "")
        raise ValueError(f"{name} must be a finite number {bounds}, but got {value!r}")
    return float(value)


def integer(name: str, value: int, *, least: int) -> int:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, but got {value!r}")
    return value
