"""The front door: ``python -m benchmarks [PART] [options]``. Without a part, the microbenchmarks."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.console import console

PARTS = {
    "environment": "machine, versions and commit that figures are taken with",
    "throughput": "milliseconds, GFLOP/s and ratios on the layers of named models",
    "stability": "errors and breakdowns in low precision, against KFAC's inverse",
    "overhead": "what a training step costs with each front end, over plain momentum SGD",
    "learning_rates": "learned against fixed learning rates on digits",
    "train": "the paper's tasks with APO and with strong baselines: table, figure and curves",
    "search": "hyperparameters of every optimizer on a task, by as many trials for each",
    "report": "the paper's Figures 3, 4, 5 and Tables 2, 3, 4 with our figures, from result files",
    "studies": "ways of learning the preconditioner, on four small tasks",
    "figure1": "Figure 1 of the paper, from the exact proximal point",
    "targets": "registers, spills and shared memory of every kernel, compiled for GPUs that need not be here",
    "host": "what a call of the kernels costs the host, with the launcher replaced by nothing",
    "tune": "time configurations of the kernels on the GPU at hand, and keep the best",
}
DEFAULT = ("environment", "throughput", "stability")


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    options = _parser(given).parse_args(given)
    _check_device(options.device)
    if options.part is None:
        _add_defaults(options)
    for name in [options.part] if options.part else DEFAULT:
        console.rule(f"[bold]{name}")
        importlib.import_module(f"benchmarks.{name}").run(options)
    return 0


def _parser(given: Sequence[str]) -> argparse.ArgumentParser:
    """For these arguments: a part that isn't among them isn't imported, which takes seconds."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--quick", action="store_true", help="small models, few rounds: under three minutes in all")
    common.add_argument("--device", default="cpu", help="cpu, cuda, … (default: %(default)s)")
    common.add_argument("--out", type=Path, default=Path("results"), help="folder to write to (default: %(default)s)")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, parents=[common], allow_abbrev=False
    )
    parts = parser.add_subparsers(dest="part", metavar="PART")
    for name, text in PARTS.items():
        part = parts.add_parser(name, help=text, description=text, parents=[common])
        if name in given:
            _add_part_arguments(name, part)
    return parser


def _add_part_arguments(name: str, parser: argparse.ArgumentParser) -> None:
    importlib.import_module(f"benchmarks.{name}").add_arguments(parser)


def _add_defaults(options: argparse.Namespace) -> None:
    """Without a part, the own options of those that run stand at their defaults."""
    for name in DEFAULT:
        own = argparse.ArgumentParser(add_help=False)
        _add_part_arguments(name, own)
        own.parse_args([], options)


def _check_device(device: Any) -> None:
    try:
        torch.empty(0, device=device)
        if torch.device(device).type == "cuda":
            torch.cuda.set_device(torch.empty(0, device=device).device)  # what timing waits for
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        sys.exit(f"python -m benchmarks: --device must be one that torch can use here, but {device!r} is not: {reason}")


if __name__ == "__main__":
    sys.exit(main())
