"""Builds and runs the programs of tests/cuda_host: CUDA kernels executed on the CPU, also as nvcc translated them."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

from . import compiled
from .compiled import ROOT, Step

SOURCES = ROOT / "tests" / "cuda_host"
KERNELS = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "cuda_host"

COMMON = ["-std=c++17", "-g1", "-Wall", "-Wextra", "-DFRNN_CUDA_ON_HOST", f"-I{ROOT / 'csrc'}", f"-I{SOURCES}"]
# The objects of kernels and of the engine are parts of programs and of a library alike.
SHARED = ["-fPIC", "-fno-semantic-interposition"]
# How kernels and test programs are compiled; the engine itself is never instrumented.
VARIANTS = {
    "plain": ["-O1"],
    # Global arrays have their exact size there, and out of bounds is out of bounds.
    "address": [
        "-O1",
        "-fsanitize=address,alignment",
        "-fno-sanitize-recover=all",
        # Checks as calls: code in place takes twice as long to compile.
        "--param=asan-instrumentation-with-call-threshold=0",
    ],
    "thread": ["-O1", "-fsanitize=thread", "-DFRNN_HOST_TSAN"],
}
# With one kind of warps, as for a GPU whose warps cannot hand registers to others.
VARIANTS["plain_one_role"] = [*VARIANTS["plain"], "-DFRNN_ONE_ROLE"]
# About threads and warps, for which float16 is what bfloat16 is: persistent kernels are compiled without float16.
WITHOUT_FLOAT16 = ("thread", "plain_one_role")
# The exit status of a program in which ThreadSanitizer found a race.
RACE = 66
# Programs with the persistent kernels in them, and what those of small sizes (``few_registers``) are compiled without.
PERSISTENT = ("persistent", "ptx_forward", "ptx_backward")
ALL_REGISTERS = "-DFRNN_ALL_REGISTERS"


@functools.cache
def build(name: str, variant: str = "plain") -> Path:
    """The program of tests/cuda_host/<name>.cpp, compiled where something that it is made of is not as it was."""
    flags = [*VARIANTS[variant], *(["-DFRNN_WITHOUT_FLOAT16"] if variant in WITHOUT_FLOAT16 else [])]
    objects = [compile_step(BUILD / variant / f"{name}.o", [*flags, str(SOURCES / f"{name}.cpp")]), engine(variant)]
    if "ptx" in name:
        objects.append(compile_step(BUILD / variant / "ptx.o", [*flags, str(SOURCES / "ptx.cpp")]))
    if name.startswith(PERSISTENT):
        objects += persistent_kernels(variant, all_registers=name.endswith("_full") or "ptx" in name)
    # Kernels of a program are found by name (ptx.h).
    return link(BUILD / variant / name, [*flags, "-rdynamic", "-ldl"], objects)


def engine(variant: str = "plain") -> Step:
    flags = ["-O2", "-fno-tree-loop-distribute-patterns"]
    if variant == "thread":
        flags.append("-DFRNN_HOST_TSAN")
    folder = BUILD / ("thread" if variant == "thread" else "plain")
    return compile_step(folder / "engine.o", [*flags, str(SOURCES / "engine.cpp")])


def persistent_kernels(variant: str = "plain", *, all_registers: bool = False) -> list[Step]:
    """Objects of all persistent kernels, those of several layers as well."""
    folder = BUILD / (f"{variant}_full" if all_registers else variant)
    flags = [*VARIANTS[variant], *([ALL_REGISTERS] if all_registers else []), "-x", "c++"]
    sources = sorted(KERNELS.glob("persistent_*.cu"))
    if variant in WITHOUT_FLOAT16:
        sources = [source for source in sources if not source.stem.endswith("_float16")]
    return [compile_step(folder / f"{source.stem}.o", [*flags, str(source)]) for source in sources]


def compile_step(result: Path, arguments: list[str]) -> Step:
    return Step(result, (*compiled.COMPILER, *COMMON, *SHARED, "-c", *arguments))


def link(result: Path, arguments: list[str], objects: list[Step]) -> Path:
    """The program or library of these objects, which are brought up to date first."""
    compiled.make(objects)
    inputs = tuple(step.result for step in objects)
    command = (*compiled.COMPILER, *map(str, inputs), *arguments)
    return compiled.make([Step(result, command, inputs)])[0]


def find_nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def translate(source: Path, arch: str = "90a", csrc: Path = ROOT / "csrc", to: str = "ptx") -> Path:
    """What nvcc makes of a CUDA source for one architecture: PTX, or (``to="cubin"``) machine code."""
    nvcc = find_nvcc()
    assert nvcc, "nvcc is not there"
    if to == "ptx" and source.parent == KERNELS and csrc == ROOT / "csrc" and (made := _left_by_make(source, arch)):
        return made
    # As in tools/cuda_build.py.
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-arch=sm_{arch}", f"-{to}"]
    folder = BUILD / "nvcc" / ("" if csrc == ROOT / "csrc" else csrc.parent.name)
    command = (nvcc, *flags, f"-I{csrc}", f"-I{SOURCES}", str(source))
    return compiled.make([Step(folder / f"{source.stem}.{arch}.{to}", command)])[0]


def _left_by_make(source: Path, arch: str) -> Path | None:
    """The same PTX, where `make cuda-compile` has made it."""
    tools = str(ROOT / "tools")
    if tools not in sys.path:
        sys.path.insert(0, tools)
    import cuda_build
    import cuda_compile

    nvcc = cuda_build.find_nvcc()
    return cuda_compile.ptx_of(nvcc, source, arch) if nvcc and not cuda_build.further_flags() else None


def run(
    program: Path, *arguments: object, skip_site: str | None = None, ptx: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs the program; `skip_site` (file:line) is a wait that all threads go past, `ptx` what an interpreter reads."""
    environment = dict(os.environ)
    if ptx:
        environment["FRNN_PTX"] = str(ptx)
    environment.pop("FRNN_SKIP_SITE", None)
    if skip_site:
        environment["FRNN_SKIP_SITE"] = skip_site
    command = [str(program), *map(str, arguments)]
    if program.parent.name == "thread":
        # ThreadSanitizer's memory map does not survive the address layouts of some kernels.
        setarch = shutil.which("setarch")
        command = [setarch, "-R", *command] if setarch else command
        environment["TSAN_OPTIONS"] = f"exitcode={RACE} halt_on_error=1 atexit_sleep_ms=0"
    if program.parent.name == "address":
        environment["ASAN_OPTIONS"] = "detect_leaks=0:detect_stack_use_after_return=0"
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
