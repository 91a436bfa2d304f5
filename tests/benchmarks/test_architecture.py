"""Who may import whom, read from the source of every module."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FORBIDDEN = [
    ("apo_kernels", ("apo", "benchmarks")),
    ("apo", ("benchmarks",)),
    ("benchmarks/common", ("benchmarks.kernels", "benchmarks.paper")),
    ("benchmarks/kernels", ("benchmarks.paper", "apo")),
]


def imported(path: Path) -> set[str]:
    """Every module that a file imports, inside of functions too; ``from a import b`` counts as ``a`` and ``a.b``."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def below(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def graph() -> dict[str, set[str]]:
    """The modules of ``benchmarks``, each with those that it imports."""
    paths = sorted((ROOT / "benchmarks").rglob("*.py"))
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    return {name: (imported(path) & names.keys()) - {name} for name, path in names.items()}


@pytest.mark.parametrize(("folder", "forbidden"), FORBIDDEN, ids=lambda value: str(value))
def test_imports_go_one_way(folder: str, forbidden: tuple[str, ...]) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    wrong = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in imported(path)
        if any(below(name, package) for package in forbidden)
    }
    assert not wrong


def test_no_circles() -> None:
    """Leaves are taken away until nothing is left; what is left otherwise goes round."""
    left = graph()
    while leaves := {name for name, needs in left.items() if not needs & left.keys()}:
        left = {name: needs for name, needs in left.items() if name not in leaves}
    assert not left


def test_a_forbidden_import_would_be_seen(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("def f():\n    from benchmarks.paper import tasks\n")
    assert any(below(name, "benchmarks.paper") for name in imported(path))
    assert not below("apo_kernels.targets", "apo")
