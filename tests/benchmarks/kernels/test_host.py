"""The host's part of a call: measured without launching anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.common import results
from benchmarks.kernels import host

pytest.importorskip("triton.language")


def test_every_call_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    models = {"3 layers": ("triton", 3, 64, 64), "3 small layers": ("aten", 3, 8, 4)}
    monkeypatch.setattr(host, "MODELS", models)
    assert main(["host", "--quick", "--out", str(tmp_path)]) == 0
    found = results.load(tmp_path / "host.json")["calls"]
    names = ["bound step", "step", "forward", "forward, keep", "derivatives"]
    of_a_model = ["step", "step, promise", "trial", "slopes"]
    assert [(row["model"], row["call"]) for row in found] == [
        *(("3 layers", name) for name in names + [f"model's {name}" for name in of_a_model]),
        *(("3 small layers", name) for name in names),
    ]
    assert all(row["microseconds"] > 0 for row in found)


def test_nothing_is_launched_and_the_path_is_left_as_it_was() -> None:
    from apo_kernels import dispatch
    from apo_kernels.triton import plan
    from apo_kernels.triton.launch import Launch, count_launches

    before = dispatch._obstacle, plan.target_of, Launch.compile
    with host.no_launcher(), count_launches() as names:
        host.measure(host.calls(2, 64, 64, "triton"), rounds=1)
        assert names.count("tile_update") == 4  # two calls of two kinds
    assert (dispatch._obstacle, plan.target_of, Launch.compile) == before
    assert not plan._plans
