"""Programs for 64-bit Arm: compiled here by a cross compiler, run by an emulator of the processor."""

from __future__ import annotations

import fcntl
import functools
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import compiled
from .compiled import ROOT, Step

sys.path.insert(0, str(ROOT / "tools"))

from arm_products import PREFIX, Loop, loops_over_k
from arm_steps import compile_program, instructions_of_a_step
from get_arm_tools import PACKAGES
from kernel_flags import ARM_FLAGS, MATH_FLAGS, X86_FLAGS, choose_sets

__all__ = ["ARM_FLAGS", "X86_FLAGS", "choose_sets", "compile_program", "instructions_of_a_step"]

COMPILER, C_COMPILER, DISASSEMBLER = PREFIX + "g++", PREFIX + "gcc", PREFIX + "objdump"
EMULATOR = "qemu-aarch64"
SOURCES, BUILD = ROOT / "tests" / "arm", compiled.BUILD / "arm"
# As setup.py has them, but for the optimisation, which takes most of the time; with this much products are fused with
# sums.
FLAGS = ("-std=c++17", "-O1", "-fexpensive-optimizations", "-fopenmp", *MATH_FLAGS, "-Wall", "-Wextra", "-Werror")
FLAGS += (f"-I{ROOT / 'csrc'}", f"-I{SOURCES}")
# The emulator's processors: one with everything that it knows, one of the first of the architecture.
NEWEST, OLDEST = "max", "cortex-a53"


def missing() -> str | None:
    """What keeps these programs from being made and run here, as a reason to skip a test; None: nothing."""
    lacking = [name for name in (COMPILER, EMULATOR, DISASSEMBLER) if not shutil.which(name)]
    return (
        f"no {', '.join(lacking)}: make arm-tools (apt-get install {' '.join(PACKAGES.values())})" if lacking else None
    )


@functools.cache
def flags_of(isa: str) -> tuple[str, ...]:
    """What a source of an instruction set is compiled with: its flags, and what `csrc/cpu/isa_<isa>.cpp` defines."""
    source = (ROOT / "csrc" / "cpu" / f"isa_{isa}.cpp").read_text()
    defined = re.findall(r"^#define (\w+)(?: (.+))?$", source, re.MULTILINE)
    assert ("FRNN_VECTOR_BYTES", "16") in defined
    return (*ARM_FLAGS[isa], *(f"-D{name}={value}" for name, value in defined))


def object_of(source: Path, *flags: str, name: str | None = None) -> Step:
    result = BUILD / f"{name or source.parent.name + '_' + source.stem}.o"
    return Step(result, (COMPILER, *FLAGS, *flags, "-c", str(source)))


def program(name: str, objects: Sequence[Step]) -> Path:
    """A program that needs nothing else, made of objects that are made first."""
    made = compiled.make(objects)
    command = (COMPILER, "-static", "-fopenmp", *map(str, made))
    return compiled.make([Step(BUILD / name, command, tuple(made))])[0]


def library() -> Path:
    """The folder of the C library, built for Arm as it is for anyone."""
    out = BUILD / "library"
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:  # other processes share the tests
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [sys.executable, str(ROOT / "tools" / "build_library.py"), "--cxx", COMPILER, "--out", str(out)]
        # FUSED_RNN_ISAS may name those of this machine.
        environment = {name: value for name, value in os.environ.items() if name != "FUSED_RNN_ISAS"}
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert result.returncode == 0, result.stderr
    return out


def loops_of_products(isa: str) -> list[Loop]:
    """Of the library's kernels for an instruction set."""
    return list(loops_over_k(library() / "objects" / f"isa_{isa}.o"))


def run(
    path: Path, *arguments: object, given: bytes = b"", processor: str = NEWEST, isa: str | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Lets the emulator run a program; isa: of the kernels that it asks for."""
    wanted = [] if isa is None else ["-E", f"FUSED_RNN_ISA={isa}"]
    command = [EMULATOR, "-cpu", processor, *wanted, str(path), *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "FUSED_RNN_ISA"}
    return subprocess.run(command, input=given, capture_output=True, check=False, timeout=300, env=environment)


def bytes_of(tensor: Tensor) -> bytes:
    """A tensor's elements as they are in memory, the last index fastest."""
    found: bytes = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return found


def encoded(parts: Iterable[int | Tensor | None]) -> bytes:
    """What `tests/arm/wire.h` reads: numbers of 64 bits; of a tensor its bytes after their count, no bytes of None."""
    found = bytearray()
    for part in parts:
        if isinstance(part, int):
            found += struct.pack("<q", part)
        else:
            data = b"" if part is None else bytes_of(part)
            found += struct.pack("<q", len(data)) + data
    return bytes(found)


def arrays(answer: bytes) -> list[bytes]:
    """The arrays that a program has written."""
    found, at = [], 0
    while at < len(answer):
        (size,) = struct.unpack_from("<q", answer, at)
        found.append(answer[at + 8 : at + 8 + size])
        at += 8 + size
    return found


def tensor(data: bytes, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Of an array of the right size."""
    return torch.frombuffer(bytearray(data), dtype=dtype).view(tuple(shape))
