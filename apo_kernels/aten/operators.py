"""The operators on torch's own matrix products, layer by layer.

Products are chosen for the fewest FLOPs and written into their places; nothing is copied that BLAS can read
with strides. 16-bit operands are widened once, everything between them stays in float32, and the result is
rounded once at the end: on most CPUs that is also 10 to 40 times faster than native 16-bit products, and it
is never less accurate.

**Aligned rows.** A product is written with its rows 8 elements apart in multiples, and copied if the caller
must have it contiguous: BLAS writes into rows of odd length at about two thirds of its speed (MKL on an AMD
EPYC, float32, 1000 × 1001: 28 ms against 21 ms), and a bias column makes most layers odd.

**Which association.** The forward costs the same in either order, but the derivatives don't: with
``U = G A`` first they take 3 products on ``A``'s side and 4 on ``B``'s, with ``BᵀG`` first the reverse. The
wider side gets the 3. (Relative derivatives take 3 on either.) A forward that nothing is kept of takes the
narrower side first: that is as cheap and, on the gradients of a softmax layer, several times more accurate. The
second order is the first one on the transposed problem, ``P(Gᵀ; B, A, Sᵀ) = P(G; A, B, S)ᵀ``, so only one is written.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from apo_kernels.blocks import block_count, is_stack, width

__all__ = [
    "Kept",
    "accumulation_dtype",
    "aligned_empty",
    "aligned_product",
    "bind_step",
    "foreach_precondition",
    "foreach_precondition_keep",
    "foreach_precondition_step_",
    "foreach_precondition_vjp",
    "precondition",
    "precondition_keep",
    "precondition_vjp",
    "sum_of_products",
]

Tensors = Sequence[Tensor]
Groups = list[list[int]]
Found = TypeVar("Found")

ALIGNMENT = 8  # elements
SMALL = 2**16  # elements: below, an aligned buffer costs more than it gains
JOINED = 2**14  # elements: below, layers of one form with blocks in squares are computed as one batch
LARGE = 2**17  # elements: from here on it gains a copy as well
PANEL = 2**21  # elements of a derivative that is copied panel by panel: 8 MB of float32


class Kept(NamedTuple):
    """What the derivatives can reuse of a forward: three matrices of ``G``'s shape, in float32 (float64 for
    float64 operands).

    ``M = BᵀGA``; ``U`` and ``W`` are ``GA`` and ``B(S²⊙M)``, or, where ``B`` is the wider side, ``BᵀG`` and
    ``(S²⊙M)Aᵀ``. Only :func:`apo_kernels.precondition_vjp` on the same operands may be given them.
    """

    U: Tensor
    M: Tensor
    W: Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and of derivatives: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def aligned_empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised matrix (a batch) whose rows start at multiples of ``ALIGNMENT``, unless it is small."""
    *batch, m, n = shape
    if n % ALIGNMENT == 0 or m * n < SMALL:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.empty((*batch, m, block_count(n, ALIGNMENT) * ALIGNMENT), dtype=dtype, device=device)[..., :n]


def aligned_product(X: Tensor, Y: Tensor) -> Tensor:
    """``X·Y`` in an :func:`aligned_empty`."""
    return _product(X, Y, aligned_empty((*X.shape[:-1], Y.shape[-1]), X.dtype, X.device))


def precondition(G: Tensor, A: Tensor, B: Tensor, S: Tensor, wide: bool = False) -> Tensor:
    """``P(G)``, contiguous, of ``G``'s shape, in ``G``'s dtype or, if ``wide``, the accumulation dtype."""
    if _is_small(G, A, B, S):
        U = torch.mm(B.mT, G)
        M = torch.mm(U, A)
        W = torch.mm(B, M.mul_(S).mul_(S), out=U)  # each is written over what has been read for the last time
        return torch.mm(W, A.mT, out=M)
    p = _Problem(G, A, B, S, narrow_first=True)
    U = _right(p.G, p.A, p.buffer())
    M = _left(p.B.mT, U, p.buffer())
    W = _left(p.B, M.mul_(p.S).mul_(p.S), U)  # as above
    return _apply(p, W, p.dtype if wide else G.dtype, out=M)


