"""Every refusal of a bad argument: before anything is computed or written, naming it, its value and what it must be."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from apo_kernels.aten import Kept, accumulation_dtype
from apo_kernels.blocks import block_count
from apo_kernels.differentiable import transformed
from apo_kernels.given import Given
from apo_kernels.memory import shared, shared_storage
from apo_kernels.slopes import Parts

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
    "promise",
    "step",
    "step_scalars",
    "step_tensors",
    "tensor_lists",
    "wanted_letters",
    "watched",
    "writable",
]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_NARROW = DTYPES[1:]
_MIXTURES = {frozenset((torch.float64,)), *(frozenset(some) for k in (1, 2, 3) for some in combinations(_NARROW, k))}
_PLAIN = (Tensor, torch.nn.Parameter)
_LISTS = (list, tuple)

Tensors = Sequence[Tensor]


def operands(G: Tensor, A: Tensor, B: Tensor, S: Tensor, *V: Tensor, index: int | None = None) -> None:
    """Refuse what is not one preconditioned gradient, with its cotangent if given; number ``index`` of lists
    ``Gs, As, ...`` if given."""
    if _plainly_fit((G,), (A,), (B,), (S,), V or None):
        return
    at = "" if index is None else f"s[{index}]"
    _matrix("G" + at, G)
    _same_as_G("S" + at, S, G, "G" + at)
    for cotangent in V:
        _same_as_G("V" + at, cotangent, G, "G" + at)
    _block("A" + at, A, G, -1, at)
    _block("B" + at, B, G, -2, at)


def _plainly_fit(Gs: Tensors, As: Tensors, Bs: Tensors, Ss: Tensors, Vs: Tensors | None) -> bool:
    """Whether these are lists of equal length whose every entry is of the common case, one matrix and its blocks, full
    or in squares: what isn't is looked at closely.

    One flat loop over the attributes that are cheapest to read: looking closely takes longer than a small layer.
    """
    if not (type(Gs) in _LISTS and type(As) in _LISTS and type(Bs) in _LISTS and type(Ss) in _LISTS):
        return False
    length = len(Gs)
    if not (len(As) == length and len(Bs) == length and len(Ss) == length):
        return False
    first = Gs[0].get_device() if length and type(Gs[0]) in _PLAIN else -1
    try:
        for G, A, B, S in zip(Gs, As, Bs, Ss, strict=True):
            if not (type(G) in _PLAIN and type(A) in _PLAIN and type(B) in _PLAIN and type(S) in _PLAIN):
                return False
            shape, dtype = G.shape, G.dtype
            if len(shape) != 2:
                return False
            m, n = shape
            alike = A.dtype is dtype and B.dtype is dtype and S.dtype is dtype and dtype in DTYPES
            if not (
                (alike or frozenset((dtype, A.dtype, B.dtype, S.dtype)) in _MIXTURES)
                and (
                    (A.is_cpu and B.is_cpu and S.is_cpu) if G.is_cpu and first == -1 else _on_one_gpu(G, A, B, S, first)
                )
                and (G.layout is A.layout is B.layout is S.layout is torch.strided)
                and S.shape == shape
                and (A.shape == (n, n) or _plainly_covers(A, n))
                and (B.shape == (m, m) or _plainly_covers(B, m))
            ):
                return False
    except RuntimeError:  # a nested tensor has no shape
        return False
    if Vs is None:
        return True
    return type(Vs) in _LISTS and len(Vs) == length and all(map(_plainly_matches, Vs, Gs))


def _plainly_covers(block: Tensor, side: int) -> bool:
    """Whether it is a stack of squares for a side of this length."""
    shape = block.shape
    return len(shape) == 3 and (b := shape[2]) > 0 and shape == (-(-side // b), b, b)


def _on_one_gpu(G: Tensor, A: Tensor, B: Tensor, S: Tensor, index: int) -> bool:
    """Whether all are on the GPU of that index."""
    return (
        (G.is_cuda and A.is_cuda and B.is_cuda and S.is_cuda)
        and G.get_device() == index
        and A.get_device() == index
        and B.get_device() == index
        and S.get_device() == index
    )


def _plainly_matches(x: Tensor, G: Tensor) -> bool:
    """Whether ``x`` is a tensor like ``G`` in all that is asked of it."""
    return (
        type(x) in _PLAIN
        and not x.is_nested
        and x.dtype is G.dtype
        and x.layout is torch.strided
        and x.is_same_size(G)
        and ((x.is_cpu and G.is_cpu) or x.device == G.device)
    )


def foreach_operands(
    Gs: Tensors,
    As: Tensors,
    Bs: Tensors,
    Ss: Tensors,
    Vs: Tensors | None = None,
) -> None:
    """Refuse lists that don't match, then what :func:`operands` refuses of each entry."""
    if _plainly_fit(Gs, As, Bs, Ss, Vs):
        return
    entries: Iterable[tuple[Tensor, ...]]
    if Vs is None:
        tensor_lists(Gs=Gs, As=As, Bs=Bs, Ss=Ss)
        entries = zip(Gs, As, Bs, Ss, strict=True)
    else:
        tensor_lists(Gs=Gs, As=As, Bs=Bs, Ss=Ss, Vs=Vs)
        entries = zip(Gs, As, Bs, Ss, Vs, strict=True)
    for i, (G, *others) in enumerate(entries):
        operands(G, *others, index=i)
        if G.device != Gs[0].device:
            raise ValueError(f"Gs[{i}] must be on the device of Gs[0], {Gs[0].device}, but is on {G.device}")


