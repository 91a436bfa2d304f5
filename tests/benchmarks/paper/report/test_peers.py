"""The tables of the comparison with other optimizers say what its files hold."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.paper.peers import LEARNED, RATES, key_of
from benchmarks.paper.report.peers import after_steps, best, cooled, steps_in_time_of, table, tables

STEPS = [0, 200, 1000]


def run(*losses: float, status: str = "finished") -> dict[str, Any]:
    """The losses before, at 200 and at 1,000 steps."""
    shown = [*losses[:2], "inf" if status == "diverged" else losses[2]]
    return {"status": status, "device": "a CPU", "step": STEPS, "loss": shown, "metric": [0.0, 0.0, 0.5]}


def contents() -> dict[str, Any]:
    """Of every search the least rate is the best at 200 steps, and the next at 1,000. Two runs diverge."""
    runs = {key_of("apo", None, seed): run(4.0, 2.0, 0.5 + seed) for seed in (0, 1)}
    for optimizer, rates in RATES.items():
        ends = {rates[0]: run(4.0, 1.0, 3.0), rates[1]: run(4.0, 2.0, 1.0)}
        rest = {lr: run(4.0, 3.0, 3.5) for lr in rates[2:]}
        runs |= {key_of(optimizer, lr, 0): each for lr, each in (ends | rest).items()}
        runs |= {key_of(optimizer, lr, 1): each for lr, each in ends.items()}
    for name, base in LEARNED.items():
        runs |= {key_of(name, RATES[base][1], seed): run(4.0, 2.0, 0.25) for seed in (0, 1)}
        runs |= {key_of(name, 1e-4, 0): run(4.0, 2.0, 0.5), key_of(name, 1.0, 0): run(4.0, 2.0, 0.75)}
    runs[key_of("sgdm", RATES["sgdm"][4], 0)] = run(4.0, 4.0, 1e9, status="diverged")
    runs[key_of("muon", RATES["muon"][1], 1)] = run(4.0, 2.0, 9.0, status="diverged")
    packages = {"torch": "2.13", "numpy": "2"}
    seconds = {name: [0.0, 2.0, 10.0] for name in [*RATES, *LEARNED]} | {"apo": [0.0, 8.0, 40.0]}
    return {
        "environment": {"device": "a CPU", "packages": packages, "python": "3.11"},
        "data": "some data (8 + 2)",
        "batch_size": 64,
        "steps": 1000,
        "loss": "mean square",
        "metric": "residuals",
        "clock": {"device": "another CPU", "step": STEPS, "seconds": seconds},
        "runs": runs,
    }


def rows_of(shown: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown.splitlines()]
    return {line[0]: line[1:] for line in lines}


def test_the_table_says_what_the_runs_say() -> None:
    rows = rows_of(table("pinn", contents()))
    assert list(rows)[2:] == [
        "APO", "AdaptiveLR on AdamW", "AdaptiveLR on SGDm", "AdamW", "SGDm", "Muon", "SOAP", "schedule-free AdamW"
    ]  # fmt: skip
    assert rows["pinn"][:4] == ["loss at 200", "loss at 1,000", "worst ÷ best", "test residuals"]
    assert rows["AdamW"] == ["1 at 0.0001", "1 at 0.0003", "3.5", "0.5", "1", "1", "1.00"]
    assert rows["APO"][:4] == ["2", "1", "–", "0.5"]  # means of its two seeds
    assert rows["APO"][6] == "4.00"
    assert rows["SGDm"][:3] == ["1 at 0.0001", "1 at 0.0006", "1 of 5 diverged"]
    assert rows["Muon"][1:4] == ["1 (1 of 2 diverged) at 0.006", "3.5", "0.5 (1 of 2 diverged)"]
    assert rows["AdaptiveLR on AdamW"][1:3] == ["0.25 at 0.0003", "3, 0.5 from 0.0001, 0.75 from 1"]


def test_rates_that_fall_are_shown_beside_the_best_constant_one(tmp_path: Path) -> None:
    content, best_lr = contents(), RATES["adamw"][1]
    for name, ends in (("adamw", (0.8, 0.6)), ("apo-lr:adamw", (0.5, 0.3))):
        content["runs"] |= {key_of(f"{name}+cooldown", best_lr, i): run(4.0, 2.0, end) for i, end in enumerate(ends)}
    for lr, end in ((1e-4, 0.9), (1.0, 0.2)):
        content["runs"][key_of("apo-lr:adamw+cooldown", lr, 0)] = run(4.0, 2.0, end)
    (tmp_path / "pinn.json").write_text(json.dumps(content))
    rows = rows_of(cooled(tmp_path))
    assert [*rows][2:] == ["pinn, AdamW"]  # SGDm's runs are missing
    assert rows["pinn, AdamW"] == ["1", "0.7", "0.4", "0.9", "0.2", "0.5 / 0.5 / 0.5"]


def test_the_loss_in_another_ones_time() -> None:
    """A slow optimizer's lies between two rows, a quick one's is the last."""
    slow = {"status": "finished", "step": [0, 50, 100], "loss": [8.0, 2.0, 0.5]}
    assert [after_steps(slow, x) for x in (0, 25, 50, 75, 100)] == pytest.approx([8, 4, 2, 1, 0.5])
    lost = {**slow, "loss": [8.0, 2.0, math.inf]}
    assert [after_steps(lost, x) for x in (25, 50, 75, 100)] == pytest.approx([4, 2, math.inf, math.inf])
    clock = {"step": [0, 50, 100], "seconds": {"quick": [0.0, 1.0, 2.0], "slow": [0.0, 3.0, 4.0]}}
    found = [steps_in_time_of(base, other, clock) for base, other in (("quick", "slow"), ("slow", "quick"))]
    assert found == pytest.approx([100 / 3, 100])
    shown = rows_of(table("pinn", contents()))["APO"][4:6]  # at 10 of its 40 seconds, 8 of which took it to 2
    seeds = [2 * (end / 2) ** (2 / 32) for end in (0.5, 1.5)]
    assert shown == [f"{sum(seeds) / 2:.3g}"] * 2


def test_settings_of_one_seed_are_not_compared_with_those_of_two() -> None:
    settings = {"1": [run(4.0, 2.0, 1.0)] * 2, "2": [run(4.0, 2.0, 0.1)]}
    assert best(settings, lambda each: each["loss"][2])[0] == "1"


@pytest.mark.parametrize("missing", ["apo/", "apo-lr:adamw", "soap/0.003/0"])
def test_who_is_not_through_has_no_row(missing: str) -> None:
    whole = contents()
    content = {**whole, "runs": {key: each for key, each in whole["runs"].items() if not key.startswith(missing)}}
    left, every = ([row for row in rows_of(table("pinn", each)) if row != "---"] for each in (content, whole))
    assert set(left) < set(every)
    assert len(every) - len(left) == 1


def test_there_are_no_rows_before_there_is_a_clock() -> None:
    content = {key: value for key, value in contents().items() if key != "clock"}
    assert set(rows_of(table("pinn", content))) == {"pinn", "---"}


def test_the_section_is_valid_without_files_and_names_machine_and_data(tmp_path: Path) -> None:
    assert tables(tmp_path) == "Not run yet."
    (tmp_path / "pinn.json").write_text(json.dumps(contents()))
    first, second, third = tables(tmp_path).split("\n\n")
    assert first == "Runs on a CPU. Times are from another CPU, 1 thread, torch 2.13, Python 3.11."
    assert second == "PINN 1-32-32-1, 1,153 parameters; some data (8 + 2), batches of 64; mean square:"
    assert third == table("pinn", contents())
