"""Examples to train and test on, read from the files in which data sets are published."""

from benchmarks.paper.data.examples import Dataset, Examples, standardised
from benchmarks.paper.data.source import MissingData, Source

__all__ = ["Dataset", "Examples", "MissingData", "Source", "standardised"]
