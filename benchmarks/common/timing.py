"""Timing that can be compared: one process, interleaved rounds, medians with their quartiles."""

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median, quantiles

import torch

Call = Callable[[], object]

WINDOW = 0.005  # seconds: what is shorter would be timed with cold caches and the clock's own grain


def device_timer() -> float:
    """Seconds, read after the device has finished all queued work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def training_timer() -> float:
    """On one thread of a CPU the seconds of this process, which others don't disturb; else :func:`device_timer`."""
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.process_time() if alone else device_timer()


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Let torch use ``count`` threads of the CPU within the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
    warm: bool = False,
    advance: Callable[[float], object] = lambda share: None,
) -> dict[str, Sample]:
    """Run the calls in turn, round after round, so that what slows the machine slows them all.

    Each call is warmed up, and takes part until it has used ``seconds``: in ``least`` to ``most`` rounds, or in one if
    it takes more than four times ``seconds``. In a round it is repeated until ``WINDOW`` is filled, and the mean
    counts. The order of a round is drawn from a fixed seed, because a call finds the caches as its neighbour left them.
    ``warm``: each has been called before. ``advance`` is told after each call how far the whole is, from 0 to 1.
    """
    samples = {name: Sample() for name in calls}

    def share(name: str) -> float:
        """How much of its rounds a call has had."""
        rounds, used = len(samples[name].times), sum(samples[name].times) * repeats[name]
        enough = 1 if used > 4 * seconds * rounds else least
        return min(1.0, rounds / enough, max(used / seconds, rounds / most))

    repeats = {name: _repeats(call, warm) for name, call in calls.items()}
    active, order = list(calls), random.Random(0)
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        while active:
            for name in order.sample(active, len(active)):
                samples[name].times.append(_time(calls[name], repeats[name]))
                advance(sum(map(share, calls)) / len(calls))
            active = [name for name in active if share(name) < 1]
    finally:
        if was_enabled:
            gc.enable()
    return samples


def _time(call: Call, repeats: int) -> float:
    """Seconds of one call: the mean over ``repeats``."""
    start = device_timer()
    for _ in range(repeats):
        call()
    return (device_timer() - start) / repeats


def _repeats(call: Call, warm: bool) -> int:
    """How many calls fill ``WINDOW``."""
    if not warm:
        call()
    return max(1, math.ceil(WINDOW / max(_time(call, 1), 1e-9)))
