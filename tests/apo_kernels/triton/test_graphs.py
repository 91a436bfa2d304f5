"""What graphs read is let go with them: with a driver that isn't there, through the C library that is."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from apo_kernels.triton import graphs


@dataclass
class Driver:
    """Graphs by their handles, and what each owns: the callback and its argument."""

    graph: int = 7
    owned: dict[int, list[tuple[Any, Any]]] = field(default_factory=dict)
    objects: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    error: int = 0

    @property
    def functions(self) -> tuple[Any, Any, Any]:
        return self.capture_info, self.create, self.retain

    def capture_info(self, _stream: Any, _status: Any, _id: Any, graph: Any, _dependencies: Any, _count: Any) -> int:
        graph._obj.value = self.graph
        return 0

    def create(self, made: Any, argument: Any, callback: Any, count: Any, flags: Any) -> int:
        assert (count.value, flags.value) == (1, 1)
        made._obj.value = len(self.objects) + 1
        self.objects[made._obj.value] = callback, argument
        return self.error

    def retain(self, graph: Any, made: Any, count: Any, flags: Any) -> int:
        assert (count.value, flags.value) == (1, 1)
        self.owned.setdefault(graph.value, []).append(self.objects[made.value])
        return 0

    def destroy(self, graph: int) -> None:
        for callback, argument in self.owned.pop(graph):
            ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(callback.value)(ctypes.addressof(argument))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    found = Driver()
    monkeypatch.setattr(graphs, "_driver", lambda: found.functions)
    monkeypatch.setattr(graphs, "_kept", [])
    return found


def test_what_a_graph_reads_is_let_go_with_it(driver: Driver) -> None:
    first, second = object(), object()
    graphs.keep_for_graph(0, first)
    driver.graph = 8
    graphs.keep_for_graph(0, second)
    graphs.release_of_gone_graphs()
    assert graphs.kept_for_graphs() == [first, second]
    driver.destroy(7)
    graphs.release_of_gone_graphs()
    assert graphs.kept_for_graphs() == [second]
    driver.destroy(8)
    graphs.keep_for_graph(0, first)
    assert graphs.kept_for_graphs() == [first], "a capture lets go too"


def test_what_a_driver_cannot_watch_is_kept(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    thing = object()
    driver.error = 801  # not supported
    graphs.keep_for_graph(0, thing)
    monkeypatch.setattr(graphs, "_driver", lambda: None)
    graphs.keep_for_graph(0, thing)
    graphs.release_of_gone_graphs()
    assert graphs.kept_for_graphs() == [thing, thing]
