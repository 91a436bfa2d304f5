"""What an in-place step needs beside its operands."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from apo_kernels.checks.layers import foreach_operands, plainly_matches
from apo_kernels.checks.scalars import check_lr, check_scalar
from apo_kernels.checks.tensors import Tensors, check_like_G, no_graph, of_this_mode, plain, tensor_lists, writable
from apo_kernels.given import Given
from apo_kernels.memory import shared, shared_storage
from apo_kernels.slopes import Parts

__all__ = ["in_place", "no_shared_memory", "no_shared_parts", "refuse_shared", "step", "step_scalars", "step_tensors"]


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
                of_this_mode(f"{name}[{i}]", x)


def step_scalars(
    Gs: Tensors, momentum_buffers: Tensors | None, lr: float | Tensor, momentum: float, weight_decay: float
) -> None:
    """Refuse numbers that no step can be taken with."""
    check_scalar("momentum", momentum, below=1.0)
    check_scalar("weight_decay", weight_decay)
    check_lr(lr, Gs)
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
            if plainly_matches(x, G) and x.is_contiguous() and not x.is_neg() and not x.is_inference():
                continue
            check_like_G(f"{name}[{i}]", x, G, f"Gs[{i}]")
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
        refuse_shared(clash, [f"{name}[{i}]" for name, tensors in lists.items() for i in range(len(tensors))])


def refuse_shared(clash: tuple[int, int], names: Sequence[str]) -> None:
    """Say which two tensors share memory, by their numbers among these."""
    first, second = (names[number] for number in clash)
    raise ValueError(f"{first} is written and must not share memory with {second}, but does")


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
        refuse_shared(clash, names + [f"{name}[{i}]" for name, each in blocks.items() for i in range(len(each))])
