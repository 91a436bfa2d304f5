"""The way from a call to a launch on a GPU, all but the launch itself: what the interpreter goes around.

Triton's own launch code runs here, with a driver that names a target, takes the compiled kernels and writes down what
it is asked to launch. So it shows that arguments have types that Triton takes, and that what is compiled ahead of time
(:mod:`apo_kernels.triton.tools.compile_ahead`) is what is launched, to the last constant.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch

from apo_kernels.targets import TARGETS, Target
from tests.apo_kernels.triton.conftest import INTERPRETED
from tests.apo_kernels.triton.examples import Model, model

pytest.importorskip("triton.language")
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver as drivers

from apo_kernels.triton import config
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("side", "size"), [(None, "large"), (None, "small"), (16, "16"), (64, "64")])
def test_what_is_launched_is_what_is_compiled_ahead(
    gpu: Recorder, dtype: torch.dtype, side: int | None, size: str
) -> None:
    shapes = [(60, 200), (33, 65)] if size == "small" else [(130, 200), (33, 65)]
    if size == "64" and config.tile_limit(gpu.target, dtype, backward=True) < 64:
        size = "large"  # the derivatives' half is the grouped GEMM's
    everything(model(shapes, dtype, A=side, B=side), torch.tensor(0.1))
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
