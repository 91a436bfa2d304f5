"""What a measurement was taken on: machine, versions, commit."""

import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "numpy", "scikit-learn", "pytest-benchmark", "apo-kernels")


def describe(device: str = "cpu") -> dict[str, Any]:
    """Everything that is needed to read a figure, as JSON values."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": sys.version.split()[0],
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "cuda": _cuda(),
    }


def device_name(device: str) -> str:
    """The device's name, as people call it."""
    if torch.device(device).type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    return _cpu() if torch.device(device).type == "cpu" else device


def _cpu() -> str:
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        first = ""
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    model = found.get("model name") or platform.processor() or platform.machine()
    flags = found.get("flags", "").split()
    notable = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "avx512_fp16") if name in flags]
    return f"{model} ({', '.join(notable)})" if notable else model


def _cuda() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "runtime": torch.version.cuda,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    describe = ["describe", "--always", "--abbrev=40", "--exclude=*", "--dirty= with changes"]
    command = ["git", "-C", str(Path(__file__).parent), *describe]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
