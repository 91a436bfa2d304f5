"""What a run shows on the terminal: its console, tables and progress bars."""

from collections.abc import Container, Iterable, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn
from rich.table import Table

console = Console(soft_wrap=False)


def wrote(*paths: Path) -> None:
    for path in paths:
        console.print(f"wrote {escape(str(path))}", highlight=False, soft_wrap=True)


def table(
    title: str,
    columns: Iterable[str],
    rows: Iterable[Sequence[str]] = (),
    *,
    labels: Container[str] = (),
    text: Container[str] = (),
    caption: str = "",
) -> Table:
    """A table. Columns are aligned right, except the first and ``labels``, and never broken, except ``text``."""
    found = Table(
        title=title,
        caption=caption or None,
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title_justify="left",
        title_style="bold",
        caption_justify="left",
    )
    for place, name in enumerate(columns):
        if name in text:
            found.add_column(name, overflow="fold")
        else:
            found.add_column(name, justify="right" if place and name not in labels else "left", no_wrap=True)
    for row in rows:
        found.add_row(*row)
    return found


def progress() -> Progress:
    """A progress bar for anything that takes over two seconds; it leaves no trace when it is done."""
    columns = SpinnerColumn(), *Progress.get_default_columns(), TimeElapsedColumn()
    return Progress(*columns, console=console, transient=True)
