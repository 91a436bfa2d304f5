"""Processes on gloo whose weights are DTensors: equal to one process, and to each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import apo_kernels as ak
from apo.layers.matrix_view import Side
from apo.layers.portable_state import _squares
from apo.ranks.owners import balanced
from tests.apo import sharded_worker
from tests.apo.helpers import played_by_forks
from tests.apo.sharded_worker import CASES, Case, title

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


def joined(result: dict[str, Any]) -> torch.Tensor:
    return torch.cat([weight.flatten() for weight in result["weights"].values()])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[int, list[Any]]:
    """What each rank got in all scenes, by the number of ranks."""
    results = {}
    for ranks in sharded_worker.ALL:
        (folder / str(ranks)).mkdir()
        results[ranks] = played_by_forks("tests.apo.sharded_worker", "everything", ranks, folder / str(ranks))
    return results


@pytest.mark.parametrize(
    ("ranks", "case"), [(ranks, case) for ranks, cases in CASES.items() for case in cases], ids=str
)
def test_sharded_training_is_one_process(ranks: int, case: Case, found: dict[int, list[Any]]) -> None:
    """After 50 steps, relative to the weights' length; what several ranks hold is the same to the bit."""
    kind, name, layout, dtype, settings = case
    first, *others = (each["equal"][title(case)] for each in found[ranks])
    expected = sharded_worker.train(kind, name, None, ranks, dtype, structure=layout, **settings)
    assert first["counts"] == expected["counts"] == [0, 0, sharded_worker.STEPS]
    assert expected["losses"][-1] < expected["losses"][0]
    held, wanted = joined(first), joined(expected)
    # a step's gain on B′ is a difference of two losses, of which float32 leaves four digits
    tolerance = TOLERANCE[dtype] * (25 if settings.get("own_loss") and kind != "APO" else 1)
    assert (held - wanted).norm() <= tolerance * wanted.norm()
    assert all(torch.equal(held, joined(other)) for other in others)
    torch.testing.assert_close(first["numbers"], expected["numbers"], rtol=20 * tolerance, atol=0)
    assert all(torch.equal(first["numbers"], other["numbers"]) for other in others)
    if layout in ("fsdp", "hsdp"):
        alike = [block for block in first["blocks"] if block.endswith(" A")]
        assert len(alike) == len([block for block in expected["blocks"] if block.endswith(" A")])
        assert all(torch.equal(first["blocks"][block], other["blocks"][block]) for block in alike for other in others)


@pytest.fixture(params=[2, 4])
def owned(request: pytest.FixtureRequest, found: dict[int, list[Any]]) -> list[Any]:
    return [each["owners"] for each in found[request.param]]


def test_layers_with_owners_train_as_without(owned: list[Any]) -> None:
    """To the bit, on all ranks: weights, state and numbers. With one layer larger than all others, tied, frozen, groups
    of their own settings; then from a checkpoint."""
    for dtype in TOLERANCE:
        plain = owned[0][f"none {dtype}"]
        assert min(plain["promises"]) < 1
        for rank in owned:
            own = rank[f"owner {dtype}"]
            assert all(identical(plain[name], own[name]) for name in ("weights", "numbers", "promises"))
            assert identical(plain["state"]["state"], own["state"]["state"])
    for name in ("resumed", "adam"):
        for rank in owned:
            assert identical(owned[0][f"{name} none"]["weights"], rank[f"{name} owner"]["weights"])


def test_owners_hold_each_layer_once(owned: list[Any]) -> None:
    whole = owned[0]["none torch.float64"]["bytes"]
    parts = [rank["owner torch.float64"]["bytes"] for rank in owned]
    assert sum(parts) == whole
    owners = owned[0]["owner torch.float64"]["owners"]
    assert all(rank["owner torch.float64"]["owners"] == owners for rank in owned)
    assert len(set(owners)) == len(owned)
    assert owners.count(owners[0]) == 1  # the large layer, which bounds what balance there can be


@pytest.mark.parametrize("ranks", [2, 4])
def test_each_rank_holds_its_share_of_the_state(ranks: int, found: dict[int, list[Any]]) -> None:
    """With owners an even share within 10%. Under fully_shard an even share of S, B, momentum and their running means,
    and A. The memory that it lies in is no larger."""
    for each in found[ranks]:
        whole, owner, fsdp = (each["state_held"][layout] for layout in ("whole", "owner", "fsdp"))
        assert owner["all"] <= 1.1 * whole["all"] / ranks
        assert fsdp["A"] == whole["A"]
        assert fsdp["all"] - fsdp["A"] <= (whole["all"] - whole["A"]) / ranks
        assert all(held["memory"] <= 1.01 * held["all"] for held in (whole, owner, fsdp))


@pytest.mark.parametrize("layout", ["fsdp", "ddp"])
def test_ranks_that_hold_nothing_join_in(layout: str, found: dict[int, list[Any]]) -> None:
    expected = joined(sharded_worker.single(None))
    for each in found[4]:
        assert (joined(each["nothing"][layout]) - expected).norm() <= 1e-12 * expected.norm()


