"""What results files say of where they were taken, and how they hold what JSON has no number for."""

from __future__ import annotations

from pathlib import Path

from benchmarks.__main__ import main
from benchmarks.common import results


def test_environment(tmp_path: Path) -> None:
    main(["environment", "--out", str(tmp_path)])
    assert results.load(tmp_path / "environment.json")["environment"]["cores"] >= 1


def test_results_keep_infinities(tmp_path: Path) -> None:
    path = results.write(tmp_path, "x", "cpu", {"rows": [float("inf"), float("nan"), 1.5]})
    assert results.load(path)["rows"] == ["inf", "nan", 1.5]
