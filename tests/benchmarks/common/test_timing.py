"""Interleaving: everybody takes turns, uses what it is given, and is counted right."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.common import timing
from benchmarks.common.timing import Sample, cpu_threads, interleave, training_timer


def test_rounds_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "WINDOW", 0.0)
    order: list[str] = []
    samples = interleave({name: lambda name=name: order.append(name) for name in "abc"}, seconds=60.0, most=20)
    rounds = ["".join(order[i : i + 3]) for i in range(6, len(order), 3)]  # after two calls each to warm up
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert all(len(sample.times) == 20 for sample in samples.values())
    for name in "abc":  # turning the order alone would leave everybody behind the same neighbour
        assert {each[each.index(name) - 1] for each in rounds if each[0] != name} == set("abc") - {name}


class Clock:
    """Time that passes only when somebody sleeps: no load on the machine can change it."""

    def __init__(self) -> None:
        self.now, self.naps = 0.0, 0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.naps += 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "device_timer", clock)
    return clock


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the wall clock is read")
def test_training_on_one_thread_is_timed_by_the_process() -> None:
    for threads, most in ((1, 0.03), (2, 1e9)):
        with cpu_threads(threads):
            start = training_timer()
            time.sleep(0.06)
            assert (threads - 1) * 0.05 < training_timer() - start < most


def test_short_calls_are_repeated_and_divided(clock: Clock) -> None:
    sample = interleave({"call": lambda: clock.sleep(0.0005)}, seconds=60.0, most=3)["call"]
    assert clock.naps >= 3 * timing.WINDOW / 0.0005
    assert sample.times == pytest.approx([0.0005] * 3)


def test_who_is_slow_gets_fewer_rounds_but_not_too_few(clock: Clock) -> None:
    calls = {"slow": lambda: clock.sleep(0.03), "fast": lambda: clock.sleep(0.001), "slowest": lambda: clock.sleep(0.3)}
    samples = interleave(calls, seconds=0.05, least=2, most=8)
    assert len(samples["slow"].times) == 2
    assert len(samples["fast"].times) == 8
    assert len(samples["slowest"].times) == 1  # one call of more than four times what it may use


def test_sample() -> None:
    sample = Sample([3.0, 1.0, 2.0, 5.0, 4.0])
    assert sample.median == 3.0
    assert sample.spread == (2.0, 4.0)
    assert Sample([1.0]).spread == (1.0, 1.0)


def test_progress_reaches_the_end() -> None:
    shares: list[float] = []
    interleave({"a": lambda: None, "b": lambda: time.sleep(0.002)}, seconds=0.02, most=3, advance=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
