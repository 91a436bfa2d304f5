"""``python -m benchmarks report``: tables, figures and ``report.md``. It reads results files and runs nothing."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.console import console, wrote
from benchmarks.common.tables import Table
from benchmarks.paper.report.comparison import comparison
from benchmarks.paper.report.curves import draw
from benchmarks.paper.report.figures import figures
from benchmarks.paper.report.runs import Found, collect, described
from benchmarks.paper.report.searches import searches
from benchmarks.paper.report.tables import table_2, table_3, table_4
from benchmarks.paper.training.search_files import COMMITTED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = "folders that train and search wrote to (default: those that come with the project, and --out); repeatable"
    parser.add_argument("--from", type=Path, action="append", metavar="DIR", dest="folders", help=text)


def run(options: argparse.Namespace) -> list[Table]:
    """Show and write everything; the tables."""
    folders = options.folders or [COMMITTED, options.out]
    found = collect(folders)
    if not found:
        where = ", ".join(map(str, folders))
        sys.exit(f"python -m benchmarks report: --from must be folders that train wrote to; there is no run in {where}")
    made = [*map(comparison, found.values()), table_2(found), table_3(found), table_4(found), searches(folders)]
    tables = [table for table in made if table.rows]
    for table in tables:
        console.print(table.shown())
    out = options.out / "report"
    pictures = [*(draw(runs, out / f"{task}.png") for task, runs in found.items()), *figures(found, out)]
    path = out / "report.md"
    path.write_text(_markdown(found, tables, [picture.name for picture in pictures]))
    wrote(path, *pictures)
    return tables


def _markdown(found: Found, tables: Sequence[Table], pictures: Sequence[str]) -> str:
    parts = ["# The paper's tasks", "", "Written by `python -m benchmarks report` from results files.", ""]
    absent = {task: runs[0] for task, runs in found.items() if runs[0]["stand_in"]}
    if absent:
        stand_ins = [f"- `{task}`: {run['data']}, in place of {run['stand_in']}" for task, run in absent.items()]
        parts += ["Stand-ins, which are not the paper's data:", "", *stand_ins, ""]
    parts += ["What was run:", "", *(f"- `{task}`: {described(runs)}" for task, runs in found.items()), ""]
    parts += [table.markdown() for table in tables]
    parts += [f"![{name}]({name})" for name in pictures]
    return "\n".join(parts) + "\n"
