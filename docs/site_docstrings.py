"""For the site: docstrings are written for Sphinx's roles and tables, and the site reads Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:py:)?(?:class|meth|func|mod|attr|data|obj):`(~?)([^`]+)`")
LITERAL = re.compile(r" ?(?<!:)::$", re.MULTILINE)
TABLE = re.compile(r"^ *={3,}(?: +=+)+ *\n(?:.*\S.*(?:\n|$))+", re.MULTILINE)


class Markdown(griffe.Extension):
    """Turns the few pieces of reStructuredText that the docstrings use into Markdown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)


def to_markdown(text: str) -> str:
    text = TABLE.sub(_as_code, text)
    text = ROLE.sub(lambda m: f"`{m[2].rpartition('.')[2] if m[1] else m[2]}`", text)
    text = LITERAL.sub(":", text)
    return re.sub(r"(?<!`)``(?!`)", "`", text)


def _as_code(table: re.Match[str]) -> str:
    """A table between lines of ``=`` as a block of code, which keeps its columns."""
    lines = []
    for line in table[0].rstrip().splitlines():
        if set(line) <= set("= "):
            lines.append(line.replace("=", "-"))
        else:  # quotes go, and blanks at the end of the cell make up for them
            lines.append(re.sub(r"``(.+?)``(.*?)(?=  |$)", r"\1\2    ", line).rstrip())
    return "\n".join(["```text", *lines, "```", ""])
