"""Plans: the tables and configurations for a list of layers, built once and used step after step.

A plan is found again by the shapes, strides, dtypes and alignment of its operands. From step to step only addresses
change: they go to the device in one small asynchronous copy, and not even that where they are as before (static
weights and gradients, a captured graph). Nothing synchronises with the host. A run takes its workspace from torch's
allocator and gives it back: nothing but tables outlives it.

**CUDA graphs.** Call once outside of the capture with operands of the same form, so that everything is compiled, then
capture. A replay repeats the copies of tables that the capture made, from pinned memory; what it reads is kept as long
as the graph (:mod:`apo_kernels.triton.graphs`). Warm up on the capture stream: otherwise each captured call builds a
plan of its own, which only its graph can use, because its tables are filled by a replay.

**Streams.** A plan's tables were copied on the stream that it was made on; another stream gets another plan.

**Threads.** Plans are found and made ready under a lock. Runs share nothing but tables that don't change.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from threading import RLock

import torch
from torch import Tensor

from apo_kernels.targets import Target, target_of
from apo_kernels.triton import config
from apo_kernels.triton.errors import Interrupted
from apo_kernels.triton.gemm_part import GemmPart
from apo_kernels.triton.graphs import keep_for_graph, release_of_gone_graphs
from apo_kernels.triton.launch import LaunchInputs, current_stream
from apo_kernels.triton.layers import LayerLayout
from apo_kernels.triton.operand_table import OperandTable
from apo_kernels.triton.plan_builder import Operands, Operation, PlanBuilder, to_device
from apo_kernels.triton.table_layout import Role
from apo_kernels.triton.tile_part import TilePart

__all__ = ["Bound", "LaunchPlan", "Operation", "Ready", "Step", "clear_plans", "plan_for", "start", "target_of"]

_shape = attrgetter("shape")
_BINDINGS = 8
_PLANS = 32


@dataclass(frozen=True)
class Step:
    """The scalars of an update; ``lr_tensor``, if there, lies on the device and stands in ``lr``'s place."""

    lr: float = 0.0
    lr_tensor: Tensor | None = None
    momentum: float = 0.0
    decay: float = 0.0

    @property
    def scalars(self) -> tuple[float, Tensor | None, float, float]:
        return self.lr, self.lr_tensor, self.momentum, self.decay


