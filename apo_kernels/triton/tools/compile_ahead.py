"""Compiling kernels ahead of time for GPUs that need not be there, and reading what the compiler made of them.

Uses the assembler and the disassemblers that come with Triton. Not in a process with ``TRITON_INTERPRET=1``, where
kernels aren't compiled.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from apo_kernels.targets import Target
from apo_kernels.triton import config
from apo_kernels.triton.gemm import grouped_gemm
from apo_kernels.triton.gemm_part import KEEPING, gemm_constants, pack_constants
from apo_kernels.triton.model_plan import apply_constants, slopes_constants, sums_constants
from apo_kernels.triton.model_plan import forward_constants as model_constants
from apo_kernels.triton.pack import pack
from apo_kernels.triton.plan_builder import TYPES, Operation
from apo_kernels.triton.relative import average_scalings, step_diagonals, step_scalings, step_squares
from apo_kernels.triton.relative_steps import (
    LANES,
    WARPS,
    diagonals_constants,
    scalings_constants,
    squares_constants,
    squares_warps,
)
from apo_kernels.triton.tile import sum_parts, tile_backward, tile_forward
from apo_kernels.triton.tile_model import model_apply, model_forward, model_sums
from apo_kernels.triton.tile_part import SUM_CHUNK, backward_constants, forward_constants
from apo_kernels.triton.tile_slopes import model_slopes
from apo_kernels.triton.tools.disassembly import instructions, registers

__all__ = ["KernelCase", "Report", "argument_type", "cases", "compile_cases", "source_of"]

_FLOATS = (
    "numbers", "workspace", "kept", "sums", "results", "X", "S", "slope", "size", "new_slope", "new_size", "rates",
    "corrections",
)  # fmt: skip
_ARGUMENTS = {
    "tiles": "*i32",
    "lr": "fp32",
    "momentum": "fp32",
    "decay": "fp32",
    "amax": "*fp32",
    "lr_tensor": "*fp32",
    "active": "*i32",
    **dict.fromkeys(_FLOATS, "*fp32"),
    **dict.fromkeys(("rate", "correction", "weight_slope", "weight_size", "floor", "eps", "longest"), "fp32"),
}


TENSOR_COLUMNS = 512


@dataclass(frozen=True)
class KernelCase:
    """A kernel in one configuration that can be chosen by default.

    Attributes:
        stage: the launch's name.
        dtype: of all operands.
        size: the grouped GEMM's size class, or the tile's side and what of it is moved 16 bytes at a time: nothing, its
            ``squares`` or its ``matrices``, or both (``wide``).
        multiplies: whether it must come out as matrix instructions.
    """

    stage: str
    dtype: torch.dtype
    precision: str
    size: str
    kernel: Any
    constants: dict[str, Any]
    warps: int
    stages: int
    multiplies: bool


@dataclass(frozen=True)
class Report:
    """What the compiler made of a :class:`KernelCase`.

    Attributes:
        registers: of a thread.
        spills: instructions that move registers to and from local memory; for AMD, vector registers that were spilled
            to memory (scalar ones go to lanes of vector registers).
        shared: bytes of shared memory.
        tensor: columns of tensor memory, which sm_100 has.
        matrix: matrix instructions by name.
        instructions: all instructions: a kernel of a few has been miscompiled to a trap.
        astray: a product that may read beyond its operand, in words (:func:`_astray`).
        scattered: how many loads and stores give neighbouring threads neighbouring rows.
    """

    registers: int
    spills: int
    shared: int
    tensor: int
    matrix: dict[str, int]
    instructions: int
    astray: str = ""
    scattered: int = 0

    def faults(self, case: KernelCase, target: Target) -> list[str]:
        """Why this must not be a default, in words; empty if it may be."""
        found = []
        if self.spills:
            found.append(f"{self.spills} spills")
        if self.shared > target.shared:
            found.append(f"{self.shared} bytes of shared memory, of {target.shared}")
        if self.tensor > TENSOR_COLUMNS:
            found.append(f"{self.tensor} columns of tensor memory, of {TENSOR_COLUMNS}")
        if case.multiplies and not self.matrix:
            found.append("no matrix instruction")
        if self.instructions < 50:
            found.append(f"only {self.instructions} instructions")
        if self.astray:
            found.append(self.astray)
        if self.scattered:
            found.append(f"{self.scattered} loads and stores down the columns")
        return found


def cases(target: Target, dtype: torch.dtype, precision: str | None = None) -> Iterator[KernelCase]:
    """Every configuration that can be chosen by default for operands of one dtype, as a plan launches it."""
    precision = target.precision(precision, dtype)
    compute, wide = TYPES[dtype], TYPES[torch.float32]
    # float32 without splitting is multiplied by the ordinary units of an NVIDIA GPU.
    multiplies = not (dtype == torch.float32 and precision == "ieee" and target.backend == "cuda")
    common: dict[str, Any] = {"compute": compute, "precision": precision}
    plain, keep, backward = Operation(), Operation(keep=True), Operation(wanted="ABGS")
    update = Operation(update=True, buffer=True, momentum=True, decay=True, lr_dtype=torch.float32)

    limit = config.tile_limit(target, dtype, backward=False)
    for side, (stage, operation, out) in product(
        (side for side in (16, 32, 64) if side <= limit),
        (("tile_forward", plain, compute), ("tile_keep", keep, compute), ("tile_update", update, compute),
         ("tile_dG", backward, wide)),
    ):  # fmt: skip
        types = [compute] * 4 + [out, wide]
        for way in config.ways(stage, side, limit):
            tile = config.tile_config(target, dtype, precision, False, side, operation.keep, way)
            constants = forward_constants(tile, operation, types=types, of_V=stage == "tile_dG", way=way, **common)
            yield _tile_case(stage, side, way, tile_forward, constants, tile, dtype, precision, multiplies)
    limit = config.tile_limit(target, dtype, backward=True)
    for side in (side for side in (16, 32, 64) if side <= limit):
        for way in config.ways("tile_backward", side, limit):
            tile = config.tile_config(target, dtype, precision, True, side, way=way)
            for constants in backward_constants(tile, "ABS", types=[compute] * 5, way=way, **common):
                yield _tile_case(
                    "tile_backward", side, way, tile_backward, constants, tile, dtype, precision, multiplies
                )

    for stage, size in product(config.STAGES, ("small", "large")):
        of = {"update": update, "pair": backward, "left_dB": backward, "dA_dG": backward}.get(stage, plain)
        for name, operation in ((stage, of), *([(f"{stage}_keep", keep)] if stage in KEEPING else [])):
            gemm = config.gemm_config(target, dtype, precision, stage, size, operation.keep)
            types = [compute, wide if stage == "dA_dG" else compute, wide]
            constants = gemm_constants(stage, gemm, operation, types=types, **common)
            yield KernelCase(name, dtype, precision, size, grouped_gemm, constants, gemm.warps, gemm.stages, multiplies)
    yield from _model_cases(target, dtype, precision, multiplies)
    if dtype == torch.float32:
        yield from _step_cases(target, precision, multiplies)
    yield KernelCase("pack", dtype, precision, "-", pack, pack_constants(compute), 4, 1, multiplies=False)
    yield KernelCase(
        "sum_parts", torch.float32, precision, "-", sum_parts, {"CHUNK": SUM_CHUNK}, 4, 1, multiplies=False
    )


def _model_cases(target: Target, dtype: torch.dtype, precision: str, multiplies: bool) -> Iterator[KernelCase]:
    """The kernels of a whole model."""
    limit = config.tile_limit(target, torch.float32, backward=False)
    stages = ("model_direction", "model_update", "model_trial", "model_keep", "model_slopes")
    for stage, side in product(stages, (side for side in (16, 32, 64) if side <= limit)):
        for way in config.model_ways(stage, side, limit):
            tile = config.model_config(target, dtype, precision, stage, side, way)
            given: dict[str, Any] = {"compute": dtype, "precision": precision, "way": way}
            if stage == "model_slopes":
                kernel, every = model_slopes, slopes_constants(tile, types=[dtype] * 5, **given)
            else:
                kernel, every = model_forward, [model_constants(stage, tile, types=[dtype] * 7, **given)]
            for constants in every:
                yield _tile_case(stage, side, way, kernel, constants, tile, dtype, precision, multiplies)
    constants = apply_constants([dtype] * 2)
    yield KernelCase("model_apply", dtype, precision, "-", model_apply, constants, 4, 1, multiplies=False)
    wide = torch.float32
    yield KernelCase("model_sums", wide, precision, "-", model_sums, sums_constants(), 4, 1, multiplies=False)


def _step_cases(target: Target, precision: str, multiplies: bool) -> Iterator[KernelCase]:
    """The kernels of relative steps: of numbers for all tensors, and of each (``each``)."""
    wide = torch.float32
    for each in (False, True):
        of = " each" * each
        for side, eights in ((16, False), (16, True), (32, False), (32, True), (64, True)):
            constants = squares_constants(side, each, eights, precision)
            size = f"{side}{' wide' * eights}{of}"
            yield KernelCase(
                "relative_squares",
                wide,
                precision,
                size,
                step_squares,
                constants,
                squares_warps(target, side),
                1,
                multiplies,
            )
        constants = diagonals_constants(each)
        yield KernelCase(
            "relative_squares", wide, precision, f"1{of}", step_diagonals, constants, WARPS, 1, multiplies=False
        )
        constants = scalings_constants(each)
        yield KernelCase(
            "relative_means", wide, precision, f"-{of}", average_scalings, constants, WARPS, 1, multiplies=False
        )
        constants = {**constants, "LANES": LANES}
        yield KernelCase(
            "relative_scalings", wide, precision, f"-{of}", step_scalings, constants, WARPS, 1, multiplies=False
        )


_WAYS = {(False, False): "", (False, True): " squares", (True, False): " matrices", (True, True): " wide"}


def _tile_case(
    stage: str,
    side: int,
    way: tuple[bool, bool],
    kernel: Any,
    constants: dict[str, Any],
    tile: config.TileConfig,
    dtype: torch.dtype,
    precision: str,
    multiplies: bool,
) -> KernelCase:
    size = f"{side}{_WAYS[way]}"
    return KernelCase(stage, dtype, precision, size, kernel, constants, tile.warps, tile.stages, multiplies)


def argument_type(name: str) -> str:
    """Triton's type of a kernel's argument that isn't a constant: mostly a table."""
    return _ARGUMENTS.get(name, "*i64")


