"""A model's parameters as the matrices that are preconditioned.

========================  ==========================================  =======================================
parameter                 matrix ``m × n``                            blocks
========================  ==========================================  =======================================
Linear, Bilinear, RNNs    ``(out, in)``; bias as one more column      both sides
Conv1d to 3d              ``(out, in/groups · ∏kernel)``; with bias   both sides
transposed convolution    ``(out, in · ∏kernel)``; with bias          both sides
  with groups             ``(in, out/groups · ∏kernel)``              both sides; the bias is a vector
attention's in_proj       three ``(width, width)``; each with bias    both sides of each
Embedding                 ``(entries, width)``                        width only: entries don't mix
other, of two dims or up  ``(first, ∏ rest)``                         both sides
vectors and scalars       ``(1, size)``                               none: a diagonal ``S``
========================  ==========================================  =======================================

A side longer than ``max_dim``, or of length 1, gets no block; ``S`` still scales along it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from apo.ranks.sharding import Over, local

__all__ = ["MatrixView", "Side", "matrix_views", "side"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class Side:
    """A side of a matrix: its length and its block.

    Attributes:
        block_size: side of the squares of a block-diagonal block; None for a full block; 1 for none at all.
    """

    length: int
    block_size: int | None

    @property
    def learned(self) -> bool:
        return self.block_size != 1

    @property
    def width(self) -> int:
        """Side of the largest square."""
        return self.length if self.block_size is None else self.block_size

    def places(self, device: torch.device) -> Tensor:
        """The place of each entry in its square."""
        return torch.arange(self.length, device=device) % max(self.width, 1)

    def __str__(self) -> str:
        if not self.learned:
            return "-"
        return "full" if self.block_size is None else f"{-(-self.length // self.block_size)} x {self.block_size}"


def side(length: int, block_size: int | None, max_dim: int | None) -> Side:
    """The block that a side of this length gets."""
    if length == 1 or block_size == 1 or (max_dim is not None and length > max_dim):
        return Side(length, 1)
    return Side(length, None if block_size is None or length <= block_size else block_size)


def _part(whole: Side, length: int) -> Side:
    """The same kind of block for a part of a side; it is learned wherever the whole one is."""
    return Side(length, whole.width if length == 0 else whole.block_size)


@dataclass(frozen=True, eq=False)
class MatrixView:
    """A weight, joined by its bias where it has one, read as a matrix or a small batch of matrices.

    Attributes:
        name: as the model calls it, ``"0.weight + bias"``.
        weight, bias: the parameters; bias may be None.
        batch: () or, for attention's in_proj, (3,).
        m, n: sides, the bias's column counted.
        mixes_rows: whether the ``m`` side may get a block.
        is_vector: whether no side may.
        transposed: whether dimensions 0 and 1 of the weight change places first.
        whole: of a matrix that is cut over ranks, the whole one; this is then the part that this rank holds.
        over: the groups of the ranks that hold the other parts; of those, ``row_over`` cut the ``m`` side and
            ``column_over`` the ``n`` side.
        owner: the rank that alone holds the preconditioner (:mod:`apo.ranks.owners`); None: every rank that has the
            weight.
        held: whether that is this rank, or any.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    batch: tuple[int, ...]
    m: int
    n: int
    mixes_rows: bool = True
    is_vector: bool = False
    transposed: bool = False
    whole: MatrixView | None = None
    over: Over = ()
    row_over: Over = ()
    column_over: Over = ()
    owner: int | None = None
    held: bool = True

    @cached_property
    def parameters(self) -> tuple[Tensor, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def ids(self) -> list[int]:
        """Of :attr:`parameters`, which are held here."""
        return [*map(id, self.parameters)]

    @property
    def shape(self) -> tuple[int, ...]:
        """``(*batch, m, n)``."""
        return (*self.batch, self.m, self.n)

    @property
    def entries(self) -> int:
        """How many entries the whole matrix has."""
        return math.prod((self.whole or self).shape)

    def sides(self, block_size: int | None, max_dim: int | None) -> tuple[Side, Side]:
        """The blocks of the ``n`` side (A) and of the ``m`` side (B)."""
        if self.whole is not None:  # squares start at the part's edge
            A, B = self.whole.sides(block_size, max_dim)
            return _part(A, self.n), _part(B, self.m)
        if self.is_vector:
            return Side(self.n, 1), Side(self.m, 1)
        rows = side(self.m, block_size, max_dim) if self.mixes_rows else Side(self.m, 1)
        return side(self.n, block_size, max_dim), rows

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Of the matrices of :attr:`parameters`, which lie side by side."""
        return (self.n,) if self.bias is None or not self.held else (self.n - 1, 1)

    @cached_property
    def _shapes(self) -> list[torch.Size]:
        return [torch.Size((*self.batch, self.m, width)) for width in self.widths]

    def matrices(self, parts: Iterable[Tensor | None]) -> list[Tensor | None]:
        """Tensors in the shapes of :attr:`parameters`, of DTensors this rank's parts, as matrices
        ``(*batch, m, width)`` that lie side by side. Views where they can be."""
        if not self.held:
            return [local(self.weight).new_empty(self.shape)]
        found: list[Tensor | None] = []
        for x, shape in zip(parts, self._shapes, strict=True):
            if x is not None and self.transposed and not found:
                x = x.transpose(0, 1)
            found.append(x if x is None or x.shape == shape else x.reshape(*shape))  # a whole Size takes twice as long
        return found

    def joined(self, matrices: Sequence[Tensor | None] | None) -> Tensor:
        """The matrix ``(*batch, m, n)`` of :meth:`matrices`; None counts as zeros."""
        matrices = [None] * len(self.widths) if matrices is None else matrices
        like = next((x for x in matrices if x is not None), local(self.weight))
        each = [
            like.new_zeros(*self.batch, self.m, width) if x is None else x
            for x, width in zip(matrices, self.widths, strict=True)
        ]
        return each[0] if len(each) == 1 else torch.cat(each, -1)


def matrix_views(model: nn.Module, parameters: Iterable[Tensor]) -> list[MatrixView]:
    """The views of these of the model's parameters, each in exactly one, in the model's order. Parameters without
    elements are in none.

    A tied weight is seen where the model names it first, as an embedding's if it is one anywhere. A bias is joined
    to its weight only where both are among ``parameters``.

    Raises:
        ValueError: some of the parameters aren't the model's.
    """
    parameters = list(parameters)
    wanted = {id(p): p for p in parameters if p.numel()}
    entries = {id(m.weight) for m in model.modules() if isinstance(m, _EMBEDDINGS)}
    views = []
    for view in _views(model, wanted, entries):
        views.append(view)
        for p in view.parameters:
            del wanted[id(p)]
    if wanted:
        shapes = ", ".join(str(tuple(p.shape)) for p in wanted.values())
        raise ValueError(f"params must be parameters of the model, but got others, of shapes {shapes}")
    return views


def _views(model: nn.Module, wanted: dict[int, Tensor], entries: set[int]) -> Iterator[MatrixView]:
    for prefix, module in model.named_modules():
        own = {name: p for name, p in module._parameters.items() if p is not None}
        for name, p in own.items():
            if id(p) not in wanted:
                continue
            full = f"{prefix}.{name}" if prefix else name
            if id(p) in entries and p.ndim == 2:
                yield MatrixView(full, p, None, (), p.shape[0], p.shape[1], mixes_rows=False)
                continue
            partner = _bias_of(module, name)
            bias = None if partner is None else own.get(partner)
            if bias is not None and id(bias) not in wanted:
                bias = None
            yield _view(full if bias is None else f"{full} + {partner}", module, name, p, bias)


def _view(name: str, module: nn.Module, own_name: str, p: Tensor, bias: Tensor | None) -> MatrixView:
    if p.numel() == max(p.shape, default=1) and _bias_of(module, own_name) is None:
        return MatrixView(name, p, None, (), 1, p.numel(), is_vector=True)
    more = bias is not None
    if isinstance(module, nn.MultiheadAttention) and own_name == "in_proj_weight":
        return MatrixView(name, p, bias, (3,), p.shape[0] // 3, p.shape[1] + more)
    m, transposed = p.shape[0], False
    if isinstance(module, _TRANSPOSED) and module.groups == 1:
        m, transposed = p.shape[1], True
    return MatrixView(name, p, bias, (), m, p.numel() // max(m, 1) + more, transposed=transposed)


def _bias_of(module: nn.Module, name: str) -> str | None:
    """The name of the bias that adds to what this weight gives, one entry per output."""
    if isinstance(module, nn.MultiheadAttention):
        return "in_proj_bias" if name == "in_proj_weight" else None
    if isinstance(module, nn.RNNBase):
        return name.replace("weight", "bias", 1) if name.startswith(("weight_ih", "weight_hh")) else None
    if isinstance(module, _TRANSPOSED) and module.groups > 1:
        return None
    known = isinstance(module, (nn.Linear, nn.Bilinear, *_CONVOLUTIONS, *_TRANSPOSED))
    return "bias" if known and name == "weight" else None
