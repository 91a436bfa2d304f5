"""Tile sizes, warps and stages, as pure functions of (target, dtype, precision, stage, sides): testable without a GPU.

Nothing is tuned at import or in a user's first step. A table measured on a GPU by ``python -m benchmarks tune`` is used
if it is present (``tuned/<gpu>.json`` beside this file); :func:`override` forces any choice.

The defaults are what compiles without a spill, within shared memory and to matrix instructions on the target, by Triton
3.6 and 3.7.1 (``python -m benchmarks targets`` shows it for every entry). What the compilers showed:

* A spill is decided by the worst branch of a kernel, and by its addresses as much as by its accumulators: int64 offsets
  within a tile cost 700 spills where int32 ones cost none.
* Two accumulators of 64 × 64 (``pair``) want 8 warps; ``update``, which reads two matrices more, 128 × 64.
* A second store of a tile of 128 × 128, of what a forward keeps, spills on all NVIDIA targets.
* A tile of which nothing can be moved 16 bytes at a time has an address for each entry. It wants 8 warps, but not on
  sm_90.
* In the tile kernel ``tf32x3`` keeps its split operands in shared memory over the slabs. Loading them in each slab anew
  moves them to registers: 28 spills became 1,400.
* On gfx942, a tile of 64 by 4 warps takes the compiler 40 s, by 8 warps 2 s, in fewer registers.
* On sm_90, a slab of 16-bit entries is 64 wide: narrower ones, as right operands in shared memory, gave wrong results
  and faults on an H100 (Triton 3.6). 8 warps at a chain of products of 64 rows are two groups that compute the same.
* On sm_100, ``tf32x3`` with narrow slabs became a single trap, without an error: hence the count of instructions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from apo_kernels.targets import Target

__all__ = [
    "STAGES",
    "GemmConfig",
    "TileConfig",
    "gemm_config",
    "model_config",
    "model_split",
    "model_ways",
    "override",
    "size_class",
    "tile_config",
    "tile_limit",
    "ways",
]

STAGES = ("right", "scale", "left", "out", "update", "pair", "left_dB", "dA_dG")
TUNED = Path(__file__).parent / "tuned"
MODEL_SPLIT = 1024


@dataclass(frozen=True)
class GemmConfig:
    """Of the grouped GEMM: a program computes ``rows × cols``, in steps of ``depth``."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True)
class TileConfig:
    """Of the tile kernel: a program has a tile of at most ``side × side``, worked on in slabs of ``slab`` columns.

    ``split`` (0 or 1): ``dB`` has a launch of its own, where one for all would spill.
    """

    side: int
    slab: int
    warps: int
    stages: int = 1
    split: int = 0


Chosen = TypeVar("Chosen")

_ALL, _NOTHING, _SMALL = (True, True), (False, False), {16, 32}

_TILE: tuple[tuple[dict[str, Any], tuple[int, int, int]], ...] = (
    ({"backend": "cpu"}, (0, 1, 0)),
    ({"side": 32, "dtype": "float32", "target": "sm_100", "backward": True, "way": _ALL}, (16, 4, 0)),
    ({"side": 32, "dtype": "float32", "target": "sm_100", "backward": True}, (16, 4, 1)),
    ({"side": _SMALL, "dtype": "float32"}, (16, 4, 0)),
    ({"side": _SMALL}, (0, 4, 0)),
    ({"dtype": "float32", "target": "sm_100", "backward": True}, (64, 4, 0)),
    ({"dtype": "float32", "target": "sm_100"}, (64, 8, 0)),
    ({"dtype": "float32", "target": "sm_90"}, (16, 4, 0)),
    ({"dtype": "float32", "backward": True}, (16, 4, 0)),
    ({"dtype": "float32"}, (16, 8, 0)),
    ({"keep": True, "target": "sm_90", "dtype": "float16", "way": _NOTHING}, (0, 8, 0)),
    ({"target": "sm_90"}, (0, 4, 0)),
    ({"backward": True, "target": "sm_80"}, (32, 8, 0)),
    ({"backward": True}, (0, 8, 0)),
    ({"target": "gfx942"}, (0, 8, 0)),
    ({"way": _NOTHING, "target": "sm_100"}, (32, 8, 0)),
    ({"way": _NOTHING}, (0, 8, 0)),
    ({"target": "sm_80", "keep": True}, (0, 8, 0)),
    ({"target": "sm_80"}, (16, 4, 0)),
    ({}, (0, 4, 0)),
)
"""Conditions, then the slab (0: the whole side), warps and split of a :class:`TileConfig`. The first row that fits."""

