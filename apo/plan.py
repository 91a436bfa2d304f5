"""What each parameter will get, and what it costs, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import apo_kernels as ak
from apo.preconditioner import Layer

__all__ = ["Plan", "PlanRow", "plan_of"]


@dataclass(frozen=True)
class PlanRow:
    """One matrix: its shape ``(*batch, m, n)``, its blocks as text, its bytes, the FLOPs of a step and a meta-step."""

    name: str
    shape: tuple[int, ...]
    A: str
    B: str
    weight_bytes: int
    memory_bytes: int
    step_flops: int
    meta_flops: int

    def cells(self) -> tuple[str, ...]:
        """As text."""
        share = f"{self.memory_bytes / max(self.weight_bytes, 1):.1f}"
        costs = _flops(self.step_flops), _flops(self.meta_flops)
        return (self.name, " x ".join(map(str, self.shape)), self.A, self.B, _bytes(self.memory_bytes), share, *costs)


@dataclass(frozen=True)
class Plan:
    """``print`` it for a table.

    Attributes:
        rows: one per matrix, in the model's order.
        left_out: parameters that aren't trained: frozen, or in no param group.
    """

    rows: tuple[PlanRow, ...]
    left_out: tuple[str, ...]

    @property
    def memory_bytes(self) -> int:
        """Bytes that the preconditioner keeps: blocks, their meta-optimizer's state, momentum, 16-bit copies."""
        return sum(row.memory_bytes for row in self.rows)

    @property
    def step_flops(self) -> int:
        """FLOPs of applying the preconditioner once."""
        return sum(row.step_flops for row in self.rows)

    @property
    def meta_flops(self) -> int:
        """FLOPs of a meta-step's products beyond those of the step, without the model's own evaluations."""
        return sum(row.meta_flops for row in self.rows)

    def __str__(self) -> str:
        head = ("parameter", "matrix", "block A (n)", "block B (m)", "memory", "x weights", "step", "meta-step")
        lines = [head, *(row.cells() for row in (*self.rows, self._total()))]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = [
            "  ".join(
                cell.ljust(w) if i < 4 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]
        text.insert(1, "-" * len(text[0]))
        text.insert(-1, "-" * len(text[0]))
        text += [f"not trained: {name}" for name in self.left_out]
        return "\n".join(line.rstrip() for line in text)

    __repr__ = __str__

    def _total(self) -> PlanRow:
        weights = sum(row.weight_bytes for row in self.rows)
        return PlanRow("total", (), "", "", weights, self.memory_bytes, self.step_flops, self.meta_flops)


def plan_of(
    model: nn.Module, layers: Sequence[Layer], groups: Sequence[dict[str, Any]], meta_optimizer: str, *, starts: bool
) -> Plan:
    """The plan of these layers of the model; ``starts``: with what :mod:`apo.fisher_start` holds for a while."""
    held = {id(p) for layer in layers for p in layer.view.parameters}
    left_out = tuple(
        f"{name} ({'frozen' if not p.requires_grad else 'in no param group'})"
        for name, p in model.named_parameters()
        if id(p) not in held
    )
    return Plan(tuple(_row(layer, groups[layer.group], meta_optimizer, starts) for layer in layers), left_out)


def _row(layer: Layer, group: dict[str, Any], meta_optimizer: str, starts: bool) -> PlanRow:
    view, (A, B) = layer.view, layer.sides
    batch = 1 if not view.batch else view.batch[0]
    sizes = (view.m, view.n, A.block_size, B.block_size)
    step = ak.precondition_flops(*sizes, batch=batch)
    relative = meta_optimizer == "relative"
    derivatives = ak.precondition_vjp_flops(*sizes, wanted=layer.learned, kept=True, relative=relative, batch=batch)
    if relative:  # a step of which is a product
        derivatives += sum(2 * X.shape[-1] * X.numel() for X in layer.tensors()[:-1])
    learned = sum(t.nbytes for t in layer.tensors())
    memory = sum(t.nbytes for t in (layer.A, layer.B, layer.S)) + learned
    if relative:  # which holds a size for each row of a block and each entry of S
        memory += layer.S.nbytes + sum(X.nbytes // X.shape[-1] for X in layer.tensors()[:-1])
    else:
        memory += learned
    if starts:
        memory += learned
    if group["momentum"] != 0:
        memory += layer.S.nbytes
    if layer.dtype != layer.S.dtype:
        memory += sum(t.numel() for t in (layer.A, layer.B, layer.S)) * torch.finfo(layer.dtype).bits // 8
    weights = sum(p.nbytes for p in view.parameters)
    return PlanRow(view.name, view.shape, str(A), str(B), weights, memory, step, step + derivatives)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.3g} {unit}"


def _flops(count: float) -> str:
    for unit in ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP"):
        if count < 1000 or unit == "TFLOP":
            break
        count /= 1000
    return f"{count:.3g} {unit}"
