"""What can be chosen by default compiles for every target: no spills, within shared memory, to matrix instructions.

In processes of their own, as many at a time as there are cores. Triton keeps what it compiled on disk, so a second run
takes seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from apo_kernels.targets import TARGETS

pytest.importorskip("triton.language")

pytestmark = pytest.mark.aot

CHECK = """
import json, sys, torch
from apo_kernels.targets import CONSUMER, TARGETS
from apo_kernels.triton import config
from apo_kernels.triton.tools.compile_ahead import cases, compile_cases
target, dtype = TARGETS.get(sys.argv[1], CONSUMER), getattr(torch, sys.argv[2])
changed = {sys.argv[3]: json.loads(sys.argv[4])} if sys.argv[3:] else {}
with config.override(**changed):
    chosen = [case for case in cases(target, dtype) if not changed or case.stage in changed]
failed = 0
for case, report in zip(chosen, compile_cases(chosen, target)):
    faults = report.faults(case, target)
    if faults:
        failed += 1
        print(case.stage, case.size, "; ".join(faults))
sys.exit(failed != 0)
"""


Checks = dict[tuple[str, str], "Future[subprocess.CompletedProcess[str]]"]


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def checks(request: pytest.FixtureRequest) -> Iterator[Checks]:
    """What came out for each target and dtype that this run tests."""
    selected = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    wanted = [(each["target"], each["dtype"]) for each in selected if {"target", "dtype"} == set(each)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        # AMD's compiler is the slowest: first.
        order = sorted(wanted, key=lambda each: TARGETS[each[0]].backend != "hip")
        yield {each: pool.submit(run, CHECK, *each) for each in order}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("target", TARGETS)
def test_no_default_configuration_is_at_fault(target: str, dtype: str, checks: Checks) -> None:
    result = checks[target, dtype].result()
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_sm_80s_fit_consumer_gpus(name: str) -> None:
    """Which have less shared memory; what is compiled is the same, so Triton's cache has it."""
    result = run(CHECK, "consumer", name)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]


@pytest.mark.parametrize(
    ("stage", "changes", "fault"),
    [
        ("pair", {"rows": 128, "cols": 256, "warps": 4}, "spills"),
        ("pair", {"rows": 128, "cols": 256, "stages": 6}, "shared memory"),
        ("model_slopes", {"slab": 16, "warps": 4}, "reads a 64x16xf16 by rows"),
    ],
)
def test_the_check_sees_faults(stage: str, changes: dict[str, int], fault: str) -> None:
    """The same check, on tiles that are far too large, warps that are far too few, and slabs that are too narrow."""
    result = run(CHECK, "sm_90", "float16", stage, json.dumps(changes))
    assert result.returncode == 1, result.stderr[-2000:]
    assert fault in result.stdout


def test_loads_down_the_columns_are_seen() -> None:
    from apo_kernels.triton.tools.compile_ahead import _scattered

    text = """
    #blocked = #ttg.blocked<{sizePerThread = [1, 1], threadsPerWarp = [32, 1], warpsPerCTA = [2, 2], order = [0, 1]}>
    #blocked1 = #ttg.blocked<{sizePerThread = [1, 8], threadsPerWarp = [4, 8], warpsPerCTA = [4, 1], order = [1, 0]}>
    %g = tt.load %p, %mask, %zero : tensor<64x64x!tt.ptr<bf16>, #blocked>
    %b = tt.load %q, %mask, %zero : tensor<64x64x!tt.ptr<bf16>, #blocked1>
    tt.store %r, %y, %mask : tensor<64x64x!tt.ptr<f32>, #blocked>
    """
    assert _scattered(text) == 2
