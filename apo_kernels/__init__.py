"""Fused kernels for the structured preconditioned gradient ``P(G) = B (S² ⊙ BᵀGA) Aᵀ`` and its derivatives.

The backend of Amortized Proximal Optimization (Bae, Vicol, HaoChen, Grosse; NeurIPS 2022), usable by any front
end: tensors in, tensors out. Imports and runs without a GPU and without Triton.
"""

from apo_kernels.aten import Kept
from apo_kernels.blocks import blocks_from_dense, blocks_to_dense, by_square, identity_block
from apo_kernels.flops import precondition_flops, precondition_vjp_flops
from apo_kernels.functional import (
    BoundStep,
    explain,
    foreach_precondition,
    foreach_precondition_step_,
    foreach_precondition_vjp,
    precondition,
    precondition_vjp,
)
from apo_kernels.relative_steps import relative_step_scalings_, relative_step_squares_
from apo_kernels.slopes import ModelEnergies, ModelSlopes
from apo_kernels.whole_model import ModelPreconditioner

__version__ = "0.1.0"

__all__ = [
    "BoundStep",
    "Kept",
    "ModelEnergies",
    "ModelPreconditioner",
    "ModelSlopes",
    "blocks_from_dense",
    "blocks_to_dense",
    "by_square",
    "explain",
    "foreach_precondition",
    "foreach_precondition_step_",
    "foreach_precondition_vjp",
    "identity_block",
    "precondition",
    "precondition_flops",
    "precondition_vjp",
    "precondition_vjp_flops",
    "relative_step_scalings_",
    "relative_step_squares_",
]
