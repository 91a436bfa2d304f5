"""Two ranks on gloo, in each trainer: equal to each other to the bit, and to one process on the joined batches."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integrations.ddp_worker import DTYPE, train
from tests.integrations.helpers import forget_accelerators, net

WORKER = Path(__file__).parent / "ddp_worker.py"
RANKS = 2

Results = dict[str, dict[str, Any]]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], Results]:
    """Of the ranks, and of a process alone."""
    forget_accelerators()
    root = str(WORKER.parent.parent.parent)
    usual = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    usual["OMP_NUM_THREADS"] = "1"
    group = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "test",
    }
    folder = tmp_path_factory.mktemp("ranks")
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder)],
            env={**usual, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
        for rank in range(RANKS)
    ]
    try:
        alone = train(tmp_path_factory.mktemp("alone"))
        for process in processes:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors.decode()
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)], alone


@pytest.fixture
def results(played: tuple[list[Any], Results]) -> tuple[Results, Results, Results]:
    """Of replicas on rank 0, on rank 1, and of a process alone."""
    (first, second), alone = played
    return first["replicas"], second["replicas"], alone


def test_trainers_under_fully_shard_are_a_loop_by_hand(played: tuple[list[Any], Results]) -> None:
    """To the bit: Lightning by its ModelParallelStrategy, accelerate by FSDP2, whose optimizer isn't used."""
    ranks, _ = played
    assert len(ranks[0]["sharded"]) == 4
    for each in (case for rank in ranks for case in rank["sharded"]):
        assert all(map(torch.equal, each["Lightning"], each["by hand"]))
        assert all(map(torch.equal, each["accelerate"], each["by hand"]))
        assert not torch.equal(each["by hand"][0], net(DTYPE)[0].weight)  # type: ignore[index]


def test_ranks_are_equal_to_the_bit(results: tuple[Results, Results, Results]) -> None:
    first, second, _ = results
    assert len(first) == 12
    for name, found in first.items():
        other = second[name]
        assert all(map(torch.equal, found["weights"], other["weights"])), name
        assert [found[key] for key in ("rate", "failed", "Q")] == [other[key] for key in ("rate", "failed", "Q")], name


def test_ranks_are_one_process_on_the_joined_batches(results: tuple[Results, Results, Results]) -> None:
    first, _, alone = results
    for name, found in first.items():
        one = alone[name]
        assert found["failed"] == one["failed"] == 0, name
        assert found["rate"] == pytest.approx(one["rate"], rel=1e-6), name
        for a, b in zip(found["weights"], one["weights"], strict=True):
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-9), name
