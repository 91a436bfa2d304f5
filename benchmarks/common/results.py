"""One JSON file per run: where it was taken, and every number."""

import json
import math
from pathlib import Path
from typing import Any

from benchmarks.common import machine


def write(out: Path, name: str, device: str, payload: dict[str, Any]) -> Path:
    """Write ``out/name.json``: the environment under ``"environment"`` beside the payload's keys."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    content = {"benchmark": name, "environment": machine.describe(device), **payload}
    path.write_text(json.dumps(plain(content), separators=(",", ":"), allow_nan=False) + "\n")
    return path


def load(path: Path) -> dict[str, Any]:
    """What :func:`write` wrote. Non-finite numbers stand as the strings "inf", "-inf" and "nan"."""
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def begun(path: Path, settings: dict[str, Any], what: str) -> dict[str, Any]:
    """What a file holds, to be added to, or just the settings; ValueError where its own are others."""
    if not path.is_file():
        return dict(settings)
    content = {key: value for key, value in load(path).items() if key not in ("benchmark", "environment")}
    for key, value in settings.items():
        if content.get(key) != value:
            holds = f"holds {what} whose {key} is {content.get(key)!r} and not {value!r}"
            raise ValueError(f"{path} {holds}: remove it, or write elsewhere by --out")
    return content


def plain(value: Any) -> Any:
    """Numbers to six digits. Infinities and NaN become strings, because JSON has none."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value
