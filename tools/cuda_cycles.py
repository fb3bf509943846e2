"""`make cuda-cycles`: the cycles of a step of the persistent kernels, from their machine code. Needs nvcc, no GPU.

For each case the kernel that its plan takes is compiled and disassembled (nvdisasm), its warps are walked through a few
steps with the arguments of that plan (sass_walk.py), and what they execute is timed (sass_time.py). The longest chain of
a step is divided into phases, which the kernels' sources name: a comment `// phase: gates` there holds for the lines
that follow it, up to the next.

--write puts the figures into docs/cuda.md and tests/data/cuda_cycles.json; --check compares with them, and fails where
a phase has grown by more than 3 %.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cuda_build
import sass
import sass_time
import sass_walk

ROOT = cuda_build.ROOT
FOLDER = ROOT / "build" / "cuda-cycles"
FIGURES = ROOT / "tests" / "data" / "cuda_cycles.json"
DOCS = ROOT / "docs" / "cuda.md"
BEGIN, END = "<!-- cuda-cycles: begin -->", "<!-- cuda-cycles: end -->"
MHZ = 1980  # of an H200, for microseconds
STEPS = 10  # that are walked; the third to the seventh are timed
TIMED = 2, 6
GROWTH = 0.03

CELLS = {"rnn_tanh": (0, "RnnTanh"), "rnn_relu": (1, "RnnRelu"), "lstm": (2, "Lstm"), "gru": (3, "Gru")}
DTYPES = {"float32": 0, "bfloat16": 2, "float16": 3, "tf32": 0}


class Failed(Exception):
    pass


@dataclass(frozen=True)
class Case:
    kernel: str = "forward"
    cell: str = "lstm"
    dtype: str = "bfloat16"
    hidden: int = 768
    batch: int = 16
    layers: int = 1
    training: bool = True
    arch: str = "90a"

    @property
    def name(self) -> str:
        what = self.kernel if self.kernel == "backward" or self.training else f"{self.kernel}, inference"
        layers = f" x{self.layers}" if self.layers > 1 else ""
        return f"{what}: {self.cell}{layers} {self.dtype} B{self.batch} H{self.hidden}"


ANCHOR = Case()
CASES = (
    ANCHOR,
    replace(ANCHOR, training=False),
    replace(ANCHOR, kernel="backward"),
    replace(ANCHOR, cell="gru"),
    replace(ANCHOR, cell="gru", kernel="backward"),
    replace(ANCHOR, cell="rnn_tanh"),
    replace(ANCHOR, cell="rnn_tanh", kernel="backward"),
    replace(ANCHOR, hidden=128),
    replace(ANCHOR, hidden=128, kernel="backward"),
    replace(ANCHOR, hidden=128, layers=2),
    replace(ANCHOR, dtype="tf32", hidden=512),
    replace(ANCHOR, hidden=1024),
)


# --- What is compiled


def find_nvdisasm() -> str | None:
    """That of the Python package nvidia-cuda-nvdisasm, or one on PATH."""
    folders = [Path(sysconfig.get_path("purelib")) / "nvidia"]
    found = sorted(path for folder in folders for path in folder.glob("*/bin/nvdisasm"))
    return str(found[-1]) if found else shutil.which("nvdisasm")


def _run(command: list[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise Failed(f"{shlex.join(command)}:\n{done.stderr}{done.stdout}")
    return done.stdout


def _sources() -> bytes:
    paths = [p for p in sorted((ROOT / "csrc").glob("*/*")) if p.suffix in (".h", ".cuh", ".cpp")]
    return b"".join(p.name.encode() + p.read_bytes() for p in [*paths, ROOT / "csrc" / "problem.h"])


def build_arguments() -> Path:
    """The program that plans, and prints what a kernel is launched with."""
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    source = ROOT / "tools" / "cuda_arguments.cpp"
    key = hashlib.sha256(_sources() + source.read_bytes() + shlex.join(compiler).encode()).hexdigest()[:16]
    program = FOLDER / f"arguments-{key}"
    if not program.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        flags = ["-std=c++17", "-O1", "-DFRNN_CUDA_ON_HOST", "-DFRNN_ALL_REGISTERS"]
        flags += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'cuda_host'}"]
        made = program.with_suffix(f".{os.getpid()}")
        _run([*compiler, *flags, str(source), str(ROOT / "csrc/cuda/plan.cpp"), "-o", str(made)])
        made.replace(program)
    return program


def plan(case: Case, program: Path) -> dict[str, Any]:
    kind, _ = CELLS[case.cell]
    numbers = [kind, DTYPES[case.dtype], int(case.dtype == "tf32"), case.hidden, case.batch, case.layers]
    numbers += [int(case.kernel == "backward"), int(case.training), STEPS]
    return dict(json.loads(_run([str(program), *map(str, numbers)])))


def instantiation(case: Case, planned: dict[str, Any]) -> str:
    """A source with the one kernel that the plan takes."""
    pass_name = "Forward" if case.kernel == "forward" else "Backward"
    wavefront = "true" if planned["layers"] > 1 else "false"
    arguments = f"Multiply::{planned['multiply']}, {wavefront}, {CELLS[case.cell][1]}, {planned['shape']}"
    return (
        f'#include "cuda/persistent_{case.kernel}.cuh"\n'
        "namespace fused_rnn {\nnamespace cuda {\n"
        f"template {pass_name}Kernel {case.kernel}_kernel_of_shape<{arguments}>();\n"
        "}  // namespace cuda\n}  // namespace fused_rnn\n"
    )


def disassemble(text: str, arch: str, nvcc: str, nvdisasm: str) -> tuple[bytes, str]:
    """The cubin of a source and its listing; from build/ where nothing has changed."""
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    command = [*cuda_build.command(nvcc, compiler, []), "-lineinfo", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    key = hashlib.sha256(_sources() + shlex.join(command).encode() + text.encode()).hexdigest()[:16]
    cubin, listing = FOLDER / f"{key}.cubin", FOLDER / f"{key}.sass"
    if not listing.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        source = FOLDER / f"{key}.cu"
        source.write_text(text)
        _run([*command, "-cubin", "-o", str(cubin), str(source)])
        made = listing.with_suffix(f".{os.getpid()}")
        made.write_text(_run([nvdisasm, "-c", "-hex", "-gi", str(cubin)]))
        made.replace(listing)
    return cubin.read_bytes(), listing.read_text()


# --- Phases


_MARK = re.compile(r"^\s*// phase: (.+?)\s*$")
_LEAVES = "// cycles: leaves"
OTHER = "end"  # what follows the loop


def phases_of(source: str) -> dict[int, str]:
    """The phase of each line from the first mark on."""
    lines: dict[int, str] = {}
    phase = None
    for number, line in enumerate(source.splitlines(), 1):
        if match := _MARK.match(line):
            phase = None if match[1] == OTHER else match[1]
        if phase:
            lines[number] = phase
    return lines


def phase_names(source: str) -> list[str]:
    return list(dict.fromkeys(phases_of(source).values()))


def leaving_lines() -> set[sass.Frame]:
    """Lines of csrc/cuda whose loops end, whatever they wait for."""
    found = set()
    for path in sorted((ROOT / "csrc" / "cuda").glob("*")):
        if path.suffix in (".h", ".cuh"):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if _LEAVES in line:
                    found.add((str(path), number))
    return found


def phase_of_each(instructions: list[sass.Instruction], file: str, lines: dict[int, str]) -> list[str | None]:
    """By the outermost frame that is in a phase; None: in none, as what the compiler computes again that was there."""
    result: list[str | None] = []
    for instruction in instructions:
        phase = None
        for path, line in reversed(instruction.frames):
            if Path(path).name == file and line in lines:
                phase = lines[line]
                break
        result.append(phase)
    return result


def phases_of_trace(trace: list[sass_walk.Executed], of_each: list[str | None]) -> list[str]:
    """What is in no phase belongs to the one before it."""
    result = []
    phase = ""
    for executed in trace:
        phase = of_each[executed.index] or phase
        result.append(phase)
    return result


# --- A case


def _launch(case: Case, planned: dict[str, Any], warp: int, layer: int, constants: dict[int, bytes]) -> Any:
    size = len(bytes.fromhex(planned["arguments"]))
    rank = layer * planned["active"]
    return sass_walk.Launch(
        warp,
        planned["threads"],
        (rank, 0, 0),
        (planned["team_blocks"] * planned["teams"], 1, 1),
        rank if planned["variant"] == "cluster" else 0,
        planned["variant"] == "cluster",
        constants,
        len(constants[0]) - size,
    )


def steps_of(trace: list[sass_walk.Executed], of_each: list[str | None], steps: int) -> list[int]:
    """Where in the trace each step begins: at the first instruction of the loop that runs once in each step."""
    where: dict[int, list[int]] = {}
    for position, executed in enumerate(trace):
        if of_each[executed.index]:
            where.setdefault(executed.index, []).append(position)
    for positions in where.values():
        if len(positions) == steps:
            return positions
    raise Failed("no instruction of the loop runs once in each step")


def measure(case: Case, nvcc: str, nvdisasm: str, program: Path) -> dict[str, Any]:
    planned = plan(case, program)
    cubin, listing = disassemble(instantiation(case, planned), case.arch, nvcc, nvdisasm)
    kernels = sass.parse(listing)
    if len(kernels) != 1:
        raise Failed(f"{case.name}: expected one kernel, got {[k.name for k in kernels]}")
    (kernel,) = kernels
    arguments = bytes.fromhex(planned["arguments"])
    found = sass.sections(cubin)
    before = len(found[f".nv.constant0.{kernel.name}"]) - len(arguments)
    constants = {0: bytes(before) + arguments, 2: found.get(f".nv.constant2.{kernel.name}", b"")}

    file = f"persistent_{case.kernel}.cuh"
    source = (ROOT / "csrc" / "cuda" / file).read_text()
    of_each = phase_of_each(kernel.instructions, file, phases_of(source))
    leaves = leaving_lines()
    warps, begins = [], []
    for layer in range(planned["layers"]):
        for number in range(planned["threads"] // sass_walk.LANES):
            walk = sass_walk.Walk(kernel, _launch(case, planned, number, layer, constants), leaves)
            trace = walk.run()
            warps.append(sass_time.Warp(trace, layer, number))
            begins.append(steps_of(trace, of_each, STEPS))
    phases = [phases_of_trace(warp.trace, of_each) for warp in warps]

    blocks_each = planned["active"] if planned["layers"] > 1 else planned["team_blocks"]
    result: dict[str, Any] = {
        "plan": f"{planned['variant']} of {planned['team_blocks']}, {planned['columns']} columns, {planned['exchange']}"
    }
    tables: dict[str, dict[str, sass_time.Part]] = {}
    first, last = TIMED
    for kind, machine in (("typical", sass_time.Machine()), ("stalls", sass_time.Machine(alone=True))):
        issues = sass_time.Replay(kernel.instructions, warps, machine, blocks_each).run()
        # The warp that comes to its last step last.
        w = max(range(len(warps)), key=lambda w: issues[w][begins[w][last]].time)
        begin = issues[w][begins[w][first]].time
        end = w, begins[w][last]
        tables[kind] = sass_time.critical_path(kernel.instructions, warps, issues, phases, end, begin)
        result[kind] = (issues[w][end[1]].time - begin) / (last - first)
    names = [*phase_names(source), sass_time.REMOTE]
    result["phases"] = {}
    for name in names:
        typical, alone = (tables[kind].get(name, sass_time.Part()) for kind in ("typical", "stalls"))
        result["phases"][name] = {
            "typical": round(typical.cycles / (last - first)),
            "stalls": round(alone.cycles / (last - first)),
            "instructions": round(typical.instructions / (last - first)),
        }
    present = {phase for trace in phases for phase in trace}
    if missing := [name for name in phase_names(source) if name not in present]:
        raise Failed(f"{case.name}: no instruction belongs to {', '.join(missing)}")
    for kind in ("typical", "stalls"):
        result[kind] = round(result[kind])
    return result


def main() -> int:
    nvcc, nvdisasm = cuda_build.find_nvcc(), find_nvdisasm()
    assert nvcc and nvdisasm
    program = build_arguments()
    for case in CASES if len(sys.argv) < 2 else [CASES[int(a)] for a in sys.argv[1:]]:
        try:
            r = measure(case, nvcc, nvdisasm, program)
        except Exception as e:
            if len(sys.argv) > 1: raise
            print(case.name, type(e).__name__, e)
            continue
        print(case.name, r["plan"], r["typical"], r["stalls"])
        for n, p in r["phases"].items():
            print(f"   {n:14} {p['typical']:6} {p['stalls']:6} {p['instructions']:6}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