def precondition_keep(G: Tensor, A: Tensor, B: Tensor, S: Tensor) -> tuple[Tensor, Kept]:
    """``P(G)`` and what :func:`precondition_vjp` can take over from it."""
    if _is_small(G, A, B, S) and G.shape[0] <= G.shape[1]:
        return _small_keep(G, A, B, S)
    p = _Problem(G, A, B, S)
    kept = _forward(p)
    Y = _apply(p, kept.W, G.dtype, p.buffer())
    return Y, Kept(*(p.leave(x) for x in kept))


def precondition_vjp(
    G: Tensor, A: Tensor, B: Tensor, S: Tensor, V: Tensor, kept: Kept | None, wanted: str, relative: bool = False
) -> dict[str, Tensor]:
    """The derivatives named in ``wanted`` (letters of "GABS"), by name, in the accumulation dtype.

    The ``relative`` ones take nothing but M and N, ``AᵀdA = Nᵀ(S²⊙M) + Mᵀ(S²⊙N)`` and ``BᵀdB = N(S²⊙M)ᵀ + M(S²⊙N)ᵀ``,
    and so a product less than ``dA`` and ``dB``.
    """
    if _is_small(G, A, B, S) and V.dtype is G.dtype and G.shape[0] <= G.shape[1]:
        return _small_vjp(G, A, B, S, V, kept, wanted, relative)
    p = _Problem(G, A, B, S)
    letters = wanted.translate(_SWAP) if p.transposed else wanted
    need_W = "A" in letters and not relative
    held = _forward(p, need_W=need_W) if kept is None else Kept(*(p.enter(x) for x in kept))
    V = p.enter(V)

    UV = _right(V, p.A, p.buffer())
    N = _left(p.B.mT, UV, p.buffer())
    d: dict[str, Tensor] = {}
    SN = N * p.S
    if "S" in letters:
        d["S"] = p.leave((SN * held.M).mul_(2)).contiguous()
        if letters == "S":
            return d
    TN = SN.mul_(p.S)
    if "B" in letters or ("A" in letters and relative):
        TM = (held.M * p.S).mul_(p.S)
    if "B" in letters:
        left_V, left_G = (N, held.M) if relative else (UV, held.U)
        d["B"] = p.leave_block(sum_of_products(left_V, TM.mT, left_G, TN.mT, like=p.B))
    if "A" in letters and relative:
        d["A"] = p.leave_block(sum_of_products(N.mT, TM, held.M.mT, TN, like=p.A))
    if need_W or "G" in letters:
        WN = _left(p.B, TN, UV)  # UV has been read for the last time
    if need_W:
        d["A"] = p.leave_block(sum_of_products(V.mT, held.W, p.G.mT, WN, like=p.A))
    if "G" in letters:
        d["G"] = _apply(p, WN, p.dtype, p.buffer())
    return {name.translate(_SWAP): x for name, x in d.items()} if p.transposed else d


def foreach_precondition(Gs: Tensors, As: Tensors, Bs: Tensors, Ss: Tensors) -> list[Tensor]:
    groups, joined = _joined(Gs, As, Bs, Ss)
    return _apart(groups, map(precondition, *joined), _matrices)


def foreach_precondition_keep(Gs: Tensors, As: Tensors, Bs: Tensors, Ss: Tensors) -> tuple[list[Tensor], list[Kept]]:
    groups, joined = _joined(Gs, As, Bs, Ss)
    pairs = _apart(groups, map(precondition_keep, *joined), _pairs)
    return [Y for Y, _ in pairs], [kept for _, kept in pairs]


def foreach_precondition_vjp(
    Gs: Tensors,
    As: Tensors,
    Bs: Tensors,
    Ss: Tensors,
    Vs: Tensors,
    kept: Sequence[Kept] | None,
    wanted: str,
    relative: bool = False,
) -> list[dict[str, Tensor]]:
    groups, joined = _joined(Gs, As, Bs, Ss, Vs, [None] * len(Gs) if kept is None else kept)
    return _apart(groups, map(precondition_vjp, *joined, repeat(wanted), repeat(relative)), _by_letter)


