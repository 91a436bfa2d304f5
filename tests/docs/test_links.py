"""What pages point to is there: files, headings, commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, PAGES, ROOT, blocks_of, name_of

LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links(page: Path) -> None:
    for link in LINK.findall(without_code(page)):
        if link.startswith(("https://", "mailto:")):
            continue
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)} points to {link}, which isn't there"
        if heading and target.suffix == ".md":
            assert heading in headings_of(target), f"{name_of(page)} points to {link}, which has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands(page: Path) -> None:
    """``make`` targets are in the Makefile, and scripts and modules that are run are there."""
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for block in blocks_of(page):
        if block.language != "bash":
            continue
        for line in block.text.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["make"]:
                assert words[1] in targets, f"{name_of(page)}: {line}"
            if words[:1] == ["python"]:
                script = words[2].replace(".", "/") if words[1] == "-m" else words[1]
                assert any((ROOT / f"{script}{end}").exists() for end in ("", ".py")), f"{name_of(page)}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_that_are_named(page: Path) -> None:
    for path in re.findall(r"`((?:apo|apo_kernels|benchmarks|docs|tests|\.ci)/[\w./-]*)`", page.read_text()):
        assert (ROOT / path).exists(), f"{name_of(page)} names {path}, which isn't there"


def test_readme_is_short_and_the_two_commands_stay() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert "make bench" in text
    assert "make test" in text
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_every_page_and_example_is_pointed_to() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in DOCS.glob("*.md"):
        assert page.name in navigation
    examples = (DOCS / "examples.md").read_text()
    for script in (DOCS / "examples").glob("*.py"):
        assert f"examples/{script.name}" in examples


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def headings_of(page: Path) -> set[str]:
    """As Markdown renderers name them."""
    lines = re.findall(r"^#+ (.+)$", without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).strip().replace(" ", "-") for line in lines}