class LaunchPlan:
    """See the module's docstring.

    Args:
        target: what the device is.
        precision: how float32 operands are multiplied, or None (:meth:`apo_kernels.targets.Target.precision`).
        operation: what is computed.
        operands: the tensors by role, at least one per role; those of one role have one dtype.

    Attributes:
        launches: what a run launches, in order.
    """

    def __init__(self, target: Target, precision: str | None, operation: Operation, operands: Operands) -> None:
        builder = PlanBuilder(target, precision, operation, operands)
        self.device = builder.device
        limit = config.tile_limit(target, builder.compute, bool(operation.wanted))
        fits = [max(layer.A.side, layer.B.side) <= limit for layer in builder.layers]
        if not all(fits):
            # The grouped GEMM is launched anyway: a layer of full blocks joins it at no further launch, however small.
            fits = [fit and not _has_one_tile(layer) for fit, layer in zip(fits, builder.layers, strict=True)]
        parts = (
            GemmPart(builder, [at for at, fit in enumerate(fits) if not fit]),
            TilePart(builder, [at for at, fit in enumerate(fits) if fit], limit),
        )
        table = builder.table(builder.shapes)
        found = [part.launches(table) for part in parts]
        # What writes weights comes last: until then nothing is lost if a launch fails.
        self.launches = [launch for launches in found for launch in launches if not launch.updates]
        self.launches += [launch for launches in found for launch in launches if launch.updates]
        self._addresses = OperandTable(builder.layers, builder.made, builder.singles)
        self._workspace_bytes, self._amax = builder.workspace_bytes, builder.amax
        self._hosts = builder.hosts if _capturing(self.device) else []
        self._bindings: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()
        self._last: tuple[tuple[int, ...], Tensor] | None = None

    def ready(self, pointers: tuple[int, ...], step: Step, stream: int) -> Ready:
        """All that can fail, for operands of the form that the plan was made for, which lie at ``pointers``."""
        workspace = None
        if self._workspace_bytes:
            workspace = torch.empty(self._workspace_bytes // 4, dtype=torch.float32, device=self.device)
            pointers = (*pointers, workspace.data_ptr())
        table = self._bind(pointers, stream)
        run = LaunchInputs(table, None if workspace is None else workspace[self._amax // 4 :], step.scalars, stream)
        for launch in self.launches:
            launch.compile(run)
        return Ready(self, run)

    def _bind(self, pointers: tuple[int, ...], stream: int) -> Tensor:
        """The table of addresses for tensors that lie at ``pointers``, the workspace last, on the device."""
        capturing = _capturing(self.device)
        if self._last is not None and pointers is self._last[0] and not capturing:
            return self._last[1]  # to look them up would be to hash them all
        table = self._bindings.get(pointers)
        host = None
        if table is not None:
            self._bindings.move_to_end(pointers)
        else:
            host, table = to_device(self._addresses.fill(pointers), self.device)
            if not capturing:
                self._bindings[pointers] = table
                while len(self._bindings) > _BINDINGS:
                    self._bindings.popitem(last=False)
        if capturing:
            keep_for_graph(stream, self, host, table)
        else:
            self._last = pointers, table
        return table


@dataclass(frozen=True)
class Ready:
    """A plan with everything that one run needs: planned, bound and compiled. It keeps the run's workspace."""

    plan: LaunchPlan
    run: LaunchInputs


_plans: OrderedDict[Hashable, LaunchPlan] = OrderedDict()
_lock = RLock()


class Bound:
    """Runs on the same tensors, planned once for each operation and stream.

    The tensors must lie where they lay, in the form that they had; their device must be the current one at each call.

    Args:
        groups: operands, at least one; those of one role in one group have one dtype.

    Raises:
        TypeError: an operand's memory has no address.
    """

    def __init__(self, precision: str | None, groups: Sequence[Operands]) -> None:
        self.precision, self.groups = precision, groups
        self.device = groups[0][Role.G][0].device
        self._pointers = [tuple([x.data_ptr() for tensors in group.values() for x in tensors]) for group in groups]
        for group, pointers in zip(groups, self._pointers, strict=True):
            if 0 in pointers:
                _refuse_without_address(group)
        self._plans: dict[Hashable, list[LaunchPlan]] = {}

    def run(self, operation: Operation, step: Step) -> None:
        """Plan and compile for every group, then launch.

        Raises:
            Interrupted: a launch failed, and one before it has written weights.
        """
        stream = current_stream(self.device)
        key = operation, stream, config.overrides_key()
        with _lock:
            if (plans := self._plans.get(key)) is None:
                each = zip(self.groups, self._pointers, strict=True)
                plans = [plan_for(self.precision, operation, group, pointers) for group, pointers in each]
                if not _capturing(self.device):  # else it is its graph's alone
                    self._plans[key] = plans
            ready = [plan.ready(at, step, stream) for plan, at in zip(plans, self._pointers, strict=True)]
        start(ready)


def start(every: Iterable[Ready]) -> None:
    """Launch what is ready, in order.

    Raises:
        Interrupted: a launch failed, and one before it has written weights.
    """
    written = False
    try:
        for each in every:
            for launch in each.plan.launches:
                launch(each.run)
                written |= launch.updates
    except Exception as error:
        if written:
            raise Interrupted(
                f"a launch failed after some weights had been stepped: {type(error).__name__}: {error}"
            ) from error
        raise


def plan_for(precision: str | None, operation: Operation, operands: Operands, pointers: Sequence[int]) -> LaunchPlan:
    """The plan for operands of this form that lie at ``pointers``, made if it isn't there. Their device must be the
    current one."""
    device = operands[Role.G][0].device
    forms = [
        (role, xs[0].dtype, tuple(map(_shape, xs)), tuple(map(Tensor.stride, xs))) for role, xs in operands.items()
    ]
    alignments = tuple([pointer % 16 for pointer in pointers])
    key = (device, current_stream(device), precision, operation, config.overrides_key(), *forms, alignments)
    with _lock:
        plan = _plans.get(key)
        if plan is not None:
            _plans.move_to_end(key)
            return plan
        release_of_gone_graphs()
        plan = LaunchPlan(target_of(device), precision, operation, operands)
        if not _capturing(device):
            _plans[key] = plan
            while len(_plans) > _PLANS:
                _plans.popitem(last=False)
        return plan


def clear_plans() -> None:
    """Give back all tables, except those that a CUDA graph reads."""
    with _lock:
        _plans.clear()
        release_of_gone_graphs()


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _has_one_tile(layer: LayerLayout) -> bool:
    return layer.A.count == layer.B.count == 1


def _refuse_without_address(operands: Operands) -> None:
    for role, tensors in operands.items():
        for i, x in enumerate(tensors):
            if x.data_ptr() == 0:
                raise TypeError(
                    f"backend triton needs tensors that lie in memory, but number {i} of {role.name}, a "
                    f"{type(x).__name__}, has no address"
                )
