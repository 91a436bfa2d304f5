"""UCI regression: Protein, Parkinsons, Slice. Comma-separated files with a header; a fifth is kept to test on."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.paper.data.examples import Dataset, Examples, split, standardised
from benchmarks.paper.data.source import Source, find, open_text

ARCHIVE = "https://archive.ics.uci.edu/dataset/"


def read_table(path: Path, target: str, left_out: Sequence[str] = ()) -> tuple[Tensor, Tensor]:
    """``(features (N, d), targets (N, 1))`` float64 of a csv file, gzipped or not, whose first line names the columns.

    ``target`` is to be predicted; those ``left_out`` are no features.
    """
    with open_text(path) as file:
        lines = csv.reader(file)
        names = [name.strip() for name in next(lines, [])]
        for name in (target, *left_out):
            if name not in names:
                raise ValueError(f"{path} must have a column {name!r}, but has {', '.join(names) or 'none'}")
        rows: list[list[float]] = []
        for number, line in enumerate(lines, start=2):
            if not line:
                continue
            try:
                row = [float(value) for value in line]
            except ValueError as error:
                raise ValueError(f"line {number} of {path} must hold numbers, but: {error}") from None
            if len(row) != len(names):
                raise ValueError(f"line {number} of {path} must hold {len(names)} numbers, but holds {len(row)}")
            rows.append(row)
    if not rows:
        raise ValueError(f"{path} must hold rows of numbers, but holds a header alone")
    table = torch.tensor(rows, dtype=torch.float64)
    features = [i for i, name in enumerate(names) if name != target and name not in left_out]
    return table[:, features], table[:, [names.index(target)]]


def _source(name: str, file: str, number: int, rows: int, target: str, left_out: Sequence[str] = ()) -> Source:
    """``rows``: how many the published file has."""
    published = f"{ARCHIVE}{number}"

    def read(folder: Path) -> Dataset:
        inputs, targets = read_table(find(folder, ("uci", "."), file, published), target, left_out)
        chosen, held_out = split(len(inputs))
        x, test_x = standardised(inputs[chosen], inputs[held_out])
        t, test_t = standardised(targets[chosen], targets[held_out])
        train, test = Examples((x.float(),), t.float()), Examples((test_x.float(),), test_t.float())
        return Dataset(name, train, test, published=(rows * 4 // 5, rows - rows * 4 // 5))

    return Source(name, read, (file,), published)


PROTEIN = _source("UCI Protein", "CASP.csv", 265, 45_730, "RMSD")
# Of a person's voice: neither who it is nor the other score may be looked at.
PARKINSONS = _source("UCI Parkinsons", "parkinsons_updrs.data", 189, 5_875, "total_UPDRS", ("subject#", "motor_UPDRS"))
SLICE = _source("UCI Slice", "slice_localization_data.csv", 206, 53_500, "reference", ("patientId",))
