"""What a captured CUDA graph reads is kept as long as the graph: the tables of plans, and the host's copies of them.

A graph repeats the copies and launches that it saw, at the addresses that it saw. CUDA (HIP alike) lets a graph own an
object and calls back when the last graph that owns it is gone. The callback here is the C library's ``sem_post`` on a
semaphore of ours: it needs neither Python nor the device, so it may run on any thread at any time. What belongs to a
semaphore that was posted is let go at the next capture, or the next plan that is made.

Where the driver can't do it, what graphs read is kept for good.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch

__all__ = ["keep_for_graph", "kept_for_graphs", "release_of_gone_graphs"]

_NO_DESTRUCTOR_SYNC = 1
_MOVE = 1
_SEMAPHORE_BYTES = 64  # a sem_t has 32 on Linux

_kept: list[tuple[Any, tuple[object, ...]]] = []
"""Semaphores (None where the driver can't call back) and what is kept until they are posted."""


def keep_for_graph(stream: int, *things: object) -> None:
    """Keep ``things`` as long as a graph lives that the stream's work is captured into, now."""
    release_of_gone_graphs()
    semaphore = ctypes.create_string_buffer(_SEMAPHORE_BYTES)
    owned = _c_library().sem_init(semaphore, 0, 0) == 0 and _give_to_graph(stream, semaphore)
    _kept.append((semaphore if owned else None, things))


def kept_for_graphs() -> list[object]:
    """Everything that is kept."""
    return [thing for _, things in _kept for thing in things]


def release_of_gone_graphs() -> None:
    """Let go what the graphs that are gone have owned."""
    _kept[:] = [(semaphore, things) for semaphore, things in _kept if semaphore is None or not _posted(semaphore)]


def _posted(semaphore: Any) -> bool:
    value = ctypes.c_int()
    _c_library().sem_getvalue(semaphore, ctypes.byref(value))
    return value.value > 0


def _give_to_graph(stream: int, semaphore: Any) -> bool:
    """Have the semaphore posted when the graph that is being captured is gone; False where that can't be."""
    if (driver := _driver()) is None:
        return False
    capture_info, create, retain = driver
    status, graph, owner = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
    if capture_info(ctypes.c_void_p(stream), ctypes.byref(status), None, ctypes.byref(graph), None, None) or not graph:
        return False
    post = ctypes.cast(_c_library().sem_post, ctypes.c_void_p)
    if create(ctypes.byref(owner), semaphore, post, ctypes.c_uint(1), ctypes.c_uint(_NO_DESTRUCTOR_SYNC)):
        return False
    return not retain(graph, owner, ctypes.c_uint(1), ctypes.c_uint(_MOVE))


@cache
def _c_library() -> Any:
    return ctypes.CDLL(None)


@cache
def _driver() -> tuple[Any, Any, Any] | None:
    """The driver's functions that ask for the graph of a capture, make an object for it, and give it away."""
    if torch.version.hip is not None:
        library = "libamdhip64.so"
        names = ("hipStreamGetCaptureInfo_v2", "hipUserObjectCreate", "hipGraphRetainUserObject")
    else:
        library, names = "libcuda.so.1", ("cuStreamGetCaptureInfo_v2", "cuUserObjectCreate", "cuGraphRetainUserObject")
    try:
        loaded = ctypes.CDLL(library)
        capture_info, create, retain = (getattr(loaded, name) for name in names)
    except (OSError, AttributeError):
        return None
    return capture_info, create, retain