def tensor_lists(**lists: Tensors) -> None:
    """Refuse what is no list of tensors, and lists of different lengths."""
    length = None
    for name, tensors in lists.items():
        if not isinstance(tensors, (list, tuple)):
            raise TypeError(f"{name} must be a list or tuple of tensors, but got {_kind(tensors)}")
        if length is None:
            first, length = name, len(tensors)
        if len(tensors) != length:
            raise ValueError(f"{name} must have the length of {first}, {length}, but has {len(tensors)}")


def wanted_letters(wanted: str) -> None:
    if not isinstance(wanted, str):
        raise TypeError(f"wanted must be a string of letters from 'GABS', but got {_kind(wanted)}")
    if not wanted or set(wanted) - set("GABS") or len(set(wanted)) != len(wanted):
        raise ValueError(f"wanted must be one or more different letters from 'GABS', but got {wanted!r}")


def kept_products(kept: Kept, G: Tensor, *, index: int | None = None) -> None:
    """Refuse what a forward of ``G`` can't have kept."""
    if not isinstance(kept, Kept):
        at = "" if index is None else f"[{index}]"
        raise TypeError(f"kept{at} must be the Kept that a forward with keep=True returned, but got {_kind(kept)}")
    U, M, W = kept
    if _plainly_matches(U, G) and _plainly_matches(M, G) and _plainly_matches(W, G) and G.element_size() >= 4:
        return
    dtype, shape, device = accumulation_dtype(G.dtype), G.shape, G.device
    for i, x in enumerate(kept):
        if not isinstance(x, Tensor) or x.shape != shape or x.dtype is not dtype or x.device != device:
            at = "" if index is None else f"[{index}]"
            name = "G" if index is None else f"Gs{at}"
            raise ValueError(
                f"kept{at}.{Kept._fields[i]} must be a {dtype} tensor of {name}'s shape {tuple(shape)} on {device}, "
                f"but got {_description(x)}"
            )


def kept_list(kept: Sequence[Kept], Gs: Tensors) -> None:
    """Refuse what the forwards of ``Gs`` can't have kept. ``Gs`` have been checked."""
    if not isinstance(kept, (list, tuple)) or isinstance(kept, Kept) or len(kept) != len(Gs):
        raise ValueError(f"kept must be None or a list of {len(Gs)} Kept, one for each of Gs, but got {_kind(kept)}")
    for i, G in enumerate(Gs):
        kept_products(kept[i], G, index=i)


def model(As: Tensors, Bs: Tensors, Ss: Tensors, widths: Sequence[Sequence[int]], learned: Sequence[str]) -> None:
    """Refuse what is no preconditioner of a model."""
    tensor_lists(As=As, Bs=Bs, Ss=Ss)
    foreach_operands(Ss, As, Bs, Ss)
    not_negated(As=As, Bs=Bs, Ss=Ss)
    for name, each in (("widths", widths), ("learned", learned)):
        if not isinstance(each, _LISTS) or len(each) != len(Ss):
            raise ValueError(f"{name} must be a list with an entry for each of {len(Ss)} layers, but got {each!r}")
    for i, (S, own, letters) in enumerate(zip(Ss, widths, learned, strict=True)):
        whole = isinstance(own, _LISTS) and all(isinstance(x, int) and not isinstance(x, bool) for x in own)
        if not whole or not 1 <= len(own) <= 2 or sum(own) != S.shape[-1] or min(own) < 0:
            raise ValueError(f"widths[{i}] must be one or two ints that add up to {S.shape[-1]}, but is {own!r}")
        if not isinstance(letters, str) or "S" not in letters or sorted(letters) != sorted(set("ABS") & set(letters)):
            raise ValueError(f"learned[{i}] must be different letters of 'ABS', with 'S', but is {letters!r}")


