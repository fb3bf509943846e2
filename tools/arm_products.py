"""What the machine code of the products for 64-bit Arm says of them: instructions of a step and sums on the stack.

    python tools/arm_products.py [--isas neon,neon_bf16] [--out build/library-aarch64]

Compiles the C library by a cross compiler (Debian: g++-aarch64-linux-gnu), as anyone would, and reads its objects. A
tile is rows x vectors of columns; its loop takes as many k as a vector register holds of a row (float32 four, float64
two, bfloat16 eight). No processor is asked: this counts, and times nothing.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PREFIX = "aarch64-linux-gnu-"

# product_tile<E, rows, vectors, panels, ...> of one instruction set, as the compiler writes its name.
TILE = re.compile(r"isa_(?P<isa>\w+?)12product_tileI(?P<element>\w+?)Li(\d+)ELi(\d+)ELi(\d+)E(?!.*\.cold)")
ELEMENTS = {"f": "float32", "d": "float64", "NS_8BFloat16E": "bfloat16"}
# float32 with weights that are stored in fewer bits (csrc/cpu/stored.h).
ELEMENTS |= {"NS0_15BFloat16WeightsE": "bfloat16 weights", "NS0_14Float16WeightsE": "float16 weights"}
ELEMENTS |= {"NS_4Int8E": "int8", "NS0_10Int8ByDotsE": "int8, sdot"}
INSTRUCTION = re.compile(r"\s*([0-9a-f]+):\t(\S+)\s*(.*)")
MULTIPLICATIONS = {"fmla", "bfdot", "sdot", "sadalp"}  # sadalp: sums what two others have multiplied
# A vector register, or a pair of them, to or from what is addressed by the stack's or the frame's pointer.
STACK = re.compile(r"\bq\d+.*\[(sp|x29)\b")
K_OF_A_MULTIPLICATION = {"fmla": 1, "bfdot": 2, "sdot": 4, "sadalp": 4}


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str
    operands: str


@dataclass(frozen=True)
class Loop:
    """An innermost loop of a tile of `rows` x `vectors` x `panels` sums."""

    isa: str
    element: str
    rows: int
    vectors: int
    panels: int
    instructions: int
    multiplications: int
    loads: int
    on_the_stack: tuple[str, ...]
    k: int  # that one round takes

    @property
    def sums(self) -> int:
        return self.rows * self.vectors * self.panels

    def __str__(self) -> str:
        panels = f" of {self.panels} panels" if self.panels > 1 else ""
        return f"{self.isa}, {self.element}: {self.rows} rows, {self.vectors} vectors{panels}"


def functions(path: Path) -> Iterator[tuple[re.Match[str], list[Instruction]]]:
    """The tiles of an object or a library."""
    command = [f"{PREFIX}objdump", "--disassemble", "--no-show-raw-insn", str(path)]
    listing = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    for block in listing.split("\n\n"):
        title, _, body = block.strip().partition("\n")
        if re.match("[0-9a-f]+ <", title) and (tile := TILE.search(title)):
            found = (INSTRUCTION.match(line) for line in body.splitlines())
            yield tile, [Instruction(int(i[1], 16), i[2], i[3]) for i in found if i]


def innermost_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """What lies between a jump backwards and its target, where nothing else jumps backwards in it."""
    place = {instruction.address: i for i, instruction in enumerate(code)}
    loops = []
    for end, instruction in enumerate(code):
        if not re.fullmatch(r"b(\.\w+)?|cbn?z|tbn?z", instruction.name):
            continue
        target = re.search(r"\b([0-9a-f]+) <", instruction.operands)
        begin = place.get(int(target[1], 16)) if target else None
        if begin is not None and begin <= end:
            loops.append(range(begin, end + 1))
    return [
        code[loop.start : loop.stop]
        for loop in loops
        if not any(other != loop and loop.start <= other.start and other.stop <= loop.stop for other in loops)
    ]


def loops_over_k(path: Path) -> Iterator[Loop]:
    """Of every tile its loops over k: in NEON's sets two, by lanes and what is left of them."""
    for tile, code in functions(path):
        rows, vectors, panels = map(int, tile.groups()[2:])
        sums = rows * vectors * panels
        found = 0
        for loop in innermost_loops(code):
            multiplications = [i.name for i in loop if i.name in MULTIPLICATIONS]
            # Blocks outside of the loop's way jump back into it: those multiply for no sum of their own.
            if len(multiplications) < sums:
                continue
            found += 1
            yield Loop(
                tile["isa"],
                ELEMENTS[tile["element"]],
                rows,
                vectors,
                panels,
                len(loop),
                len(multiplications),
                sum(i.name.startswith("ld") for i in loop),
                tuple(f"{i.name} {i.operands}" for i in loop if STACK.search(i.operands)),
                len(multiplications) // sums * K_OF_A_MULTIPLICATION[multiplications[0]],
            )
        if not found:
            raise ValueError(f"{path}: {tile[0]} has no loop in which every sum is multiplied for")


def table(loops: list[Loop]) -> str:
    """The highest tile of each width, and those of one row, which take several panels."""
    lines = ["| set, dtype | tile | instructions for a k | multiply-adds | loads | of vectors on the stack |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    main: dict[tuple[str, str, int, int, int], Loop] = {}
    for loop in loops:
        key = loop.isa, loop.element, loop.rows, loop.vectors, loop.panels
        if key not in main or loop.k > main[key].k:
            main[key] = loop
    highest: dict[tuple[str, str, int], int] = {}
    for isa, element, rows, vectors, panels in main:
        if panels == 1:
            highest[isa, element, vectors] = max(rows, highest.get((isa, element, vectors), 0))
    for (isa, element, rows, vectors, panels), loop in sorted(
        main.items(), key=lambda item: (item[0][:2], -item[0][3])
    ):
        if rows != 1 and highest.get((isa, element, vectors)) != rows:
            continue
        if rows == 1 and panels == 1 and any(k[:2] == (isa, element) and k[3] == vectors and k[4] > 1 for k in main):
            continue
        shape = f"{rows} x {vectors}" + (f" x {panels} panels" if panels > 1 else "")
        numbers = [loop.instructions / loop.k, loop.multiplications / loop.k, loop.loads / loop.k]
        cells = [f"{number:.4g}" for number in numbers] + [f"{len(loop.on_the_stack) / loop.k:.4g}"]
        lines.append(" | ".join([f"| {isa}, {element}", shape, *cells]) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isas", default="neon,neon_bf16", help="among portable, neon, neon_bf16")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "library-aarch64")
    options = parser.parse_args()
    build = [sys.executable, str(ROOT / "tools" / "build_library.py"), "--cxx", f"{PREFIX}g++"]
    subprocess.run([*build, "--isas", options.isas, "--out", str(options.out)], check=True)
    objects = [options.out / "objects" / f"isa_{name}.o" for name in options.isas.split(",")]
    print(table([loop for path in objects for loop in loops_over_k(path)]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
