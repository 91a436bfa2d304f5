"""The optimizers from packages: what Muon takes, and where schedule-free methods are judged."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks.paper.baselines.packages import muon, schedule_free, soap
from benchmarks.paper.models import GPT, lenet
from benchmarks.paper.tasks import named
from benchmarks.paper.training.run import Run
from benchmarks.paper.training.run_spec import RunSpec
from benchmarks.paper.training.training import evaluate


@pytest.mark.parametrize("module", ["pytorch_optimizer", "schedulefree"])
def test_a_missing_package_is_named(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    for make in (muon, soap) if module == "pytorch_optimizer" else (schedule_free,):
        with pytest.raises(ImportError, match=rf'{module} is not installed; pip install -e "\.\[peers\]"'):
            make(torch.nn.Linear(2, 2))


def test_muon_takes_hidden_matrices_alone() -> None:
    model = GPT(20, width=8, layers=1, heads=2, longest=6)
    hidden, others = muon(model, lr=0.5).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    matrices = {names[id(p)] for p in hidden["params"]}
    assert {names[id(p)] for p in others["params"]} == set(names.values()) - matrices
    assert all(name.startswith("blocks.0") and name.endswith("weight") for name in matrices)
    assert len(matrices) == 6  # four of attention, two of the feed-forward part
    assert (hidden["lr"], others["lr"]) == (0.5, 0.05)
    hidden, others = muon(lenet()).param_groups
    assert [p.ndim for p in hidden["params"]] == [4, 4, 2, 2]
    assert [tuple(p.shape) for p in others["params"] if p.ndim > 1] == [(10, 84)]


def test_a_schedule_free_method_is_judged_at_its_averages() -> None:
    task, data = named("digits"), named("digits").data()
    run = Run(RunSpec("digits", "schedule-free", {}, steps=20), data)
    curve = run.go()["curve"]
    trained_at = evaluate(task, run.model, run.judged)[0]
    run.optimizer.eval()  # type: ignore[attr-defined]
    averages = evaluate(task, run.model, run.judged)[0]
    assert curve["loss"][-1] == pytest.approx(averages, rel=1e-4)
    assert abs(trained_at - averages) > 1e-3 * averages