def parts(written: Parts, read: Parts, shapes: Sequence[Sequence[tuple[int, ...]]], like: Tensor) -> None:
    """Refuse parts that don't fit the layers, whose own have these shapes, and weights that can't be written."""
    for name, all_parts in (("Gs", read), ("thetas", written)):
        if not isinstance(all_parts, _LISTS) or len(all_parts) != len(shapes):
            raise ValueError(
                f"{name} must be a list with an entry for each of {len(shapes)} layers, but is {_size(all_parts)}"
            )
    for i, (thetas, Gs, own) in enumerate(zip(written, read, shapes, strict=True)):
        if Gs is None:
            continue
        for name, each in (("Gs", Gs), ("thetas", thetas)):
            if not isinstance(each, _LISTS) or len(each) != len(own):
                raise ValueError(
                    f"{name}[{i}] must be a list of {len(own)} parts, of shapes {own}, but is {_size(each)}"
                )
        assert thetas is not None
        for k, (theta, G, shape) in enumerate(zip(thetas, Gs, own, strict=True)):
            if G is None:
                continue
            for name, x in (("Gs", G), ("thetas", theta)):
                _part(f"{name}[{i}][{k}]", x, shape, like)
            assert theta is not None
            if theta is not G:
                writable(f"thetas[{i}][{k}]", theta)


def _part(name: str, x: object, shape: tuple[int, ...], like: Tensor) -> None:
    dense(name, x)
    assert isinstance(x, Tensor)
    if x.shape != shape or x.device != like.device:
        raise ValueError(f"{name} must be a tensor of shape {shape} on {like.device}, but got {_description(x)}")
    if (x.dtype == torch.float64) != (like.dtype == torch.float64):
        raise TypeError(f"{name} must be float64 exactly if the blocks are, but is {x.dtype}, they {like.dtype}")
    if x.is_neg():
        raise ValueError(f"{name} must be read as it lies in memory, but is lazily negated: resolve it")


def buffers(tensors: Sequence[Tensor | None], shapes: Sequence[tuple[int, ...]], like: Tensor) -> None:
    """Refuse momentum buffers that don't fit the layers."""
    dtype = accumulation_dtype(like.dtype)
    if not isinstance(tensors, _LISTS) or len(tensors) != len(shapes):
        raise ValueError(
            f"momentum_buffers must be a list with an entry for each of {len(shapes)} layers, but is {_size(tensors)}"
        )
    for i, (v, shape) in enumerate(zip(tensors, shapes, strict=True)):
        if v is None:
            continue
        dense(f"momentum_buffers[{i}]", v)
        if v.shape != shape or v.dtype is not dtype or v.device != like.device:
            raise ValueError(
                f"momentum_buffers[{i}] must be a {dtype} tensor of shape {tuple(shape)} on {like.device}, "
                f"but got {_description(v)}"
            )
        writable(f"momentum_buffers[{i}]", v)


def numbers(count: int, **lists: Sequence[float]) -> None:
    """Refuse lists that don't have a finite number for each layer."""
    for name, each in lists.items():
        _listed(name, each, count)
        if set(map(type, each)) <= {float} and math.isfinite(sum(each)):
            continue
        for i, x in enumerate(each):
            finite(f"{name}[{i}]", x)


def finite(name: str, value: Any) -> None:
    """Refuse what is no finite number."""
    _number(name, value)
    if not abs(value) <= sys.float_info.max:
        raise ValueError(f"{name} must be finite, but is {value}")


def promise(count: int, most: float, shares: Sequence[float] | None, total: object) -> None:
    """Refuse what no promise can be kept with. A share may be infinite: then the step isn't taken."""
    at_least_0("most", most)
    if total is not None and not callable(total):
        raise TypeError(f"total must be None or a function of the sum, but got {_kind(total)}")
    if not math.isfinite(most):
        return
    _listed("shares", shares, count)
    if shares and set(map(type, shares)) <= {float} and not math.isnan(sum(shares)):
        return
    for i, x in enumerate(shares or ()):
        _number(f"shares[{i}]", x)
        if math.isnan(x):
            raise ValueError(f"shares[{i}] must be a number, but is {x}")


