"""Processes on gloo whose weights are DTensors: equal to one process, and to each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.apo import sharded_worker
from tests.apo.helpers import played
from tests.apo.sharded_worker import CASES, Case, title

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


def joined(result: dict[str, Any]) -> torch.Tensor:
    return torch.cat([weight.flatten() for weight in result["weights"].values()])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    return {
        ranks: played("tests.apo.sharded_worker", "equal", ranks, tmp_path_factory.mktemp(f"ranks_{ranks}"))
        for ranks in CASES
    }


@pytest.mark.parametrize(
    ("ranks", "case"), [(ranks, case) for ranks, cases in CASES.items() for case in cases], ids=str
)
def test_sharded_training_is_one_process(ranks: int, case: Case, found: dict[int, list[Any]]) -> None:
    """After 50 steps, relative to the weights' length; what several ranks hold is the same to the bit."""
    kind, name, layout, dtype, settings = case
    first, *others = (each[title(case)] for each in found[ranks])
    expected = sharded_worker.train(kind, name, None, ranks, dtype, structure=layout, **settings)
    assert first["counts"] == expected["counts"] == [0, 0, sharded_worker.STEPS]
    assert expected["losses"][-1] < expected["losses"][0]
    held, wanted = joined(first), joined(expected)
    assert (held - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()
    assert all(torch.equal(held, joined(other)) for other in others)
    torch.testing.assert_close(first["numbers"], expected["numbers"], rtol=20 * TOLERANCE[dtype], atol=0)
    assert all(torch.equal(first["numbers"], other["numbers"]) for other in others)
    if layout in ("fsdp", "hsdp"):
        alike = [block for block in first["blocks"] if block.endswith(" A")]
        assert len(alike) == len([block for block in expected["blocks"] if block.endswith(" A")])
        assert all(torch.equal(first["blocks"][block], other["blocks"][block]) for block in alike for other in others)
