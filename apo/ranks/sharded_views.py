"""The parts of matrices that this rank holds.

==============================  ===================================================================================
a weight that is cut along      its matrix here
==============================  ===================================================================================
its rows (FSDP, column          some rows: B's squares, S and momentum are of these rows alone; A is the same on all
parallel)                       ranks, its derivative their sum. The bias joins if it is cut as the rows are
its columns (row parallel)      the mirror image. The bias, which isn't cut, becomes a vector of its own
both (a mesh of two dims)       both; each block's derivative is summed over the ranks that cut the other side
a vector                        some entries
==============================  ===================================================================================

``P(G)`` of a part needs its own G, A, B and S only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from apo.layers.matrix_view import MatrixView
from apo.ranks.placement_checks import check_matrix
from apo.ranks.sharding import local, shards_of

__all__ = ["local_views"]


def local_views(views: Iterable[MatrixView], block_size: int | None, max_dim: int | None) -> list[MatrixView]:
    """The part of each matrix that this rank holds, an empty one if need be; whole matrices as they are.

    Raises:
        ValueError: a weight is cut in a way that its matrix can't follow.
    """
    return [part for view in views for part in _parts(view, block_size, max_dim)]


def _parts(view: MatrixView, block_size: int | None, max_dim: int | None) -> list[MatrixView]:
    if view.is_vector:
        return [_vector(view)]
    row_dim = int(view.transposed)
    name, _, partner = view.name.partition(" + ")
    full = [block_size is None and side.learned for side in view.sides(block_size, max_dim)]
    check_matrix(name, view.weight, row_dim=row_dim, batch=view.batch, full=full)
    cut = shards_of(view.weight)
    rows = tuple(group for dim, group in cut if dim == row_dim)
    columns = tuple(group for dim, group in cut if dim != row_dim)
    bias, apart = view.bias, []
    if bias is not None and (columns or tuple(group for _, group in shards_of(bias)) != rows):
        place = f"{name.rpartition('.')[0]}.{partner}".lstrip(".")
        apart = [_vector(MatrixView(place, bias, None, (), 1, bias.numel(), is_vector=True))]
        view = replace(view, name=name, bias=None, n=view.n - 1)
    if cut:
        part = local(view.weight)
        biases = int(view.bias is not None)
        m = part.shape[row_dim] if rows else view.m
        n = (view.n - biases) // view.weight.shape[1 - row_dim] * part.shape[1 - row_dim] + biases
        over = tuple(group for _, group in cut)
        view = replace(view, m=m, n=n, whole=view, over=over, row_over=rows, column_over=columns)
    return [view, *apart]


def _vector(view: MatrixView) -> MatrixView:
    cut = tuple(group for _, group in shards_of(view.weight))
    if not cut:
        return view
    return replace(view, n=local(view.weight).numel(), whole=view, over=cut, column_over=cut)
