"""Putting things back whatever happens, and as if they had not been touched."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["set_version", "surely"]


def surely(restore: Callable[[], None]) -> None:
    """Run it to its end although Ctrl-C is pressed meanwhile. It must be safe to run twice."""
    try:
        restore()
    except BaseException:
        restore()
        raise


def set_version(tensor: Tensor, version: int) -> None:
    """Let a tensor that holds what it held count as not written to: graphs that saved it stay valid."""
    if not tensor.is_inference():
        torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))
