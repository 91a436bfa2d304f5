"""The contestants compute what they say, and the run shows and writes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.__main__ import main
from benchmarks.common import results
from benchmarks.kernels import machine_peaks, shapes
from benchmarks.kernels.throughput import contestants as module
from benchmarks.kernels.throughput import tables
from benchmarks.kernels.throughput.contestants import (
    BLOCKS,
    CHAIN,
    COMPILED,
    DAMPING,
    EIGEN,
    FULL,
    INVERSE,
    NAMES,
    OPERATIONS,
    Workload,
    contestants,
    damped_eigenbases,
    estimate,
    inverse,
)

LAYERS = [(6, 10), (9, 5), (70, 130)]


@pytest.fixture
def work() -> Workload:
    return Workload(LAYERS, torch.float32, "cpu")


def test_same_contestants_in_every_operation(work: Workload) -> None:
    for operation in OPERATIONS:
        assert tuple(name for name, _ in contestants(operation, work)) == NAMES


def test_apply_agrees_with_the_chain(work: Workload) -> None:
    found: dict[str, Any] = {name: c.call() for name, c in contestants("apply", work, (COMPILED,))}
    for ours, chain in zip(found[FULL], found[CHAIN], strict=True):
        torch.testing.assert_close(ours, chain, rtol=1e-4, atol=1e-6)


def test_refresh_agrees_with_autograd(work: Workload) -> None:
    found: dict[str, Any] = {name: c.call() for name, c in contestants("refresh", work, (COMPILED,))}
    by_operand = zip(*found[FULL], strict=True)  # dA, dB, dS of each layer, as autograd orders them
    for ours, chain in zip([x for each in by_operand for x in each], found[CHAIN], strict=True):
        torch.testing.assert_close(ours, chain, rtol=1e-4, atol=1e-5)


def test_step_agrees_with_the_chain() -> None:
    ends = []
    for contestant in (FULL, CHAIN):
        work = Workload(LAYERS, torch.float32, "cpu")
        call = dict(contestants("step", work, (COMPILED,)))[contestant].call
        call()
        call()
        ends.append(work.thetas)
    for ours, chain in zip(*ends, strict=True):
        torch.testing.assert_close(ours, chain, rtol=1e-5, atol=1e-6)


def test_compiled_chain_agrees(work: Workload) -> None:
    small = Workload([(6, 10)], torch.float32, "cpu")
    found: dict[str, Any] = {n: c.call() for n, c in contestants("apply", small) if n in (COMPILED, CHAIN)}
    torch.testing.assert_close(found[COMPILED], found[CHAIN])


def test_kfac_inverts_its_damped_factors() -> None:
    X = torch.randn(20, 8)
    factor = X.mT @ X / 20
    damped = factor + DAMPING * torch.eye(8)
    torch.testing.assert_close(inverse(factor) @ damped, torch.eye(8), atol=1e-3, rtol=0)
    G, other = torch.randn(8, 8), factor + torch.eye(8)
    Q_A, Q_B, s = damped_eigenbases(factor, other)
    by_basis = Q_B @ (s * (Q_B.mT @ G @ Q_A)) @ Q_A.mT
    torch.testing.assert_close(by_basis, inverse(other) @ G @ inverse(factor), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_flops_are_those_that_are_counted(work: Workload, operation: str) -> None:
    for name, contestant in contestants(operation, work, (COMPILED,)):
        if contestant.flops is not None:
            contestant.call()  # what it makes for itself, once
            with FlopCounterMode(display=False) as counter:
                contestant.call()
            assert counter.get_total_flops() == contestant.flops, name


def test_bytes_are_those_of_the_operands(work: Workload) -> None:
    m_n, blocks = sum(m * n for m, n in LAYERS), sum(m * m + n * n for m, n in LAYERS)
    assert dict(contestants("apply", work))[FULL].bytes == 4 * (3 * m_n + blocks)
    assert dict(contestants("step", work))[FULL].bytes == 4 * (6 * m_n + blocks)


def test_estimates_scale_with_the_rate() -> None:
    rates = {torch.float32: 1e9, torch.float16: 1e6}
    fast = estimate("apply", CHAIN, LAYERS, torch.float32, rates)
    assert estimate("apply", CHAIN, LAYERS, torch.float16, rates) == pytest.approx(1000 * fast)
    assert estimate("apply", FULL, LAYERS, torch.float16, rates) == pytest.approx(fast)  # in float32 inside
    assert estimate("refresh", EIGEN, LAYERS, torch.float32, rates) > estimate(
        "refresh", INVERSE, LAYERS, torch.float32, rates
    )


def test_ratios() -> None:
    rows = [
        {"model": "mlp", "operation": o, "dtype": d, "contestant": c, "median_ms": t}
        for o, d, c, t in (
            ("apply", "fp32", FULL, 2.0),
            ("apply", "fp32", CHAIN, 4.0),
            ("apply", "bf16", FULL, 3.0),
            ("apply", "fp32", BLOCKS, 0.5),
        )
    ]
    (found,) = tables.ratios(rows)
    assert (found["forward"], found["in bf16"], found["full/blocks"]) == (0.5, 1.5, 4.0)
    assert found["with VJP"] is None


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.MODELS, "lenet", [(4, 6), (3, 70)])
    monkeypatch.setattr(machine_peaks, "matmul_rates", lambda device, dtypes, seconds: dict.fromkeys(dtypes, 1e10))
    monkeypatch.setattr(machine_peaks, "copy_bandwidth", lambda device, seconds: 1e10)


@pytest.mark.usefixtures("tiny")
def test_run_writes_every_number_and_the_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--quick", "--seconds", "0.01", "--models", "lenet", "--no-compile", "--out", str(tmp_path)]
    assert main(["throughput", *options]) == 0
    content = results.load(tmp_path / "throughput.json")
    assert content["environment"]["packages"]["torch"] == torch.__version__
    assert {"cpu", "python", "commit", "torch_threads", "time"} <= set(content["environment"])
    assert {(row["operation"], row["dtype"]) for row in content["rows"]} == {
        (operation, dtype) for operation in OPERATIONS for dtype in ("fp32", "bf16", "fp16")
    }
    for row in content["rows"]:
        assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"]
        assert row["rounds"] >= 1
        assert ("share_of_copy" in row) == (row["contestant"] in (FULL, BLOCKS) and row["operation"] != "refresh")
    assert {(row["m"], row["n"]) for row in content["by_shape"]} == {(4, 6), (3, 70)}
    assert all((tmp_path / f"throughput-{x}.png").stat().st_size > 10_000 for x in ("fp32", "bf16", "fp16", "shapes"))
    assert "Ratios of medians" in capsys.readouterr().out


@pytest.mark.usefixtures("tiny")
def test_what_would_take_too_long_is_named_and_left_out(tmp_path: Path) -> None:
    options = ["--seconds", "0.01", "--models", "lenet", "--dtypes", "fp32", "--operations", "apply", "--no-compile"]
    main(["throughput", *options, "--limit", "1e-12", "--out", str(tmp_path)])
    rows = results.load(tmp_path / "throughput.json")["rows"]
    assert len(rows) == len(NAMES) - 1
    assert all("median_ms" not in row and row["note"].startswith("not run") for row in rows)


@pytest.mark.usefixtures("tiny")
def test_a_contestant_of_ours_must_not_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another's failure stands in the table; ours stops the run."""

    def fail(*_: object) -> Callable[[], object]:
        raise RuntimeError("broken")

    options = ["throughput", "--seconds", "0.01", "--models", "lenet", "--dtypes", "fp32", "--operations", "apply"]
    options += ["--no-compile", "--out", str(tmp_path)]
    monkeypatch.setattr(module, "damped_inverse", fail)
    main(options)
    rows = results.load(tmp_path / "throughput.json")["rows"]
    assert next(row for row in rows if row["contestant"] == INVERSE)["note"] == "KFAC inverses failed: RuntimeError"
    monkeypatch.setattr(module.ak, "foreach_precondition", fail)
    with pytest.raises(RuntimeError, match="broken"):
        main(options)
