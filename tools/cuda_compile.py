"""`make cuda-compile`: compiles every kernel for every architecture with nvcc alone, and prints what each one takes.

Registers, static shared memory (dynamic shared memory is the planner's choice), stack and spills per kernel come from
ptxas. A spill in a persistent kernel is an error: there registers hold the weights, and memory traffic in every step is
what the kernel exists to avoid. Nothing is compiled again whose sources are unchanged. Needs no PyTorch and no GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cuda_build

FOLDER = cuda_build.ROOT / "build" / "cuda-compile"
WARNINGS = ["-Werror=all-warnings"]


# To be taken away, and no more than this: where one kind of warps has both roles, gates need registers that W_hh has.
KNOWN_SPILLS = {
    ("80", "persistent_backward_bfloat16.cu"): 176,
    ("80", "persistent_backward_float16.cu"): 176,
    ("80", "persistent_backward_float32.cu"): 80,
    # Of LSTMs; an address, stored before the steps and loaded at one place of theirs.
    ("90a", "persistent_forward_float16.cu"): 8,
}


@dataclass(frozen=True)
class Kernel:
    """One entry of ptxas' report; sizes in bytes."""

    source: str
    arch: str
    name: str
    registers: int
    shared: int
    stack: int
    spilled: int  # stores and loads together

    @property
    def may_spill(self) -> float:
        """Bytes of stores and loads."""
        if not self.source.startswith("persistent"):
            return math.inf
        return KNOWN_SPILLS.get((self.arch, self.source), 0)

    @property
    def uses_stack(self) -> bool:
        """Beside what is spilled: arrays that are not in registers."""
        return self.source.startswith("persistent") and self.stack > 0 and self.spilled == 0


def parse(report: str, source: str, arch: str) -> list[Kernel]:
    """The kernels in what `ptxas -v` printed."""
    kernels = []
    for part in report.split("Compiling entry function ")[1:]:
        name = re.match(r"'(\S+)'", part)
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        if not (name and frame and registers):
            raise ValueError(f"ptxas' report of {source} for sm_{arch} is not understood:\n{part}")
        shared = re.search(r"(\d+) bytes smem", part)
        stack, stores, loads = map(int, frame.groups())
        kernels.append(
            Kernel(source, arch, name[1], int(registers[1]), int(shared[1]) if shared else 0, stack, stores + loads)
        )
    return kernels


def demangled(names: list[str]) -> list[str]:
    """Names as in the source, without namespaces, arguments and results."""
    try:
        text = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return names
    return [_short(line) for line in text.splitlines()]


def _short(name: str) -> str:
    name = re.sub(r"fused_rnn::(cuda::)?|\(anonymous namespace\)::|^void ", "", name)
    # The arguments begin at the last parenthesis that is outside of all angle brackets.
    depth = 0
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:i]
            break
    return re.sub(r"\((\w|::)+\)(?=\d)", "", name)  # (Cell)2 -> 2


def key_of_sources(command: list[str]) -> str:
    digest = hashlib.sha256(shlex.join(command).encode())
    for folder in ("cuda", "cells", "cpu"):
        for path in sorted((cuda_build.ROOT / "csrc" / folder).glob("*")):
            if path.suffix in (".h", ".cuh"):
                digest.update(path.name.encode() + path.read_bytes())
    digest.update((cuda_build.ROOT / "csrc/problem.h").read_bytes())
    return digest.hexdigest()


def _command(nvcc: str, source: Path, arch: str) -> list[str]:
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    command = [*cuda_build.command(nvcc, compiler, []), *WARNINGS, "-Xptxas=-v"]
    return [*command, f"-gencode=arch=compute_{arch},code=sm_{arch}", "-c", str(source)]


def _report_path(source: Path, arch: str) -> Path:
    return FOLDER / arch / f"{source.stem}.txt"


def _current_report(path: Path, command: list[str], source: Path) -> tuple[str, str | None]:
    """The key of what the command makes of the source, and the report where it has been made."""
    key = hashlib.sha256((key_of_sources(command) + source.read_text()).encode()).hexdigest()
    first, _, report = path.read_text().partition("\n") if path.exists() else ("", "", "")
    return key, report if first == key else None


def ptx_of(nvcc: str, source: Path, arch: str) -> Path | None:
    """The intermediate code that compile_one has left of these very sources; None where it has not."""
    path = _report_path(source, arch)
    _, report = _current_report(path, _command(nvcc, source, arch), source)
    ptx = path.with_suffix(".ptx")
    return ptx if report is not None and ptx.exists() else None


