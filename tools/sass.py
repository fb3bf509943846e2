"""Machine code of NVIDIA GPUs as nvdisasm prints it: instructions, how they are scheduled, and their lines of source.

From Volta on an instruction has 128 bits, of which the upper ones say how it is to be scheduled: bits 105 to 108 for
how many cycles the warp then stays away, 110 to 112 the scoreboard that is held until the result is there, 113 to 115
the one that is held until the operands have been read (7: none), 116 to 121 the scoreboards that have to be free
before. NVIDIA does not document them; that they are these has been found by others, and agrees with what nvcc emits.
"""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass, field
from functools import cached_property

Frame = tuple[str, int]  # a file and a line

NONE = 7  # no scoreboard


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str  # like "!P0"; empty: always
    opcode: str  # with all that follows it after dots
    operands: tuple[str, ...]
    stall: int
    write_barrier: int
    read_barrier: int
    waits: tuple[int, ...]
    frames: tuple[Frame, ...] = ()  # innermost first; the last is a line of the kernel

    @cached_property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @cached_property
    def modifiers(self) -> tuple[str, ...]:
        return tuple(self.opcode.split(".")[1:])

    def __str__(self) -> str:
        predicate = f"@{self.predicate} " if self.predicate else ""
        return f"{self.address:05x} {predicate}{self.opcode} {', '.join(self.operands)}"


@dataclass
class Kernel:
    name: str
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # to addresses

    def index_of(self, address: int) -> int:
        index = address // 16
        if not (0 <= index < len(self.instructions) and self.instructions[index].address == address):
            raise ValueError(f"{self.name}: no instruction at {address:#x}")
        return index


_SECTION = re.compile(r"\.text\.(\S+):$")
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_LINE = re.compile(r'"([^"]+)", line (\d+)')
_FIRST = re.compile(r"\s+/\*([0-9a-f]{4,8})\*/\s+(.*?)\s*;?\s+/\* 0x([0-9a-f]{16}) \*/")
_SECOND = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/")
_TEXT = re.compile(r"(?:@(!?U?P[0-9T]+)\s+)?([A-Z][A-Z0-9_.]*)\s*(.*)$", re.DOTALL)


def decode(address: int, text: str, upper: int, frames: tuple[Frame, ...] = ()) -> Instruction:
    """An instruction from its text and the upper 64 of its 128 bits."""
    match = _TEXT.match(text.partition("(*")[0].strip())
    if not match:
        raise ValueError(f"not understood at {address:#x}: {text}")
    predicate, opcode, operands = match.groups()
    bits = upper >> 41
    mask = bits >> 11 & 0x3F
    return Instruction(
        address,
        predicate or "",
        opcode,
        _split(operands),
        bits & 0xF,
        bits >> 5 & 7,
        bits >> 8 & 7,
        tuple(b for b in range(6) if mask >> b & 1),
        frames,
    )


def _split(operands: str) -> tuple[str, ...]:
    parts = [part.strip() for part in operands.split(",")]
    # BRX and the like: a register and an offset without a comma between them.
    return tuple(part for part in parts if part)


def parse(listing: str) -> list[Kernel]:
    """The kernels of what `nvdisasm -c -hex -gi` printed (without -gi: without frames)."""
    kernels: list[Kernel] = []
    kernel: Kernel | None = None
    labels: list[str] = []
    frames: list[Frame] = []
    between = False  # whether lines of source since the last instruction
    first: tuple[int, str] | None = None
    for line in listing.splitlines():
        if line.startswith(".text."):
            match = _SECTION.match(line)
            kernel = Kernel(match[1]) if match else None
            if kernel:
                kernels.append(kernel)
            frames, labels, between = [], [], False
            continue
        if kernel is None:
            continue
        if "//## File" in line:
            # A line stands for its outermost frame, and in front of it for those that were inlined into it.
            found = [(os.path.normpath(file), int(number)) for file, number in _LINE.findall(line)]
            if not between:
                frames = []
            frames += [frame for frame in found if frame not in frames]
            between = True
            continue
        if match := _LABEL.match(line):
            labels.append(match[1])
            continue
        if match := _FIRST.match(line):
            first = int(match[1], 16), match[2]
            for label in labels:
                kernel.labels[label] = first[0]
            labels, between = [], False
            continue
        if first and (match := _SECOND.match(line)):
            kernel.instructions.append(decode(*first, int(match[1], 16), tuple(frames)))
            first = None
    return kernels


def sections(elf: bytes) -> dict[str, bytes]:
    """The contents of the sections of a 64-bit ELF file (a cubin)."""
    if elf[:5] != b"\x7fELF\x02":
        raise ValueError("not a 64-bit ELF file")
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", elf, table + i * size) for i in range(count)]
    names = headers[names_index][4]
    found = {}
    for name, kind, _, _, offset, length, *_ in headers:
        end = elf.index(b"\0", names + name)
        nobits = 8
        found[elf[names + name : end].decode()] = bytes(length) if kind == nobits else elf[offset : offset + length]
    return found


def most_threads(info: bytes) -> int:
    """The threads of a block that a kernel was compiled for, from its section .nv.info.<name>.

    A list of attributes: a byte for the form, one for which, and two of value, or of the size of what follows.
    """
    sized, threads = 4, 5
    at = 0
    while at + 4 <= len(info):
        form, which, size = struct.unpack_from("<BBH", info, at)
        if (form, which) == (sized, threads):
            x, y, z = struct.unpack_from("<III", info, at + 4)
            return int(x * y * z)
        at += 4 + (size if form == sized else 0)
    raise ValueError("the kernel has no __launch_bounds__")
