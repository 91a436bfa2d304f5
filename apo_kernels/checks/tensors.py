"""What any tensor must be, and how it must fit the gradient beside it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from apo_kernels.blocks import block_count
from apo_kernels.checks.describe import kind_of, shape_text
from apo_kernels.differentiable import transformed

__all__ = [
    "MIXTURES",
    "Tensors",
    "check_block",
    "check_like_G",
    "check_matrix",
    "dense",
    "no_graph",
    "not_negated",
    "of_this_mode",
    "plain",
    "tensor_lists",
    "untransformed",
    "watched",
    "writable",
]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_NARROW = DTYPES[1:]
MIXTURES = {frozenset((torch.float64,)), *(frozenset(some) for k in (1, 2, 3) for some in combinations(_NARROW, k))}

Tensors = Sequence[Tensor]


def dense(name: str, x: object) -> None:
    """Refuse what is no tensor that lies in memory, of a dtype that is served."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, but got {kind_of(x)}")
    if x.layout is not torch.strided or x.is_nested:
        kind = "it is nested" if x.is_nested else f"its layout is {x.layout}"
        raise TypeError(f"{name} must be a dense (strided) tensor, but {kind}")
    if is_traceable_wrapper_subclass(x):
        raise TypeError(
            f"{name} must lie in one tensor's memory, but is a {type(x).__name__} around other tensors: "
            "call with its local part"
        )
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, but its dtype is {x.dtype}")


def plain(**lists: Tensors) -> None:
    """Refuse tensors that something differentiates or maps over, where that isn't served."""
    if not transformed(*lists.values()):
        return
    for name, tensors in lists.items():
        for i, x in enumerate(tensors):
            untransformed(f"{name}[{i}]", x)


def untransformed(name: str, x: Tensor) -> None:
    """The same of one tensor."""
    if transformed([x]):
        raise ValueError(
            f"{name} must be a plain tensor, but torch.func transforms it or it has a tangent of "
            "forward-mode AD: only precondition and foreach_precondition, without keep, serve these"
        )


def no_graph(reason: str, **lists: Tensors) -> None:
    """Refuse tensors that autograd is watching where no graph is built."""
    if not watched(*lists.values()):
        return
    for name, tensors in lists.items():
        for i, x in enumerate(tensors):
            if x.requires_grad:
                at = name if len(tensors) == 1 and not name.endswith("s") else f"{name}[{i}]"
                raise ValueError(
                    f"{at} must not require grad, but does, in grad mode: {reason}; "
                    "call it under torch.no_grad() or detach"
                )


def watched(*lists: Tensors) -> bool:
    """Whether autograd must see a call on these tensors."""
    if torch.is_grad_enabled():
        for tensors in lists:
            for x in tensors:
                if x.requires_grad:
                    return True
    return False


def writable(name: str, x: Tensor) -> None:
    """Refuse what can't be written in place, entry by entry."""
    if x.is_neg():
        raise ValueError(f"{name} must be written as it lies in memory, but is lazily negated: resolve it")
    of_this_mode(name, x)
    if x.is_contiguous():
        return
    reach = 1  # of the dimensions of smaller stride
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride < reach:
            raise ValueError(
                f"{name} must not overlap itself, but its shape is {tuple(x.shape)} with strides {x.stride()}"
            )
        reach += (size - 1) * stride


def of_this_mode(name: str, x: Tensor) -> None:
    if x.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"{name} must be a tensor that can be written outside of torch.inference_mode(), but was made under it: "
            "clone it, or call under it"
        )


def not_negated(**lists: Tensors) -> None:
    """Refuse lazily negated tensors where memory is read again and again."""
    for name, tensors in lists.items():
        for i, x in enumerate(tensors):
            if x.is_neg():
                raise ValueError(f"{name}[{i}] must be read as it lies in memory, but is lazily negated: resolve it")


def check_matrix(name: str, x: Tensor) -> None:
    dense(name, x)
    if x.ndim < 2:
        raise ValueError(
            f"{name} must be a matrix or a batch of them, (*batch, m, n), but its shape is {tuple(x.shape)}"
        )


def _beside(name: str, x: Tensor, G: Tensor, G_name: str) -> None:
    dense(name, x)
    if x.device != G.device:
        raise ValueError(f"{name} must be on {G_name}'s device, {G.device}, but is on {x.device}")
    if (x.dtype == torch.float64) != (G.dtype == torch.float64):
        raise TypeError(
            f"{name} must be float64 exactly if {G_name} is (narrower dtypes mix freely), "
            f"but {name} is {x.dtype} and {G_name} is {G.dtype}"
        )


def check_like_G(name: str, x: Tensor, G: Tensor, G_name: str) -> None:
    _beside(name, x, G, G_name)
    if x.shape != G.shape:
        raise ValueError(f"{name} must have {G_name}'s shape {tuple(G.shape)}, but its shape is {tuple(x.shape)}")


def check_block(name: str, x: Tensor, G: Tensor, axis: int, at: str) -> None:
    _beside(name, x, G, "G" + at)
    batch, side = G.shape[:-2], G.shape[axis]
    if x.ndim == G.ndim:
        fits = x.shape == (*batch, side, side)
    elif x.ndim == G.ndim + 1:
        b = x.shape[-1]
        fits = b >= 1 and x.shape == (*batch, block_count(side, b), b, b)
    else:
        fits = False
    if not fits:
        full = shape_text(*batch, side, side)
        stack = shape_text(*batch, f"ceil({side}/b)", "b", "b")
        raise ValueError(
            f"{name} must be full, {full}, or a stack of blocks, {stack}, with b >= 1, "
            f"for G{at} of shape {tuple(G.shape)}, but its shape is {tuple(x.shape)}"
        )


def tensor_lists(**lists: Tensors) -> None:
    """Refuse what is no list of tensors, and lists of different lengths."""
    length = None
    for name, tensors in lists.items():
        if not isinstance(tensors, (list, tuple)):
            raise TypeError(f"{name} must be a list or tuple of tensors, but got {kind_of(tensors)}")
        if length is None:
            first, length = name, len(tensors)
        if len(tensors) != length:
            raise ValueError(f"{name} must have the length of {first}, {length}, but has {len(tensors)}")
