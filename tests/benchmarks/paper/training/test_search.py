"""The search gives each optimizer as many trials, drawn alike and judged alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.common.results import load
from benchmarks.paper.tasks import TASKS, named
from benchmarks.paper.training import search as searching
from benchmarks.paper.training.optimizers import METHODS, Range, method
from benchmarks.paper.training.run_spec import RunSpec
from benchmarks.paper.training.search import Search, drawn
from benchmarks.paper.training.search_files import best, found

OPTIMIZERS = [*(name for name, each in METHODS.items() if each.ranges), "apo-lr", "sgdm+step"]


def test_trials_are_even_over_each_range_and_longer_searches_go_on() -> None:
    for name in OPTIMIZERS:
        eight, ranges = drawn(name, 8), method(name).ranges
        assert drawn(name, 12)[:8] == eight
        for key, r in ranges.items():
            values = [trial[key] for trial in eight]
            if r.choices:
                assert set(values) <= set(r.choices)
                counts = [values.count(choice) for choice in r.choices]
                assert max(counts) - min(counts) <= 2
            else:
                assert all(r.low <= value <= r.high * 1.001 for value in values)
                # one in each eighth of the logarithms
                edges = [r.low * (r.high / r.low) ** (i / 8) for i in range(1, 8)]
                assert sorted(sum(v > e for e in edges) for v in values) == list(range(8)), (name, key)


def test_every_range_is_of_a_hyperparameter_that_there_is() -> None:
    for name in OPTIMIZERS:
        assert method(name).ranges.keys() <= method(name).defaults.keys()


def test_what_has_nothing_to_search_is_refused(tmp_path: Path) -> None:
    assert not method("apo-defaults").ranges
    assert method("apo-defaults").defaults == method("apo").defaults
    with pytest.raises(SystemExit, match="must be ones that have something to search, but got apo-defaults"):
        main(["search", "digits", "--optimizer", "sgdm,apo-defaults", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The specs that a search ran. Large rates diverge, with a loss of 0, which must not be taken for the best."""
    specs: list[Any] = []

    class Fake:
        def __init__(self, spec: Any, data: Any) -> None:
            self.spec = spec

        def go(self, limit_seconds: float | None = None) -> dict[str, Any]:
            specs.append(self.spec)
            loss = abs(self.spec.full_hyper["lr"] - 0.01)
            status = "diverged" if self.spec.full_hyper["lr"] > 0.1 else "finished"
            loss = 0.0 if status == "diverged" else loss
            return {"status": status, "curve": {"loss": [loss], "metric": [50.0]}, "seconds": 1.0, "steps": 11}

    monkeypatch.setattr(searching, "Run", Fake)
    return specs


def spec_of(task: str, epochs: int) -> RunSpec:
    return RunSpec(task, "sgdm", {}, epochs=epochs)


def test_each_optimizer_gets_as_many_equal_trials(
    tmp_path: Path, counted: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = named("digits").data()
    names = ["sgdm", "kfac", "apo"]
    content = Search(spec_of("digits", 3), tmp_path, trials=4, seeds=2).run(names, data)
    assert [len(content["trials"][name]) for name in names] == [4, 4, 4]
    for name in names:
        own = [spec for spec in counted if spec.optimizer == name]
        assert [spec.seed for spec in own] == [0, 1] * 4
        assert {(spec.epochs, spec.steps, spec.precision) for spec in own} == {(3, None, "fp32")}
    counted.clear()
    Search(spec_of("digits", 3), tmp_path, trials=6, seeds=2).run(names, data)
    assert len(counted) == 3 * 2 * 2  # only what was missing
    with pytest.raises(ValueError, match="holds a search whose epochs is 3 and not 5"):
        Search(spec_of("digits", 5), tmp_path, trials=6, seeds=2).run(names, data)
    narrower = replace(METHODS["sgdm"], ranges={"lr": Range(0.01, 0.1)})
    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "sgdm", narrower)
        with pytest.raises(ValueError, match="holds a search of sgdm in other ranges"):
            Search(spec_of("digits", 3), tmp_path, trials=6, seeds=2).run(names, data)
    stored = load(tmp_path / "search" / "digits.json")
    chosen = best(stored, "sgdm")
    assert chosen is not None
    finite = [t for t in stored["trials"]["sgdm"] if t["status"] == "finished"]
    assert len(finite) < 6  # one diverged, with the least loss
    assert chosen["loss"] == min(t["loss"] for t in finite)
    hyper, source = found(tmp_path, "digits", "sgdm", "fp32")
    assert hyper == chosen["hyper"]
    assert "search of 6 trials in fp32, digits.json" in source
    # 16 bits take full precision's, as the paper does
    assert found(tmp_path, "digits", "sgdm", "bf16") == (hyper, source)


def test_a_metric_is_judged_on_held_out_examples(tmp_path: Path, counted: list[Any]) -> None:
    assert {task.judged_by for task in TASKS.values() if task.place.startswith("Table")} == {"metric"}
    data = named("digits").data()
    Search(spec_of("cifar10-lenet", 1), tmp_path, trials=1).run(["sgdm"], data)
    Search(spec_of("digits", 1), tmp_path, trials=1).run(["sgdm"], data)
    assert [spec.held_out for spec in counted] == [True, False]


def test_search_from_the_command_line(tmp_path: Path) -> None:
    command = ["search", "digits", "--optimizer", "sgdm,apo", "--trials", "2", "--epochs", "1", "--out", str(tmp_path)]
    main(command)
    path = tmp_path / "search" / "digits.json"
    content = load(path)
    assert content["data"] == "scikit-learn's digits, a stand-in for MNIST (1,437 + 360)"
    assert content["ranges"]["apo"]["fsd_weight"]["high"] == 30.0
    main(["train", "digits", "--optimizer", "sgdm", "--epochs", "1", "--out", str(tmp_path)])
    run = load(tmp_path / "runs" / "digits" / "sgdm-fp32-seed0.json")
    chosen = best(content, "sgdm")
    assert chosen is not None
    assert run["hyper"]["lr"] == chosen["hyper"]["lr"]
    assert run["hyper_from"].startswith("search of 2 trials")
    assert run["curve"]["loss"][-1] == pytest.approx(chosen["loss"], rel=1e-4)  # a trial is a run
