"""``python -m benchmarks report``: tables, figures and ``report.md``. It reads results files and runs nothing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich.table
from rich.markup import escape

from benchmarks.common import markdown
from benchmarks.common.console import console
from benchmarks.paper.report.collect import Found, collect, described
from benchmarks.paper.report.comparison import COLUMNS, rows
from benchmarks.paper.report.curves import draw
from benchmarks.paper.report.figures import figures
from benchmarks.paper.report.searches import searches, sweep
from benchmarks.paper.report.tables import Table, table_2, table_3, table_4
from benchmarks.paper.training.search_files import COMMITTED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from",
        type=Path,
        action="append",
        metavar="DIR",
        dest="folders",
        help="folders that train and search wrote to; may be given more than once "
        "(default: those that come with the project, and --out)",
    )


def run(options: argparse.Namespace) -> list[Table]:
    """Show and write everything; the tables."""
    folders = options.folders or [COMMITTED, options.out]
    found = collect(folders)
    if not found:
        sys.exit(
            "python -m benchmarks report: --from must be folders that train has written to, but there is no run in "
            f"{', '.join(map(str, folders))}"
        )
    tables = [*(_compared(found[task]) for task in found), table_2(found), table_3(found), table_4(found)]
    swept = sweep(folders, "ill-conditioned")
    tables += [searches(folders), *([swept] if swept else [])]
    for table in tables:
        if table.rows:
            console.print(_shown(table))
    out = options.out / "report"
    pictures = [draw(runs, out / f"{task}.png") for task, runs in found.items()]
    pictures += figures(found, out)
    path = out / "report.md"
    path.write_text(_markdown(found, tables, [picture.name for picture in pictures]))
    console.print(f"wrote {path} and {len(pictures)} figures", soft_wrap=True)
    return tables


def _compared(runs: Sequence[dict[str, Any]]) -> Table:
    cells, caption = rows(runs)
    header = [runs[0]["metric_name"] if column == "metric" else column for column in COLUMNS]
    return Table(f"{runs[0]['task']}: {runs[0]['title']}", header, cells, caption)


def _shown(table: Table) -> rich.table.Table:
    shown = rich.table.Table(
        title=escape(table.title), title_justify="left", caption=escape(table.note), caption_justify="left"
    )
    for name in table.header:
        shown.add_column(escape(name))
    for row in table.rows:
        shown.add_row(*map(escape, row))
    return shown


def _markdown(found: Found, tables: Sequence[Table], pictures: Sequence[str]) -> str:
    parts = ["# The paper's tasks", "", "Written by `python -m benchmarks report` from results files.", ""]
    stand_ins = [
        f"- `{task}`: {runs[0]['data']}, in place of {runs[0]['stand_in']}"
        for task, runs in found.items()
        if runs[0]["stand_in"]
    ]
    if stand_ins:
        parts += ["Stand-ins, which are not the paper's data:", "", *stand_ins, ""]
    parts += ["What was run:", "", *(f"- `{task}`: {described(runs)}" for task, runs in found.items()), ""]
    for table in tables:
        if table.rows:
            note = [table.note, ""] if table.note else []
            parts += [f"## {table.title}", "", *note, markdown.table(table.header, table.rows), ""]
    parts += [f"![{name}]({name})" for name in pictures]
    return "\n".join(parts) + "\n"
