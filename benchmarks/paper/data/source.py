"""Where a data set comes from: which files it needs, where they are published, how they are read."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from benchmarks.paper.data.examples import Dataset


class MissingData(FileNotFoundError):
    """A file that a task needs isn't there. The message names it and where it is published."""


@dataclass(frozen=True)
class Source:
    """A data set.

    Args:
        read: the reader. It gets the folder of ``--data``, which data that need no file ignore.
    """

    name: str  # as people call it
    read: Callable[[Path], Dataset]
    files: Sequence[str] = ()  # what the folder must hold, for the error without ``--data``
    published: str = ""  # where these files are
    stand_in: str = ""  # for what this stands in, where it is bundled data in place of the paper's
    without: Source | None = None  # what is read in its place without a folder

    @property
    def label(self) -> str:
        """The name, with what it stands in for."""
        return f"{self.name}, a stand-in for {self.stand_in}" if self.stand_in else self.name

    def load(self, folder: Path | None) -> Dataset:
        """Read it; :class:`MissingData` where there is no folder, or a file is missing in it."""
        if self.without is not None and folder is None:
            return self.without.load(None)
        if self.files and folder is None:
            raise MissingData(
                f"{self.name} is read from files: give the folder that holds {', '.join(self.files)} by --data DIR. "
                f"They are published at {self.published}"
            )
        if folder is not None and self.files and not folder.is_dir():
            raise MissingData(f"--data must be a folder, but {folder} is not")
        return replace(self.read(folder or Path()), name=self.label)


def find(folder: Path, places: Sequence[str], name: str, published: str) -> Path:
    """``name`` or ``name.gz`` in the first of ``places`` below ``folder``; :class:`MissingData` where none has it."""
    for place in places:
        for candidate in (folder / place / name, folder / place / f"{name}.gz"):
            if candidate.is_file():
                return candidate
    looked = ", ".join(str(folder / place) for place in places)
    raise MissingData(f"{name} (or {name}.gz) is missing: looked in {looked}. It is published at {published}")


def open_text(path: Path) -> TextIO:
    """A text file in UTF-8, gzipped or not, with its line ends as they are."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")
