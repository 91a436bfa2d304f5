"""The modules that a thread calls, whoever holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock, get_ident
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.module import register_module_forward_pre_hook

__all__ = ["calls_told"]

_lock = RLock()
_told: dict[int, list[Callable[[nn.Module], None]]] = {}
_handle: Any = None


def _on_call(module: nn.Module, _: Any) -> None:
    if not torch.compiler.is_compiling():
        for tell in _told.get(get_ident(), ()):
            tell(module)


@contextmanager
def calls_told(tell: Callable[[nn.Module], None]) -> Iterator[None]:
    """In here, ``tell(module)`` before each call of a module in this thread.

    The hook has one and the same number each time: compiled models ask for it, and would be compiled anew.
    """
    global _handle
    thread = get_ident()
    with _lock:
        _told.setdefault(thread, []).append(tell)
        if _handle is None:
            _handle = register_module_forward_pre_hook(_on_call)
        torch_module._global_forward_pre_hooks[_handle.id] = _on_call
    try:
        yield
    finally:
        with _lock:
            own = _told[thread]
            own.remove(tell)
            if not own:
                del _told[thread]
            if not _told:
                torch_module._global_forward_pre_hooks.pop(_handle.id, None)
