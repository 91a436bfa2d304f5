"""Every Python block of README and docs runs as written, and prints what the page says it prints.

The blocks of a page share one namespace, in order. A ``text`` block after a Python block that prints is its output.
"""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

from tests.docs.pages import PAGES, Block, blocks_of, name_of

RUN_ELSEWHERE = {"docs/trainers.md"}
"""By tests/integrations: it needs Lightning and transformers."""

NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")
FACTOR = 1.5
"""By how much a measured number may differ on another machine."""

WITH_CODE = [
    page
    for page in PAGES
    if name_of(page) not in RUN_ELSEWHERE and any(block.language == "python" for block in blocks_of(page))
]


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_blocks_run_and_print_what_the_page_says(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    scope: dict[str, object] = {"__name__": "__main__"}
    printed = ""
    for block, before in zip(blocks_of(page), [None, *blocks_of(page)], strict=False):
        if block.language == "python":
            printed = run(block, page, scope)
        elif block.language == "text" and before is not None and before.language == "python" and printed:
            assert_alike(printed, block.text, f"{name_of(page)}:{block.line}")


def run(block: Block, page: Path, scope: dict[str, object]) -> str:
    out = io.StringIO()
    code = "\n" * (block.line - 1) + block.text  # so that a traceback names the page's own line
    with contextlib.redirect_stdout(out):
        exec(compile(code, name_of(page), "exec"), scope)
    return out.getvalue()


def assert_alike(printed: str, shown: str, where: str) -> None:
    """Word for word, and number for number within a factor."""
    for got, want in zip(printed.splitlines(), shown.splitlines(), strict=True):
        assert NUMBER.sub("#", got.rstrip()) == NUMBER.sub("#", want.rstrip()), where
        for a, b in zip(map(float, NUMBER.findall(got)), map(float, NUMBER.findall(want)), strict=True):
            assert a == b or b / FACTOR < a < b * FACTOR, f"{where}: {got!r}, not {want!r}"


def test_no_page_lays_code_out_for_its_number_of_lines() -> None:
    for page in PAGES:
        for block in blocks_of(page):
            if block.language == "python":
                statements = [line for line in block.text.splitlines() if re.search(r";\s*\S", line.split("#")[0])]
                assert not statements, f"{name_of(page)}:{block.line}"