_MODEL: tuple[tuple[dict[str, Any], tuple[int, int, int]], ...] = (
    ({"backend": "cpu"}, (0, 1, 0)),
    ({"side": 32, "target": "sm_80", "stage": "model_trial", "dtype": "float32", "way": (True, False)}, (16, 8, 0)),
    ({"side": _SMALL, "dtype": "float32"}, (16, 4, 0)),
    ({"side": 32, "target": "sm_90", "stage": "model_update"}, (0, 8, 0)),
    ({"side": 32, "target": "sm_100", "stage": "model_direction"}, (0, 8, 0)),
    ({"side": _SMALL}, (0, 4, 0)),
    ({"dtype": "float32", "target": "sm_90", "stage": "model_slopes"}, (16, 4, 1)),
    ({"dtype": "float32", "target": "sm_90"}, (16, 4, 0)),
    ({"dtype": "float32", "stage": "model_slopes"}, (16, 8, 1)),
    ({"dtype": "float32"}, (16, 8, 0)),
    ({"stage": "model_slopes", "target": {"sm_80", "gfx942"}}, (16, 8, 0)),
    ({"stage": "model_slopes", "target": "sm_90"}, (0, 8, 1)),
    ({"target": "sm_90"}, (0, 4, 0)),
    ({"stage": "model_slopes"}, (32, 8, 0)),
    ({"target": "sm_80"}, (32, 8, 0)),
    ({}, (0, 8, 0)),
)
"""The same of a whole model's stages."""

_GEMM: tuple[tuple[dict[str, Any], tuple[int, int, int, int]], ...] = (
    ({"stage": "pair", "target": "sm_80", "dtype": "float32"}, (64, 64, 64, 8)),
    ({"stage": "pair", "target": "sm_100", "dtype": "float16"}, (64, 64, 64, 8)),
    ({"stage": "pair"}, (64, 64, 128, 8)),  # two accumulators
    ({"narrow": True, "target": "sm_100", "stage": "left_dB"}, (64, 64, 128, 4)),
    ({"narrow": True, "target": "sm_100", "stage": "update", "dtype": "float32"}, (64, 64, 64, 8)),
    ({"narrow": True, "target": "sm_100"}, (64, 64, 128, 8)),
    ({"narrow": True}, (64, 64, 128, 4)),
    ({"stage": "update"}, (128, 64, 128, 8)),
    ({"stage": "dA_dG", "dtype": "float32"}, (128, 64, 128, 8)),
    ({"stage": "dA_dG", "target": "sm_100"}, (128, 64, 128, 8)),
    ({"target": "sm_80", "dtype": "float32"}, (128, 64, 128, 8)),
    ({"target": "sm_100", "dtype": "float32", "stage": "scale"}, (128, 64, 128, 8)),
    ({"target": "sm_100", "dtype": {"float16", "float32"}, "stage": "left_dB"}, (128, 64, 128, 8)),
    ({}, (128, 128, 128, 8)),
)
"""Conditions, then rows, columns, depth in bytes, and warps of a :class:`GemmConfig`."""


def ways(stage: str, side: int, limit: int) -> tuple[tuple[bool, bool], ...]:
    """The variants that a stage of the tile kernel is compiled in, from worst to best: whether 16 bytes can be moved at
    a time of its tiles' matrices, and of their squares, one per tile. Neither always, the others where they pay.

    Args:
        stage: ``tile_forward``, ``tile_update``, ``tile_keep``, ``tile_dG`` or ``tile_backward``.
        side: of the tiles; below ``limit`` all matrices are small.
    """
    if side < limit or stage == "tile_dG":
        return ((False, False),)
    every = ((False, False), (False, True), (True, False), (True, True))
    return tuple(way for way in every if way != (True, False)) if stage == "tile_keep" else every


def model_ways(stage: str, side: int, limit: int) -> tuple[tuple[bool, bool], ...]:
    """:func:`ways` of a stage of a whole model, whose matrices lie well where their squares do. Slopes have none for
    matrices alone, which spilled in float32 on sm_90."""
    left_out = ((False, True), (True, False)) if stage == "model_slopes" else ((False, True),)
    return tuple(way for way in ways(stage, side, limit) if way not in left_out)


def model_split(tiles: int) -> bool:
    """Whether the tiles whose matrices can be moved 16 bytes at a time get a launch of their own. One more launch costs
    what some hundreds of tiles gain by it."""
    return tiles >= MODEL_SPLIT


_override: ContextVar[dict[str, dict[str, int]] | None] = ContextVar("apo_kernels_config", default=None)


@contextmanager
def override(**changes: dict[str, int]) -> Iterator[None]:
    """Force fields of configurations, by stage: ``override(pair={"rows": 64}, tile_forward={"warps": 8})``.

    Stages are those of :data:`STAGES`, ``tile_forward`` and ``tile_backward``.
    """
    token = _override.set(changes)
    try:
        yield
    finally:
        _override.reset(token)


def overrides_key() -> str:
    """What tells plans made under different overrides apart."""
    current = _override.get()
    return "" if current is None else json.dumps(current, sort_keys=True)


def tile_limit(target: Target, dtype: torch.dtype, backward: bool) -> int:
    """The widest square that the tile kernel takes; layers with wider ones are the grouped GEMM's.

    The derivatives of a float32 tile of 64 need more registers than NVIDIA's targets have, in any form tried; sm_80's
    forward of one needs 104 KB of shared memory.
    """
    if dtype != torch.float32 or target.backend != "cuda":
        return 64
    return 32 if backward or target.shared < 104 * 1024 else 64


