"""What kernels compiled for NVIDIA's GPUs consist of, by the tools that come with Triton."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import triton

__all__ = ["instructions", "registers"]

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)")


def registers(cubin: bytes) -> int:
    """Registers of a thread of a kernel."""
    usage = _output("cuobjdump", ["--dump-resource-usage"], cubin)
    found = re.search(r"REG:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no register count:\n{usage}")
    return int(found.group(1))


def instructions(cubins: Sequence[bytes], arch: int) -> list[list[str]]:
    """The names of the instructions of each kernel, all for one architecture (90: sm_90).

    The disassembler takes most of a second to start, whatever it is given. So it runs once, on the code of all.
    """
    codes = [code(cubin) for cubin in cubins]
    ends = list(accumulate(map(len, codes)))
    options = ["--no-dataflow", "--binary", f"SM{arch}{'a' * (arch >= 90)}"]
    found: list[list[str]] = [[] for _ in codes]
    for address, name in _INSTRUCTION.findall(_output("nvdisasm", options, b"".join(codes))):
        found[bisect_right(ends, int(address, 16))].append(name)
    return found


def code(cubin: bytes) -> bytes:
    """The machine code of the one kernel of an ELF file, its section ``.text.NAME``."""
    (at,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, at + size * i) for i in range(count)]
    first_name = sections[names][4]
    found = [
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in sections
        if cubin.startswith(b".text.", first_name + name)
    ]
    if len(found) != 1:
        raise ValueError(f"cubin must hold one kernel, but holds {len(found)}")
    return found[0]


def _output(tool: str, options: Sequence[str], content: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "content"
        path.write_bytes(content)
        return subprocess.run([_TOOLS / tool, *options, path], check=True, capture_output=True, text=True).stdout
