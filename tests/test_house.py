"""Sizes that keep the code readable: of functions, of signatures, of files, of the benchmarks."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("apo_kernels", "apo", "benchmarks")

LONGEST_FUNCTION, LONGEST_KERNEL = 65, 90
MOST_PARAMETERS = 14
MOST_LINES, MOST_LINES_OF_TESTS = 640, 540  # of a file
MOST_LINES_OF_BENCHMARKS = 8_150

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(folder: str) -> Iterator[tuple[str, Function]]:
    """Every function of a folder, as ``path:Class.name``."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        for name, node in _named(ast.parse(path.read_text()), ""):
            yield f"{path.relative_to(ROOT)}:{name}", node


def _named(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, (ast.ClassDef, Function))
        if isinstance(child, Function):
            yield prefix + child.name, child
        yield from _named(child, f"{prefix}{child.name}." if named else prefix)


def is_kernel(function: Function) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def length(function: Function) -> int:
    """In lines, decorators and docstring included."""
    first = min(node.lineno for node in (function, *function.decorator_list))
    return (function.end_lineno or first) - first + 1


def parameters(function: Function) -> list[str]:
    """Without ``self`` and ``cls``."""
    own = function.args
    every = [*own.posonlyargs, *own.args, *own.kwonlyargs, *filter(None, (own.vararg, own.kwarg))]
    return [each.arg for each in every if each.arg not in ("self", "cls")]


def is_public(name: str) -> bool:
    parts = name.partition(":")[2].split(".")
    return all(not part.startswith("_") or part == "__init__" for part in parts)


def test_functions_are_short() -> None:
    """Kernels may be longer: what they share can't always be a function."""
    too_long = {
        name
        for folder in PACKAGES
        for name, function in functions(folder)
        if length(function) > (LONGEST_KERNEL if is_kernel(function) else LONGEST_FUNCTION)
    }
    assert not too_long


def test_signatures_are_short() -> None:
    """Kernels aside: Triton passes a table's columns one by one."""
    too_many = {
        name
        for folder in PACKAGES
        for name, function in functions(folder)
        if is_public(name) and not is_kernel(function) and len(parameters(function)) > MOST_PARAMETERS
    }
    assert not too_many


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


@pytest.mark.parametrize(
    ("folder", "most"), [*((package, MOST_LINES) for package in PACKAGES), ("tests", MOST_LINES_OF_TESTS)]
)
def test_files_are_short(folder: str, most: int) -> None:
    """A file holds one idea."""
    files = sorted((ROOT / folder).rglob("*.py"))
    assert len(files) > 20
    assert not {str(path.relative_to(ROOT)): lines(path) for path in files if lines(path) > most}


def test_benchmarks_stay_smaller_than_their_limit() -> None:
    total = sum(lines(path) for path in (ROOT / "benchmarks").rglob("*.py"))
    assert total <= MOST_LINES_OF_BENCHMARKS


def test_what_is_too_long_would_be_seen() -> None:
    node = ast.parse("class C:\n    def f(self, a, *b, c, **d):\n        def g(): pass\n")
    found = dict(_named(node, ""))
    assert list(found) == ["C.f", "C.f.g"]
    assert parameters(found["C.f"]) == ["a", "c", "b", "d"]
    assert is_public("x.py:C.__init__")
    assert not is_public("x.py:C._f")