def foreach_precondition_step_(
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
    """``v ← μ v + P(G)``, ``θ ← (1 − lr·λ) θ − lr·v``, each rounded once.

    All directions come first; the writes allocate nothing, so that they can't fail half-way.
    """
    groups, joined = _joined(Gs, As, Bs, Ss)
    directions = _apart(groups, map(precondition, *joined, repeat(True)), Tensor.unbind)
    weights = list(thetas)
    if not weights:
        return
    if momentum_buffers:
        buffers = list(momentum_buffers)
        if momentum != 0:  # at 0 the buffers are overwritten: they may hold anything, NaN included
            torch._foreach_add_(directions, buffers, alpha=momentum)
        torch._foreach_copy_(buffers, directions)
    if weight_decay != 0:
        torch._foreach_add_(directions, weights, alpha=weight_decay)
    if isinstance(lr, Tensor):
        torch._foreach_mul_(directions, lr)
        torch._foreach_sub_(weights, directions)
    else:
        torch._foreach_sub_(weights, directions, alpha=lr)


def bind_step(
    thetas: Tensors, Gs: Tensors, As: Tensors, Bs: Tensors, Ss: Tensors, momentum_buffers: Tensors
) -> Callable[[float | Tensor, float, float], None]:
    """:func:`foreach_precondition_step_` on these tensors, of ``lr, momentum, weight_decay``."""
    return partial(foreach_precondition_step_, thetas, Gs, As, Bs, Ss, momentum_buffers)


# Layers of one form with blocks in squares, joined to a batch where each alone costs more to call than to compute. Full
# blocks aren't: BLAS multiplies them faster one by one.


def _joined(*lists: Sequence[Any]) -> tuple[Groups, Sequence[Iterable[Any]]]:
    """The layers that are computed together, and the operands of the groups, stacked where one has several.

    No groups: each layer alone. This is found before the first product, because what runs between products finds
    nothing in the caches and takes several times as long.
    """
    Gs, As, Bs = lists[:3]
    if len(Gs) < 2 or not any(A.ndim > 2 or B.ndim > 2 for A, B in zip(As, Bs, strict=True)):
        return [], lists
    alike: dict[Hashable, list[int]] = {}
    for i, operands in enumerate(zip(*lists, strict=True)):
        G, A, B = operands[:3]
        joins = (A.ndim > G.ndim or B.ndim > G.ndim) and G.numel() < JOINED
        form = tuple((x.shape, x.dtype) for x in operands if isinstance(x, Tensor)) if joins else i
        alike.setdefault(form, []).append(i)
    groups = list(alike.values())
    if len(groups) == len(Gs):
        return [], lists
    return groups, [_in_groups(own, groups) for own in lists]


def _in_groups(own: Sequence[Any], groups: Groups) -> Iterator[Any]:
    for group in groups:
        yield _stacked([own[i] for i in group])


def _stacked(each: Sequence[Any]) -> Any:
    first = each[0]
    if len(each) == 1 or first is None:
        return first
    if isinstance(first, Kept):
        return Kept(*map(_stacked, zip(*each, strict=True)))
    return torch.stack(list(each))


def _apart(groups: Groups, found: Iterable[Found], split: Callable[[Found], Iterable[Found]]) -> list[Found]:
    """What groups gave, layer by layer; what several gave is ``split``."""
    if not groups:
        return list(found)
    results: dict[int, Found] = {}
    for group, own in zip(groups, found, strict=True):
        results.update(zip(group, split(own) if len(group) > 1 else [own], strict=True))
    return [results[i] for i in range(len(results))]


def _matrices(batch: Tensor) -> Sequence[Tensor]:
    """Each in memory of its own."""
    return cast("tuple[Tensor, ...]", torch.unbind_copy(batch))


def _pairs(found: tuple[Tensor, Kept]) -> Iterable[tuple[Tensor, Kept]]:
    Y, kept = found
    return zip(_matrices(Y), map(Kept, *map(_matrices, kept)), strict=True)


def _by_letter(found: dict[str, Tensor]) -> Iterable[dict[str, Tensor]]:
    return (dict(zip(found, own, strict=True)) for own in zip(*map(_matrices, found.values()), strict=True))


# Small layers with full blocks of one dtype: the algebra again, without the bookkeeping. Through _Problem LeNet's calls
# take 13 to 22 % longer; with products and buffers as methods of a class for small layers, still 4 to 6 %.


def _is_small(G: Tensor, A: Tensor, B: Tensor, S: Tensor) -> bool:
    dtype = G.dtype
    return (
        G.numel() < SMALL
        and A.ndim == B.ndim == 2  # full, and of one matrix
        and (A.dtype is dtype and B.dtype is dtype and S.dtype is dtype)
        and (dtype is torch.float32 or dtype is torch.float64)
    )


def _small_keep(G: Tensor, A: Tensor, B: Tensor, S: Tensor) -> tuple[Tensor, Kept]:
    U = torch.mm(G, A)
    M = torch.mm(B.mT, U)
    T = (M * S).mul_(S)
    W = torch.mm(B, T)
    return torch.mm(W, A.mT, out=T), Kept(U, M, W)


def _small_vjp(
    G: Tensor, A: Tensor, B: Tensor, S: Tensor, V: Tensor, kept: Kept | None, wanted: str, relative: bool
) -> dict[str, Tensor]:
    need_W = "A" in wanted and not relative
    if kept is None:
        U = torch.mm(G, A)
        M = torch.mm(B.mT, U)
        W = torch.mm(B, (M * S).mul_(S)) if need_W else M
    else:
        U, M, W = kept
    UV = torch.mm(V, A)
    N = torch.mm(B.mT, UV)
    d: dict[str, Tensor] = {}
    T = None
    if "B" in wanted or ("A" in wanted and relative):
        T = (M * S).mul_(S)
        if "B" in wanted:
            d["B"] = torch.mm(N if relative else UV, T.mT)
        if "A" in wanted and relative:
            d["A"] = torch.mm(N.mT, T)
    SN = N.mul_(S)
    if "S" in wanted:
        d["S"] = torch.mul(SN, M, out=T).mul_(2)
    TN = SN.mul_(S)
    if "B" in wanted:
        d["B"] = _add_product(M if relative else U, TN.mT, d["B"])
    if "A" in wanted and relative:
        d["A"] = _add_product(M.mT, TN, d["A"])
    if need_W or "G" in wanted:
        WN = torch.mm(B, TN, out=UV)  # UV has been read for the last time
    if need_W:
        d["A"] = _add_product(G.mT, WN, torch.mm(V.mT, W))
    if "G" in wanted:
        d["G"] = torch.mm(WN, A.mT)
    return d


def _A_is_wider(G: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether ``A`` is the side to begin with where derivatives follow."""
    m, n = G.shape[-2:]
    return width(A, G, n) >= width(B, G, m)


class _Problem:
    """The operands, widened, their batch dimensions joined to at most one, and turned so that ``A`` is the side to
    begin with: the wider one, or with ``narrow_first`` the other."""

    def __init__(self, G: Tensor, A: Tensor, B: Tensor, S: Tensor, *, narrow_first: bool = False) -> None:
        self.shape = G.shape
        self.device = G.device
        self.dtype = accumulation_dtype(G.dtype)
        self.batch_dims = G.ndim - 2
        self.transposed = _A_is_wider(G, A, B) is narrow_first
        self.plain = G.numel() < SMALL and not (self.transposed or is_stack(A, G) or is_stack(B, G))
        self.G, self.S = self.enter(G), self.enter(S)
        A, B = self._widen(A), self._widen(B)
        self.A, self.B = (B, A) if self.transposed else (A, B)

    def enter(self, x: Tensor) -> Tensor:
        """A matrix of the caller's as the problem has it."""
        x = self._widen(x)
        return x.mT if self.transposed else x

    def buffer(self) -> Tensor | None:
        """Where to put a product; None: where torch puts it is as good."""
        if self.plain:
            return None
        return self.enter(aligned_empty(self.shape, self.dtype, self.device))

    def leave(self, x: Tensor) -> Tensor:
        """A matrix as the caller has it."""
        x = x.mT if self.transposed else x
        return x.reshape(*self.shape[: self.batch_dims], *x.shape[1:]) if self.batch_dims > 1 else x

    def leave_block(self, x: Tensor) -> Tensor:
        """A block's derivative as the caller has the block."""
        return x.reshape(*self.shape[: self.batch_dims], *x.shape[1:]) if self.batch_dims > 1 else x

    def _widen(self, x: Tensor) -> Tensor:
        x = x if x.dtype == self.dtype else x.to(self.dtype)
        return x.flatten(0, self.batch_dims - 1) if self.batch_dims > 1 else x


_SWAP = str.maketrans("AB", "BA")


def _forward(p: _Problem, need_W: bool = True) -> Kept:
    U = _right(p.G, p.A, p.buffer())
    M = _left(p.B.mT, U, p.buffer())
    W = _left(p.B, (M * p.S).mul_(p.S), p.buffer()) if need_W else M
    return Kept(U, M, W)


def _apply(p: _Problem, W: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """``W Aᵀ``, the last product, through ``out``, as the caller gets it: contiguous, rounded to ``dtype``."""
    return p.leave(_right(W, p.A.mT, out)).to(dtype).contiguous()


def _right(X: Tensor, A: Tensor, out: Tensor | None) -> Tensor:
    """``X·A`` into ``out``."""
    if not is_stack(A, X):
        return _product(X, A, out)
    assert out is not None
    b = A.shape[-1]
    if b == 1:
        return torch.mul(X, A.flatten(-3).unsqueeze(-2), out=out)
    whole, rest = divmod(X.shape[-1], b)
    if whole:
        _product(_panels(X, whole, b), A[..., :whole, :, :], _panels(out, whole, b))
    if rest:
        _product(X[..., -rest:], A[..., whole, :rest, :rest], out[..., -rest:])
    return out


def _left(B: Tensor, X: Tensor, out: Tensor | None) -> Tensor:
    """``B·X`` into ``out``."""
    if not is_stack(B, X):
        return _product(B, X, out)
    assert out is not None
    _right(X.mT, B.mT, out.mT)
    return out


def sum_of_products(L: Tensor, R: Tensor, L2: Tensor, R2: Tensor, like: Tensor) -> Tensor:
    """``L·R + L2·R2``, contiguous, as far as a block of the form of ``like`` has entries for it."""
    if not is_stack(like, L):
        return _full_sum_of_products(L, R, L2, R2)
    b = like.shape[-1]
    if b == 1:
        return (L.mT * R).sum(-2).add_((L2.mT * R2).sum(-2))[..., None, None]
    whole, rest = divmod(L.shape[-2], b)
    D = torch.empty_like(like, memory_format=torch.contiguous_format)
    if whole:
        D_whole = _product(_panels(L.mT, whole, b).mT, _panels(R, whole, b), D[..., :whole, :, :])
        _add_product(_panels(L2.mT, whole, b).mT, _panels(R2, whole, b), D_whole)
    if rest:
        D_rest = D[..., whole, :, :].zero_()[..., :rest, :rest]
        _product(L[..., -rest:, :], R[..., -rest:], D_rest)
        _add_product(L2[..., -rest:, :], R2[..., -rest:], D_rest)
    return D


def _full_sum_of_products(L: Tensor, R: Tensor, L2: Tensor, R2: Tensor) -> Tensor:
    rows, cols = L.shape[-2], R.shape[-1]
    if cols % ALIGNMENT == 0 or rows * cols < LARGE:
        return _add_product(L2, R2, _product(L, R, None))
    D = L.new_empty((*L.shape[:-2], rows, cols))
    step = min(max(PANEL // cols, 64), rows)
    panel = aligned_empty((*L.shape[:-2], step, cols), L.dtype, L.device)
    for top in range(0, rows, step):
        here = slice(top, min(top + step, rows))
        part = panel[..., : here.stop - top, :]
        _product(L[..., here, :], R, part)
        D[..., here, :] = _add_product(L2[..., here, :], R2, part)
    return D


def _panels(X: Tensor, whole: int, b: int) -> Tensor:
    """The first ``whole·b`` columns of ``X`` as a stack of panels ``(*batch, whole, m, b)``: a view."""
    return torch.unflatten(X[..., : whole * b], -1, (whole, b)).transpose(-3, -2)


def _product(X: Tensor, Y: Tensor, out: Tensor | None) -> Tensor:
    if X.ndim == 2:
        return torch.mm(X, Y, out=out)
    if X.ndim == 3:
        return torch.bmm(X, Y, out=out)
    product = torch.matmul(X, Y)  # with `out` it would resize what it folds
    return product if out is None else out.copy_(product)


def _add_product(X: Tensor, Y: Tensor, out: Tensor) -> Tensor:
    if X.ndim == 2:
        return torch.addmm(out, X, Y, out=out)
    return torch.baddbmm(out, X, Y, out=out) if X.ndim == 3 else out.add_(torch.matmul(X, Y))
