"""Numerical stability: how accurate a second-order preconditioned gradient can be in low precision."""
