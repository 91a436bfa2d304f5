"""Processes on gloo: replicas equal to one process on the joined batch, and to each other to the bit; models that
are independent stay so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.apo import ranks_worker
from tests.apo.distributed_worker import RANKS, train
from tests.apo.helpers import played, same

WORKER = Path(__file__).parent / "distributed_worker.py"


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return played("tests.apo.ranks_worker", "two_ranks", 2, tmp_path_factory.mktemp("two_ranks"))


@pytest.mark.parametrize("kind", ranks_worker.FRONT_ENDS)
@pytest.mark.parametrize("name", ranks_worker.OPTIONS)
def test_replicas_under_any_options_of_ddp(kind: str, name: str, two_ranks: list[Any]) -> None:
    """Whatever module the objective was given: equal to the bit, and to one process on the joined batch."""
    first, second = (found[f"{kind}, {name}"] for found in two_ranks)
    assert same(first, second)
    options = {k: v for k, v in ranks_worker.OPTIONS[name].items() if k in ("parts", "own_loss", "unused")}
    expected = ranks_worker.replicas(None, kind, **options)
    assert all(torch.allclose(a, b, rtol=1e-7, atol=1e-9) for a, b in zip(first, expected, strict=True))


@pytest.mark.parametrize("kind", ranks_worker.FRONT_ENDS)
@pytest.mark.parametrize("name", [*ranks_worker.ONLY_EQUAL, "averaged by hand"])
def test_ranks_of_one_model_stay_equal(kind: str, name: str, two_ranks: list[Any]) -> None:
    first, second = (found[f"{kind}, {name}"] for found in two_ranks)
    assert same(first, second)
    assert all(x.isfinite().all() for x in first)
    assert first[-1][1] == (1 if name == "NaN on one rank" else 0)  # skipped, on both
    assert first[-1][2] == ranks_worker.STEPS


@pytest.mark.parametrize("kind", ranks_worker.FRONT_ENDS)
@pytest.mark.parametrize("name", ranks_worker.SWEEPS)
def test_independent_models_give_what_one_process_gives(kind: str, name: str, two_ranks: list[Any]) -> None:
    for rank, found in enumerate(two_ranks):
        expected = ranks_worker.alone(rank, kind, **ranks_worker.SWEEPS[name](rank))
        assert same(found[f"{kind}, sweep of {name}"], expected)


def test_a_model_on_one_rank_only_trains_alone(two_ranks: list[Any]) -> None:
    """And what both ranks train afterwards, in the same shapes, is one model again."""
    assert same(two_ranks[0]["on one rank only"], ranks_worker.alone(None, "APO"))
    assert same(*(found["after one rank alone"] for found in two_ranks))


def test_two_models_of_two_replicas(tmp_path: Path) -> None:
    found = played("tests.apo.ranks_worker", "subgroups", 4, tmp_path)
    for kind in ("AdaptiveLR", "APO"):
        assert same(found[0][kind], found[1][kind])
        assert same(found[2][kind], found[3][kind])
        assert not same(found[0][kind], found[2][kind])
        for each in found:
            assert each[f"{kind}, not told"].startswith("process_group must be given: some ranks of the default group")


def test_an_exception_on_one_rank_lets_no_other_go_on(tmp_path: Path) -> None:
    """An error on both within the group's timeout, at the same step and with the same weights."""
    first, second = played("tests.apo.ranks_worker", "raising", 2, tmp_path, failing=True)
    assert second["error"] == "stop"
    assert first["error"] is not None
    assert first["steps"] == second["steps"] == 2
    assert same(first["weights"], second["weights"])


def test_two_ranks_are_one_process_and_equal_to_the_bit(tmp_path: Path) -> None:
    root = str(WORKER.parent.parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(WORKER), str(tmp_path)]
    ranks = [
        subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(RANKS)
    ]
    try:
        for process in ranks:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in ranks:
            process.kill()
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS))
    alone = train(None, torch.float64)
    for dtype, results in first.items():
        for name, result in results.items():
            for a, b in zip(result["weights"], second[dtype][name]["weights"], strict=True):
                assert torch.equal(a, b), (dtype, name)
            assert {k: v for k, v in result.items() if k != "weights"} == {
                k: v for k, v in second[dtype][name].items() if k != "weights"
            }
    for name, result in first[str(torch.float64)].items():
        for a, b in zip(result["weights"], alone[name]["weights"], strict=True):
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-9), name
        assert result["rate"] == pytest.approx(alone[name]["rate"], rel=1e-6)
        assert result["Q"] == pytest.approx(alone[name]["Q"], rel=1e-6)
        assert result["failed"] == alone[name]["failed"] == (0 if name != "failing" else result["failed"])
    assert first[str(torch.float64)]["failing"]["failed"] > 0
