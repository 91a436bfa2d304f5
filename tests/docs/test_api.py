"""The API page shows every public name of the packages."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator

import pytest
import yaml

from tests.docs.pages import DOCS

SHOWN = re.compile(r"^::: ([\w.]+)\n((?: +.*\n|\n(?= ))*)", re.MULTILINE)


def shown(page: str) -> Iterator[str]:
    """What the page shows, by full names; ``module.*`` where it shows all of a module."""
    for name, options in SHOWN.findall(page + "\n"):
        members = ((yaml.safe_load(options) or {}).get("options") or {}).get("members", True)
        yield name
        if members is True:
            yield f"{name}.*"
        elif members:
            yield from (f"{name}.{member}" for member in members)


def missing(package: str, page: str) -> set[str]:
    """Public names that the page shows neither as the package's nor as those of the module that defines them."""
    module, found = importlib.import_module(package), set(shown(page))
    names = set()
    for name in module.__all__:
        value = getattr(module, name)
        defined = getattr(value, "__module__", package)
        if found.isdisjoint((f"{package}.{name}", f"{defined}.{name}", f"{defined}.*")):
            names.add(name)
    return names - {"__version__"}  # nothing to say of it


@pytest.mark.parametrize("package", ["apo", "apo_kernels"])
def test_every_public_name_is_shown(package: str) -> None:
    assert not missing(package, (DOCS / "api.md").read_text())


def test_a_name_that_is_left_out_would_be_seen() -> None:
    option = "\n    options:\n      members:"
    page = f"::: apo.APO{option} [step]\n\n::: apo.discrepancy{option}\n        - KL\n"
    assert {*shown(page)} == {"apo.APO", "apo.APO.step", "apo.discrepancy", "apo.discrepancy.KL"}
    assert {"AdaptiveLR", "SquaredError", "proximal"} <= missing("apo", page)
    assert missing("apo", page).isdisjoint({"APO", "KL"})
    assert missing("apo", f"{page}\n::: apo.discrepancy\n").isdisjoint({"SquaredError", "GaussianKL"})
    assert "KL" in missing("apo", f"::: apo.discrepancy{option} false\n")
