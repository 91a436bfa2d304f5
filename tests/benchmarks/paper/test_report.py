"""The report says what result files say, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.paper.report import published
from benchmarks.paper.report.comparison import COLUMNS, comparison
from benchmarks.paper.report.figures import figures
from benchmarks.paper.report.runs import collect, grouped
from benchmarks.paper.report.tables import table_2, table_3, table_4
from benchmarks.paper.tasks import TASKS, named


def result(task: str, optimizer: str, seed: int, losses: list[float], **changes: Any) -> dict[str, Any]:
    steps = [10 * i for i in range(len(losses))]
    curve = {name: [0.0] * len(losses) for name in ("batch_loss", "test_loss", "failed_trials")}
    second = changes.pop("second", 1.0)
    metric = changes.pop("metric", 70.0)
    curve |= {"step": steps, "epoch": [s / 10 for s in steps], "seconds": [second * i for i in range(len(losses))]}
    curve |= {"loss": losses, "metric": [metric] * len(losses), "rate": [0.1] * len(losses)}
    definition = named(task)
    return {
        "environment": {"device": "a machine"},
        "status": "finished",
        "task": task,
        "title": definition.title,
        "data": f"{definition.source.label} (1 + 1)",
        "stand_in": definition.source.stand_in,
        "model": definition.model_name,
        "optimizer": optimizer,
        "hyper": {"damping": 0.3} if optimizer == "kfac" else {},
        "hyper_from": "defaults, not searched",
        "seed": seed,
        "precision": "fp32",
        "epochs": float(len(losses) - 1),
        "total_steps": steps[-1],
        "loss_name": definition.loss.name,
        "judged_on": 1,
        "metric_name": definition.loss.metric,
        "higher_is_better": definition.loss.higher_is_better,
        "scores": {},
        "curve": curve,
        **changes,
    }


def test_losses_at_equal_steps_and_at_equal_times() -> None:
    slow = [result("digits", "kfac", seed, [2.0, 0.5, 0.1 + seed, 0.01], second=3.0) for seed in range(3)]
    quick = [result("digits", "sgdm", seed, [2.0, 1.0, 0.9, 0.8]) for seed in range(3)]
    _, _, cells, caption = comparison([*slow, *quick])
    by_name = {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in cells}
    assert by_name["kfac"]["loss, steps"] == "0.01"
    assert by_name["kfac"]["loss, time"] == "0.5"  # after SGDm's 3 s: one row of KFAC's
    assert by_name["sgdm"]["loss, time"] == "0.8"
    assert "after 30 steps (3 epochs) and after 3 s" in caption
    cells = comparison([*quick, result("digits", "shampoo", 0, [2.0, 0.1], second=3.5)]).rows
    assert [row[COLUMNS.index("loss, time")] for row in cells] == ["0.8", "–"]  # what it began with is no result
    assert grouped(slow)[0].loss_at("step", 20) == pytest.approx([0.1, 1.1, 2.1])
    lost = result("digits", "adam", 0, [2.0, float("inf")], status="diverged")
    cells = comparison([*quick, lost]).rows
    assert [row[1] for row in cells] == ["3/3", "0/1"]
    assert cells[1][2] == "diverged"


def put(folder: Path, *runs: dict[str, Any]) -> None:
    for run in runs:
        place = folder / "runs" / run["task"]
        place.mkdir(parents=True, exist_ok=True)
        name = f"{run['optimizer'].replace('+', '_with_').replace(':', '_')}-{run['precision']}-seed{run['seed']}.json"
        (place / name).write_text(json.dumps(run))


def test_the_report_is_made_from_result_files_alone(tmp_path: Path) -> None:
    task = "cifar10-lenet"
    put(
        tmp_path,
        *(result(task, "sgdm", seed, [2.3, 1.5], metric=60.0 + seed) for seed in range(2)),
        result(task, "apo", 0, [2.3, 1.2], metric=64.5),
        result(task, "kfac", 0, [2.3, 1.2], metric=33.25, precision="bf16"),
        result("cifar10-resnet32", "apo-lr", 0, [2.3, 1.2], metric=71.0),
        result("cifar10-resnet32", "sgdm+step", 0, [2.3, 1.2], metric=72.0),
        result("digits", "apo-lr:rmsprop", 0, [2.3, 0.2]),
        result("diabetes", "apo", 0, [0.5, 0.2]),
        result("multi30k", "adamw", 0, [8.0, 3.0], scores={"BLEU": 21.5}),
        result("cifar10-wrn-28-10", "apo-lr", 0, [2.3, 1.0]),
    )
    found_runs = collect([tmp_path])
    second = {row[0]: row for row in table_2(found_runs).rows}
    assert second["CIFAR-10, LeNet"][1:5] == ["60.50 / 75.73", "– / 73.41", "– / 76.63", "64.50 / 77.42"]
    assert second["CIFAR-10, LeNet"][5] == "CIFAR-10 (1 + 1); 1 epochs; a machine"
    assert second["CIFAR-10, VGG16"][5] == "not run"
    assert second["Multi30k German–English, Transformer 6+6, 512"][2] == "21.50 BLEU / –"
    assert [row for row in table_3(found_runs).rows if row[1] == "bf16"] == [
        ["CIFAR-10, LeNet", "bf16", "– / 75.65", "33.25 / 74.95", "– / 77.25", "0.3", second["CIFAR-10, LeNet"][5]]
    ]
    fourth = {(row[0], row[1]): row[2:5] for row in table_4(found_runs).rows}
    assert fourth["CIFAR-10, ResNet-32", "sgdm"] == ["– / 89.40", "72.00 / 93.34", "71.00 / 92.75"]
    assert figures(found_runs, tmp_path / "drawn") == [
        tmp_path / "drawn" / name for name in ("figure3.png", "figure4.png", "figure5.png", "rates-digits.png")
    ]
    small = tmp_path / "small"
    put(small, result("digits", "apo-lr:rmsprop", 0, [2.3, 0.2]))
    main(["report", "--from", str(small), "--out", str(tmp_path)])
    text = (tmp_path / "report" / "report.md").read_text()
    assert "Stand-ins, which are not the paper's data" in text
    assert "`digits`: scikit-learn's digits, a stand-in for MNIST (1 + 1), in place of MNIST" in text
    pictures = {path.name for path in (tmp_path / "report").glob("*.png")}
    assert pictures == {"digits.png", "figure4.png", "rates-digits.png"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="there is no run in"):
        main(["report", "--from", str(tmp_path / "empty"), "--out", str(tmp_path / "empty")])


def test_runs_of_different_lengths_do_not_stand_beside_each_other(tmp_path: Path) -> None:
    put(tmp_path, *(result("digits", name, 0, [2.0, 1.0]) for name in ("sgdm", "adam")))
    put(tmp_path, result("digits", "apo", 0, [2.0, 1.0, 0.5]))
    put(tmp_path, result("digits", "apo", 0, [2.0, 1.0, 0.5], precision="bf16"))
    found_runs = collect([tmp_path])["digits"]
    assert [(run["optimizer"], run["precision"]) for run in found_runs] == [
        ("sgdm", "fp32"),
        ("adam", "fp32"),
        ("apo", "bf16"),
    ]


def test_the_papers_figures_are_the_papers() -> None:
    """The best of each row of Table 2, which the paper prints in bold."""
    best_of = {
        task: max((v for v in row.values() if v is not None), default=0) for task, row in published.TABLE_2.items()
    }
    assert sum(best_of[task] == row["apo"] for task, row in published.TABLE_2.items()) == 10
    assert best_of["cifar100-resnet32"] == published.TABLE_2["cifar100-resnet32"]["sgdm"]
    assert all(row["apo"] == max(row.values()) for row in published.TABLE_3.values())  # type: ignore[type-var]
    assert {len(row) for row in published.TABLE_4.values()} == {len(published.TABLE_4_COLUMNS)}
    assert published.TABLE_2.keys() | published.TABLE_3.keys() | set(published.TABLE_4_COLUMNS) <= TASKS.keys()