def _listed(name: str, each: object, count: int) -> None:
    if not isinstance(each, _LISTS) or len(each) != count:
        raise ValueError(f"{name} must be a list with a number for each of {count} layers, but is {_size(each)}")


def _size(x: object) -> str:
    return f"a {type(x).__name__} of {len(x)}" if isinstance(x, _LISTS) else _kind(x)


def watched(*lists: Tensors) -> bool:
    """Whether autograd must see a call on these tensors."""
    if torch.is_grad_enabled():
        for tensors in lists:
            for x in tensors:
                if x.requires_grad:
                    return True
    return False


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


def plain(**lists: Tensors) -> None:
    """Refuse tensors that something differentiates or maps over, where that isn't served."""
    if not transformed(*lists.values()):
        return
    for name, tensors in lists.items():
        for i, x in enumerate(tensors):
            if transformed([x]):
                raise ValueError(
                    f"{name}[{i}] must be a plain tensor, but torch.func transforms it or it has a tangent of "
                    "forward-mode AD: only precondition and foreach_precondition, without keep, serve these"
                )


def step(
    thetas: Tensors,
    Gs: Tensors,
    As: Tensors,
    Bs: Tensors,
    Ss: Tensors,
    momentum_buffers: Tensors | None,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
) -> None:
    """Refuse what an in-place step couldn't finish."""
    step_tensors(thetas, Gs, As, Bs, Ss, momentum_buffers)
    step_scalars(Gs, momentum_buffers, lr, momentum, weight_decay)
    in_place(thetas, momentum_buffers)


def in_place(thetas: Tensors, momentum_buffers: Tensors | None) -> None:
    """Refuse what torch won't let us write: what autograd watches, and inference tensors outside of their mode."""
    written = {"thetas": thetas, "momentum_buffers": momentum_buffers or ()}
    no_graph("it is written in place", **written)
    for name, tensors in written.items():
        if any(map(Tensor.is_inference, tensors)):
            for i, x in enumerate(tensors):
                _of_this_mode(f"{name}[{i}]", x)


def _of_this_mode(name: str, x: Tensor) -> None:
    if x.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"{name} must be a tensor that can be written outside of torch.inference_mode(), but was made under it: "
            "clone it, or call under it"
        )


def step_scalars(
    Gs: Tensors, momentum_buffers: Tensors | None, lr: float | Tensor, momentum: float, weight_decay: float
) -> None:
    """Refuse numbers that no step can be taken with."""
    _scalar("momentum", momentum, below=1.0)
    _scalar("weight_decay", weight_decay)
    _learning_rate(lr, Gs)
    if momentum != 0 and momentum_buffers is None:
        raise ValueError(f"momentum_buffers must be given where momentum is not 0, but momentum is {momentum}")


def step_tensors(
    thetas: Tensors, Gs: Tensors, As: Tensors, Bs: Tensors, Ss: Tensors, momentum_buffers: Tensors | None
) -> None:
    """Refuse tensors that no step can be taken with."""
    written = {"thetas": thetas}
    if momentum_buffers is not None:
        written["momentum_buffers"] = momentum_buffers
    tensor_lists(Gs=Gs, **written)
    foreach_operands(Gs, As, Bs, Ss)
    plain(**written, Gs=Gs, As=As, Bs=Bs, Ss=Ss)
    for name, tensors in written.items():
        for i, (x, G) in enumerate(zip(tensors, Gs, strict=True)):
            if _plainly_matches(x, G) and x.is_contiguous() and not x.is_neg() and not x.is_inference():
                continue
            _same_as_G(f"{name}[{i}]", x, G, f"Gs[{i}]")
            writable(f"{name}[{i}]", x)


def no_shared_memory(
    thetas: Tensors, momentum_buffers: Tensors | None, *, fake: bool = False, **read: Sequence[Tensor]
) -> None:
    """Refuse one memory under two names where one of them is written: tied weights are to be listed once.

    Apart from :func:`step`, because ``fake`` tensors have no addresses: of these places in a storage are compared.
    """
    lists = {"thetas": thetas, "momentum_buffers": momentum_buffers or (), **read}
    written = len(thetas) + len(lists["momentum_buffers"])
    clash = (shared_storage if fake else shared)([x for tensors in lists.values() for x in tensors], written)
    if clash is not None:
        _refuse_shared(clash, [f"{name}[{i}]" for name, tensors in lists.items() for i in range(len(tensors))])


