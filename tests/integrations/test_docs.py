"""docs/trainers.md keeps its word: the examples run as written, one after the other, and are short."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from apo.integrations import front_end
from tests.integrations.helpers import forget_accelerators

TEXT = (Path(__file__).parent.parent.parent / "docs" / "trainers.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_each_is_at_most_15_lines() -> None:
    assert len(BLOCKS) == 5
    for block in BLOCKS:
        assert len([line for line in block.splitlines() if line.strip()]) <= 15, block


def test_they_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    forget_accelerators()
    torch.manual_seed(0)
    scope: dict[str, Any] = {}

    def run(code: str) -> None:
        exec(compile(code, "docs/trainers.md", "exec"), scope)

    digits, lightning, transformers, mixin, accelerate = BLOCKS
    run(digits)
    run(lightning)
    assert any(name.startswith("apo/") for name in scope["trainer"].callback_metrics)
    for code in (transformers, mixin):
        run(code)
        lines = [line for line in scope["trainer"].state.log_history if "loss" in line]
        assert len(lines) == 4
        assert any(name.startswith("apo/") for name in lines[0])
        assert lines[-1]["loss"] < lines[0]["loss"]
    run(accelerate)
    optimizer = front_end(scope["optimizer"])
    assert optimizer is not None
    assert optimizer.steps == 15
