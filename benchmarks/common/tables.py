"""Tables as Markdown, and those that are shown on the terminal as well."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import rich.table
from rich.markup import escape

from benchmarks.common import console


def short(value: float) -> str:
    """Three digits, or a whole number from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False) -> str:
    """A line for the header, a rule, a line for each row; ``numbers``: all but the first column to the right."""
    rule = ["---", *(["---:" if numbers else "---"] * (len(header) - 1))]
    lines = [header, rule, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


class Table(NamedTuple):
    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""

    def shown(self) -> rich.table.Table:
        header, rows = [*map(escape, self.header)], [[*map(escape, row)] for row in self.rows]
        return console.table(escape(self.title), header, rows, text=header[1:], caption=escape(self.note))

    def markdown(self) -> str:
        parts = [f"## {self.title}", *([self.note] if self.note else []), markdown(self.header, self.rows)]
        return "\n\n".join(parts) + "\n"
