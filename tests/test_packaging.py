"""What can be said of the packages without building them; ``make package`` builds and uses them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import apo
import apo_kernels

ROOT = Path(__file__).parent.parent


def test_one_version() -> None:
    assert apo.__version__ == apo_kernels.__version__
    assert f"## {apo.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    written = [path for path in ROOT.glob("apo*/**/*.py") if re.search(r"^__version__ = ", path.read_text(), re.M)]
    assert written == [ROOT / "apo_kernels" / "__init__.py"]


def test_benchmarks_are_not_installed() -> None:
    include = re.search(r"find_packages\(include=\[(.*?)\]\)", (ROOT / "setup.py").read_text())
    assert include is not None
    assert set(re.findall(r'"(.*?)"', include[1])) == {"apo", "apo.*", "apo_kernels", "apo_kernels.*"}
    assert {path.parent.name for path in ROOT.glob("*/py.typed")} == {"apo", "apo_kernels"}


@pytest.mark.parametrize("workflow", ["ci.yml", "release.yml"])
def test_workflows_run_what_a_person_runs(workflow: str) -> None:
    assert "- run: .ci/run\n" in (ROOT / ".github" / "workflows" / workflow).read_text()
    steps = (ROOT / ".ci" / "run").read_text()
    assert [line for line in steps.splitlines() if line.startswith("make ")] == [
        "make test",
        "make ranks",
        "make targets",
        "make docs",
        "make package",
    ]
