"""Two processes on gloo: equal to one on the joined batch, and to each other to the bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.apo.distributed_worker import RANKS, train

WORKER = Path(__file__).parent / "distributed_worker.py"


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
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
