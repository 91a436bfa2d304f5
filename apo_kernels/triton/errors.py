"""Why a call isn't served by these kernels: what :mod:`apo_kernels.dispatch` tells apart. Imports no Triton."""

from __future__ import annotations

__all__ = ["Interrupted", "Unserved"]


class Unserved(ValueError):
    """Operands that these kernels don't take, in a form that others may. Nothing has been written."""


class Interrupted(RuntimeError):
    """A launch failed after some weights had been stepped: no other path may step them again."""
