"""What the tests of single commands share."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType


def options(module: ModuleType, *arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.set_defaults(quick=False, device="cpu")
    module.add_arguments(parser)
    return parser.parse_args(arguments)
