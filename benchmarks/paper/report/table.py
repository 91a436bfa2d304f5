"""A table that is shown on the terminal and written as Markdown."""

from __future__ import annotations

from typing import NamedTuple

import rich.table
from rich.markup import escape

from benchmarks.common import console, markdown


class Table(NamedTuple):
    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""

    def shown(self) -> rich.table.Table:
        header, rows = [*map(escape, self.header)], [[*map(escape, row)] for row in self.rows]
        return console.table(escape(self.title), header, rows, text=header, caption=escape(self.note))

    def markdown(self) -> str:
        parts = [f"## {self.title}", *([self.note] if self.note else []), markdown.table(self.header, self.rows)]
        return "\n\n".join(parts) + "\n"
