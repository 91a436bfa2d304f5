"""Every refusal of a bad argument: before anything is computed or written, naming it, its value and what it must be."""

from apo_kernels.checks.layers import foreach_operands, kept_list, kept_products, operands, wanted_letters
from apo_kernels.checks.models import buffers, model, parts, plain_parts, promise
from apo_kernels.checks.scalars import at_least_0, finite, numbers, step_numbers
from apo_kernels.checks.steps import (
    in_place,
    no_shared_memory,
    no_shared_parts,
    refuse_shared,
    step,
    step_scalars,
    step_tensors,
)
from apo_kernels.checks.tensors import dense, no_graph, not_negated, plain, tensor_lists, watched, writable

__all__ = [
    "at_least_0",
    "buffers",
    "dense",
    "finite",
    "foreach_operands",
    "in_place",
    "kept_list",
    "kept_products",
    "model",
    "no_graph",
    "no_shared_memory",
    "no_shared_parts",
    "not_negated",
    "numbers",
    "operands",
    "parts",
    "plain",
    "plain_parts",
    "promise",
    "refuse_shared",
    "step",
    "step_numbers",
    "step_scalars",
    "step_tensors",
    "tensor_lists",
    "wanted_letters",
    "watched",
    "writable",
]