def source_of(case: KernelCase, target: Target) -> ASTSource:
    """What Triton compiles when a plan launches the case: what was compiled ahead is found in Triton's cache."""
    constants = dict(case.constants)
    if "LR_IN_TENSOR" in constants and not constants["LR_IN_TENSOR"]:
        constants["lr_tensor"] = None
    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in constants else argument_type(name) for name in names}
    # What Triton sees of the tables when it launches: they begin at multiples of 16, and are small. The learning rate
    # is the caller's, and may lie anywhere.
    small = [["tt.pointer_range", 32]] if target.backend == "hip" else []
    table = [["tt.divisibility", 16], *small]
    known: dict[Any, Any] = {
        (i,): (small if name == "lr_tensor" else table) if signature[name].startswith("*") else []
        for i, name in enumerate(names)
        if signature[name] != "fp32"
    }
    return ASTSource(case.kernel, signature, constants, known)


def compile_cases(chosen: Sequence[KernelCase], target: Target) -> list[Report]:
    """Compile each case for ``target``."""
    every = [
        triton.compile(
            source_of(case, target),
            target=GPUTarget(target.backend, target.arch, target.warp),
            options={"num_warps": case.warps, "num_stages": case.stages},
        )
        for case in chosen
    ]
    if target.backend == "hip":
        return [_amd_report(compiled, target) for compiled in every]
    disassembled = instructions([compiled.asm["cubin"] for compiled in every], int(target.arch))
    return [_nvidia_report(compiled, names, target) for compiled, names in zip(every, disassembled, strict=True)]


