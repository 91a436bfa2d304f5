"""Timing that can be compared: one process, interleaved rounds, medians with their quartiles."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median, quantiles

import torch

__all__ = ["Sample", "device_timer", "interleave"]

Call = Callable[[], object]


def device_timer() -> float:
    """Seconds, read after the device has finished all that was asked of it (for pytest-benchmark and here)."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass
class Sample:
    """The times of one call, in seconds, in the order they were taken."""

    times: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return median(self.times)

    @property
    def spread(self) -> tuple[float, float]:
        """The lower and the upper quartile."""
        if len(self.times) < 2:
            return self.times[0], self.times[0]
        low, _, high = quantiles(self.times, n=4, method="inclusive")
        return low, high


def interleave(
    calls: Mapping[str, Call],
    *,
    seconds: float,
    least: int = 3,
    most: int = 101,
    advance: Callable[[float], object] = lambda share: None,
) -> dict[str, Sample]:
    """Run the calls in turn, round after round, so that what slows the machine slows them all.

    Each is warmed up once, then takes part until it has used ``seconds`` (but ``least`` rounds at the least,
    ``most`` at the most). The order turns by one each round: none always follows the same neighbour.

    Args:
        calls: what to time, by name.
        seconds: what each may use.
        advance: told after each call how far the whole is, from 0 to 1.
    """
    samples = {name: Sample() for name in calls}
    for call in calls.values():
        call()
    active, turn = list(calls), 0
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        while active:
            turn += 1
            for name in active[turn % len(active) :] + active[: turn % len(active)]:
                start = device_timer()
                calls[name]()
                samples[name].times.append(device_timer() - start)
                advance(sum(_share(s, seconds, least, most) for s in samples.values()) / len(samples))
            active = [name for name in active if _share(samples[name], seconds, least, most) < 1]
    finally:
        if was_enabled:
            gc.enable()
    return samples


def _share(sample: Sample, seconds: float, least: int, most: int) -> float:
    """How much of its rounds a call has had."""
    rounds = len(sample.times)
    return min(1.0, rounds / least, max(sum(sample.times) / seconds, rounds / most))
