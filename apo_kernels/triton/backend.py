"""What :mod:`apo_kernels.dispatch` calls: results are allocated here, the rest is a plan's.

Layers are planned together as far as their operands have the same dtypes, role by role; a model with one dtype per role
has one plan. float64 isn't served.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from apo_kernels.aten import Kept, aligned_empty
from apo_kernels.blocks import is_stack, relative_derivative
from apo_kernels.triton import relative_steps
from apo_kernels.triton.launch import note_written, on_device
from apo_kernels.triton.layers import turns
from apo_kernels.triton.model import TritonModel
from apo_kernels.triton.plan import Bound, Operation, Step
from apo_kernels.triton.plan_builder import Operands
from apo_kernels.triton.table_layout import Role

__all__ = ["TritonBackend"]

Tensors = Sequence[Tensor]
_DERIVATIVES = {"G": Role.OUT, "A": Role.DA, "B": Role.DB, "S": Role.DS}


@dataclass(frozen=True)
class TritonBackend:
    """The :class:`apo_kernels.dispatch.Backend` on Triton's kernels.

    Attributes:
        precision: how float32 operands are multiplied; None for the fastest way that is faithful to float32.
    """

    precision: str | None = None

    def foreach_precondition(self, Gs: Tensors, As: Tensors, Bs: Tensors, Ss: Tensors) -> list[Tensor]:
        Ys = [_empty(G, G.dtype) for G in Gs]
        self._run(Operation(), {**_operands(Gs, As, Bs, Ss), Role.OUT: Ys})
        return Ys

    def foreach_precondition_keep(
        self, Gs: Tensors, As: Tensors, Bs: Tensors, Ss: Tensors
    ) -> tuple[list[Tensor], list[Kept]]:
        Ys = [_empty(G, G.dtype) for G in Gs]
        kept = [Kept(*(aligned_empty(G.shape, torch.float32, G.device) for _ in range(3))) for G in Gs]
        roles = {
            Role.KEEP_U: [each.U for each in kept],
            Role.KEEP_M: [each.M for each in kept],
            Role.KEEP_W: [each.W for each in kept],
        }
        self._run(Operation(keep=True), {**_operands(Gs, As, Bs, Ss), Role.OUT: Ys, **roles})
        return Ys, kept

    def foreach_precondition_vjp(
        self,
        Gs: Tensors,
        As: Tensors,
        Bs: Tensors,
        Ss: Tensors,
        Vs: Tensors,
        kept: Sequence[Kept] | None,
        wanted: str,
        relative: bool = False,
    ) -> list[dict[str, Tensor]]:
        """The products of ``G`` are recomputed beside those of ``V``, in the same launches: ``kept`` isn't read.
        ``relative`` ones are multiplied by their blocks afterwards."""
        like = dict(zip("GABS", (Gs, As, Bs, Ss), strict=True))
        results = {letter: [_derivative(x, G) for x, G in zip(like[letter], Gs, strict=True)] for letter in wanted}
        roles = {_DERIVATIVES[letter]: tensors for letter, tensors in results.items()}
        operation = Operation(wanted="".join(sorted(wanted)))
        self._run(operation, {**_operands(Gs, As, Bs, Ss), Role.V: Vs, **roles})
        for letter, dim in (("A", -1), ("B", -2)):
            if relative and letter in wanted:
                each = zip(like[letter], results[letter], Gs, strict=True)
                results[letter] = [relative_derivative(X, dX, G.shape[dim]) for X, dX, G in each]
        return [{letter: tensors[i] for letter, tensors in results.items()} for i in range(len(Gs))]

    def foreach_precondition_step_(
        self,
        thetas: Tensors,
        Gs: Tensors,
        As: Tensors,
        Bs: Tensors,
        Ss: Tensors,
        momentum_buffers: Tensors,
        lr: float | Tensor,
        momentum: float,
        weight_decay: float,
    ) -> None:
        self.bind_step(thetas, Gs, As, Bs, Ss, momentum_buffers)(lr, momentum, weight_decay)

    def bind_step(
        self, thetas: Tensors, Gs: Tensors, As: Tensors, Bs: Tensors, Ss: Tensors, momentum_buffers: Tensors
    ) -> Callable[[float | Tensor, float, float], None]:
        operands = {**_operands(Gs, As, Bs, Ss), Role.OUT: thetas}
        if len(momentum_buffers):
            operands[Role.MOMENTUM] = momentum_buffers
        bound = self._bind(operands)
        return partial(_step, bound, thetas, momentum_buffers) if bound is not None else _nothing

    def bind_model(
        self, As: Tensors, Bs: Tensors, Ss: Tensors, widths: Sequence[tuple[int, ...]], learned: Sequence[str]
    ) -> TritonModel:
        return TritonModel(self.precision, self._run, As, Bs, Ss, widths, learned)

    def relative_step_squares_(self, *arguments: Any) -> None:
        relative_steps.relative_step_squares_(self.precision, *arguments)

    def relative_step_scalings_(self, *arguments: Any) -> None:
        relative_steps.relative_step_scalings_(self.precision, *arguments)

    def _run(self, operation: Operation, operands: Operands) -> None:
        if (bound := self._bind(operands, turn=operation.keep)) is not None:
            with on_device(bound.device):
                bound.run(operation, Step())

    def _bind(self, operands: Operands, *, turn: bool = False) -> Bound | None:
        groups = _by_dtypes(_resolved(operands), turn=turn)
        return Bound(self.precision, groups) if groups else None


def _step(
    bound: Bound, thetas: Tensors, buffers: Tensors, lr: float | Tensor, momentum: float, weight_decay: float
) -> None:
    if isinstance(lr, Tensor) and lr.device.type == "cpu" and bound.device.type != "cpu":
        lr = float(lr)  # it is on the host: nothing waits
    lr_tensor = lr if isinstance(lr, Tensor) else None
    operation = Operation(
        update=True,
        buffer=bool(len(buffers)),
        momentum=momentum != 0,
        decay=weight_decay != 0,
        lr_dtype=None if lr_tensor is None else lr_tensor.dtype,
    )
    rate = 0.0 if isinstance(lr, Tensor) else float(lr)
    note_written((*thetas, *buffers))
    with on_device(bound.device):
        bound.run(operation, Step(rate, lr_tensor, float(momentum), float(weight_decay)))


def _nothing(*_: object) -> None:
    """The step of a model without entries."""


def _operands(Gs: Tensors, As: Tensors, Bs: Tensors, Ss: Tensors) -> dict[Role, Tensors]:
    return {Role.G: Gs, Role.A: As, Role.B: Bs, Role.S: Ss}


def _empty(G: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(G.shape, dtype=dtype, device=G.device)


def _derivative(x: Tensor, G: Tensor) -> Tensor:
    """Where a derivative goes, contiguous; zero where the kernels leave it: for no rows or columns, and in the rest of
    a last square that sticks out."""
    covered = G.numel() > 0 and not (is_stack(x, G) and any(side % x.shape[-1] for side in G.shape[-2:]))
    make = torch.empty if covered else torch.zeros
    return make(x.shape, dtype=torch.float32, device=x.device)


def _resolved(operands: Operands) -> Operands:
    """The operands, lazily negated ones negated in memory. None that is written is."""
    return {
        role: [x.resolve_neg() for x in tensors] if any(map(Tensor.is_neg, tensors)) else tensors
        for role, tensors in operands.items()
    }


def _by_dtypes(operands: Operands, *, turn: bool) -> list[Operands]:
    """The call, cut such that each role has one dtype, as the layers are worked on (:func:`layers_of`); layers without
    entries left out."""
    dtypes = zip(*([x.dtype for x in tensors] for tensors in operands.values()), strict=True)
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, (G, A, B, types) in enumerate(
        zip(*(operands[role] for role in (Role.G, Role.A, Role.B)), dtypes, strict=True)
    ):
        if types[0] is torch.float64:
            raise TypeError("backend triton serves float32, bfloat16 and float16, but Gs has float64 entries")
        if G.numel():
            turned = turn and A.dtype != B.dtype and turns(G, A, B)
            groups.setdefault((turned, *types), []).append(i)
    return [{role: [tensors[i] for i in indices] for role, tensors in operands.items()} for indices in groups.values()]
