"""`make cuda-cycles`: the cycles of a step of the persistent kernels, from their machine code. Needs nvcc, no GPU.

For each case the kernel that its plan takes is compiled and disassembled (nvdisasm), its warps are walked through a
few steps with the arguments of that plan (sass_walk.py), and what they execute is timed (sass_time.py). The longest
chain of a step is divided into phases, which the kernels' sources name: a comment `// phase: gates` there holds for the
lines that follow it, up to the next.

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
ARCH = "90a"  # of no other is it known where constant memory has what the driver puts there (sass_walk.Launch)
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
    done = subprocess.run(command, capture_output=True, text=True)
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


def disassemble(text: str, nvcc: str, nvdisasm: str) -> tuple[bytes, str]:
    """The cubin of a source and its listing; from build/ where nothing has changed."""
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    command = [*cuda_build.command(nvcc, compiler, []), "-lineinfo", *cuda_build.code_flags([ARCH])]
    made_by = f"{cuda_build.nvcc_version(nvcc)} {nvdisasm} {shlex.join(command)}"
    key = hashlib.sha256(_sources() + made_by.encode() + text.encode()).hexdigest()[:16]
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

Lines = dict[sass.Frame, str]  # the phase of each line that is in one


def phases_of(path: str, source: str) -> Lines:
    """The phase of each line of a file, from its first mark on."""
    lines: Lines = {}
    phase = None
    for number, line in enumerate(source.splitlines(), 1):
        if match := _MARK.match(line):
            phase = None if match[1] == OTHER else match[1]
        if phase:
            lines[path, number] = phase
    return lines


def headers() -> dict[str, str]:
    """Text by path, of what kernels are made of."""
    paths = sorted((ROOT / "csrc" / "cuda").glob("*.*h"))
    return {str(path): path.read_text() for path in paths}


def leaving_lines(sources: dict[str, str]) -> set[sass.Frame]:
    """Lines whose loops end, whatever they wait for."""
    return {
        (path, number)
        for path, source in sources.items()
        for number, line in enumerate(source.splitlines(), 1)
        if _LEAVES in line
    }


def phase_of_each(instructions: list[sass.Instruction], lines: Lines) -> list[str | None]:
    """By the innermost line that is in a phase; None: in none, as what the compiler moves into the loop."""
    return [next((lines[frame] for frame in i.frames if frame in lines), None) for i in instructions]


def phases_of_trace(trace: list[sass_walk.Executed], of_each: list[str | None]) -> list[str]:
    """What is in no phase belongs to the one before it."""
    result = []
    phase = ""
    for executed in trace:
        phase = of_each[executed.index] or phase
        result.append(phase)
    return result


# --- A case


def _launch(
    planned: dict[str, Any], threads: int, warp: int, layer: int, constants: dict[int, bytes]
) -> sass_walk.Launch:
    size = len(bytes.fromhex(planned["arguments"]))
    rank = layer * planned["active"]
    return sass_walk.Launch(
        warp,
        threads,
        (rank, 0, 0),
        (planned["team_blocks"] * planned["teams"], 1, 1),
        rank if planned["variant"] == "cluster" else 0,
        planned["team_blocks"] if planned["variant"] == "cluster" else 0,
        constants,
        len(constants[0]) - size,
    )


def steps_of(trace: list[sass_walk.Executed], of_each: list[str | None], steps: int) -> list[int]:
    """Where in the trace each step begins: at the first instruction of a phase that runs once in each step.

    Or else at every second of those that run twice, as with two column tiles, and so on. Empty for a warp without any.
    """
    where: dict[int, list[int]] = {}
    for position, executed in enumerate(trace):
        if of_each[executed.index]:
            where.setdefault(executed.index, []).append(position)
    in_steps = [positions for positions in where.values() if len(positions) % steps == 0]
    if not in_steps:
        return []
    fewest = min(in_steps, key=len)  # of those, the first
    return fewest[:: len(fewest) // steps]


@dataclass
class Walked:
    """What the warps of a block, or of a block of each layer, have executed."""

    instructions: list[sass.Instruction]
    warps: list[sass_time.Warp]
    phases: list[list[str]]  # of each warp's instructions
    begins: list[list[int]]  # where in each warp's trace its steps begin
    blocks_each: int  # for how many blocks of the cluster each of them stands


def walk(
    kernel: sass.Kernel,
    launches: list[list[sass_walk.Launch]],
    lines: Lines,
    leaves: set[sass.Frame],
    steps: int,
    blocks_each: int,
) -> Walked:
    """Walks the warps of each block through the kernel."""
    of_each = phase_of_each(kernel.instructions, lines)
    walked = Walked(kernel.instructions, [], [], [], blocks_each)
    for block, of_block in enumerate(launches):
        # Twice: what warps read of shared memory others may have written, such as a table of addresses.
        contents: dict[int, int] = {}
        for launch in of_block:
            first = sass_walk.Walk(kernel, launch, leaves)
            first.run()
            for at, what in first.stored.items():
                contents[at] = -1 if what is None or contents.get(at, what) != what else what
        contents = {at: what for at, what in contents.items() if what >= 0}
        for launch in of_block:
            trace = sass_walk.Walk(kernel, launch, leaves, contents).run()
            walked.warps.append(sass_time.Warp(trace, block, launch.warp))
            walked.phases.append(phases_of_trace(trace, of_each))
            walked.begins.append(steps_of(trace, of_each, steps))
    if not any(walked.begins):
        raise Failed("no instruction of a phase runs once in each step")
    return walked


def figures(walked: Walked, names: list[str], assumed: dict[str, float] | None = None) -> dict[str, Any]:
    """The figures of a step; `names` are the phases that it must have."""
    present = {phase for trace in walked.phases for phase in trace if phase}
    if missing := [name for name in names if name not in present]:
        raise Failed(f"no instruction belongs to the phase {', '.join(missing)}")
    first, last = TIMED
    steps = last - first
    result: dict[str, Any] = {}
    tables: dict[str, dict[str, sass_time.Part]] = {}
    instructions, warps, phases, begins = walked.instructions, walked.warps, walked.phases, walked.begins
    looping = [w for w in range(len(warps)) if begins[w]]
    typical_machine = sass_time.Machine(cycles={**sass_time.Machine().cycles, **(assumed or {})})
    for kind, machine in (("typical", typical_machine), ("stalls", sass_time.Machine(alone=True))):
        issues = sass_time.Replay(instructions, warps, machine, walked.blocks_each).run()
        # The warp that comes to its last step last.
        w = max(looping, key=lambda w: issues[w][begins[w][last]].time)
        begin, middle, finish = (issues[w][begins[w][step]].time for step in (first, (first + last) // 2, last))
        if abs((finish - middle) - (middle - begin)) > 0.01 * (finish - begin):
            raise Failed(f"steps are not alike: {middle - begin:.0f} cycles, then {finish - middle:.0f} ({kind})")
        end = w, begins[w][last]
        tables[kind] = sass_time.critical_path(instructions, warps, issues, phases, end, begin)
        result[kind] = round((finish - begin) / steps)
        if kind == "typical":
            result["warps"] = _roles(walked, issues)
    spans = [(b[first], b[last]) if b else (0, 0) for b in begins]
    for unit in ("shared", "matrix"):
        busy = [sass_time.busy(instructions, warps, spans, block)[unit] for block in {warp.block for warp in warps}]
        result[unit] = round(max(busy) / steps)
    result["phases"] = {}
    for name in [*names, *sorted(present - set(names)), sass_time.MEMORY, sass_time.REMOTE]:
        typical, alone = (tables[kind].get(name, sass_time.Part()) for kind in ("typical", "stalls"))
        result["phases"][name] = {
            "typical": round(typical.cycles / steps),
            "stalls": round(alone.cycles / steps),
            "instructions": round(typical.instructions / steps),
        }
    return result


def measure(
    case: Case, nvcc: str, nvdisasm: str, program: Path, assumed: dict[str, float] | None = None
) -> dict[str, Any]:
    """The figures of a case; assumed: cycles in place of those in sass_time.ASSUMPTIONS."""
    planned = plan(case, program)
    cubin, listing = disassemble(instantiation(case, planned), nvcc, nvdisasm)
    kernels = sass.parse(listing)
    if len(kernels) != 1:
        raise Failed(f"{case.name}: expected one kernel, got {[k.name for k in kernels]}")
    (kernel,) = kernels
    arguments = bytes.fromhex(planned["arguments"])
    found = sass.sections(cubin)
    before = len(found[f".nv.constant0.{kernel.name}"]) - len(arguments)
    threads = sass.most_threads(found[f".nv.info.{kernel.name}"])
    constants = {0: bytes(before) + arguments, 2: found.get(f".nv.constant2.{kernel.name}", b"")}

    # Phases that a kernel must have are named in its own files, persistent_<pass>*.cuh.
    sources = headers()
    lines = {frame: phase for path, text in sources.items() for frame, phase in phases_of(path, text).items()}
    own = f"persistent_{case.kernel}"
    names = list(dict.fromkeys(phase for (path, _), phase in lines.items() if Path(path).name.startswith(own)))
    if not names:
        raise Failed(f"{own}*.cuh: no line says `// phase: ...`")
    warps = range(threads // sass_walk.LANES)
    launches = [
        [_launch(planned, threads, warp, layer, constants) for warp in warps] for layer in range(planned["layers"])
    ]
    blocks_each = planned["active"] if planned["layers"] > 1 else planned["team_blocks"]
    try:
        result = figures(walk(kernel, launches, lines, leaving_lines(sources), STEPS, blocks_each), names, assumed)
    except (Failed, sass_walk.Undecided, sass_walk.NotUnderstood) as error:
        raise Failed(f"{case.name}: {error}") from error
    team = f"{planned['variant']} of {planned['team_blocks']}"
    return {"plan": f"{team}, {planned['columns']} columns, {planned['exchange']}", **result}


def _roles(walked: Walked, issues: list[list[sass_time.Issue]]) -> list[dict[str, Any]]:
    """For warps that execute the same: how long a step they are in each phase, waiting for others included."""
    first, last = TIMED
    roles: dict[tuple[int, tuple[int, ...]], dict[str, Any]] = {}
    for w, warp in enumerate(walked.warps):
        if not walked.begins[w]:
            continue
        begin, end = walked.begins[w][first], walked.begins[w][last]
        key = warp.block, tuple(executed.index for executed in warp.trace[begin:end])
        if key in roles:
            roles[key]["warps"].append(warp.number)
            continue
        cycles: dict[str, float] = {}
        for position in range(begin, end):
            phase = walked.phases[w][position]
            cycles[phase] = cycles.get(phase, 0) + issues[w][position + 1].time - issues[w][position].time
        roles[key] = {
            "block": warp.block,
            "warps": [warp.number],
            "instructions": round((end - begin) / (last - first)),
            "phases": {phase: round(c / (last - first)) for phase, c in cycles.items()},
        }
    return list(roles.values())


# --- Figures


def text_of(case: str, result: dict[str, Any], with_warps: bool) -> str:
    lines = [f"{case} ({result['plan']})"]
    lines.append(f"  {'':14}{'typical':>9}{'stalls':>9}{'instructions':>14}")
    for name, part in result["phases"].items():
        lines.append(f"  {name:14}{part['typical']:9}{part['stalls']:9}{part['instructions']:14}")
    lines.append(f"  {'a step':14}{result['typical']:9}{result['stalls']:9}")
    lines.append(f"  {'':14}{result['typical'] / MHZ:9.2f}{result['stalls'] / MHZ:9.2f}  us at {MHZ} MHz")
    lines.append(f"  at least, of a block: shared memory {result['shared']}, matrix unit {result['matrix']}")
    if with_warps:
        for role in result["warps"]:
            phases = ", ".join(f"{name} {cycles}" for name, cycles in role["phases"].items())
            warps = ",".join(map(str, role["warps"]))
            lines.append(f"  block {role['block']} warps {warps} ({role['instructions']} instructions): {phases}")
    return "\n".join(lines)


def table_of(results: dict[str, dict[str, Any]]) -> str:
    """What stands in docs/cuda.md: a line for each case, a column for each phase, typical (stalls alone)."""
    names = list(dict.fromkeys(name for result in results.values() for name in result["phases"]))
    # Those of no phase last, as in each case.
    last = [sass_time.MEMORY, sass_time.REMOTE]
    names = [name for name in names if name not in last] + last
    heads = ["case", *names, "**a step**", "us", "shared memory", "matrix unit"]
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " --- |" * (len(heads) - 1)]
    for case, result in results.items():
        cells = [case]
        for name in names:
            part = result["phases"].get(name)
            cells.append(_both(part["typical"], part["stalls"]) if part else "")
        cells.append(f"**{_both(result['typical'], result['stalls'])}**")
        cells.append(f"{result['typical'] / MHZ:.2f} ({result['stalls'] / MHZ:.2f})")
        cells += [str(result["shared"]), str(result["matrix"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _both(typical: int, alone: int) -> str:
    return f"{typical} ({alone})" if typical or alone else "-"


def assumptions_table() -> str:
    lines = ["| name | cycles | of what | from |", "| --- | --- | --- | --- |"]
    for name, a in sass_time.ASSUMPTIONS.items():
        lines.append(f"| {name} | {a.cycles:g} | {a.what} | {a.source} |")
    return "\n".join(lines)


def documented(nvcc_version: str, results: dict[str, dict[str, Any]]) -> str:
    return "\n".join(
        [
            BEGIN,
            f"nvcc {nvcc_version}, sm_{ARCH}; cycles of a step: typical, and in brackets of stalls alone.",
            "",
            table_of(results),
            "",
            "What *typical* takes for granted:",
            "",
            assumptions_table(),
            END,
        ]
    )


def between_marks(text: str, new: str) -> str:
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise Failed(f"{DOCS.name}: {BEGIN} and {END} are not there")
    return before + new + after


def grown(old: dict[str, Any], new: dict[str, Any], case: str) -> list[str]:
    """What has become worse in a case than is committed, in words."""
    if old["plan"] != new["plan"]:
        return [f"{case}: the plan was {old['plan']}, and is {new['plan']}"]
    problems = []
    for phase, part in old["phases"].items():
        if phase not in new["phases"]:
            problems.append(f"{case}: the phase {phase} is gone")
            continue
        for kind in ("typical", "stalls"):
            problems += _grown(f"{case}: {phase}", kind, part[kind], new["phases"][phase][kind])
    problems += [f"{case}: the phase {phase} is new" for phase in new["phases"] if phase not in old["phases"]]
    for kind in ("typical", "stalls"):
        problems += _grown(f"{case}: a step", kind, old[kind], new[kind])
    return problems


def _grown(what: str, kind: str, old: int, new: int) -> list[str]:
    # A cycle or two of the shortest phases are rounding.
    if new <= old * (1 + GROWTH) or new - old <= 2:
        return []
    return [f"{what}: {new} cycles ({kind}), {old} are committed"]


def _measure(job: tuple[Case, str, str, Path, dict[str, float]]) -> dict[str, Any]:
    return measure(*job)


def _assumption(text: str) -> tuple[str, float]:
    name, _, cycles = text.partition("=")
    if name not in sass_time.ASSUMPTIONS:
        raise argparse.ArgumentTypeError(f"{name!r}: expected one of {', '.join(sass_time.ASSUMPTIONS)}")
    return name, float(cycles)


def selected(arguments: argparse.Namespace) -> list[Case]:
    chosen = {
        name: value
        for name, value in vars(arguments).items()
        if name in Case.__dataclass_fields__ and value is not None
    }
    return [replace(ANCHOR, **chosen)] if chosen else list(CASES)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", choices=("forward", "backward"))
    parser.add_argument("--cell", choices=CELLS)
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--layers", type=int, help="of a wavefront")
    parser.add_argument("--training", action="store_true", default=None)
    parser.add_argument("--inference", action="store_false", dest="training", default=None)
    parser.add_argument("--assume", action="append", type=_assumption, default=[], metavar="NAME=CYCLES")
    parser.add_argument("--warps", action="store_true", help="what each kind of warp does besides")
    parser.add_argument("--json", action="store_true", help="everything as JSON")
    parser.add_argument("--write", action="store_true", help=f"into {DOCS.name} and {FIGURES.name}")
    parser.add_argument("--check", action="store_true", help=f"compare with {FIGURES.name}")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="cases at once")
    arguments = parser.parse_args()
    nvcc = cuda_build.find_nvcc()
    if nvcc is None:
        print("cuda-cycles: skipped, nvcc is not found in CUDA_HOME, on PATH or in /usr/local/cuda/bin")
        return 0
    nvdisasm = find_nvdisasm()
    if nvdisasm is None:
        print("cuda-cycles: nvdisasm is not found: pip install nvidia-cuda-nvdisasm", file=sys.stderr)
        return 2
    version = cuda_build.nvcc_version(nvcc)
    cases = selected(arguments)
    if (arguments.write or arguments.check) and (cases != list(CASES) or arguments.assume):
        parser.error("--write and --check are for all cases as they are")
    committed = json.loads(FIGURES.read_text()) if arguments.check else {}
    if arguments.check and committed["nvcc"] != version:
        print(f"cuda-cycles: not compared, the figures are of nvcc {committed['nvcc']} and this one is {version}")
        return 0
    try:
        program = build_arguments()
        # Neighbours may have a kernel in common, which is compiled twice where they begin together.
        order = [*cases[::2], *cases[1::2]]
        jobs = [(case, nvcc, nvdisasm, program, dict(arguments.assume)) for case in order]
        with ProcessPoolExecutor(min(arguments.jobs, len(jobs))) as pool:
            found = dict(zip(order, pool.map(_measure, jobs)))
        results = {case.name: found[case] for case in cases}
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(results, indent=1))
    elif not arguments.check:
        for case, result in results.items():
            print(text_of(case, result, arguments.warps))
    for result in results.values():
        del result["warps"]
    if arguments.write:
        FIGURES.write_text(json.dumps({"nvcc": version, "cases": results}, indent=1) + "\n")
        DOCS.write_text(between_marks(DOCS.read_text(), documented(version, results)))
    problems = []
    if arguments.check:
        for name in committed["cases"].keys() | results.keys():
            if name in committed["cases"] and name in results:
                problems += grown(committed["cases"][name], results[name], name)
            else:
                problems.append(f"{name}: {'gone' if name in committed['cases'] else 'not committed'}")
        print(f"cuda-cycles: {len(results)} cases, {len(problems)} figures worse than in {FIGURES.relative_to(ROOT)}")
        for problem in sorted(problems):
            print(f"error: {problem}", file=sys.stderr)
        if problems:
            print("where that is meant: tools/cuda_cycles.py --write, and commit what it writes", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
