"""Numerical stability: how accurately a second-order preconditioned gradient can be had in low precision.

Inversion (KFAC) and eigendecomposition (EKFAC) of rounded factors, against the preconditioner of APO held and
applied as blocks, on matrices recorded in training and on synthetic ones. ``python -m benchmarks stability``.
"""

from benchmarks.stability.study import add_arguments, run

__all__ = ["add_arguments", "run"]
