"""Configurations are pure functions of the target, the dtype and the shapes."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from apo_kernels import dispatch
from apo_kernels.targets import CONSUMER, INTERPRETER, TARGETS, Target, target_of
from apo_kernels.triton import config
from tests.apo_kernels.triton.examples import DTYPES

EVERY = [*TARGETS.values(), CONSUMER, INTERPRETER]


@pytest.mark.parametrize("target", EVERY, ids=lambda t: t.name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_choice_can_be_launched(target: Target, dtype: torch.dtype) -> None:
    precision = target.precision(None, dtype)
    for stage, size in product(config.STAGES, ("small", "large")):
        chosen = config.gemm_config(target, dtype, precision, stage, size)
        assert chosen == config.gemm_config(target, dtype, precision, stage, size)
        for side in (chosen.rows, chosen.cols, chosen.depth):
            assert side >= 16
            assert side & (side - 1) == 0, "tl.arange takes powers of two"
        assert chosen.warps in (1, 2, 4, 8)
    for backward, way in product((False, True), config.ways("tile_forward", 64, 64)):
        for widest in range(1, config.tile_limit(target, dtype, backward) + 1):
            tile = config.tile_config(target, dtype, precision, backward, widest, way=way)
            other = config.tile_config(target, dtype, precision, backward, widest)
            assert tile.side == other.side, "the launches of a part share its tiles"
            assert tile.side >= widest
            assert tile.side % tile.slab == 0
            assert tile.slab >= 16


def test_the_default_is_faithful_to_float32() -> None:
    assert {t.precision(None, torch.float32) for t in EVERY} == {"tf32x3", "ieee"}
    assert TARGETS["sm_90"].precision(None, torch.float32) == "tf32x3"
    assert TARGETS["gfx942"].precision(None, torch.float32) == "ieee"
    assert TARGETS["gfx942"].precision("tf32x3", torch.float32) == "bf16x6"
    assert TARGETS["sm_90"].precision("tf32", torch.bfloat16) == "ieee"
    with pytest.raises(ValueError, match="precision must be"):
        TARGETS["sm_90"].precision("fast", torch.float32)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((8, 0), TARGETS["sm_80"]), ((8, 6), CONSUMER), ((8, 9), CONSUMER), ((9, 0), TARGETS["sm_90"]),
        ((10, 0), TARGETS["sm_100"]), ((10, 3), TARGETS["sm_100"]), ((12, 0), CONSUMER),
    ],
)  # fmt: skip
def test_targets_of_gpus(capability: tuple[int, int], expected: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert target_of(torch.device("cuda")) == expected
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(ValueError, match=r"8\.0 or above, but cuda has 7\.5"):
        target_of(torch.device("cuda"))


@pytest.mark.parametrize(("arch", "served"), [("gfx942:sramecc+:xnack-", True), ("gfx90a", False), ("gfx1100", False)])
def test_targets_of_amd(arch: str, served: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others have other warps and other matrix instructions: ATen serves them."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(gcnArchName=arch))
    device = torch.device("cuda")
    dispatch._device_obstacle.cache_clear()
    try:
        if served:
            assert target_of(device) == TARGETS["gfx942"]
            assert dispatch._device_obstacle(device) is None
        else:
            with pytest.raises(ValueError, match=f"gfx942 of AMD's GPUs, but cuda is {arch}"):
                target_of(device)
            assert arch in (dispatch._device_obstacle(device) or "")
    finally:
        dispatch._device_obstacle.cache_clear()


def test_what_is_compiled_for_how_tiles_lie() -> None:
    """Any tile is served by some way that asks no more than it offers."""
    for stage, side in product(("tile_forward", "tile_update", "tile_keep", "tile_dG", "tile_backward"), (16, 32, 64)):
        ways = config.ways(stage, side, 64)
        assert ways[0] == (False, False)
        assert list(ways) == sorted(set(ways))


def test_small_models_get_small_tiles() -> None:
    assert config.size_class(64) == "small"
    assert config.size_class(65) == "large"
    with pytest.raises(ValueError, match="stage must be one of"):
        config.gemm_config(INTERPRETER, torch.float32, "ieee", "middle", "small")


def test_override_reaches_only_inside() -> None:
    def chosen() -> config.GemmConfig:
        return config.gemm_config(TARGETS["sm_90"], torch.bfloat16, "ieee", "right", "large")

    before, key = chosen(), config.overrides_key()
    with config.override(right={"warps": 2}):
        assert chosen().warps == 2
        assert chosen().rows == before.rows
        assert config.overrides_key() != key
    assert chosen() == before


def test_a_tuned_table_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "TUNED", tmp_path)
    config._tuned.cache_clear()
    target = TARGETS["sm_90"]
    wanted = config.GemmConfig(64, 128, 32, 4, 5)
    config.write_tuned(target, "a GPU", {"right/bfloat16/ieee/large": wanted})
    try:
        assert config.gemm_config(target, torch.bfloat16, "ieee", "right", "large") == wanted
        assert config.gemm_config(target, torch.bfloat16, "ieee", "left", "large") != wanted
    finally:
        config._tuned.cache_clear()
