"""What is timed: each contestant is an operation on all layers of a model, in one dtype.

Three operations, apart:

* **apply**: the preconditioned gradients of all layers.
* **refresh**: what updates a preconditioner. Ours: the forward and the derivatives of the blocks (the meta-gradient).
  The chain: the same by autograd. KFAC: the damped inverses or eigendecompositions of factors that it has been given.
* **step**: apply, and the update of all weights with momentum and weight decay.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

import apo_kernels as ak
from benchmarks.common.fisher.damping import damped_inverse, eigenbasis
from benchmarks.kernels.shapes import Shape

OPERATIONS = ("apply", "refresh", "step")
BLOCK_SIZE = 64
Blocks = tuple[list[Tensor], list[Tensor]]
LR, MOMENTUM, WEIGHT_DECAY, DAMPING = 1e-3, 0.9, 1e-4, 1e-2

FULL = "ours, full blocks"
BLOCKS = f"ours, blocks of {BLOCK_SIZE}"
CHAIN = "plain chain"
COMPILED = "compiled chain"
INVERSE = "KFAC inverses"
EIGEN = "KFAC eigenbases"
OURS = (FULL, BLOCKS)
NAMES = (FULL, BLOCKS, CHAIN, COMPILED, INVERSE, EIGEN)


def chain(G: Tensor, A: Tensor, B: Tensor, S: Tensor) -> Tensor:
    """The operator as one writes it down."""
    return B @ ((S * S) * (B.mT @ G @ A)) @ A.mT


@dataclass
class Contestant:
    """A call to time."""

    call: Callable[[], object]
    flops: int | None  # of matrix products; None: not counted in products
    bytes: int | None = None  # each operand read and each result written once, where that is known


class Workload:
    """The operands of all layers of a model, the same for every contestant. KFAC's are made when first asked for."""

    def __init__(self, layers: list[Shape], dtype: torch.dtype, device: str) -> None:
        self.layers, self.dtype, self.device = layers, dtype, device
        self.generator = torch.Generator(device).manual_seed(0)
        self.Gs, self.Vs = ([self._random(m, n, scale=1e-2) for m, n in layers] for _ in range(2))
        self.As = [self._random(n, n, scale=n**-0.5) for _, n in layers]
        self.Bs = [self._random(m, m, scale=m**-0.5) for m, _ in layers]
        self.stacks: Blocks = [self._stack(n) for _, n in layers], [self._stack(m) for m, _ in layers]
        self.Ss, self.thetas = ([self._random(m, n) for m, n in layers] for _ in range(2))
        self.buffers = [torch.zeros_like(theta) for theta in self.thetas]

    def _random(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=self.generator, device=self.device) * scale).to(self.dtype)

    def _stack(self, side: int) -> Tensor:
        return self._random(-(-side // BLOCK_SIZE), BLOCK_SIZE, BLOCK_SIZE, scale=BLOCK_SIZE**-0.5)

    @cached_property
    def keeps(self) -> bool:
        """Whether the derivatives use what the forward computed. Triton's kernels compute it anew, which is faster."""
        return not ak.explain(None, self.Gs).startswith("triton")

    @cached_property
    def factors(self) -> list[tuple[Tensor, Tensor]]:
        """Second moments, as KFAC would have them, in the workload's dtype."""
        moments = ([(X.float() @ X.float().mT).to(self.dtype) for X in Xs] for Xs in (self.As, self.Bs))
        return list(zip(*moments, strict=True))

    @cached_property
    def inverses(self) -> list[tuple[Tensor, Tensor]]:
        return [(inverse(A), inverse(B)) for A, B in self.factors]

    @cached_property
    def eigenbases(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        return [damped_eigenbases(A, B) for A, B in self.factors]


def inverse(factor: Tensor) -> Tensor:
    """``(F + γI)⁻¹``, stored in the factor's dtype."""
    found = damped_inverse(factor, DAMPING)
    assert found is not None
    return found.to(factor.dtype)


def damped_eigenbases(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``Q_A``, ``Q_B`` and the damped reciprocal eigenvalues ``(m, n)``, stored in the factors' dtype."""
    found_A, found_B = eigenbasis(A), eigenbasis(B)
    assert found_A
    assert found_B
    scale = torch.outer(found_B[0] + DAMPING, found_A[0] + DAMPING).reciprocal()
    return found_A[1].to(A.dtype), found_B[1].to(B.dtype), scale.to(A.dtype)


def contestants(operation: str, work: Workload, left_out: Sequence[str] = ()) -> Iterator[tuple[str, Contestant]]:
    """The contestants of one operation, by name, ready to be called."""
    for name in NAMES:
        if name not in left_out:
            yield name, (_ours if name in OURS else _theirs)(operation, name, work)


def estimate(
    operation: str, name: str, layers: list[Shape], dtype: torch.dtype, rates: dict[torch.dtype, float]
) -> float:
    """Seconds that a call can be expected to take, from the measured rates of matrix products."""
    forward = sum(ak.precondition_flops(m, n) for m, n in layers)
    wide = torch.promote_types(dtype, torch.float32)
    if name in OURS:
        return forward * (3 if operation == "refresh" else 1) / rates.get(wide, rates[dtype])
    if operation == "refresh" and name in (INVERSE, EIGEN):
        cubes = sum(m**3 + n**3 for m, n in layers)
        return cubes * (10 if name == EIGEN else 2) / rates.get(wide, rates[dtype])
    return forward * (3 if operation == "refresh" else 1) / rates[dtype]


def _ours(operation: str, name: str, work: Workload) -> Contestant:
    As, Bs = (work.As, work.Bs) if name == FULL else work.stacks
    sides = (None, None) if name == FULL else (BLOCK_SIZE, BLOCK_SIZE)
    flops = sum(ak.precondition_flops(m, n, *sides) for m, n in work.layers)
    if operation == "refresh":
        flops += sum(ak.precondition_vjp_flops(m, n, *sides, kept=work.keeps) for m, n in work.layers)
        return Contestant(lambda: _refresh(work, As, Bs), flops)
    read = _bytes(work.Gs, work.Ss, As, Bs)
    if operation == "apply":
        call = partial(ak.foreach_precondition, work.Gs, As, Bs, work.Ss)
        return Contestant(call, flops, read + _bytes(work.Gs))
    return Contestant(lambda: _step(work, As, Bs), flops, read + 2 * _bytes(work.thetas, work.buffers))


def _theirs(operation: str, name: str, work: Workload) -> Contestant:
    foreach_chain = _compiled_chain(work.device) if name == COMPILED else _foreach_chain
    apply: Callable[[], list[Tensor]] = {
        INVERSE: lambda: [B @ G @ A for G, (A, B) in zip(work.Gs, work.inverses, strict=True)],
        EIGEN: lambda: [
            Q_B @ (s * (Q_B.mT @ G @ Q_A)) @ Q_A.mT for G, (Q_A, Q_B, s) in zip(work.Gs, work.eigenbases, strict=True)
        ],
    }.get(name, lambda: foreach_chain(work.Gs, work.As, work.Bs, work.Ss))
    if operation != "refresh":
        flops = sum(ak.precondition_flops(m, n) for m, n in work.layers) // (2 if name == INVERSE else 1)
        return Contestant(apply if operation == "apply" else lambda: _update(work, apply()), flops)
    if name == INVERSE:
        return Contestant(lambda: [(inverse(A), inverse(B)) for A, B in work.factors], None)
    if name == EIGEN:
        return Contestant(lambda: [damped_eigenbases(A, B) for A, B in work.factors], None)
    # The chain multiplies from the left: its derivatives take 8mn² + 6m²n, whatever the shape.
    by_autograd = sum(12 * m * n**2 + 10 * m**2 * n for m, n in work.layers)
    return Contestant(lambda: _differentiate(foreach_chain, work), by_autograd)


def _bytes(*lists: list[Tensor]) -> int:
    return sum(x.nbytes for tensors in lists for x in tensors)


def _foreach_chain(Gs: list[Tensor], As: list[Tensor], Bs: list[Tensor], Ss: list[Tensor]) -> list[Tensor]:
    return [chain(*operands) for operands in zip(Gs, As, Bs, Ss, strict=True)]


def _compiled_chain(device: str) -> Callable[..., list[Tensor]]:
    """On a GPU with what torch.compile has to offer there; on a CPU that changes nothing but the time it takes."""
    mode = "default" if torch.device(device).type == "cpu" else "max-autotune"
    return torch.compile(_foreach_chain, dynamic=False, mode=mode)


def _refresh(work: Workload, As: list[Tensor], Bs: list[Tensor]) -> object:
    if not work.keeps:
        ak.foreach_precondition(work.Gs, As, Bs, work.Ss)
        return ak.foreach_precondition_vjp(work.Gs, As, Bs, work.Ss, work.Vs)
    _, kept = ak.foreach_precondition(work.Gs, As, Bs, work.Ss, keep=True)
    return ak.foreach_precondition_vjp(work.Gs, As, Bs, work.Ss, work.Vs, kept=kept)


def _differentiate(foreach_chain: Callable[..., list[Tensor]], work: Workload) -> object:
    blocks = [[x.detach().requires_grad_() for x in operands] for operands in (work.As, work.Bs, work.Ss)]
    Ys = foreach_chain(work.Gs, *blocks)
    return torch.autograd.grad(Ys, [x for operands in blocks for x in operands], work.Vs)


def _step(work: Workload, As: list[Tensor], Bs: list[Tensor]) -> None:
    held: dict[str, Any] = {"momentum": MOMENTUM, "momentum_buffers": work.buffers, "weight_decay": WEIGHT_DECAY}
    ak.foreach_precondition_step_(work.thetas, work.Gs, As, Bs, work.Ss, lr=LR, **held)


def _update(work: Workload, directions: list[Tensor]) -> None:
    torch._foreach_mul_(work.buffers, MOMENTUM)
    torch._foreach_add_(work.buffers, directions)
    torch._foreach_mul_(work.thetas, 1 - LR * WEIGHT_DECAY)
    torch._foreach_add_(work.thetas, work.buffers, alpha=-LR)
