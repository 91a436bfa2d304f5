"""``python -m benchmarks host``: what a call costs the host, apart from what it computes.

The Triton path runs with Triton's launcher replaced by nothing. Checks, plans, addresses and arguments are the real
ones, on tensors of the CPU, planned as for an H100. The ATen path runs on layers so small that the calls dominate. All
run in one process, in turn. Figures are medians of process time, so that other processes don't count.
"""

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import apo_kernels as ak
from benchmarks.common import results
from benchmarks.common.console import console, table, wrote

Call = Callable[[], object]
Tensors = list[Tensor]

MODELS: dict[str, tuple[str, int, int, int | None]] = {
    "21 layers, squares of 64": ("triton", 21, 128, 64),
    "60 layers, squares of 64": ("triton", 60, 128, 64),
    "60 layers, full blocks of 128": ("triton", 60, 128, None),
    "60 layers of 8, squares of 4": ("aten", 60, 8, 4),
    "60 layers of 8, full blocks": ("aten", 60, 8, None),
}
"""The backend, how many layers, of which side, with squares of which side."""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=101, help="calls of each (default: %(default)s)")


def run(options: Namespace) -> dict[str, Any]:
    """Print a table and write ``host.json``: microseconds per call (``"calls"``)."""
    rows = []
    shown = table("Host time of a call", ("model", "backend", "call", "µs", "µs per layer"), labels=("backend", "call"))
    with no_launcher():
        for model, (backend, count, side, squares) in MODELS.items():
            found = measure(calls(count, side, squares, backend), 5 if options.quick else options.rounds)
            for call, seconds in found.items():
                taken = 1e6 * seconds
                names = {"model": model, "backend": backend, "call": call}
                rows.append({**names, "layers": count, "microseconds": taken})
                shown.add_row(model, backend, call, f"{taken:.0f}", f"{taken / count:.1f}")
    console.print(shown)
    wrote(results.write(options.out, "host", "cpu", {"calls": rows}))
    return {"calls": rows}


def calls(count: int, side: int, squares: int | None, backend: str) -> dict[str, Call]:
    """The functions of ``apo_kernels`` on a model of square layers, blocks in bfloat16 on ``triton``."""
    dtype = torch.bfloat16 if backend == "triton" else torch.float32
    matrices = partial(_tensors, count, (side, side))
    shape = (side, side) if squares is None else (-(-side // squares), squares, squares)
    blocks = partial(_tensors, count, shape)
    Gs, Ss, Vs, thetas, buffers = (matrices(torch.float32) for _ in range(5))
    operands = Gs, blocks(dtype), blocks(dtype), Ss
    scalars = {"lr": 1e-9, "momentum": 0.9, "weight_decay": 0.1}
    step = partial(ak.foreach_precondition_step_, thetas, *operands, momentum_buffers=buffers, backend=backend)
    bound = ak.BoundStep(thetas, *operands, momentum_buffers=buffers, backend=backend)
    bound_model = backend == "triton" and squares is not None
    return {
        "bound step": partial(bound, **scalars),
        "step": partial(step, **scalars),
        "forward": partial(ak.foreach_precondition, *operands, backend=backend),
        "forward, keep": partial(ak.foreach_precondition, *operands, keep=True, backend=backend),
        "derivatives": partial(ak.foreach_precondition_vjp, *operands, Vs, backend=backend),
        **(_model_calls(thetas, *operands, buffers) if bound_model else {}),
    }


def _model_calls(
    thetas: Tensors, Gs: Tensors, As: Tensors, Bs: Tensors, Ss: Tensors, buffers: Tensors
) -> dict[str, Call]:
    """The methods of a bound model, with every tensor where it was."""
    bound = ak.ModelPreconditioner(As, Bs, Ss, widths=[S.shape[-1:] for S in Ss], backend="triton")
    weights, gradients = ([[x] for x in xs] for xs in (thetas, Gs))
    rates, momentum, ones = ([x] * len(Gs) for x in (1e-9, 0.9, 1.0))
    step = partial(bound.step_, weights, gradients, buffers, lr=rates, momentum=momentum, weight_decay=rates)
    return {
        "model's step": step,
        "model's step, promise": partial(step, most=1.0, shares=ones),
        "model's trial": partial(
            bound.trial_, weights, gradients, buffers, lengths=rates, momentum=momentum, shrink=ones
        ),
        "model's slopes": partial(bound.slopes, gradients, bound.keep(gradients), lengths=rates),
    }


def measure(every: dict[str, Call], rounds: int) -> dict[str, float]:
    """Seconds of process time per call: the median over rounds in which each call has its turn."""
    times: dict[str, list[float]] = {name: [] for name in every}
    for name, call in [*every.items()] * (rounds + 1):  # the first one plans
        began = time.process_time()
        call()
        times[name].append(time.process_time() - began)
    return {name: median(found[1:]) for name, found in times.items()}


@contextmanager
def no_launcher() -> Iterator[None]:
    """The Triton path on the CPU, without the launches."""
    from apo_kernels.targets import TARGETS
    from apo_kernels.triton import launch, plan

    def compiled(self: launch.Launch, run: launch.LaunchInputs) -> None:
        if self._start is None:
            constants = tuple(self.constants[name] for name in self.kernel.arg_names if name in self.constants)
            self._start = partial(self._direct, lambda *_, **__: None, constants)

    with (
        patch("apo_kernels.dispatch._obstacle", lambda _: None),
        patch.object(plan, "target_of", lambda _: TARGETS["sm_90"]),
        patch.object(launch.Launch, "compile", compiled),
    ):
        plan.clear_plans()
        yield
    plan.clear_plans()


def _tensors(count: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensors:
    return [torch.randn(shape).to(dtype) for _ in range(count)]
