"""Options that ``train`` and ``search`` share, and what they say where one is wrong."""

import argparse
import ast
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.dtypes import DTYPES
from benchmarks.common.options import at_least_1
from benchmarks.common.timing import cpu_threads
from benchmarks.paper.data import MissingData
from benchmarks.paper.tasks import TASKS, Task, named
from benchmarks.paper.training.optimizers import method


def add_shared(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="folder with the files of data sets")
    add("--epochs", type=at_least_1, help="passes through the data (default: the task's)")
    add("--steps", type=at_least_1, help="steps to take instead of epochs")
    precision = "of parameters, activations and gradients (default: %(default)s, or the task's own)"
    add("--precision", choices=DTYPES, default="fp32", help=precision)
    add("--limit-seconds", type=float, metavar="S", help="stop each run after this many seconds of training")
    add("--threads", type=at_least_1, help="of torch (default: 1 for networks under 200,000 weights)")
    setting = "a hyperparameter of the optimizers that have it; OPTIMIZER.KEY=VALUE for one alone"
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings", help=setting)


def given(settings: list[str], optimizers: list[str]) -> dict[str, dict[str, Any]]:
    """What ``--set`` says, by optimizer; ValueError where it is no KEY=VALUE, or no optimizer has the key."""
    found: dict[str, dict[str, Any]] = {name: {} for name in optimizers}
    for entry in settings:
        key, equals, text = entry.partition("=")
        owner, dot, inner = key.rpartition(".")
        takers = [n for n in optimizers if (not dot or n == owner) and inner in method(n).defaults]
        if not equals:
            raise ValueError(f"--set must be KEY=VALUE, but got {entry!r}")
        if not takers:
            known = sorted({k for n in optimizers for k in method(n).defaults})
            raise ValueError(f"--set {entry}: {', '.join(optimizers)} has no such key; there is {', '.join(known)}")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        for name in takers:
            found[name][inner] = value
    return found


def listed(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


@dataclass(frozen=True)
class Request:
    """A task with what the command line asks for."""

    task: Task
    optimizers: list[str]
    settings: dict[str, dict[str, Any]]  # of ``--set``, by optimizer
    epochs: int
    precision: str


def for_each_task(command: str, options: argparse.Namespace, act: Callable[[Request], Any]) -> dict[str, Any]:
    """What ``act`` returns, by task. A user's mistake ends the command with one line, without a traceback."""
    found = {}
    try:
        for task in TASKS.values() if options.tasks == "all" else map(named, listed(options.tasks)):
            optimizers = listed(options.optimizer)
            epochs = options.epochs or (task.quick_epochs if options.quick else task.epochs)
            # fp32 means the task's own precision; 16 bits are passed on, to be refused where they can't be had
            precision = task.precisions[0] if options.precision == "fp32" else options.precision
            few = 1 if task.parameters() < 200_000 else torch.get_num_threads()
            with cpu_threads(options.threads or few):
                asked = Request(task, optimizers, given(options.settings, optimizers), epochs, precision)
                found[task.name] = act(asked)
    except (ImportError, MissingData, ValueError) as error:
        sys.exit(f"python -m benchmarks {command}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"python -m benchmarks {command}: interrupted; --resume goes on")
    return found
