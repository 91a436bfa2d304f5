"""The study of the meta-update: every way runs, results are kept, and the table says what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.paper.studies import command
from benchmarks.paper.studies.command import one_run
from benchmarks.paper.studies.tables import markdown, summary
from benchmarks.paper.studies.variants import BASELINES, NO_LONGER_RUN, VARIANTS
from benchmarks.paper.tasks import Batches, named


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
    assert "| 0.300 (0.200 to 0.400; 3) | 2.0 |" in markdown(runs)


def test_grids_are_equal() -> None:
    assert len({len(baseline.grid) for baseline in BASELINES.values()}) == 1


def test_names_can_be_given_by_comma() -> None:
    assert not [name for name in (*VARIANTS, *BASELINES) if "," in name]


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
    monkeypatch.setattr(command, "one_run", lambda *a, **k: pytest.fail("was run again"))
    assert main(arguments) == 0
    assert "P fixed" in (tmp_path / "meta-update.md").read_text()


def test_the_same_batch_is_that_of_the_step() -> None:
    task = named("diabetes")
    batches = Batches(task.data().train, task.batch_size, 0)
    inputs, _ = batches.batch(3)
    assert batches.latest is inputs


def test_every_way_of_every_study_stands_in_its_table() -> None:
    for study in command.STUDIES.values():
        rows = markdown({f"t/{name}/0": held(0.5) for name in study}).splitlines()[2:]
        assert {row.split("|")[1].strip() for row in rows} == set(study)


def test_results_of_ways_that_are_no_longer_run_stand_in_the_table() -> None:
    assert not NO_LONGER_RUN.keys() & VARIANTS.keys()
    (row,) = markdown({"t/moments/0": held(0.5)}).splitlines()[2:]
    assert row.startswith(f"| moments | {NO_LONGER_RUN['moments']} | 0.500")
