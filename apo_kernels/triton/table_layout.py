"""The tables that kernels read: what each row and column holds. Shared by the host and the device.

``operands`` ``[layers, ROLES, COLUMNS]`` (int64) says where the matrices of a layer lie; it is all that changes
from step to step. ``layers`` ``[layers, LAYER_FIELDS]`` (int64) holds their shapes. ``problems``
``[problems, PROBLEM_FIELDS]`` (int64) and ``tiles`` ``[programs, 4]`` (int32) cut the work of one launch.
"""

from __future__ import annotations

from enum import IntEnum

__all__ = [
    "ALIGN",
    "Column",
    "Kind",
    "LayerField",
    "ModelField",
    "ModelRole",
    "Number",
    "PackField",
    "ProblemField",
    "Role",
    "row_of",
]

ALIGN = 8
"""Sides of packed and workspace matrices are multiples of this many elements: 16 bytes of 16-bit numbers."""


def row_of(fields: type[IntEnum], **values: int) -> tuple[int, ...]:
    """A row of a table: the values by their fields' names, 0 for the others."""
    row = [0] * len(fields)
    for name, value in values.items():
        row[fields[name]] = value
    return tuple(row)


class Role(IntEnum):
    """What a matrix is to its layer. ``X + 1`` is to ``V`` what ``X`` is to ``G``, for the first five pairs."""

    G = 0
    V = 1
    U = 2  # GA, a workspace of the grouped GEMM
    UV = 3
    T = 4  # S²⊙M
    TV = 5
    W = 6  # BT
    WV = 7
    A = 8
    B = 9
    S = 10
    OUT = 11  # P(G), the weight θ, or dG
    MOMENTUM = 12
    KEEP_U = 13
    KEEP_M = 14
    KEEP_W = 15
    DA = 16
    DB = 17
    DS = 18


class Column(IntEnum):
    """Where a matrix lies: its address, then strides in elements."""

    ADDRESS = 0
    ROW = 1
    COL = 2
    SQUARE = 3  # from one square of a stack to the next
    PART = 4  # from one part of a sum to the next


class LayerField(IntEnum):
    """A layer's shape: ``m × n``; ``side_B`` is the side of one square of ``B``, ``group_B`` how many of them lie on
    the diagonal of one tile (or of one packed square), ``count_B`` how many there are. A full block is one square."""

    M = 0
    N = 1
    SIDE_B = 2
    SIDE_A = 3
    GROUP_B = 4
    GROUP_A = 5
    COUNT_B = 6
    COUNT_A = 7
    AMAX_G = 8  # first of the partial maxima of |G|, and how many there are; so for V and S
    AMAX_G_COUNT = 9
    AMAX_V = 10
    AMAX_V_COUNT = 11
    AMAX_S = 12
    AMAX_S_COUNT = 13


class ProblemField(IntEnum):
    """One matrix product of a launch of the grouped GEMM. Sides in units of ``ALIGN``."""

    LAYER = 0
    KIND = 1
    ROWS = 2
    COLS = 3
    DEPTH = 4
    ROW0 = 5  # where its part of an m × n matrix begins, in units of ALIGN
    COL0 = 6
    SQUARE = 7  # which square of A or B


class Kind(IntEnum):
    """Which of the products of its launch a problem is."""

    FOR_G = 0
    FOR_V = 1
    BLOCK = 2  # a derivative of A or of B


class PackField(IntEnum):
    """One tile of one operand that is packed: what :func:`apo_kernels.triton.pack.pack` reads of ``jobs`` (int64)."""

    SOURCE = 0  # index of its address
    CODE = 1  # its dtype: 0, 1 or 2 for float32, float16 and bfloat16
    DESTINATION = 2  # index of its address, or 0
    ROW = 3
    COL = 4
    SQUARE = 5
    SIDE = 6
    FIRST = 7  # square of the stack with which the packed square begins
    ROW0 = 8  # the tile's corner in the packed square
    COL0 = 9
    ROWS = 10  # true sides of the packed square
    COLS = 11
    PITCH = 12  # padded side


class ModelRole(IntEnum):
    """What a matrix is to its layer in the kernels of a whole model; in :class:`Role`'s place, and as many at most.

    Of those that the kernels have in memory of their own, the table says offsets in elements, not addresses.
    """

    G = 0  # or the cotangent
    G_BIAS = 1
    THETA = 2
    THETA_BIAS = 3
    A = 4
    B = 5
    S = 6
    MOMENTUM = 7
    P = 8  # P(G); from here on in memory of their own
    M = 9
    DA = 10
    DB = 11
    DS = 12
    SIZE_A = 13
    SIZE_B = 14
    SIZE_S = 15


class ModelField(IntEnum):
    """What a layer's shape has besides the fields of :class:`LayerField`, in place of those of the grouped GEMM."""

    N1 = 8  # the columns of its weight: n, or n - 1 where it has a bias


class Number(IntEnum):
    """The numbers of each layer (float32), one row; the last row of the table has those of the whole call."""

    RATE = 0  # lr, or the length of a trial's step
    MOMENTUM = 1
    SHRINK = 2
    SHARE = 3