def no_shared_parts(
    given: Given, thetas: Parts, Gs: Parts, momentum_buffers: Sequence[Tensor | None], *, step: bool, **blocks: Tensors
) -> None:
    """The same of a bound model's call, whose tensors have been checked; the buffers are written by a step only."""
    tensors = [*given.stepped, *given.buffers, *given.gradients, *[x for each in blocks.values() for x in each]]
    clash = shared(tensors, len(given.stepped) + (len(given.buffers) if step else 0))
    if clash is not None:
        parts = [(i, k) for i in given.layers for k, G in enumerate(Gs[i] or ()) if G is not None]
        names = [f"thetas[{i}][{k}]" for i, k in parts]
        names += [f"momentum_buffers[{i}]" for i in given.layers if momentum_buffers[i] is not None]
        names += [f"Gs[{i}][{k}]" for i, k in parts]
        _refuse_shared(clash, names + [f"{name}[{i}]" for name, each in blocks.items() for i in range(len(each))])


def _refuse_shared(clash: tuple[int, int], names: Sequence[str]) -> None:
    first, second = (names[number] for number in clash)
    raise ValueError(f"{first} is written and must not share memory with {second}, but does")


def not_negated(**lists: Tensors) -> None:
    """Refuse lazily negated tensors where memory is read again and again."""
    for name, tensors in lists.items():
        for i, x in enumerate(tensors):
            if x.is_neg():
                raise ValueError(f"{name}[{i}] must be read as it lies in memory, but is lazily negated: resolve it")


def dense(name: str, x: object) -> None:
    """Refuse what is no tensor that lies in memory, of a dtype that is served."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, but got {_kind(x)}")
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


def _matrix(name: str, x: Tensor) -> None:
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


def _same_as_G(name: str, x: Tensor, G: Tensor, G_name: str) -> None:
    _beside(name, x, G, G_name)
    if x.shape != G.shape:
        raise ValueError(f"{name} must have {G_name}'s shape {tuple(G.shape)}, but its shape is {tuple(x.shape)}")


def _block(name: str, x: Tensor, G: Tensor, axis: int, at: str) -> None:
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
        full = _shape(*batch, side, side)
        stack = _shape(*batch, f"ceil({side}/b)", "b", "b")
        raise ValueError(
            f"{name} must be full, {full}, or a stack of blocks, {stack}, with b >= 1, "
            f"for G{at} of shape {tuple(G.shape)}, but its shape is {tuple(x.shape)}"
        )


def _number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, but got {_kind(value)}")


def _scalar(name: str, value: Any, *, below: float = math.inf) -> None:
    _number(name, value)
    if not 0 <= value < below:
        bound = "finite and at least 0" if below == math.inf else f"at least 0 and below {below:g}"
        raise ValueError(f"{name} must be {bound}, but got {value}")


def at_least_0(name: str, value: Any, *, most: float = math.inf) -> None:
    """Refuse what isn't a number from 0 to the most."""
    _number(name, value)
    if not 0 <= value <= most:
        bound = "at least 0" if most == math.inf else f"at least 0 and at most {most:g}"
        raise ValueError(f"{name} must be {bound}, but got {value}")


def _learning_rate(lr: object, Gs: Tensors) -> None:
    if not isinstance(lr, Tensor):
        _scalar("lr", lr)
    elif lr.ndim != 0 or not lr.is_floating_point():
        raise ValueError(f"lr must be a number or a floating-point tensor of no dimensions, but got {_description(lr)}")
    elif lr.device.type != "cpu" and Gs and lr.device != Gs[0].device:
        raise ValueError(f"lr must be on the CPU or on {Gs[0].device} with Gs, but is on {lr.device}")


def writable(name: str, x: Tensor) -> None:
    """Refuse what can't be written in place, entry by entry."""
    if x.is_neg():
        raise ValueError(f"{name} must be written as it lies in memory, but is lazily negated: resolve it")
    _of_this_mode(name, x)
    if x.is_contiguous():
        return
    reach = 1  # of the dimensions of smaller stride
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride < reach:
            raise ValueError(
                f"{name} must not overlap itself, but its shape is {tuple(x.shape)} with strides {x.stride()}"
            )
        reach += (size - 1) * stride


def _kind(x: object) -> str:
    return f"a {type(x).__name__}" if isinstance(x, Tensor) else f"{x!r} of type {type(x).__name__}"


def _description(x: object) -> str:
    return f"a {x.dtype} tensor of shape {tuple(x.shape)} on {x.device}" if isinstance(x, Tensor) else _kind(x)


def _shape(*sizes: object) -> str:
    return f"({', '.join(map(str, sizes))})"
