"""The way from a call to a launch on a GPU, all but the launch itself: what the interpreter goes around.

Triton's own launch code runs here, with a driver that names a target, takes the compiled kernels and writes down what
it is asked to launch. So it shows that arguments have types that Triton takes, and that what is compiled ahead of time
(:mod:`apo_kernels.triton.tools.compile_ahead`) is what is launched, to the last constant.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch

import apo_kernels as ak
from apo_kernels.targets import TARGETS, Target
from tests.apo_kernels.triton.conftest import INTERPRETED
from tests.apo_kernels.triton.examples import Model, model

pytest.importorskip("triton.language")
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver as drivers

from apo_kernels.triton import config, relative_steps
from apo_kernels.triton import plan as plans
from apo_kernels.triton.backend import TritonBackend
from apo_kernels.triton.tools import compile_ahead

pytestmark = [pytest.mark.aot, pytest.mark.skipif(INTERPRETED, reason="nothing is compiled under TRITON_INTERPRET=1")]

DTYPES = (torch.bfloat16, torch.float32)


@dataclass
class Launched:
    """One launch as the driver got it."""

    name: str
    programs: int
    warps: int
    shared: int
    scratch: int
    source: str
    arguments: dict[str, Any]


def identity(source: Any) -> str:
    """What a kernel is compiled from: the types of its arguments, its constants, and what is known of its pointers."""
    known = {path: attributes for path, attributes in source.attrs.items() if attributes}
    constants = sorted((path, str(value)) for path, value in source.constants.items())
    return f"{source.fn.__name__} {source.signature} {constants} {known}"


@dataclass
class Recorder:
    """What Triton asks a driver for, answered for a GPU that isn't there."""

    target: Target
    launched: list[Launched] = field(default_factory=list)
    built: list[str] = field(default_factory=list)

    @property
    def utils(self) -> Recorder:
        return self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget(self.target.backend, self.target.arch, self.target.warp)

    def get_current_device(self) -> int:
        return list(TARGETS).index(self.target.name)

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_device_properties(self, _device: int) -> dict[str, int]:
        return {"max_shared_mem": self.target.shared}

    def load_binary(self, name: str, *_: object) -> tuple[int, int, int, int, int]:
        self.built.append(name)
        return 1, 1, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return partial(self._launch, source, metadata)

    def _launch(self, source: Any, metadata: Any, x: int, y: int, z: int, *rest: Any) -> None:
        self.launched.append(
            Launched(
                source.fn.__name__,
                x * y * z,
                metadata.num_warps,
                metadata.shared,
                getattr(metadata, "global_scratch_size", 0),
                identity(source),
                dict(zip(source.fn.arg_names, rest[6:], strict=True)),
            )
        )


RECORDERS = {name: Recorder(target) for name, target in TARGETS.items()}
"""One a target: Triton keeps the launcher that it got with each kernel."""


@pytest.fixture(params=TARGETS)
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """A GPU of each target, behind tensors on the CPU."""
    recorder = RECORDERS[request.param]
    recorder.launched, recorder.built = [], []
    monkeypatch.setattr(plans, "target_of", lambda _: recorder.target)
    before = drivers._active
    drivers.set_active(recorder)
    plans.clear_plans()
    yield recorder
    plans.clear_plans()
    drivers._active = before


def everything(layers: Model, lr: torch.Tensor) -> None:
    """Each function of the backend, once."""
    backend, operands = TritonBackend(), layers.operands
    backend.foreach_precondition(*operands)
    backend.foreach_precondition_keep(*operands)
    backend.foreach_precondition_vjp(*operands, layers.Vs, None, "GABS")
    thetas, buffers = [G.clone() for G in layers.Gs], [G.float() for G in layers.Gs]
    backend.foreach_precondition_step_(thetas, *operands, buffers, lr, 0.9, 0.1)


def everything_of_a_model(layers: Model, pairs: Sequence[int], bounded: bool) -> None:
    """Each function of a bound model, once; of the layers ``pairs`` the last column is a bias."""
    Gs, Vs = ([[*x.split([x.shape[1] - 1, 1], 1)] if i in pairs else [x] for i, x in enumerate(xs)]
              for xs in (layers.Gs, layers.Vs))  # fmt: skip
    Gs, Vs, thetas = ([[x.clone() for x in own] for own in each] for each in (Gs, Vs, Gs))
    buffers, numbers = [G.float() for G in layers.Gs], [0.1] * len(Gs)
    widths = [tuple(x.shape[1] for x in own) for own in Gs]
    bound = ak.ModelPreconditioner(layers.As, layers.Bs, layers.Ss, widths=widths, backend="triton")
    most = 1.0 if bounded else math.inf
    bound.step_(thetas, Gs, buffers, lr=numbers, momentum=numbers, weight_decay=numbers, most=most, shares=numbers)
    kept = bound.trial_(thetas, Gs, buffers, lengths=numbers, momentum=numbers, shrink=numbers)
    bound.slopes(Vs, kept, lengths=numbers)
    bound.keep(Gs)


