"""The command line: ``python -m benchmarks [COMMAND] [options]``. Without a command, the microbenchmarks."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.common.console import console

COMMANDS: dict[str, tuple[str, str]] = {
    "environment": ("common.environment", "machine, versions and commit that figures are taken with"),
    "throughput": ("kernels.throughput.command", "milliseconds, GFLOP/s and ratios on the layers of named models"),
    "stability": ("kernels.stability.command", "errors and breakdowns in low precision, against KFAC's inverse"),
    "overhead": ("paper.overhead", "what a training step costs with each front end, over plain momentum SGD"),
    "learning_rates": ("paper.learning_rates", "learned against fixed learning rates on digits"),
    "train": ("paper.train", "the paper's tasks with APO and with strong baselines: table, figure and curves"),
    "search": ("paper.search", "hyperparameters of every optimizer on a task, by as many trials for each"),
    "report": ("paper.report.command", "the paper's Figures 3 to 5 and Tables 2 to 4 with ours, from results files"),
    "peers": ("paper.peers", "APO and AdaptiveLR at their defaults beside AdamW, SGDm, Muon, SOAP and schedule-free"),
    "studies": ("paper.studies.command", "ways of learning the preconditioner, on four small tasks"),
    "figure1": ("paper.figure1", "Figure 1 of the paper, from the exact proximal point"),
    "targets": ("kernels.targets", "registers, spills and shared memory of every kernel, compiled for absent GPUs"),
    "host": ("kernels.host", "what a call of the kernels costs the host, with the launcher replaced by nothing"),
    "tune": ("kernels.tune", "time configurations of the kernels on the GPU at hand, and keep the best"),
}
"""Each command's module and what it shows. The module has ``add_arguments(parser)`` and ``run(options)``."""

DEFAULT = ("environment", "throughput", "stability")


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    options = _parser(given).parse_args(given)
    _check_device(options.device)
    if options.command is None:
        _add_defaults(options)
    for name in [options.command] if options.command else DEFAULT:
        console.rule(f"[bold]{name}")
        module_of(name).run(options)
    return 0


def module_of(command: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.{COMMANDS[command][0]}")


def _parser(given: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for these arguments. Only the module of a command among them is imported: each takes seconds."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--quick", action="store_true", help="small models, few rounds: under three minutes in all")
    common.add_argument("--device", default="cpu", help="cpu, cuda, … (default: %(default)s)")
    common.add_argument("--out", type=Path, default=Path("results"), help="folder to write to (default: %(default)s)")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, parents=[common], allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (_, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, parents=[common])
        if name in given:
            module_of(name).add_arguments(command)
    return parser


def _add_defaults(options: argparse.Namespace) -> None:
    """Without a command, the options of those that run have their defaults."""
    for name in DEFAULT:
        own = argparse.ArgumentParser(add_help=False)
        module_of(name).add_arguments(own)
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