def test_the_balance_is_within_the_largest_cost() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 3, 8):
        costs = [(x, y) for x, y in torch.rand(20, 2, generator=generator).square().tolist()]
        loads = [(0.0, 0.0)] * count
        owners = balanced(costs, loads)
        for k in (0, 1):
            assert loads == [
                pytest.approx([sum(c[j] for c, o in zip(costs, owners, strict=True) if o == rank) for j in (0, 1)])
                for rank in range(count)
            ]
            even = sum(c[k] for c in costs) / count
            assert max(load[k] for load in loads) <= 1.35 * even + max(c[k] for c in costs)
    assert balanced([(1.0, 1.0)], [(0.0, 0.0)] * 3) == [0]  # more ranks than layers


@pytest.mark.parametrize("case", sharded_worker.SPOILED, ids=str)
def test_what_is_not_finite_on_one_rank_is_judged_alike_on_all(
    case: tuple[str, ...], found: dict[int, list[Any]]
) -> None:
    first, second = (each["not_finite"][str(case)] for each in found[2])
    skipped = case[1] in ("batch", "gradient")
    assert first["counts"] == second["counts"] == [int(skipped), 1, 6]
    assert all(torch.equal(a, b) for a, b in zip(first["states"], second["states"], strict=True))
    assert torch.equal(first["states"][2], first["states"][3])
    assert all(state.isfinite().all() for state in first["states"])
    assert not torch.equal(first["states"][3], first["states"][5])


@pytest.mark.parametrize("scene", sharded_worker.STOPPING)
def test_no_rank_hangs_or_goes_on_where_another_stops(scene: str, tmp_path: Path) -> None:
    """An error on all that live, within the group's timeout; weights and state are as before the step."""
    first, second = played_by_forks("tests.apo.sharded_worker", scene, 2, tmp_path, failing=True)
    assert first["error"] is not None
    assert first["steps"] == 2
    assert first["kept"]
    if "die" not in scene:
        assert second == {"steps": 2, "error": "stop", "kept": True}


@pytest.mark.parametrize("ranks", [None, 2, 3, 4])
def test_checkpoints_reshard(ranks: int | None, found: dict[int, list[Any]], folder: Path) -> None:
    """By torch.distributed.checkpoint, from two ranks, fully sharded or tensor parallel, amid the Fisher start; on as
    many ranks to the bit. None: to one process without DTensors."""
    for case in sharded_worker.SAVED:
        name = " ".join(case)
        expected = found[2][0]["saving"][name]
        if ranks is None:
            result = sharded_worker.resumed(*case, folder / "2", None)
        else:
            result = found[ranks][0]["loading"][name]
        assert ranks != 2 or identical(result["weights"], expected["weights"])
        wanted = joined(expected)
        assert (joined(result) - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("case", sharded_worker.SENT, ids=str)
def test_what_is_sent_is_what_the_plan_says(case: Any, found: dict[int, list[Any]]) -> None:
    """Counted in a plain step and in one with a meta-update, beside what the model's own passes send; the calls of a
    plain step are those that torch's CommDebugMode finds."""
    for each in found[2]:
        result = each["sent"][str(case[:2] + case[3:])]
        planned, counted = result["planned"], result["counted"]
        assert counted["step"] == planned["step"] > 0
        assert counted["meta"] == planned["meta"] > planned["step"]
        assert all(ours == torchs_own > 0 for ours, torchs_own in result["calls"])


def test_squares_that_start_elsewhere_keep_what_they_share() -> None:
    """Ten rows in squares of 4, whole and as two parts of five rows: from the parts to the whole, nothing is lost."""
    generator = torch.Generator().manual_seed(0)
    parts, places = [], []
    for _ in range(2):
        side = Side(5, 4)
        stack = torch.zeros(2, 4, 4)
        stack[0] = torch.randn(4, 4, generator=generator)
        stack[1] = torch.diag(torch.tensor([3.0, 2.0, 2.0, 2.0]))  # one row, and what sticks out
        parts.append(stack)
        places.append(side.places(torch.device("cpu")))
    dense = torch.block_diag(*(ak.blocks_to_dense(stack, 5) for stack in parts))
    rows = torch.cat([stack.flatten(0, 1)[:5] for stack in parts])
    whole = _squares(rows, torch.cat(places), Side(10, 4), torch.Size((3, 4, 4)), 2.0, 0)
    kept = ak.blocks_to_dense(whole, 10)
    inside = torch.block_diag(torch.ones(4, 4), torch.ones(4, 4), torch.ones(2, 2))
    assert torch.equal(kept, dense * inside)
    assert whole[2].diagonal()[2:].tolist() == [2, 2]
    back = _squares(
        whole.flatten(0, 1)[:10][:5], Side(10, 4).places(rows.device)[:5], Side(5, 4), parts[0].shape, 2.0, 0
    )
    assert torch.equal(back, parts[0])


def identical(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(identical, a, b))
    return bool(a == b or (a != a and b != b))
