"""UCI regression: Protein, Parkinsons, Slice. Tables with a header; a fifth is kept to test on."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.paper.data.examples import Dataset, Examples, split, standardised
from benchmarks.paper.data.source import Source, find, open_text

ARCHIVE = "https://archive.ics.uci.edu/dataset/"


def read_table(path: Path, target: str, left_out: Sequence[str] = ()) -> tuple[Tensor, Tensor]:
    """``(features (N, d), targets (N, 1))`` float64 of a file, gzipped or not, with column names above.

    Columns are parted by commas, semicolons or tabs.
    """
    with open_text(path) as file:
        header = file.readline()
        separator = max(",;\t", key=header.count)
        names = [name.strip() for name in header.split(separator)]
        for name in (target, *left_out):
            if name not in names:
                raise ValueError(f"{path} must have a column {name!r}, but has {', '.join(names)}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of no rows, which is an error here
            try:
                rows = np.loadtxt(file, delimiter=separator, ndmin=2)
            except ValueError as error:
                raise ValueError(f"{path} must hold rows of numbers below its header, but: {error}") from None
    if rows.shape[1] != len(names):
        raise ValueError(f"{path} must hold rows of {len(names)} numbers, but holds {len(rows)} of {rows.shape[1]}")
    table = torch.from_numpy(rows)
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
