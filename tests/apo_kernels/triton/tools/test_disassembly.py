"""The code of kernels, disassembled together, is what each is alone."""

from __future__ import annotations

import struct

import pytest

pytest.importorskip("triton.language")
from apo_kernels.triton.tools import disassembly


def elf(sections: dict[bytes, bytes]) -> bytes:
    """An ELF file of 64 bits, as far as :func:`disassembly.code` reads it."""
    names = b"\0" + b"".join(name + b"\0" for name in sections) + b".names\0"
    header, content, table = 64, b"", []
    for name, code in [*sections.items(), (b".names", names)]:
        table.append(struct.pack("<IIQQQQ24x", names.index(name), 1, 0, 0, header + len(content), len(code)))
        content += code
    start = struct.pack("<4s36xQ10xHHH", b"\x7fELF", header + len(content), 64, len(table), len(table) - 1)
    return start.ljust(header, b"\0") + content + b"".join(table)


def test_code_is_the_section_of_the_kernel() -> None:
    assert disassembly.code(elf({b".nv.info": b"12345678", b".text.kernel": b"code", b".rel.text": b"0"})) == b"code"


@pytest.mark.parametrize("names", [[b".nv.info"], [b".text.one", b".text.other"]])
def test_one_kernel_alone_is_read(names: list[bytes]) -> None:
    with pytest.raises(ValueError, match="must hold one kernel, but holds"):
        disassembly.code(elf(dict.fromkeys(names, b"code")))


def test_instructions_are_told_apart_by_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of two and three instructions, in one listing."""
    listing = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA 0x30 ;
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0030*/               @P1 STL [R1], R100 ;
        /*0040*/                   EXIT ;
    """
    monkeypatch.setattr(disassembly, "_output", lambda *_: listing)
    cubins = [elf({b".text.a": bytes(32)}), elf({b".text.b": bytes(48)})]
    assert disassembly.instructions(cubins, 90) == [["LDC", "BRA"], ["HMMA.16816.F32.BF16", "STL", "EXIT"]]


@pytest.mark.aot
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_the_disassembler_takes_the_code_of_several(arch: int) -> None:
    """Which is given as the instructions' bits: NOP, EXIT."""
    nop, leave = bytes.fromhex("1879000000000000000000000000c000"), bytes.fromhex("4d790000000000000000800300ea0f00")
    cubins = [elf({b".text.a": nop * 2 + leave}), elf({b".text.b": leave + nop})]
    assert disassembly.instructions(cubins, arch) == [["NOP", "NOP", "EXIT"], ["EXIT", "NOP"]]
