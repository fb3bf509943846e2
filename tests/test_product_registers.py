"""Sums of the products stay in registers: read from the machine code of the kernels that are installed.

A compiler that finds one register too few keeps a sum on the stack, stores and loads it for every k, and says nothing;
the results are the same and the product takes twice as long.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

pytestmark = pytest.mark.kernels

# product_tile<E, rows, vectors, panels, ...> and dots<E, rows, fetch, S> of one instruction set, as the compiler writes
# their names.
PRODUCT = re.compile(
    r"isa_(?P<isa>\w+?)(?:12product_tileI(?P<element>\w+?)Li(?P<rows>\d+)ELi(?P<vectors>\d+)ELi(?P<panels>\d+)E"
    r"|4dotsI(?P<element_of_dots>\w+?)Li(?P<rows_of_dots>\d+)ELb[01]E)(?!.*\.cold)"
)
LEAST_DOTS = 8  # that are summed at once
INSTRUCTION = re.compile(r"\s*([0-9a-f]+):\t(?:\{vex\} )?(\S+)\s*(.*)")
MULTIPLICATION = re.compile(r"v?mulp[sd]|vfn?m(add|sub)\d+p[sd]|vdpbf16ps|vpdpbusd|v?pmaddwd")


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str
    operands: str


def functions(library: str) -> Iterator[tuple[re.Match[str], list[Instruction]]]:
    """The functions of a library that multiply."""
    command = ["objdump", "--disassemble", "--no-show-raw-insn", library]
    listing = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    for block in listing.split("\n\n"):
        title, _, body = block.strip().partition("\n")
        if product := PRODUCT.search(title):
            found = (INSTRUCTION.match(line) for line in body.splitlines())
            yield product, [Instruction(int(i[1], 16), i[2], i[3]) for i in found if i]


def innermost_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """What lies between a jump backwards and its target, where nothing else jumps backwards in it."""
    place = {instruction.address: i for i, instruction in enumerate(code)}
    loops = []
    for end, instruction in enumerate(code):
        target = re.match(r"[0-9a-f]+\b", instruction.operands) if instruction.name.startswith("j") else None
        begin = place.get(int(target[0], 16)) if target else None
        if begin is not None and begin <= end:
            loops.append(range(begin, end + 1))
    return [
        code[loop.start : loop.stop]
        for loop in loops
        if not any(other != loop and loop.start <= other.start and other.stop <= loop.stop for other in loops)
    ]


def uses_of_stack(code: list[Instruction], loop: list[Instruction]) -> list[str]:
    """Vectors that the loop of a function loads from the stack or stores there."""
    has_frame = any(i.name == "mov" and i.operands == "%rsp,%rbp" for i in code)
    stack = re.compile(r"\(%r[sb]p[,)]" if has_frame else r"\(%rsp[,)]")
    return [f"{i.name} {i.operands}" for i in loop if re.search("%[xyz]mm", i.operands) and stack.search(i.operands)]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="reads the machine code of x86-64")
@pytest.mark.skipif(not shutil.which("objdump"), reason="no objdump on PATH")
def test_no_loop_over_k_keeps_sums_on_the_stack() -> None:
    from fused_rnn import _C

    build = _C.build_info()
    if "-O3" not in build["flags"]:
        pytest.skip("the kernels are built with sanitizers, not for speed")
    seen: set[tuple[str, str]] = set()
    spills = {}
    for product, code in functions(_C.__file__):
        isa = product["isa"]
        if product["element"]:
            kind, element = "tile", product["element"]
            rows, vectors, panels = (int(product[name]) for name in ("rows", "vectors", "panels"))
            sums, size = rows * vectors * panels, f"{rows} rows, {vectors} vectors of {panels} panels"
        else:
            kind, element = "dots", product["element_of_dots"]
            sums, size = LEAST_DOTS, f"{product['rows_of_dots']} rows"
        if isa == "portable" and ("Float16Weights" in element or (kind == "dots" and "Half" in product.string)):
            continue  # converted without an instruction for it, by constants that find no room beside the sums
        loops = [loop for loop in innermost_loops(code) if sum(map(is_multiplication, loop)) >= sums]
        assert loops, f"{product[0]}: no loop in which every sum is multiplied for"
        if kind == "dots":
            loops = [min(loops, key=len)]  # over whole vectors; the others are ways out of it and back
        seen.add((isa, kind))
        for loop in loops:
            used = uses_of_stack(code, loop)
            if kind == "dots" and isa.startswith("avx512"):
                used = [use for use in used if "%zmm" in use]  # 16-bit values pass through it on their way to a vector
            if used:
                spills[f"{isa}, {kind} of {element}: {size}"] = used
    if not seen:
        pytest.skip("the library has no names of functions: it is stripped")
    compiled = {"portable", "avx2", "avx512"} & set(build["isa_compiled"])
    assert seen >= {(isa, kind) for isa in compiled for kind in ("tile", "dots")}
    assert not spills


def is_multiplication(instruction: Instruction) -> bool:
    return MULTIPLICATION.fullmatch(instruction.name) is not None