def size_class(widest_narrow_side: int) -> str:
    """``"small"`` where no layer has both sides above 64, so that wider tiles would be mostly empty; else ``"large"``.

    Args:
        widest_narrow_side: the largest, over the layers of a launch, of the lesser of a layer's two sides.
    """
    return "small" if widest_narrow_side <= 64 else "large"


def tile_config(
    target: Target,
    dtype: torch.dtype,
    precision: str,
    backward: bool,
    widest: int,
    keep: bool = False,
    way: tuple[bool, bool] = (True, True),
) -> TileConfig:
    """For tiles with squares of at most ``widest``; ``keep``: intermediates are stored too; ``way``: what can be moved
    16 bytes at a time, one of :func:`ways`."""
    stage = "tile_backward" if backward else "tile_forward"
    side = next(side for side in (16, 32, 64) if widest <= side)
    chosen = _tile_default(target, dtype, backward, side, keep, way)
    name = "tile_keep" if keep else stage
    return replace(chosen, **_changes(target, f"{name}/{_name(dtype)}/{precision}/{side}", stage))


def model_config(
    target: Target, dtype: torch.dtype, precision: str, stage: str, widest: int, way: tuple[bool, bool] = (True, True)
) -> TileConfig:
    """For a stage of a whole model: ``model_direction``, ``model_update``, ``model_trial``, ``model_keep`` or
    ``model_slopes``. ``split``: the slopes of A have a launch of their own."""
    side = next(side for side in (16, 32, 64) if widest <= side)
    chosen = _model_default(target, dtype, stage, side, way)
    return replace(chosen, **_changes(target, f"{stage}/{_name(dtype)}/{precision}/{side}", stage))


def gemm_config(
    target: Target, dtype: torch.dtype, precision: str, stage: str, size: str, keep: bool = False
) -> GemmConfig:
    """For one stage of :data:`STAGES`; ``size`` as of :func:`size_class`; ``keep``: what it computes is stored in
    float32 too, and no tuned table says how."""
    if stage not in STAGES:
        raise ValueError(f"stage must be one of {STAGES}, but got {stage!r}")
    chosen = _gemm_default(target, dtype, stage, size, keep)
    name = f"{stage}_keep" if keep else stage
    return replace(chosen, **_changes(target, f"{name}/{_name(dtype)}/{precision}/{size}", stage))


def _first(table: Sequence[tuple[dict[str, Any], Chosen]], **case: Any) -> Chosen:
    """What the first row says whose conditions all hold. A condition is a value, or a set of them."""
    for conditions, chosen in table:
        if all(case[name] in (value if isinstance(value, set) else {value}) for name, value in conditions.items()):
            return chosen
    raise LookupError(f"no row for {case}")


def _tile_default(
    target: Target, dtype: torch.dtype, backward: bool, side: int, keep: bool, way: tuple[bool, bool]
) -> TileConfig:
    case = {"backend": target.backend, "target": target.name, "dtype": _name(dtype), "side": side, "way": way}
    slab, warps, split = _first(_TILE, **case, backward=backward, keep=keep)
    return TileConfig(side, slab or side, warps, split=split)


def _model_default(target: Target, dtype: torch.dtype, stage: str, side: int, way: tuple[bool, bool]) -> TileConfig:
    case = {"backend": target.backend, "target": target.name, "dtype": _name(dtype), "side": side, "way": way}
    slab, warps, split = _first(_MODEL, **case, stage=stage)
    return TileConfig(side, slab or side, warps, split=split)


def _gemm_default(target: Target, dtype: torch.dtype, stage: str, size: str, keep: bool) -> GemmConfig:
    if target.backend == "cpu":
        return GemmConfig(128, 128, 128, 1, 1)
    narrow = size == "small" or (keep and target.backend == "cuda")
    rows, cols, depth, warps = _first(_GEMM, target=target.name, dtype=_name(dtype), stage=stage, narrow=narrow)
    return GemmConfig(rows, cols, depth // dtype.itemsize, warps, 3)


def _changes(target: Target, key: str, stage: str) -> dict[str, int]:
    current = _override.get()
    if current is not None:
        return current.get(stage, {})
    return _tuned(target.name).get(key, {})


@cache
def _tuned(name: str) -> dict[str, dict[str, int]]:
    path = TUNED / f"{name}.json"
    if not path.exists():
        return {}
    content: dict[str, Any] = json.loads(path.read_text())
    configurations: dict[str, dict[str, int]] = content["configurations"]
    return configurations


def write_tuned(target: Target, gpu: str, configurations: dict[str, GemmConfig | TileConfig]) -> Path:
    """What the tuner found, to be used from the next process on."""
    TUNED.mkdir(exist_ok=True)
    path = TUNED / f"{target.name}.json"
    content = {"gpu": gpu, "configurations": {key: asdict(each) for key, each in sorted(configurations.items())}}
    path.write_text(json.dumps(content, indent=1) + "\n")
    _tuned.cache_clear()
    return path


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
