"""docs/examples/sharded: each script, started by torchrun, learns on two ranks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import DOCS


@pytest.mark.parametrize("name", ["ddp", "fsdp", "tensor_parallel"])
def test_it_learns(name: str, tmp_path: Path) -> None:
    script = DOCS / "examples" / "sharded" / f"{name}.py"
    assert len(script.read_text().splitlines()) <= 60
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    root = str(DOCS.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, *launch, str(script), "12", str(tmp_path / "saved")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    losses = [float(x) for x in re.findall(r"loss (\S+)", done.stdout)]
    assert losses[-1] < losses[0]
