"""Benchmarks of apo_kernels and apo: throughput and numerical stability, each from one command.

``python -m benchmarks`` runs everything; ``python -m benchmarks --help`` lists the parts.
"""
