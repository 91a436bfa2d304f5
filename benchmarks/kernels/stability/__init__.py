"""Numerical stability: how accurate a second-order preconditioned gradient can be in low precision.

Inversion (KFAC) and eigendecomposition (EKFAC) of rounded factors are compared with APO's preconditioner, held and
applied as blocks, on matrices recorded in training and on synthetic ones.
"""
