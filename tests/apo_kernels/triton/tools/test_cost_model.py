"""The cost model agrees with what the tables of a plan hold."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from apo_kernels.targets import INTERPRETER, TARGETS
from apo_kernels.triton.tools.cost_model import launch_costs
from tests.apo_kernels.triton.examples import model

pytest.importorskip("triton.language")
from apo_kernels.triton.plan import LaunchPlan
from apo_kernels.triton.plan_builder import Operation
from apo_kernels.triton.table_layout import ALIGN, Kind, ProblemField, Role

SHAPES = ((70, 90), (64, 64), (130, 257), (16, 200), (7, 1))


def count(shapes: tuple[tuple[int, int], ...], side: int | None, operation: str) -> Counter[str]:
    """FLOPs by launch, from the tables: products of the grouped GEMM by their sides, of the tile kernel by its tile."""
    layers = model(shapes, torch.bfloat16, A=side, B=side)
    operands = dict(zip((Role.G, Role.A, Role.B, Role.S), layers.operands, strict=True))
    if operation == "vjp":
        plan = LaunchPlan(INTERPRETER, None, Operation(wanted="ABS"), {
            **operands, Role.V: layers.Vs, Role.DA: layers.As, Role.DB: layers.Bs, Role.DS: layers.Ss,
        })  # fmt: skip
    else:
        plan = LaunchPlan(INTERPRETER, None, Operation(update=operation == "step"), {**operands, Role.OUT: layers.Gs})
    flops: Counter[str] = Counter()
    for launch in plan.launches:
        if launch.name.startswith("tile"):
            products = 10 if launch.name == "tile_backward" else 4
            flops[launch.name] += 2 * products * launch.constants["SIDE"] ** 3 * len(launch.tables[0])
        elif launch.name == "sum_parts":
            flops[launch.name] += 0
        elif launch.name != "pack":
            for problem in launch.tables[1].tolist():
                sides = [problem[f] * ALIGN for f in (ProblemField.ROWS, ProblemField.COLS, ProblemField.DEPTH)]
                twice = 2 if launch.name == "pair" or problem[ProblemField.KIND] == Kind.BLOCK else 1
                flops[launch.name] += 2 * sides[0] * sides[1] * sides[2] * twice
    return flops


@pytest.mark.parametrize("side", [None, 16, 64, 100])
@pytest.mark.parametrize("operation", ["forward", "step", "vjp"])
def test_flops_are_those_of_the_tables(operation: str, side: int | None) -> None:
    found = {entry.launch: entry.flops for entry in launch_costs(operation, SHAPES, side, torch.bfloat16, INTERPRETER)}
    assert found == dict(count(SHAPES, side, operation))


def test_bytes_of_a_block_diagonal_step_are_the_floor() -> None:
    """G, S, the weight and the momentum read, the weight and the momentum written, the blocks read: nothing else."""
    (entry,) = launch_costs("step", ((256, 512),), 64, torch.bfloat16, TARGETS["sm_90"])
    mn, blocks = 256 * 512, 64 * 256 + 64 * 512
    assert entry.bytes == 2 * (mn + mn + blocks) + 2 * 2 * mn + 2 * 4 * mn
    assert entry.regime(800e12, 3e12, 1e-9) == "memory"
    assert entry.regime(800e12, 3e12, 1.0) == "launch"


def test_bytes_of_the_launches_of_full_blocks() -> None:
    m, n = 512, 1024
    found = {e.launch: e.bytes for e in launch_costs("forward", ((m, n),), None, torch.bfloat16, TARGETS["sm_90"])}
    assert found == {
        "right": 2 * (m * n + n * n + m * n),  # G, A in; U out
        "scale": 2 * (m * n + m * m + m * n + m * n),  # U, B, S in; T out
        "left": 2 * (m * n + m * m + m * n),  # T, B in; W out
        "out": 2 * (m * n + n * n + m * n),  # W, A in; Y out
    }


def test_an_operation_that_is_none() -> None:
    with pytest.raises(ValueError, match="operation must be one of"):
        launch_costs("backward", SHAPES, None, torch.bfloat16, INTERPRETER)
