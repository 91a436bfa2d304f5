"""The comparison with the optimizers that people use: which runs it makes, keeps and refuses."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.common import machine
from benchmarks.common.results import load
from benchmarks.paper import peers
from benchmarks.paper.data import Dataset, Examples
from benchmarks.paper.peers import LEARNED, RATES, best_rate, in_turn, key_of, loss_at
from benchmarks.paper.tasks import named
from benchmarks.paper.training.training import Training


def made_up(
    task: Any, data: Any, rates: dict[str, float | None], seed: int, lengths: dict[str, int], device: str
) -> Any:
    """Without training: the greater the rate, the better early on; the second least is the best at the end."""
    return {name: made_up_run(name, lr, lengths[name]) for name, lr in rates.items()}


def made_up_run(optimizer: str, lr: float | None, steps: int) -> dict[str, Any]:
    place = sorted(RATES[optimizer]).index(lr) if optimizer in RATES and lr is not None else 1
    losses = [9.0, 5.0 - place, 1.0 + abs(place - 1)]
    run = {"status": "finished", "hyper": {"lr": lr}, "step": [0, steps // 5, steps], "seconds": [0.0, 0.1, 5.0]}
    return {**run, "device": "a CPU", **dict.fromkeys(("loss", "test_loss", "metric", "rate"), losses)}


def arguments(folder: Path, steps: int = 100) -> list[str]:
    return ["peers", "--tasks", "pinn", "--seeds", "2", "--steps", str(steps), "--out", str(folder)]


@pytest.fixture(autouse=True)
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "in_turn", made_up)
    monkeypatch.setattr(machine, "describe", lambda device: {})


def test_the_best_rates_alone_are_run_on_every_seed(tmp_path: Path) -> None:
    main(arguments(tmp_path))
    content = load(tmp_path / "peers" / "pinn.json")
    runs = content["runs"]
    wanted = {key_of("apo", None, seed) for seed in (0, 1)}
    for optimizer, rates in RATES.items():
        wanted |= {key_of(optimizer, lr, 0) for lr in rates} | {key_of(optimizer, rates[i], 1) for i in (1, 4)}
    for optimizer, base in LEARNED.items():
        wanted |= {key_of(optimizer, RATES[base][1], seed) for seed in (0, 1)}
        wanted |= {key_of(optimizer, lr, 0) for lr in (1e-4, 1.0)}
        wanted |= {key_of(f"{name}+cooldown", RATES[base][1], i) for name in (base, optimizer) for i in (0, 1)}
        wanted |= {key_of(f"{optimizer}+cooldown", lr, 0) for lr in (1e-4, 1.0)}
    assert runs.keys() == wanted
    assert all(run["step"][-1] == 100 for run in runs.values())
    assert content["clock"]["step"] == [0, 20, 100]
    seconds = content["clock"]["seconds"]
    assert [seconds.pop(name) for name in RATES] == [[0.0, 5.0, 25.0]] * len(RATES)  # after a fifth, and beyond
    assert seconds == {name: [0.0, 0.1, 5.0] for name in ("apo", *LEARNED)}
    assert not any("seconds" in run for run in runs.values())  # which only those taken in turn can compare


def test_starts_from_afar_are_run_on_half_of_the_seeds(tmp_path: Path) -> None:
    """There are more of them where their losses lie far apart."""
    main(["peers", "--tasks", "pinn", "--steps", "100", "--out", str(tmp_path)])
    runs = load(tmp_path / "peers" / "pinn.json")["runs"]
    for name, base in LEARNED.items():
        for begun, seeds in ((key_of(name, RATES[base][1], 0), 8), (key_of(name, 1.0, 0), 4)):
            assert [f"{begun[:-1]}{seed}" in runs for seed in range(9)] == [True] * seeds + [False] * (9 - seeds)


def test_rates_of_an_earlier_search_are_run_alone(tmp_path: Path) -> None:
    main(arguments(tmp_path / "cpu"))
    main([*arguments(tmp_path / "gpu"), "--rates", str(tmp_path / "cpu" / "peers")])
    runs = load(tmp_path / "gpu" / "peers" / "pinn.json")["runs"]
    best = {key_of(name, rates[1], seed) for name, rates in RATES.items() for seed in (0, 1)}
    assert {key for key in runs if key.split("/")[0] in RATES} == best
    with pytest.raises(SystemExit, match="No such file or directory"):
        main([*arguments(tmp_path / "gpu"), "--rates", str(tmp_path / "elsewhere")])


def test_they_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what slows the machine slows them all."""
    turns: list[int] = []
    train = Training.train

    def noted(self: Training, **limits: Any) -> None:
        train(self, **limits)
        turns.append(self.step)

    monkeypatch.setattr(Training, "train", noted)
    runs = in_turn(named("pinn"), few("pinn"), {"adamw": 1e-3, "sgdm": 1e-4}, 0, {"adamw": 120, "sgdm": 60})
    assert turns == [50, 50, 100, 60, 120]
    assert [run["step"] for run in runs.values()] == [[0, 50, 100, 120], [0, 50, 60]]
    assert all(run["seconds"] == sorted(run["seconds"]) for run in runs.values())


