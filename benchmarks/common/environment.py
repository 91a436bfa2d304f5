"""``python -m benchmarks environment``: shows what measurements are taken on, and writes it to a file."""

import argparse
from typing import Any

from benchmarks.common import machine, results
from benchmarks.common.console import console, wrote


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This command has no options of its own."""


def run(options: argparse.Namespace) -> dict[str, Any]:
    found = machine.describe(options.device)
    console.print_json(data=found)
    wrote(results.write(options.out, "environment", options.device, {}))
    return found