def compile_one(nvcc: str, source: Path, arch: str) -> tuple[list[Kernel], str]:
    """Kernels of a source for one architecture, and the compiler's error if there was one."""
    command = _command(nvcc, source, arch)
    report_path = _report_path(source, arch)
    key, report = _current_report(report_path, command, source)
    if report is not None:
        return parse(report, source.name, arch), ""
    report_path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=report_path.parent) as kept:
        done = subprocess.run(
            [*command, "--keep", "--keep-dir", kept, "-o", str(report_path.with_suffix(".o"))],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode != 0:
            return [], f"{source.name} for sm_{arch}:\n{done.stdout}"
        # The tests execute it (tests/test_cuda_ptx.py).
        (ptx,) = Path(kept).glob("*.ptx")
        ptx.replace(report_path.with_suffix(".ptx"))
    kernels = parse(done.stdout, source.name, arch)
    report_path.write_text(f"{key}\n{done.stdout}")
    return kernels, ""


def print_table(kernels: list[Kernel], architectures: list[str]) -> None:
    """A line for each kernel: registers on each architecture; shared memory, stack, spills where there are any."""
    names = dict(zip([k.name for k in kernels], demangled([k.name for k in kernels])))
    cells: dict[tuple[str, str], dict[str, Kernel]] = {}
    for kernel in kernels:
        cells.setdefault((kernel.source, names[kernel.name]), {})[kernel.arch] = kernel
    width = min(100, max(len(name) for _, name in cells))
    print(f"{'kernel':{width}}" + "".join(f"  {'sm_' + arch:>16}" for arch in architectures))
    source = ""
    for (file, name), row in sorted(cells.items()):
        if file != source:
            print(f"{file}:")
            source = file
        print(f"{name:{width}}" + "".join(f"  {_describe(row.get(arch)):>16}" for arch in architectures))


def _describe(kernel: Kernel | None) -> str:
    if kernel is None:
        return "-"
    notes = [f"{kernel.registers}"]
    notes += [f"shared {kernel.shared}"] if kernel.shared else []
    notes += [f"stack {kernel.stack}"] if kernel.stack else []
    notes += [f"SPILLS {kernel.spilled}"] if kernel.spilled else []
    return " ".join(notes)


def is_like_another(source: Path, arch: str) -> bool:
    """Persistent kernels for float16, beside those for bfloat16; and of the two architectures that have one kind of
    warps, in clusters, all but the bfloat16 ones of the first. Of other kernels, which ask whether there are clusters
    and no more than that, those of both; but for the exchange by itself, which takes a second."""
    if source.name == "barrier.cu":
        return False
    if "bfloat16" in source.name:
        return arch == "120"
    return "float16" in source.name or arch in ("100", "120")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="compilations at once")
    parser.add_argument("--arch", action="append", help="only this architecture, e.g. 90a (may be repeated)")
    parser.add_argument(
        "--quick", action="store_true", help="of kernels that are alike (float16, sm_100 and sm_120), one of each kind"
    )
    parser.add_argument("sources", nargs="*", help="only these files of csrc/cuda")
    arguments = parser.parse_args()
    nvcc = cuda_build.find_nvcc()
    if nvcc is None:
        print("cuda-compile: skipped, nvcc is not found in CUDA_HOME, on PATH or in /usr/local/cuda/bin")
        return 0
    architectures = cuda_build.supported(nvcc)
    if missing := set(cuda_build.ARCHITECTURES) - set(architectures):
        print(f"cuda-compile: nvcc {cuda_build.nvcc_version(nvcc)} cannot compile for {', '.join(sorted(missing))}")
    architectures = [arch for arch in architectures if not arguments.arch or arch in arguments.arch]
    known = [*cuda_build.sources(), *cuda_build.programs()]
    sources = [s for s in known if not arguments.sources or s.name in arguments.sources]
    jobs = [(s, a) for s in sources for a in architectures if not (arguments.quick and is_like_another(s, a))]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        done = list(pool.map(lambda job: compile_one(nvcc, *job), jobs))
    kernels = [kernel for found, _ in done for kernel in found]
    errors = [error for _, error in done if error]
    if kernels:
        print(f"registers per thread; shared: static, in bytes; nvcc {cuda_build.nvcc_version(nvcc)}")
        print_table(kernels, architectures)
    # With a limit to waits, say, a few registers more are wanted than there are, and such a build is not for measuring.
    spilling = [k for k in kernels if (k.spilled > k.may_spill or k.uses_stack) and not cuda_build.further_flags()]
    for kernel in spilling:
        errors.append(
            f"{kernel.source}: {demangled([kernel.name])[0]} spills {kernel.spilled} bytes on sm_{kernel.arch}"
        )
    print(f"{len(kernels)} kernels of {len(sources)} sources, {len(errors)} errors")
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
