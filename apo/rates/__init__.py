"""Learned rates: their slopes, their steps, and schedulers beside them."""
