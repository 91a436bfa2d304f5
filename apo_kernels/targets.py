"""What each GPU allows: the facts that configurations are chosen by.

Nothing here imports Triton or touches a GPU before a function that needs it is called.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

__all__ = ["CONSUMER", "INTERPRETER", "TARGETS", "Target", "target_of"]


@dataclass(frozen=True)
class Target:
    """A kind of GPU.

    Attributes:
        name: ``sm_90``, ``gfx942``, ...
        backend: Triton's name for its compiler, ``cuda`` or ``hip``.
        arch: Triton's name for it within that.
        warp: threads of a warp.
        shared: bytes of shared memory that one program can have.
        matrix_instruction: what its matrix products are called in its assembly, a regular expression.
        precisions: how float32 operands can be multiplied.
    """

    name: str
    backend: str
    arch: int | str
    warp: int
    shared: int
    matrix_instruction: str
    precisions: tuple[str, ...]

    def precision(self, asked: str | None, dtype: torch.dtype) -> str:
        """How operands of ``dtype`` are multiplied, by ``asked``: ``None``, ``ieee``, ``tf32``, ``tf32x3``, ``bf16x6``.

        ``None`` is faithful to float32: ``tf32x3`` where matrix units multiply TensorFloat32 alone (its error is that
        of float32 products, 4e-7), ``ieee`` where they multiply float32 itself. ``tf32x3`` is served by ``bf16x6``
        where the target lacks it.

        Raises:
            ValueError: ``asked`` is none of these.
        """
        if asked not in (None, "ieee", "tf32", "tf32x3", "bf16x6"):
            raise ValueError(f"precision must be None, 'ieee', 'tf32', 'tf32x3' or 'bf16x6', but got {asked!r}")
        if dtype != torch.float32:
            return "ieee"  # a product of 16-bit numbers is exact in float32: there is nothing to choose
        if asked is None:
            return "tf32x3" if "tf32x3" in self.precisions else "ieee"
        if asked in self.precisions:
            return asked
        return "bf16x6" if "bf16x6" in self.precisions else "ieee"


_NVIDIA = ("ieee", "tf32", "tf32x3", "bf16x6")
_KB = 1024

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 163 * _KB, r"\bHMMA\.", _NVIDIA),
        Target("sm_90", "cuda", 90, 32, 227 * _KB, r"\b(HGMMA|HMMA)\.", _NVIDIA),
        Target("sm_100", "cuda", 100, 32, 227 * _KB, r"\b(UTC\w*MMA|HMMA)\b", _NVIDIA),
        Target("gfx942", "hip", "gfx942", 64, 64 * _KB, r"\bv_mfma_", ("ieee", "tf32", "bf16x6")),
    )
}
"""The targets that are compiled for ahead of time and tested so: A100, H100 and H200, B200, MI300X."""

CONSUMER = replace(TARGETS["sm_80"], shared=99 * _KB)
"""sm_80's kernels on the consumer GPUs of its family and later ones (sm_86, sm_89, sm_120): less shared memory."""

INTERPRETER = Target("interpreter", "cpu", "cpu", 1, 1 << 40, "", ("ieee", "tf32", "tf32x3"))
"""Triton's interpreter (``TRITON_INTERPRET=1``): numpy on the CPU, float32 whatever is asked, for tests."""


def target_of(device: torch.device) -> Target:
    """The target that a tensor's device is, or the nearest one that it can run the kernels of.

    Raises:
        ValueError: no target serves the device.
    """
    if device.type == "cpu":
        return INTERPRETER
    if device.type != "cuda":
        raise ValueError(f"no target is known for {device}")
    if torch.version.hip is not None:
        return _amd_target(device)
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise ValueError(f"kernels need compute capability 8.0 or above, but {device} has {major}.{minor}")
    exact = {8: "sm_80", 9: "sm_90", 10: "sm_100"}.get(major)
    # Consumer Blackwell (12) has neither wgmma nor tcgen05.
    return TARGETS[exact] if exact and (major, minor) not in ((8, 6), (8, 9)) else CONSUMER


def _amd_target(device: torch.device) -> Target:
    """By its architecture's name: others differ in the threads of a warp (RDNA has 32) and in matrix instructions."""
    arch = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    if (target := TARGETS.get(arch)) is None:
        raise ValueError(f"kernels are compiled and tested for gfx942 of AMD's GPUs, but {device} is {arch}")
    return target
