"""What a step costs beside SGD's: every contestant, every model, and the tables of the docs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import readme
from benchmarks.common.results import load
from benchmarks.paper import overhead
from tests.benchmarks.paper.helpers import options


def measured(tmp_path: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    return overhead.run(
        options(overhead, "--seconds", "0.02", "--interval", "2", "--batch", "8", "--out", str(tmp_path), *arguments)
    )


@pytest.mark.parametrize("model", overhead.MODELS)
def test_overhead_times_every_contestant(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "WORDS", 50)
    monkeypatch.setattr(overhead, "_in_a_process", lambda *arguments: None)
    made = measured(tmp_path, "--models", model, "--width", "0.03")[model]
    front_ends = {"AdaptiveLR on SGDm", "APO, blocks of 64", overhead.AT_FIRST}
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
    content = load(readme.STEP_RESULTS / "overhead.json")
    older = {name: {key: row[key] for key in ("step_seconds", "ratio")} for name, row in content["contestants"].items()}
    kept = {"environment": content["environment"], "contestants": older}
    (tmp_path / "there" / "overhead.json").write_text(json.dumps(kept))
    monkeypatch.setattr(readme, "COMMITTED", tmp_path)
    shown = readme.TABLES["overhead"]()
    titles = [line for line in shown.splitlines() if line.endswith(":")]
    assert [line.split(",")[0] for line in titles] == ["MLP 784-1000-1000-10"] * 2 + ["LeNet"]
    assert all("batch 8, interval 2, threads 1, width 0.03" in titles[place] for place in (0, 2))
    of_sgdm = [line.split(" | ", 2)[2] for line in shown.splitlines() if line.startswith("| SGDm | ")]
    assert sorted(of_sgdm) == ["1.00 | 2.0 |", "1.00 | 2.0 |", "1.00 | – |"]
