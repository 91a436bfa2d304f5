"""The loop: resuming to the bit, equal batches for all, schedules, limits, precisions, what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.common.results import load
from benchmarks.paper.data import Examples
from benchmarks.paper.tasks import TASKS, Batches, named
from benchmarks.paper.training.command_options import given
from benchmarks.paper.training.optimizers import METHODS, method
from benchmarks.paper.training.run import Run
from benchmarks.paper.training.run_spec import RunSpec
from benchmarks.paper.training.schedules import factor
from benchmarks.paper.training.training import COLUMNS, evaluate, some

DIGITS = named("digits").data()


def spec(optimizer: str = "sgdm", **changes: Any) -> RunSpec:
    return RunSpec("digits", optimizer, changes.pop("hyper", {}), **{"epochs": 2, **changes})


@pytest.mark.parametrize(
    "optimizer", ["sgdm+step", "adam", "kfac", "ekfac", "shampoo", "muon", "soap", "schedule-free", "apo", "apo-lr"]
)
def test_a_resumed_run_is_the_same_to_the_bit(optimizer: str, tmp_path: Path) -> None:
    stops = (7, 4, 1)  # inside an epoch, at its end, a little later
    whole = Run(spec(optimizer), DIGITS)
    straight = whole.go()
    for steps in stops:
        torch.manual_seed(99)  # what the process drew before must not matter
        part = Run(spec(optimizer), DIGITS, tmp_path)
        part.resume()
        assert part.go(limit_steps=steps)["status"] == "unfinished"
    last = Run(spec(optimizer), DIGITS, tmp_path)
    assert last.resume()
    assert last.step == sum(stops)
    resumed = last.go()
    for p, q in zip(whole.model.parameters(), last.model.parameters(), strict=True):
        assert torch.equal(p, q)
    for column in set(COLUMNS) - {"seconds"}:
        assert [str(x) for x in resumed["curve"][column]] == [str(x) for x in straight["curve"][column]], column
    assert resumed["status"] == "finished"
    assert not list(tmp_path.rglob("*.pt"))  # a finished run needs no checkpoint


def test_dropout_goes_on_where_it_stood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = named("digits")
    monkeypatch.setitem(
        TASKS, "digits", replace(task, build=lambda: torch.nn.Sequential(torch.nn.Dropout(), task.build()))
    )
    straight = Run(spec(), DIGITS).go()["curve"]["loss"]
    Run(spec(), DIGITS, tmp_path).go(limit_steps=7)
    torch.manual_seed(99)
    run = Run(spec(), DIGITS, tmp_path)
    run.resume()
    assert run.go()["curve"]["loss"] == straight


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    Run(spec(), DIGITS, tmp_path).go(limit_steps=3)
    with pytest.raises(ValueError, match=r"its hyper is .*'lr': 0\.1.* and not .*'lr': 0\.2"):
        Run(spec(hyper={"lr": 0.2}), DIGITS, tmp_path).resume()
    assert Run(spec(), DIGITS, tmp_path).resume()


def test_every_optimizer_sees_the_same_batches() -> None:
    seen: dict[str, list[int]] = {}
    for optimizer in ("sgdm", "apo", "kfac"):
        run = Run(spec(optimizer, epochs=1), DIGITS)
        batches, ids = run.batches, seen.setdefault(optimizer, [])
        original = batches.batch
        index = {tuple(x.tolist()): i for i, x in enumerate(DIGITS.train.inputs[0])}

        def watched(step: int, ids: list[int] = ids, original: Any = original, index: Any = index) -> Any:
            inputs, targets = original(step)
            ids += [index[tuple(x.tolist())] for x in inputs[0]]
            return inputs, targets

        batches.batch = watched  # type: ignore[method-assign]
        run.go()
    assert seen["sgdm"] == seen["apo"] == seen["kfac"]
    assert len(set(seen["sgdm"])) == len(seen["sgdm"]) == 11 * 128  # a pass: each example at most once


def test_batches_follow_from_the_seed_and_the_step_alone() -> None:
    examples = Examples((torch.arange(100.0),), torch.arange(100))
    a, b, c = (Batches(examples, 10, seed) for seed in (0, 0, 1))
    assert len(a) == 10
    for step in (13, 2, 29):
        assert torch.equal(a.batch(step)[1], b.batch(step)[1])
        assert not torch.equal(a.batch(step)[1], c.batch(step)[1])
    assert not torch.equal(a.batch(3)[1], a.batch(13)[1])  # another epoch, another order
    assert sorted(torch.cat([a.batch(s)[1] for s in range(10, 20)]).tolist()) == list(range(100))
    state = a.state_dict()
    drawn = [a.other()[0] for _ in range(3)]
    b.load_state_dict(state)
    assert all(torch.equal(x, b.other()[0]) for x in drawn)
    assert [len(a.other(most)[0]) for most in (None, 3, 20)] == [10, 3, 10]
    with pytest.raises(ValueError, match="size must be at most the 100 examples, but got 101"):
        Batches(examples, 101, 0)


def test_the_curve_says_what_the_weights_say(tmp_path: Path) -> None:
    run = Run(spec(epochs=12), DIGITS, tmp_path)
    curve = run.go()["curve"]
    assert curve["step"] == list(range(0, 133, 11))
    assert curve["epoch"] == list(range(13))
    assert curve["seconds"] == sorted(curve["seconds"])
    with torch.no_grad():
        outputs = run.model(DIGITS.test.inputs[0])
    assert curve["metric"][-1] == pytest.approx(100 * (outputs.argmax(1) == DIGITS.test.targets).double().mean().item())
    loss = torch.nn.functional.cross_entropy(run.model(DIGITS.train.inputs[0]), DIGITS.train.targets)
    assert curve["loss"][-1] == pytest.approx(loss.item(), rel=1e-5)
    text = (tmp_path / "runs/digits/sgdm-fp32-seed0.csv").read_text().splitlines()
    assert text[0].split(",") == list(COLUMNS)
    assert len(text) == 14
    written = load(tmp_path / "runs/digits/sgdm-fp32-seed0.json")
    assert written["data"] == "scikit-learn's digits, a stand-in for MNIST (1,437 + 360)"
    assert written["stand_in"] == "MNIST"
    assert written["environment"]["device"]


def test_evaluation_leaves_modes_and_random_state_alone() -> None:
    task = named("digits")
    model = torch.nn.Sequential(torch.nn.Dropout(), task.model(0))
    model[1].eval()
    before = torch.get_rng_state()
    one, other = (evaluate(task, model, some(DIGITS.train, 500)) for _ in range(2))
    assert one == other  # no dropout
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert not model[1].training


def test_short_runs_have_rows_too() -> None:
    assert Run(spec(steps=10), DIGITS).go()["curve"]["step"] == [0, 2, 4, 6, 8, 10]
    assert Run(spec(epochs=3), DIGITS).go()["curve"]["step"] == [*range(0, 31, 5), 33]


def test_a_run_that_diverges_ends_and_says_so(tmp_path: Path) -> None:
    result = Run(spec("sgd", hyper={"lr": 1e6}, epochs=50), DIGITS, tmp_path).go()
    assert result["status"] == "diverged"
    assert "loss" in result["reason"]
    assert result["steps"] < 550
    assert result["curve"]["loss"][-1] > 1000
    assert load(tmp_path / "runs/digits/sgd-fp32-seed0.json")["status"] == "diverged"


def test_a_time_limit_stops_a_run_that_can_go_on(tmp_path: Path) -> None:
    run = Run(spec(epochs=1000), DIGITS, tmp_path)
    assert run.go(limit_seconds=0.05)["status"] == "unfinished"
    assert 0 < run.step < 11_000
    assert list(tmp_path.rglob("*.pt"))


def test_schedules() -> None:
    steps = (0.5, 0.75)
    by_step = factor("step", 100, steps, decay=0.2, warmup=0)
    assert [by_step(s) for s in (0, 49, 50, 74, 75, 99)] == pytest.approx([1, 1, 0.2, 0.2, 0.04, 0.04])
    rising = factor("warmup", 100, steps, decay=1, warmup=0.1)
    assert [rising(s) for s in (0, 4, 9, 50)] == pytest.approx([0.1, 0.5, 1, 1])
    falling = factor("warmup-decay", 100, steps, decay=1, warmup=0.1)
    assert [falling(s) for s in (4, 9, 39)] == pytest.approx([0.5, 1, 0.5])
    cooling = factor("cooldown", 100, steps, decay=1, warmup=0)
    assert [cooling(s) for s in (0, 70, 85, 99)] == pytest.approx([1, 1, 0.5, 1 / 30])
    run = Run(spec("sgdm+step", epochs=12, hyper={"lr": 0.05, "factor": 0.1}), DIGITS)
    assert run.go()["curve"]["rate"][1:] == pytest.approx(6 * [0.05] + 3 * [0.005] + 3 * [0.0005])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bits_are_of_weights_activations_and_gradients(precision: str) -> None:
    few = replace(DIGITS, train=DIGITS.train.take(torch.arange(128)), test=DIGITS.test.take(torch.arange(8)))
    for optimizer in ("sgdm", "adam", "kfac", "apo", "apo-lr"):
        run = Run(spec(optimizer, steps=1, precision=precision), few)
        kinds: set[torch.dtype] = set()
        run.model[1].register_forward_hook(lambda *x, seen=kinds: seen.add(x[-1].dtype))
        result = run.go()
        kinds |= {p.dtype for p in run.model.parameters()} | {p.grad.dtype for p in run.model.parameters()}
        assert kinds == {run.spec.dtype}
        assert result["status"] == "finished", (optimizer, result["reason"])


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match="precision must be one of fp64 for the task ill-conditioned, but got 'bf16'"):
        RunSpec("ill-conditioned", "sgdm", {}, precision="bf16")
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16 for the task multi30k, but got 'fp16'"):
        RunSpec("multi30k", "sgdm", {}, precision="fp16")
    with pytest.raises(ValueError, match=r"task must be one of .*digits.*, but got 'nothing'"):
        RunSpec("nothing", "sgdm", {})
    for name in ("nothing", "apo+step", "apo-lr:kfac", "apo-lr+step", "sgdm+nothing"):
        with pytest.raises(ValueError, match=r"optimizer must be one of .*apo-lr:adam"):
            method(name)
    with pytest.raises(ValueError, match="SGDm has no damping; it has lr, momentum"):
        spec(hyper={"damping": 1})
    with pytest.raises(ValueError, match="epochs must be >= 1, but got 0"):
        spec(epochs=0)


def test_settings_from_the_command_line() -> None:
    both = given(["lr=0.5", "kfac.damping=1e-3", "kl_clip=None"], ["sgdm", "kfac"])
    assert both == {"sgdm": {"lr": 0.5}, "kfac": {"lr": 0.5, "damping": 1e-3, "kl_clip": None}}
    with pytest.raises(ValueError, match="has no such key"):
        given(["nothing=1"], ["sgdm"])
    with pytest.raises(ValueError, match="must be KEY=VALUE"):
        given(["lr"], ["sgdm"])


def test_float16_gets_an_epsilon_that_is_not_zero_there() -> None:
    assert torch.tensor(METHODS["adam"].hyper({}, "fp16")["eps"]).half() > 0
    assert method("apo-lr:adam").hyper({}, "fp16")["eps"] == 1e-4
    assert METHODS["adam"].hyper({"eps": 1e-3}, "fp16")["eps"] == 1e-3


def test_train_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "digits", "--optimizer", "sgdm,adam", "--seeds", "2", "--epochs", "1", "--out", str(tmp_path)]
    main(command)
    folder = tmp_path / "runs" / "digits"
    assert {path.name for path in folder.glob("*.json")} == {
        f"{name}-fp32-seed{seed}.json" for name in ("sgdm", "adam") for seed in (0, 1)
    }
    assert (folder / "digits.png").stat().st_size > 10_000
    assert "stand-in for MNIST" in capsys.readouterr().out
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    main([*command, "--resume"])  # all is finished: nothing is run again
    assert times == {path: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    main([*command, "--resume", "--set", "sgdm.lr=0.2"])
    changed = {path.name for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert changed == {"sgdm-fp32-seed0.json", "sgdm-fp32-seed1.json"}
    assert math.isclose(load(folder / "sgdm-fp32-seed0.json")["hyper"]["lr"], 0.2)
    with pytest.raises(SystemExit, match=r"CASP\.csv.*--data DIR"):
        main(["train", "protein", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="precision must be one of fp64"):
        main(["train", "ill-conditioned", "--precision", "fp16", "--out", str(tmp_path)])


def test_the_list_names_every_task(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.paper.train.console.width", 300)
    main(["train", "--list"])
    shown = capsys.readouterr().out
    for text in ("cifar100-resnet32", "11.2M", "stand-in for MNIST", "apo-lr:rmsprop", "Tables 2 and 3"):
        assert text in shown
