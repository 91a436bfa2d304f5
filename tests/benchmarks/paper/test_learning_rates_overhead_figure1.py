"""What the benchmarks of the front ends say: Figure 1, the overhead, the table of learning rates."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from apo.proximal import PROXIMAL_POINT
from benchmarks import readme
from benchmarks.common.results import load
from benchmarks.paper import figure1, learning_rates, overhead


def options(module: ModuleType, *arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.set_defaults(quick=False, device="cpu")
    module.add_arguments(parser)
    return parser.parse_args(arguments)


def test_figure_1_shows_what_the_paper_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {panel: weights[1:3] for panel, weights in figure1.PANELS.items()}
    monkeypatch.setattr(figure1, "PANELS", few)
    assert PROXIMAL_POINT.loss == PROXIMAL_POINT.fsd == "exact"
    drawn = figure1.run(options(figure1, "--out", str(tmp_path)))
    assert (tmp_path / "figure1.png").stat().st_size > 10_000
    grid = torch.linspace(-2, 2, 401, dtype=torch.float64)
    before = torch.tensor(drawn["before"])
    x, t = figure1.POINT
    at, far = (grid - x).abs() < 0.01, (grid - x).abs() > 1
    near = ((grid - x).abs() > 0.1) & ((grid - x).abs() < 0.3)

    def moved(panel: str, where: torch.Tensor) -> float:
        last = torch.tensor(list(drawn[panel].values())[-1])
        return (last - before)[where].abs().mean().item()

    needed = t - before[at].mean().item()
    # the weight-space term alone: a global adjustment
    assert moved("weight space", far) > 0.3 * needed
    # the function-space term alone: a spike that leaves even its neighbours
    assert moved("function space", at) > 0.8 * needed
    assert moved("function space", near) < 0.2 * needed
    # both: a local adjustment, which takes the neighbours with it
    assert moved("both", at) > 0.8 * needed
    assert moved("both", far) < 0.1 * needed
    assert moved("both", near) > 1.5 * moved("function space", near)


def measured(tmp_path: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    return overhead.run(
        options(overhead, "--seconds", "0.02", "--interval", "2", "--batch", "8", "--out", str(tmp_path), *arguments)
    )


@pytest.mark.parametrize("model", overhead.MODELS)
def test_overhead_times_every_contestant(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "WORDS", 50)
    monkeypatch.setattr(overhead, "_in_a_process", lambda *arguments: None)
    made = measured(tmp_path, "--models", model, "--width", "0.03")[model]
    front_ends = {"AdaptiveLR on SGDm", "APO, blocks of 64", "APO, its first 300 steps"}
    assert front_ends | {"SGDm", "AdamW, foreach", "AdamW, fused", "KFAC", "Shampoo"} < made["contestants"].keys()
    file = "overhead.json" if model == "mlp" else f"overhead-{model}.json"
    for row in load(tmp_path / file)["contestants"].values():
        assert row["step_seconds"] > 0
        assert row["periods"] >= 1
    assert made["contestants"]["SGDm"]["ratio"] == 1
    assert made["batch"] == 8


def test_the_models_are_those_of_the_paper() -> None:
    counts = {name: sum(p.numel() for p in each.build(1.0).parameters()) for name, each in overhead.MODELS.items()}
    transformer = 31_543_296 + 512 * overhead.WORDS
    assert counts == {"mlp": 1_796_010, "lenet": 62_006, "resnet18": 11_173_962, "transformer": transformer}
    (source, target), said = overhead.MODELS["transformer"].batch(512)
    assert source.shape[0] * target.shape[1] == len(said) == 512


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process its peak memory")
def test_peak_memory_is_that_of_the_state_and_the_work(tmp_path: Path) -> None:
    """Each in a process of its own. Momentum is one number a weight, Adam's moments two."""
    own = options(overhead, "--batch", "8", "--interval", "1", "--width", "1")
    own.model = "mlp"
    sgdm, adamw = (overhead._in_a_process(name, own) for name in ("SGDm", "AdamW, fused"))
    assert sgdm == pytest.approx(1, abs=0.3)
    assert adamw == pytest.approx(2, abs=0.3)


def test_the_docs_show_every_model_and_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files from before there were other models too."""
    monkeypatch.setattr(overhead, "_in_a_process", lambda *arguments: 2.04)
    measured(tmp_path / "here", "--models", "mlp,lenet", "--width", "0.03")
    (tmp_path / "there").mkdir()
    content = load(readme.OVERHEAD_RESULTS / "overhead.json")
    older = {name: {key: row[key] for key in ("step_seconds", "ratio")} for name, row in content["contestants"].items()}
    kept = {"environment": content["environment"], "contestants": older}
    (tmp_path / "there" / "overhead.json").write_text(json.dumps(kept))
    monkeypatch.setattr(readme, "COMMITTED", tmp_path)
    shown = readme.TABLES["overhead"]()
    titles = [line for line in shown.splitlines() if line.endswith(":")]
    assert [line.split(",")[0] for line in titles] == ["MLP 784-1000-1000-10"] * 2 + ["LeNet"]
    assert all("batch 8, interval 2, threads 1, width 0.03" in titles[place] for place in (0, 2))
    assert shown.count("| SGDm | ") == 3
    assert shown.count("| 1.00 | 2.0 |") == 2
    assert shown.count("| 1.00 | – |") == 1


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
    """From rates far too small and far too large, with the defaults for all."""
    epochs = learning_rates.EPOCHS // 2
    best = learning_rates.train(name, BEST_FIXED[name], adaptive=False, epochs=epochs)
    low, high = (learning_rates.train(name, lr, adaptive=True, epochs=epochs) for lr in (1e-4, 1000 * BEST_FIXED[name]))
    for learned in (low, high):
        assert learned.loss < LOSS[name]
        assert learned.accuracy > best.accuracy - 1.5  # of one run on 360 images, known to 1 point
    assert high.failed_trials > 0
    assert 1 / 4 < high.rate / low.rate < 4
