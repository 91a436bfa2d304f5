"""The study of the meta-update: every way runs, results are kept, and the table says what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import studies
from benchmarks.__main__ import main
from benchmarks.studies.running import one_run
from benchmarks.studies.tables import markdown, summary
from benchmarks.studies.variants import BASELINES, VARIANTS


def held(*losses: float) -> dict[str, list[float]]:
    return {"steps": [1.0] * len(losses), "losses": list(losses), "seconds": [2.0] * len(losses)}


def test_the_table_takes_the_better_finalist_and_counts_what_diverged() -> None:
    runs: dict[str, Any] = {
        "t/KFAC/0/lr=1": held(9, 0.1),
        "t/KFAC/1/lr=1": held(float("nan")),
        "t/KFAC/2/lr=1": held(float("nan")),
        "t/KFAC/0/lr=2": held(0.2),
        "t/KFAC/1/lr=2": held(0.4),
        "t/KFAC/2/lr=2": held(0.3),
        "t/KFAC/0/lr=3": held(0.11),  # not among the finalists
        "t/default/0": held(0.5),
    }
    assert summary(runs) == {"KFAC": {"t": (0.3, 0.2, 0.4, 3)}, "default": {"t": (0.5, 0.5, 0.5, 1)}}
    assert "| 0.3 (0.2 to 0.4; 3) | 2.0 |" in markdown(runs)


def test_grids_are_equal() -> None:
    assert len({len(baseline.grid) for baseline in BASELINES.values()}) == 1


@pytest.mark.parametrize("name", VARIANTS)
def test_every_way_learns(name: str) -> None:
    found = one_run("diabetes", name, None, seed=0, quick=True)
    assert found["losses"][-1] < found["losses"][0]


def test_runs_are_kept_and_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["studies", "--quick", "--out", str(tmp_path), "--study-tasks", "diabetes", "--seeds", "1"]
    arguments += ["--variants", "P fixed", "--against", "none"]
    assert main(arguments) == 0
    runs = json.loads((tmp_path / "meta-update.json").read_text())["runs"]
    assert list(runs) == ["diabetes/P fixed/0"]
    monkeypatch.setattr(studies, "one_run", lambda *a, **k: pytest.fail("was run again"))
    assert main(arguments) == 0
    assert "P fixed" in (tmp_path / "meta-update.md").read_text()
