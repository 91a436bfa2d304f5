"""A run killed with SIGKILL at any moment and resumed from its last checkpoint ends as one that wasn't."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.apo.resume_worker import resumptions


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_killed_at_random_moments_and_resumed_to_the_bit(tmp_path: Path) -> None:
    """The short form; ``python -m tests.apo.resume_worker --kills 100`` is the long one."""
    done, resumed, ended = resumptions(8, tmp_path, steps=12)
    assert done == 8
    assert resumed > 0
    assert ended > 0
