"""A function of torch's replaced for a while, for the thread that asked for it alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from threading import RLock, get_ident
from typing import Any

__all__ = ["patched"]

_lock = RLock()
_patches: dict[tuple[int, str], _Patch] = {}


class _Patch:
    """What stands in the place of ``holder.name`` while any thread needs it, and what each thread wants instead."""

    def __init__(self, holder: Any, name: str) -> None:
        self.holder, self.name = holder, name
        self.true = true = vars(holder)[name]
        self.wanted: dict[int, list[Callable[..., Any]]] = {}
        wanted = self.wanted

        @wraps(true)
        def call(*args: Any, **kwargs: Any) -> Any:
            own = wanted.get(get_ident())
            return own[-1](true, *args, **kwargs) if own else true(*args, **kwargs)

        self.call = call
        setattr(holder, name, call)

    def remove(self) -> None:
        if vars(self.holder)[self.name] is self.call:
            setattr(self.holder, self.name, self.true)


@contextmanager
def patched(holder: Any, name: str, instead: Callable[..., Any]) -> Iterator[None]:
    """In here, and in this thread, ``holder.name(...)`` is ``instead(true, ...)``, with what stands there.

    Args:
        holder: a module or a class that has the function itself.
    """
    key, thread = (id(holder), name), get_ident()
    with _lock:
        patch = _patches.get(key)
        if patch is None:
            patch = _patches[key] = _Patch(holder, name)
        patch.wanted.setdefault(thread, []).append(instead)
    try:
        yield
    finally:
        with _lock:
            own = patch.wanted[thread]
            own.remove(instead)
            if not own:
                del patch.wanted[thread]
            if not patch.wanted:
                patch.remove()
                _patches.pop(key, None)
