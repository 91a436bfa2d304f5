"""What each parameter will get, and what it costs, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import apo_kernels as ak
from apo.layers.matrix_view import MatrixView
from apo.layers.preconditioner import PreconditionedLayer
from apo.ranks.sharding import Shards, is_placed, local, over

__all__ = ["Plan", "PlanRow", "plan_of"]


FLAG, LENGTH, TERMS, VERDICT = 8, 8, 24, 4
"""Bytes of the gradients' largest norm, of a step's length, of the terms of Q, and of the verdict on slopes."""


@dataclass(frozen=True)
class PlanRow:
    """One matrix: its shape ``(*batch, m, n)``, its blocks as text, its bytes, the FLOPs of a step and a meta-step.

    Of a matrix that is cut over ranks, or that a rank owns, all is of what this rank holds.

    Attributes:
        part: how the matrix is shared out; empty where this rank holds all of it.
        step_sent, meta_sent: bytes that it adds to what a step and a meta-step all-reduce or broadcast.
    """

    name: str
    shape: tuple[int, ...]
    A: str
    B: str
    weight_bytes: int
    memory_bytes: int
    step_flops: int
    meta_flops: int
    part: str = ""
    step_sent: int = 0
    meta_sent: int = 0

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
        groups: how many dimensions of meshes the ranks of DTensors agree over.
        promise: bytes of a step's predicted decrease, summed over ranks.
        verdict: bytes of the terms of Q and of the verdict on slopes, where layers have owners.
        averaged: bytes of V of parameters that are no DTensors, beside some that are, as under tensor parallel.
        looked: bytes of a look at the last step that sees its cost too, as every third does.
    """

    rows: tuple[PlanRow, ...]
    left_out: tuple[str, ...]
    groups: int = 0
    promise: int = 0
    verdict: int = 0
    averaged: int = 0
    looked: int = 0

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

    @property
    def step_sent(self) -> int:
        """Bytes that the optimizer hands to collectives in a step without a meta-update, the model's own left out: one
        number by which all ranks judge the gradients, and what the rows say."""
        return self.groups * FLAG + sum(row.step_sent for row in self.rows) + self.promise

    @property
    def meta_sent(self) -> int:
        """The same of a step with a meta-update; every ten of them send two numbers more for each block and S."""
        alike = self.groups * (TERMS + VERDICT + self.averaged) + self.verdict + self.looked
        return self.step_sent + alike + sum(row.meta_sent for row in self.rows)

    def __str__(self) -> str:
        head = ("parameter", "matrix", "block A (n)", "block B (m)", "memory", "x weights", "step", "meta-step")
        lines = [head, *(row.cells() for row in (*self.rows, self._total()))]
        if any(row.part for row in self.rows):
            parts = ("here", *(row.part for row in self.rows), "")
            lines = [(*line, part) for line, part in zip(lines, parts, strict=True)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        text = []
        for line in lines:
            cells = enumerate(zip(line, widths, strict=True))
            text.append("  ".join(cell.ljust(w) if i < 4 or i == 8 else cell.rjust(w) for i, (cell, w) in cells))
        text.insert(1, "-" * len(text[0]))
        text.insert(-1, "-" * len(text[0]))
        if self.meta_sent:
            text.append(f"sent: {_bytes(self.step_sent)} in a step, {_bytes(self.meta_sent)} in a meta-step")
        text += [f"not trained: {name}" for name in self.left_out]
        return "\n".join(line.rstrip() for line in text)

    __repr__ = __str__

    def _total(self) -> PlanRow:
        weights = sum(row.weight_bytes for row in self.rows)
        return PlanRow("total", (), "", "", weights, self.memory_bytes, self.step_flops, self.meta_flops)


def plan_of(
    model: nn.Module,
    layers: Sequence[PreconditionedLayer],
    groups: Sequence[dict[str, Any]],
    meta_optimizer: str,
    *,
    starts: bool,
    looks: bool,
) -> Plan:
    """The plan of these layers of the model; ``starts``: with what :mod:`apo.fisher.start` holds for a while;
    ``looks``: with what :mod:`apo.noise.factor` asks for."""
    held = {id(p) for layer in layers for p in layer.view.parameters}
    left_out = tuple(
        f"{name} ({'frozen' if not p.requires_grad else 'in no param group'})"
        for name, p in model.named_parameters()
        if id(p) not in held
    )
    rows = tuple(_row(layer, groups[layer.group], meta_optimizer, starts) for layer in layers)
    shards = Shards(p for group in groups for p in group["params"])
    # on a CPU a number for each layer, elsewhere their sum
    summed = {
        name: LENGTH * len(layers) if layer.S.is_cpu else layer.S.element_size()
        for layer in layers
        for name in layer.view.over
    }
    owned = any(layer.view.owner is not None for layer in layers)
    promise, verdict = sum(summed.values()), (VERDICT + TERMS) * owned
    plain = sum(p.nbytes for p in shards.parameters if not is_placed(p)) if shards.groups else 0
    ways = sum(map(len, {layer.view.over for layer in layers}))
    looked = looks * (sum(map(_handed_on, layers)) + LENGTH * (3 * owned + 4 * ways))
    return Plan(rows, left_out, len(shards.groups), promise, verdict, plain, looked)


def _row(layer: PreconditionedLayer, group: dict[str, Any], meta_optimizer: str, starts: bool) -> PlanRow:
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
    weights = sum(local(p).nbytes for p in view.parameters)
    sent = _sent(layer, relative=relative)
    return PlanRow(view.name, view.shape, str(A), str(B), weights, memory, step, step + derivatives, _part(view), *sent)


def _part(view: MatrixView) -> str:
    """How a matrix is shared out."""
    if view.owner is not None:
        return "owned here" if view.held else f"owned by rank {view.owner}"
    if view.whole is None:
        return ""
    if view.is_vector:
        return f"{view.n} of {view.whole.n} entries"
    rows = [f"{view.m} of {view.whole.m} rows"] if view.row_over else []
    columns = [f"{view.n} of {view.whole.n} columns"] if view.column_over else []
    return ", ".join(rows + columns)


def _sent(layer: PreconditionedLayer, *, relative: bool) -> tuple[int, int]:
    """Bytes that a layer adds to what is all-reduced or broadcast, in a step and further in a meta-step."""
    view, size = layer.view, layer.S.element_size()
    blocks = [(own, len(own.alike)) for own in layer.phi if own.block]
    of_blocks = sum(count * (x.tensor.nbytes + relative * x.tensor.nbytes // x.tensor.shape[-1]) for x, count in blocks)
    weights = _handed_on(layer)
    lengths = 2 * LENGTH * sum(len(over(p)) for p in view.parameters)  # of the step and of the weights
    products = len(view.over) * (
        2 * LENGTH + relative * size
    )  # its slope and that's size, and its share of S's mean size
    return weights, 2 * weights + lengths + of_blocks + products  # of an owned layer θ′, and V, are weights too


def _handed_on(layer: PreconditionedLayer) -> int:
    """Bytes of the weights that an owner broadcasts."""
    return sum(p.nbytes for p in layer.view.parameters) if layer.view.owner is not None else 0


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
