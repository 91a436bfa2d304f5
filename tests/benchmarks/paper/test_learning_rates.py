"""The table of learning rates, and rates that are learned from any start."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.common.results import load
from benchmarks.paper import learning_rates
from tests.benchmarks.paper.helpers import options


def test_the_table_of_learning_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning_rates, "FIXED", (1e-2, 1e-1))
    monkeypatch.setattr(learning_rates, "INITIAL", (1e-3,))
    made = learning_rates.run(options(learning_rates, "--seeds", "1", "--epochs", "1", "--out", str(tmp_path)))
    assert list(made["optimizers"]) == ["SGD", "SGDm", "RMSprop", "Adam"]
    for each in load(tmp_path / "learning_rates.json")["optimizers"].values():
        assert [run["initial"] for run in each["fixed"]] == [1e-2, 1e-1]
        assert [run["initial"] for run in each["learned"]] == [1e-3, 1000 * each["best_fixed"]]


BEST_FIXED = {"SGD": 0.3, "SGDm": 0.3, "RMSprop": 0.003, "Adam": 0.03}
"""The best of the seven fixed rates by training loss, from ``learning_rates.run`` (which compares all, over seeds)."""


LOSS = {"SGD": 0.1, "SGDm": 0.01, "RMSprop": 0.06, "Adam": 0.01}
"""What the training loss ends below, after half of the benchmark's epochs."""


@pytest.mark.parametrize("name", learning_rates.OPTIMIZERS)
def test_learned_rates_on_digits(name: str) -> None:
    """From a rate that is far too small, and from one that is too large, with the defaults for all."""
    epochs = learning_rates.EPOCHS // 2
    best = learning_rates.train(name, BEST_FIXED[name], adaptive=False, epochs=epochs)
    low, high = (learning_rates.train(name, lr, adaptive=True, epochs=epochs) for lr in (1e-4, 1.0))
    for learned in (low, high):
        assert learned.loss < LOSS[name]
        assert learned.accuracy > best.accuracy - 1.5  # of one run each on 360 images, known to 1 point
    assert 1 / 20 < high.rate / low.rate < 20  # they start four orders apart
