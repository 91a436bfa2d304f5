"""The paper's tables and figures with our figures in them, from result files alone."""

from benchmarks.report.command import add_arguments, run

__all__ = ["add_arguments", "run"]
