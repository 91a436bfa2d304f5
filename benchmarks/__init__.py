"""Benchmarks of ``apo_kernels`` and ``apo``, run from a checkout: ``python -m benchmarks --help`` lists the commands.

``kernels`` measures the backend, ``paper`` trains the paper's tasks, ``common`` holds what both use. ``kernels``
imports nothing from ``paper``, and ``common`` nothing from either.
"""
