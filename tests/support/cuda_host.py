"""Builds and runs the programs of tests/cuda_host: CUDA kernels executed on the CPU, also as nvcc translated them."""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import subprocess
import zlib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "tests" / "cuda_host"
BUILD = ROOT / "build" / "cuda_host"

COMMON = ["-std=c++17", "-g1", "-Wall", "-Wextra", "-DFRNN_CUDA_ON_HOST", f"-I{ROOT / 'csrc'}", f"-I{SOURCES}"]
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
# The exit status of a program in which ThreadSanitizer found a race.
RACE = 66


def build(name: str, variant: str = "plain") -> Path:
    """The program of tests/cuda_host/<name>.cpp, compiled if a file that it includes is newer."""
    folder = BUILD / variant
    folder.mkdir(parents=True, exist_ok=True)
    engine_flags = ["-O2", "-fno-tree-loop-distribute-patterns"]
    if variant == "thread":
        engine_flags.append("-DFRNN_HOST_TSAN")
    engine = _compile(folder / "engine.o", [*engine_flags, "-c", str(SOURCES / "engine.cpp")])
    # Kernels of a program are found by name (ptx.h).
    arguments = [*VARIANTS[variant], str(SOURCES / f"{name}.cpp"), str(engine), "-rdynamic", "-ldl"]
    return _compile(folder / name, arguments, [engine])


def find_nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def translate(source: Path, arch: str = "90a", csrc: Path = ROOT / "csrc", to: str = "ptx") -> Path:
    """What nvcc makes of a CUDA source for one architecture: PTX, or (``to="cubin"``) machine code."""
    folder = BUILD / "nvcc"
    folder.mkdir(parents=True, exist_ok=True)
    nvcc = find_nvcc()
    assert nvcc, "nvcc is not there"
    # As in tools/cuda_build.py.
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-arch=sm_{arch}", f"-{to}"]
    name = f"{source.stem}.{zlib.crc32(str(csrc).encode()):08x}.{arch}.{to}"
    return _make(folder / name, [nvcc, *flags, f"-I{csrc}", f"-I{SOURCES}", str(source)])


def _compile(result: Path, arguments: list[str], needs: Sequence[Path] = ()) -> Path:
    return _make(result, [*shlex.split(os.environ.get("CXX", "g++")), *COMMON, *arguments], needs)


def _make(result: Path, command: list[str], needs: Sequence[Path] = ()) -> Path:
    dependencies = Path(f"{result}.d")
    # Tests may run in several processes.
    with Path(f"{result}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_current(result, dependencies, needs):
            command = [*command, "-MMD", "-MF", str(dependencies), "-o", str(result)]
            process = subprocess.run(command, capture_output=True, text=True, check=False)
            assert process.returncode == 0, f"{shlex.join(command)}\n{process.stderr}"
    return result


def _is_current(result: Path, dependencies: Path, needs: Sequence[Path]) -> bool:
    if not result.exists() or not dependencies.exists():
        return False
    files = [Path(file) for file in dependencies.read_text().replace("\\\n", " ").split(":", 1)[1].split()]
    made = result.stat().st_mtime
    return all(file.exists() and file.stat().st_mtime <= made for file in [*files, *needs, Path(__file__)])


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
