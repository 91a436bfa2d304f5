"""Who may import whom, and by which names, read from the source of every module."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FORBIDDEN = [
    ("apo_kernels", ("apo", "benchmarks")),
    ("apo", ("benchmarks",)),
    ("benchmarks/common", ("benchmarks.kernels", "benchmarks.paper")),
    ("benchmarks/kernels", ("benchmarks.paper", "apo")),
]

PUBLIC = {
    "apo": ("apo", "apo.proximal", "apo.reference"),
    "apo_kernels": ("apo_kernels", "apo_kernels.reference", "apo_kernels.targets"),
}
"""A package's modules that others may use, each by the names in its ``__all__``."""

INSIDE = {
    "benchmarks/kernels/launch_costs.py": {"apo_kernels.triton.tools.cost_model"},
    "benchmarks/kernels/host.py": {"apo_kernels.dispatch", "apo_kernels.triton"},
    "benchmarks/kernels/targets.py": {"apo_kernels.triton.tools.compile_ahead"},
    "benchmarks/kernels/tune.py": {"apo_kernels.triton", "apo_kernels.triton.tools.compile_ahead"},
}
"""Files that look at the Triton kernels from inside, because that is what they measure."""


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


def used(path: Path) -> Iterator[str]:
    """Every name of another module that a file uses: by ``from a import b``, as ``a.b``, or in ``patch("a.b", …)``."""
    tree = ast.parse(path.read_text())
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name.partition(".")[0]: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            yield f"{modules[node.value.id]}.{node.attr}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "patch":
            yield from (each.value for each in node.args[:1] if isinstance(each, ast.Constant))


def is_public(name: str, package: str) -> bool:
    """Whether it is a public module, or what one exports. Nothing else is promised to stay."""
    if name in (*PUBLIC[package], f"{package}.__version__"):
        return True
    module, _, last = name.rpartition(".")
    return module in PUBLIC[package] and last in importlib.import_module(module).__all__


def below(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def graph(root: Path, package: str) -> dict[str, set[str]]:
    """The modules of a package, each with those of them that it imports.

    ``from apo import checks`` imports ``apo.checks``, not what ``apo`` gathers from its modules: the package itself
    counts only where a name is taken that isn't a module.
    """
    paths = sorted((root / package).rglob("*.py"))
    names = {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    return {name: needed(path, names.keys()) - {name} for name, path in names.items()}


def needed(path: Path, modules: Collection[str]) -> set[str]:
    """Those of ``modules`` that a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            each = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in modules else str(node.module) for name in each}
    return found & set(modules)


def circle(modules: dict[str, set[str]]) -> dict[str, set[str]]:
    """Leaves are taken away until nothing is left; what is left otherwise goes round."""
    left = modules
    while leaves := {name for name, needs in left.items() if not needs & left.keys()}:
        left = {name: needs & left.keys() for name, needs in left.items() if name not in leaves}
    return left


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


@pytest.mark.parametrize(
    ("folder", "package"), [("benchmarks", "apo"), ("benchmarks", "apo_kernels"), ("apo", "apo_kernels")]
)
def test_packages_are_used_by_their_public_names(folder: str, package: str) -> None:
    wrong = {
        (file, name)
        for path in sorted((ROOT / folder).rglob("*.py"))
        for file in [str(path.relative_to(ROOT))]
        for name in used(path)
        if below(name, package)
        and not is_public(name, package)
        and not any(below(name, module) for module in INSIDE.get(file, ()))
    }
    assert not wrong


@pytest.mark.parametrize("package", ["apo_kernels", "apo", "benchmarks"])
def test_no_circles(package: str) -> None:
    modules = graph(ROOT, package)
    assert len(modules) > 20
    assert not circle(modules)


def test_a_circle_would_be_seen(tmp_path: Path) -> None:
    package = tmp_path / "p"
    package.mkdir()
    files = {"__init__": "from p.a import f", "a": "from p import b", "b": "", "c": "import p.a"}
    for name, text in files.items():
        (package / f"{name}.py").write_text(text)
    assert graph(tmp_path, "p") == {"p": {"p.a"}, "p.a": {"p.b"}, "p.b": set(), "p.c": {"p.a"}}
    assert not circle(graph(tmp_path, "p"))
    for within in ("from p import c", "from p.c import g", "def g():\n    import p.c", "from p import f"):
        (package / "b.py").write_text(within)
        assert {"p.a", "p.b"} <= circle(graph(tmp_path, "p")).keys()


def test_a_forbidden_import_would_be_seen(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("def f():\n    from benchmarks.paper import tasks\n")
    assert any(below(name, "benchmarks.paper") for name in imported(path))
    assert not below("apo_kernels.targets", "apo")


def test_an_inner_name_would_be_seen(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("import apo\nimport apo_kernels as ak\nfrom apo.arena import Arena\nak.checks, apo.APO\n")
    inner = {name for name in used(path) if not is_public(name, name.partition(".")[0])}
    assert inner == {"apo_kernels.checks", "apo.arena.Arena"}