def _scattered(layouts: str) -> int:
    """How many loads and stores of tiles go down their columns, where neighbours in memory are those of a row."""
    down = set(re.findall(r"(#blocked\d*) = #ttg\.blocked<\{.*order = \[0, 1\]", layouts))
    moved = re.findall(r"tt\.(?:load|store) .*tensor<\d+x\d+x!tt\.ptr<\w+>, (#blocked\d*)>", layouts)
    return sum(layout in down for layout in moved)


def _astray(layouts: str) -> str:
    """The first of Hopper's products whose right operand lies in shared memory by rows of less than 128 bytes. Of 16
    bits such products gave wrong results or a fault on an H100."""
    shared = r"(#shared\d*) = #ttg\.nvmma_shared<\{swizzlingByteWidth = (\d+), transposed = false"
    narrow = {name for name, width in re.findall(shared, layouts) if int(width) < 128}
    product = r"warp_group_dot .*? \* !ttg\.memdesc<(\d+x\d+x\w+), (#shared\d*)"
    return next((f"reads a {what} by rows" for what, name in re.findall(product, layouts) if name in narrow), "")


def _nvidia_report(compiled: Any, names: list[str], target: Target) -> Report:
    return Report(
        registers=registers(compiled.asm["cubin"]),
        spills=sum(name.split(".")[0] in ("LDL", "STL") for name in names),
        tensor=int(compiled.metadata.tmem_size or 0),
        matrix=_tally(re.findall(target.matrix_instruction, "\n".join(names))),
        instructions=len(names),
        **_of_any(compiled),
    )


def _amd_report(compiled: Any, target: Target) -> Report:
    assembly = compiled.asm["amdgcn"]
    return Report(
        registers=_value("vgpr_count", assembly),
        spills=_value("vgpr_spill_count", assembly),
        tensor=0,
        matrix=_tally(re.findall(target.matrix_instruction, assembly)),
        instructions=len(re.findall(r"^\s+[vs]_\w+|^\s+(?:global|buffer|ds)_\w+", assembly, re.MULTILINE)),
        **_of_any(compiled),
    )


def _value(name: str, assembly: str) -> int:
    found = re.search(rf"\.{name}:\s*(\d+)", assembly)
    if found is None:
        raise RuntimeError(f"the assembly has no .{name}")
    return int(found.group(1))


def _of_any(compiled: Any) -> dict[str, Any]:
    """What is read in the same way whatever the target."""
    layouts = compiled.asm["ttgir"]
    return {
        "shared": int(compiled.metadata.shared),
        "astray": _astray(layouts),
        "scattered": _scattered(layouts),
    }


def _tally(names: list[str]) -> dict[str, int]:
    return {name: names.count(name) for name in sorted(set(names))}
