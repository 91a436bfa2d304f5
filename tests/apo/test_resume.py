"""A run killed with SIGKILL and resumed from its last checkpoint ends as one that wasn't."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from tests.apo.resume_worker import train

WORKER = Path(__file__).parent / "resume_worker.py"


def test_killed_and_resumed_to_the_bit(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole.pt")
    path = tmp_path / "killed.pt"
    root = str(WORKER.parent.parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    killed = subprocess.run(
        [sys.executable, str(WORKER), str(path), "17"], env=environment, timeout=120, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert torch.load(path, weights_only=True)["step"] == 15
    resumed = train(path)
    assert len(resumed) == len(whole)
    for a, b in zip(resumed, whole, strict=True):
        assert torch.equal(a, b)
