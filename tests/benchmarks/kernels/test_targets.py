"""The table of targets: what is compiled is shown and written, and a fault ends the run with an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from apo_kernels.targets import TARGETS
from benchmarks.__main__ import main
from benchmarks.common import results
from benchmarks.kernels import targets

pytest.importorskip("triton.language")
from apo_kernels.triton.tools.compile_ahead import cases

ARGUMENTS = ["targets", "--target", "sm_90", "--dtype", "bfloat16"]


class Pool:
    """In place of processes: rows that were made up, in the order of the work."""

    faults: tuple[str, ...] = ()

    def __init__(self, *_: object) -> None: ...

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None: ...

    def map(self, _: object, *work: Any) -> list[list[dict[str, Any]]]:
        names, dtypes, _precisions, firsts = work
        every = list(cases(TARGETS[names[0]], getattr(torch, dtypes[0])))
        found = {"precision": "ieee", "warps": 4, "registers": 99, "spills": 0, "shared": 2048, "matrix": {"HMMA.": 2}}
        return [
            [
                {
                    "target": name,
                    "dtype": dtype,
                    "stage": case.stage,
                    "size": case.size,
                    "tile": targets.tile(case.constants),
                    "faults": list(self.faults[at : at + 1]),
                    **found,
                }
                for at, case in enumerate(every[first : first + targets.TOGETHER], first)
            ]
            for name, dtype, first in zip(names, dtypes, firsts, strict=True)
        ]


def test_every_case_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(targets, "ProcessPoolExecutor", Pool)
    assert main([*ARGUMENTS, "--out", str(tmp_path)]) == 0
    content = results.load(tmp_path / "targets.json")
    expected = [(case.stage, case.size) for case in cases(TARGETS["sm_90"], torch.bfloat16)]
    assert [(row["stage"], row["size"]) for row in content["kernels"]] == expected
    assert content["faults"] == []
    assert content["triton"] == content["environment"]["packages"]["triton"]


def test_a_fault_ends_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(targets, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(Pool, "faults", ("7 spills",))
    with pytest.raises(SystemExit, match=r"at fault:\nsm_90 bfloat16 tile_forward 16: 7 spills"):
        main([*ARGUMENTS, "--out", str(tmp_path)])
    assert len(results.load(tmp_path / "targets.json")["faults"]) == 1


def test_the_interpreter_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="unset it"):
        main(ARGUMENTS)


@pytest.mark.aot
def test_some_cases_compiled() -> None:
    rows = targets.compile_some("sm_90", "bfloat16", None, 0)
    assert [(row["stage"], row["size"]) for row in rows[:2]] == [("tile_forward", "16"), ("tile_keep", "16")]
    assert len(rows) == targets.TOGETHER
    for row in rows:
        assert (row["target"], row["spills"]) == ("sm_90", 0)
        assert row["registers"] > 16
        assert sum(row["matrix"].values()) > 0
