"""The builder of a plan, which its two parts share: the tile kernel's and the grouped GEMM's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from triton import language as tl

from apo_kernels.targets import Target
from apo_kernels.triton.layers import BlockLayout, View, layers_of
from apo_kernels.triton.operand_table import Made, OperandTable
from apo_kernels.triton.table_layout import LayerField, Role

__all__ = ["CODES", "TYPES", "Operands", "Operation", "PlanBuilder", "to_device"]

Operands = Mapping[Role, Sequence[Tensor]]

TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@dataclass(frozen=True)
class Operation:
    """What a plan computes, as far as its kernels differ by it.

    ``wanted`` is empty for a forward, else the derivatives' letters. What follows ``update`` holds only with it;
    ``lr_dtype`` is that of a learning rate that is read on the device.
    """

    wanted: str = ""
    keep: bool = False
    update: bool = False
    buffer: bool = False
    momentum: bool = False
    decay: bool = False
    lr_dtype: torch.dtype | None = None

    @property
    def flags(self) -> dict[str, bool]:
        """The update's, as kernels take them."""
        return {
            "HAS_BUFFER": self.buffer,
            "HAS_MOMENTUM": self.momentum,
            "HAS_DECAY": self.decay,
            "LR_IN_TENSOR": self.lr_dtype is not None,
        }


def to_device(array: NDArray[Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """``array`` on the device by an asynchronous copy, and the host's memory that it comes from.

    A captured graph copies from that memory again when it is replayed.
    """
    host = torch.from_numpy(array)
    if device.type == "cuda":
        host = host.pin_memory()
    return host, host.to(device, non_blocking=True)


class PlanBuilder:
    """The layers of a call, their dtypes, and the memory that a run takes for itself.

    Attributes:
        compute: the narrowest dtype that holds every operand of a product exactly.
        scaled: whether intermediates need powers of two to stay in its range.
        made, shapes: of each layer, filled in by the part that it belongs to.
        singles: addresses besides the operands' table, for kernels that take operands one by one: a view, or an offset
            into the workspace.
        workspace_bytes: what a run takes, in one piece.
        amax: where in it the grouped GEMM has its partial maxima.
        hosts: the host's copies of the tables.
    """

    def __init__(self, target: Target, precision: str | None, operation: Operation, operands: Operands) -> None:
        self.target, self.operation = target, operation
        self.device = operands[Role.G][0].device
        self.layers = layers_of(operands, turn=operation.keep)
        self.types = {role: view.dtype for role, view in self.layers[0].views.items()}
        products = [self.types[role] for role in (Role.G, Role.V, Role.A, Role.B) if role in self.types]
        self.compute = products[0]
        for dtype in products[1:]:
            self.compute = torch.promote_types(self.compute, dtype)
        self.precision = target.precision(precision, self.compute)
        self.scaled = self.compute == torch.float16
        self.made = [Made() for _ in self.layers]
        self.shapes = [[0] * len(LayerField) for _ in self.layers]
        self.singles: list[View | int] = []
        self.workspace_bytes = self.amax = 0
        self.hosts: list[Tensor] = []

    def set_squares(self, at: int, B: BlockLayout, A: BlockLayout) -> None:
        """Say how the part that layer ``at`` belongs to takes its squares together."""
        layer, row = self.layers[at], self.shapes[at]
        row[LayerField.M], row[LayerField.N] = layer.m, layer.n
        row[LayerField.SIDE_B], row[LayerField.GROUP_B], row[LayerField.COUNT_B] = B.side, B.group, B.count
        row[LayerField.SIDE_A], row[LayerField.GROUP_A], row[LayerField.COUNT_A] = A.side, A.group, A.count

    def single(self, place: View | int) -> int:
        """The index in the table of addresses at which a kernel will find that of ``place``; never 0."""
        self.singles.append(place)
        return OperandTable.first_single(len(self.layers)) + len(self.singles) - 1

    def table(self, rows: Sequence[Sequence[int]], dtype: type[np.integer[Any]] = np.int64) -> Tensor:
        """A table on the device."""
        host, table = to_device(np.array(rows, dtype), self.device)
        self.hosts.append(host)
        return table

    def workspace(self, sizes: Sequence[int]) -> list[int]:
        """Where in the workspace uninitialised matrices of these sizes in bytes begin: multiples of 256."""
        starts = []
        for size in sizes:
            starts.append(self.workspace_bytes)
            self.workspace_bytes += -(-size // 256) * 256
        return starts

    def type_of(self, role: Role) -> Any:
        """Triton's type of an operand; float32 for one that isn't there."""
        return TYPES[self.types.get(role, torch.float32)]
