"""The fast path on torch's own matrix products: CPU, and any device that has no kernels of ours."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from apo_kernels.aten.model import AtenModel
from apo_kernels.aten.operators import (
    Kept,
    accumulation_dtype,
    aligned_empty,
    aligned_product,
    bind_step,
    foreach_precondition,
    foreach_precondition_keep,
    foreach_precondition_step_,
    foreach_precondition_vjp,
    precondition,
    precondition_keep,
    precondition_vjp,
)
from apo_kernels.aten.relative_steps import relative_step_scalings_, relative_step_squares_

__all__ = [
    "AtenModel",
    "Kept",
    "accumulation_dtype",
    "aligned_empty",
    "aligned_product",
    "bind_model",
    "bind_step",
    "foreach_precondition",
    "foreach_precondition_keep",
    "foreach_precondition_step_",
    "foreach_precondition_vjp",
    "precondition",
    "precondition_keep",
    "precondition_vjp",
    "relative_step_scalings_",
    "relative_step_squares_",
]


def bind_model(
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    Ss: Sequence[Tensor],
    widths: Sequence[tuple[int, ...]],
    learned: Sequence[str],
) -> AtenModel:
    return AtenModel(As, Bs, Ss, widths, learned)