@pytest.mark.parametrize("optimizer", ["adamw", "apo-lr:adamw"])
def test_rates_that_are_cooled_down(optimizer: str) -> None:
    """Fixed and learned ones alike fall to 0, and until then go as without."""
    cooled, constant = (
        in_turn(named("pinn"), few("pinn"), {name: 1e-3}, 0, {name: 200})[name]
        for name in (f"{optimizer}+cooldown", optimizer)
    )
    assert cooled["loss"][:3] == pytest.approx(constant["loss"][:3])
    assert cooled["rate"][:3] == pytest.approx(constant["rate"][:3])
    assert cooled["rate"][-1] < 0.1 * constant["rate"][-1]


def test_runs_are_kept_and_those_of_another_length_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main([*arguments(tmp_path), "--seeds", "1"])
    file = tmp_path / "peers" / "pinn.json"
    first = load(file)["runs"]
    run_again: list[tuple[Any, ...]] = []
    monkeypatch.setattr(peers, "in_turn", lambda *a: run_again.append(a[2:4]) or made_up(*a))
    main(arguments(tmp_path))  # a seed more
    assert {seed for _, seed in run_again} == {1}
    assert load(file)["runs"].items() > first.items()
    with pytest.raises(SystemExit, match=r"pinn\.json holds runs whose steps is 100 and not 200: remove it"):
        main(arguments(tmp_path, steps=200))


def test_losses_of_runs_that_ended_early_are_infinite() -> None:
    run = {"step": [0, 50, 80], "loss": [2.0, 1.0, math.inf]}
    assert [loss_at(run, step) for step in (0, 40, 50, 60, 100)] == [2.0, 1.0, 1.0, math.inf, math.inf]
    worse = {"step": [0, 100], "loss": [2.0, 1.5]}
    runs = {key_of("adamw", lr, 0): worse if lr == 3e-3 else run for lr in RATES["adamw"]}
    assert best_rate(runs, "adamw", 50, RATES["adamw"]) == RATES["adamw"][0]
    assert best_rate(runs, "adamw", 100, RATES["adamw"]) == 3e-3


def few(task: str) -> Dataset:
    if task == "cifar10-cnn":
        classes = torch.arange(100) % 10
        x = torch.randn(10, 3, 32, 32)[classes] + torch.randn(100, 3, 32, 32) / 10
        images = Examples((x,), classes)
        return Dataset("made up", images, images.take(torch.arange(20)))
    data = named(task).data()
    return replace(data, train=data.train.take(torch.arange(100)), test=data.test.take(torch.arange(20)))


@pytest.mark.parametrize(
    ("task", "optimizer", "lr"),
    [("gpt", "schedule-free", 3e-3), ("cifar10-cnn", "apo-lr:adamw", 3e-3), ("pinn", "apo", None)],
)
def test_new_tasks_learn_from_few_examples(task: str, optimizer: str, lr: float | None) -> None:
    """The GPT from Python's help texts."""
    run = in_turn(replace(named(task), batch_size=8), few(task), {optimizer: lr}, 0, {optimizer: 20})[optimizer]
    assert run["status"] == "finished"
    assert run["step"] == [0, 20]
    assert run["loss"][1] < run["loss"][0]


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def only_muon(*given: Any) -> Any:
        return (in_turn if "muon" in given[2] else made_up)(*given)

    monkeypatch.setattr(peers, "in_turn", only_muon)
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(SystemExit, match=r'peers: pytorch_optimizer is not installed; pip install -e "\.\[peers\]"'):
        main(arguments(tmp_path))
