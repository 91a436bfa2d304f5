"""docs/examples: each script runs in a short form, and learns."""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.docs.pages import DOCS


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"docs_example_{name}", DOCS / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("optimizer", "epochs", "least"), [("adaptive", 5, 80), ("apo", 3, 80), ("adamw", 3, 0)])
def test_digits(optimizer: str, epochs: int, least: float) -> None:
    assert example("digits").main(["--optimizer", optimizer, "--epochs", str(epochs)]) > least


def test_cifar_lenet_on_synthetic_images() -> None:
    assert example("cifar_lenet").main(["--steps", "16", "--batch", "64"]) < math.log(10)


def test_cifar_lenet_reads_the_published_format(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name in ("data_batch_1.bin", "data_batch_2.bin", "test_batch.bin"):
        records = torch.randint(256, (40, 3073), dtype=torch.uint8)
        records[:, 0] %= 10
        (folder / name).write_bytes(records.numpy().tobytes())
    cifar_lenet = example("cifar_lenet")
    train, test = cifar_lenet.cifar10(tmp_path)
    assert train.tensors[0].shape == (80, 3, 32, 32)
    assert test.tensors[1].max() < 10
    assert math.isfinite(cifar_lenet.main(["--data", str(tmp_path), "--epochs", "1", "--batch", "40"]))


def test_small_gpt_goes_on_from_its_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--steps", "8", "--warmup", "4", "--width", "16", "--length", "16", "--layers", "1"]
    checkpoint = ["--checkpoint", str(tmp_path / "last.pt")]
    small_gpt = example("small_gpt")
    first = small_gpt.main([*short, *checkpoint])
    learned = rates(capsys)[-1]
    assert small_gpt.main([*short, *checkpoint]) < first
    assert rates(capsys)[0] > learned / 2


def rates(capsys: pytest.CaptureFixture[str]) -> list[float]:
    return [float(x) for x in re.findall(r"lr (\S+)", capsys.readouterr().out)]


@pytest.mark.parametrize("optimizer", ["apo", "adamw"])
def test_pinn(optimizer: str) -> None:
    assert example("pinn").main(["--optimizer", optimizer, "--steps", "30", "--points", "32"]) < 100


def test_kernels_alone() -> None:
    assert example("kernels_alone").main(["--steps", "40"]) < 1


def test_plan_on_paper(capsys: pytest.CaptureFixture[str]) -> None:
    """What docs quote; state and traffic are as written."""
    found = example("sharded/plan_on_paper").main(["--models", "gpt2_xl", "--ranks", "1", "8"])
    for line in capsys.readouterr().out.splitlines():
        assert line in (DOCS / "scaling.md").read_text()
    whole, part = found["gpt2_xl", 1], found["gpt2_xl", 8]
    assert part.memory_bytes < 1.2 * whole.memory_bytes / 8