def is_known(gpu: Recorder, dtype: torch.dtype) -> None:
    known = {
        (identity(compile_ahead.source_of(case, gpu.target)), case.warps)
        for case in compile_ahead.cases(gpu.target, dtype)
    }
    assert gpu.launched
    for launch in gpu.launched:
        assert (launch.source, launch.warps) in known, launch
        assert launch.programs > 0
        assert launch.shared <= gpu.target.shared
        assert launch.scratch == 0, "nobody would allocate it"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("side", "shapes"), [(16, [(16, 16)]), (16, [(64, 65)]), (64, [(64, 129)]), (64, [(33, 65), (7, 13)])]
)
def test_a_whole_models_kernels_are_compiled_ahead(
    gpu: Recorder, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, side: int, shapes: list[tuple[int, int]]
) -> None:
    monkeypatch.setattr("apo_kernels.dispatch._obstacle", lambda _: None)
    for bounded in (False, True):
        layers = model(shapes, dtype, A=side, B=side)
        layers.Ss = [torch.zeros(m, -(-n // 8) * 8, dtype=dtype)[:, :n] for m, n in shapes]
        everything_of_a_model(layers, [0], bounded)
    is_known(gpu, dtype)
    stages = {launch.name for launch in gpu.launched}
    assert stages == {"model_forward", "model_apply", "model_slopes", "model_sums"}


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("b", [1, 3, 30, 64])
def test_the_relative_steps_kernels_are_compiled_ahead(
    gpu: Recorder, monkeypatch: pytest.MonkeyPatch, b: int, each: bool
) -> None:
    monkeypatch.setattr("apo_kernels.dispatch._obstacle", lambda _: None)
    relative_steps._squares.cache_clear()
    relative_steps._scalings.cache_clear()
    number: Any = torch.ones(3) if each else 0.1
    given = {"rate": number, "correction": number, "betas": (0.5, 0.9), "floor": 0.1, "backend": "triton"}
    X, slope, new_slope = (torch.ones(3, b, b) for _ in range(3))
    size, new_size = (torch.ones(3, b) for _ in range(2))
    ak.relative_step_squares_(X, slope, size, new_slope, new_size, longest=2.0, **given)
    ak.relative_step_scalings_(*[torch.ones(24) for _ in range(5)], lengths=[8] * 3, **given)
    is_known(gpu, torch.float32)
    assert len(gpu.launched) == 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("side", "size"), [(None, "large"), (None, "small"), (16, "16"), (64, "64")])
def test_what_is_launched_is_what_is_compiled_ahead(
    gpu: Recorder, dtype: torch.dtype, side: int | None, size: str
) -> None:
    shapes = [(60, 200), (33, 65)] if size == "small" else [(130, 200), (33, 65)]
    if size == "64" and config.tile_limit(gpu.target, dtype, backward=True) < 64:
        size = "large"  # the derivatives' half is the grouped GEMM's
    everything(model(shapes, dtype, A=side, B=side), torch.tensor(0.1))
    is_known(gpu, dtype)


def test_pointers_are_of_the_tables(gpu: Recorder) -> None:
    """Every pointer argument is a tensor that lives as long as its plan; the scalars come last, as they were given."""
    layers, lr = model([(130, 200)], torch.bfloat16), torch.tensor(0.1)
    thetas, buffers = [layers.Gs[0].clone()], [layers.Gs[0].float()]
    TritonBackend().foreach_precondition_step_(thetas, *layers.operands, buffers, lr, 0.9, 0.1)
    *_, update = gpu.launched
    given = update.arguments
    assert given["lr_tensor"] is lr
    assert (given["momentum"], given["decay"], given["lr"]) == (0.9, 0.1, 0.0)
    for name in ("tiles", "problems", "layers", "operands", "amax"):
        assert given[name].data_ptr() % 16 == 0, "the compiler is told so"


def test_everything_is_compiled_before_anything_is_launched(gpu: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that can't be loaded leaves all memory as it was."""
    layers = model([(130, 200)], torch.bfloat16)

    def refuse(name: str, *_: object) -> tuple[int, int, int, int, int]:
        if len(gpu.built) == 3:
            raise RuntimeError("no such instruction")
        gpu.built.append(name)
        return 1, 1, 0, 0, 1024

    for kernel in (compile_ahead.grouped_gemm, compile_ahead.pack):
        kernel.device_caches.clear()
    monkeypatch.setattr(gpu, "load_binary", refuse)
    with pytest.raises(RuntimeError, match="no such instruction"):
        TritonBackend().foreach_precondition(*layers.operands)
    assert gpu.built
    assert not gpu.launched


@pytest.mark.parametrize("gpu", ["sm_90"], indirect=True)
def test_the_second_call_compiles_nothing(gpu: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor with another rate, other weights or a rate of 0 or 1: Triton compiles some integers anew, but no floats."""
    layers = model([(130, 200)], torch.bfloat16)
    thetas = [layers.Gs[0].clone()]

    def step(lr: float, momentum: float) -> None:
        TritonBackend().foreach_precondition_step_(thetas, *layers.operands, [], lr, momentum, 0.1)

    def step_by_tensor(at: int) -> None:
        lr = torch.full((8,), 0.1)[at]
        TritonBackend().foreach_precondition_step_(thetas, *layers.operands, [], lr, 0.0, 0.1)

    step(0.1, 0.9)
    step_by_tensor(0)
    compiled: list[object] = []
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda **each: compiled.append(each["fn"].name) and None)
    for lr, momentum in ((0.0, 0.9), (1.0, 1.0), (1e-30, 0.5)):
        thetas = [layers.Gs[0].clone()]
        step(lr, momentum)
    step_by_tensor(1)
    assert compiled == []
    plans.clear_plans()
    step_by_tensor(1)
    assert compiled == [], "where a rate lies is nothing to a kernel"
