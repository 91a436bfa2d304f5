"""Plans: the tables, the configurations and the workspace for a list of layers, built once and used step after step.

A plan is found again by the shapes, strides, dtypes and alignment of its operands. From step to step only addresses
change: they go to the device in one small asynchronous copy, and not even that where they are as before (static
weights and gradients, a captured graph). Nothing synchronises with the host, and nothing is allocated but results.

**CUDA graphs.** Call once outside of the capture with operands of the same form, so that everything is compiled, then
capture. A replay repeats the copies of tables that the capture made, from pinned memory that the plan keeps alive; a
plan that was captured is never dropped. Capture on the stream that you called on, and the plan is there; on another,
each captured call makes one of its own. Only its graph can use that one: its tables are filled by a replay.

**Streams.** A plan's workspace belongs to the stream that it was made on; another stream gets another plan.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from apo_kernels.targets import Target, target_of
from apo_kernels.triton import config
from apo_kernels.triton.addresses import Addresses
from apo_kernels.triton.draft import Draft, Operands, Operation, to_device
from apo_kernels.triton.gemm_part import GemmPart
from apo_kernels.triton.layers import Layer
from apo_kernels.triton.roles import Role
from apo_kernels.triton.tile_part import TilePart

__all__ = ["Operation", "Plan", "Step", "clear_plans", "plan_for"]

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


class Plan:
    """See the module's docstring.

    Args:
        target: what the device is.
        precision: how float32 operands are multiplied, or None (:meth:`apo_kernels.targets.Target.precision`).
        operation: what is computed.
        operands: the tensors by role, at least one a role; those of one role have one dtype.

    Attributes:
        launches: what :meth:`run` launches, in order.
    """

    def __init__(self, target: Target, precision: str | None, operation: Operation, operands: Operands) -> None:
        draft = Draft(target, precision, operation, operands)
        self.device = draft.device
        limit = config.tile_limit(target, draft.compute, bool(operation.wanted))
        fits = [max(layer.A.side, layer.B.side) <= limit for layer in draft.layers]
        if not all(fits):
            # The grouped GEMM is launched anyway: a layer of full blocks joins it at no further launch, however small.
            fits = [fit and not _has_one_tile(layer) for fit, layer in zip(fits, draft.layers, strict=True)]
        parts = (
            GemmPart(draft, [at for at, fit in enumerate(fits) if not fit]),
            TilePart(draft, [at for at, fit in enumerate(fits) if fit], limit),
        )
        table = draft.table(draft.shapes)
        found = [part.launches(table) for part in parts]
        # What writes weights comes last: until then nothing is lost if a launch fails.
        self.launches = [launch for launches in found for launch in launches if "update" not in launch.name]
        self.launches += [launch for launches in found for launch in launches if "update" in launch.name]
        self._addresses = Addresses(draft.layers, draft.made, draft.singles)
        self._held = draft.held
        self._bindings: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()
        self._captured: list[Tensor] = []
        self._compiled = False

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph may hold on to this plan."""
        return bool(self._captured)

    def run(self, operands: Operands, step: Step) -> None:
        """Launch everything for these operands, of the form that the plan was made for."""
        addresses = self._bind(tuple(x.data_ptr() for tensors in operands.values() for x in tensors))
        if not self._compiled:
            for launch in self.launches:
                launch.compile(addresses, step.scalars)
            self._compiled = True
        for launch in self.launches:
            launch(addresses, step.scalars)

    def _bind(self, pointers: tuple[int, ...]) -> Tensor:
        """The table of addresses for tensors that lie at ``pointers``, on the device."""
        capturing = _capturing(self.device)
        table = self._bindings.get(pointers)
        if table is not None:
            self._bindings.move_to_end(pointers)
        else:
            host, table = to_device(self._addresses.fill(pointers), self.device)
            if capturing:
                self._captured.append(host)
            else:
                self._bindings[pointers] = table
                while len(self._bindings) > _BINDINGS:
                    self._bindings.popitem(last=False)
        if capturing:
            self._captured.append(table)
        return table


_plans: OrderedDict[Hashable, Plan] = OrderedDict()
_of_graphs: list[Plan] = []


def plan_for(precision: str | None, operation: Operation, operands: Operands) -> Plan:
    """The plan for operands of this form, made if it isn't there. Their device must be the current one."""
    device = operands[Role.G][0].device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    forms = tuple(
        (role, x.dtype, x.shape, x.stride(), x.data_ptr() % 16 == 0) for role, xs in operands.items() for x in xs
    )
    key = (device, stream, precision, operation, config.overrides_key(), forms)
    plan = _plans.get(key)
    if plan is not None:
        _plans.move_to_end(key)
        return plan
    plan = Plan(target_of(device), precision, operation, operands)
    if _capturing(device):
        _of_graphs.append(plan)
    else:
        _plans[key] = plan
        _drop_oldest()
    return plan


def clear_plans() -> None:
    """Give back all workspaces, but those of plans that a CUDA graph was captured with."""
    for key in [key for key, plan in _plans.items() if not plan.captured]:
        del _plans[key]


def _drop_oldest() -> None:
    for key in list(_plans)[: max(0, len(_plans) - _PLANS)]:
        if not _plans[key].captured:
            del _plans[key]


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _has_one_tile(layer: Layer) -> bool:
    return layer.A.count == layer.B.count == 1
