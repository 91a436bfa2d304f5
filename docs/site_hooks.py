"""For the site: what pages point to outside ``docs`` is taken in.

A page is also read on code hosts, so that it points to files by their place in the repository. Pictures and reports
under ``benchmarks/results``, CHANGELOG and CONTRIBUTING are part of the site; other files become plain text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
OUTSIDE = re.compile(r"(!?\[[^\]]*\])\(\.\./([^)#]+)(#[^)]*)?\)")
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
RESULTS = "benchmarks/results/"


def on_files(files: Files, config: Any) -> Files:
    for name, place in PAGES.items():
        files.append(File.generated(config, place, content=(ROOT / name).read_text()))
    for path in sorted((ROOT / RESULTS).rglob("*")):
        if path.suffix in (".png", ".md"):
            place = f"results/{path.relative_to(ROOT / RESULTS)}"
            files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_uri in PAGES.values():
        return re.sub(r"\]\(docs/", "](", markdown)
    return OUTSIDE.sub(_inside, markdown)


def _inside(link: re.Match[str]) -> str:
    text, path, heading = link[1], link[2], link[3] or ""
    if path in PAGES:
        return f"{text}({PAGES[path]}{heading})"
    if path.startswith(RESULTS) and path.endswith((".png", ".md")):
        return f"{text}({path.replace(RESULTS, 'results/', 1)})"
    return f"`{path}`"
