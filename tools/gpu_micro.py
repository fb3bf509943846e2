"""Compiles csrc/cuda/programs/micro.cu for the GPU that is here and runs its measurements, a process each.

One that faults, hangs or prints nonsense costs itself. It is then run once more, compiled so that every wait in it
gives up after a fifth of a second and says where.

    python tools/gpu_micro.py --arch 90a [--json FILE] [--only NAME]
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import cuda_build

FOLDER = cuda_build.ROOT / "build" / "gpu" / "micro"
SECONDS = 8.0
LIMITED = ["-DFRNN_WAIT_LIMIT=400000000"]


def compile_programs(arch: str) -> tuple[Path, Path]:
    """The program as it is measured, and the one whose waits end; both at once.

    Raises:
        RuntimeError: with the compiler's messages.
    """
    nvcc = cuda_build.find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc is not found in CUDA_HOME, on PATH or in /usr/local/cuda/bin")
    FOLDER.mkdir(parents=True, exist_ok=True)
    (source,) = [path for path in cuda_build.programs() if path.name == "micro.cu"]
    command = cuda_build.command(nvcc, shlex.split(os.environ.get("CXX") or "g++"), [arch])
    plain, limited = FOLDER / "micro", FOLDER / "micro_limited"
    running = []
    for program, flags in ((plain, []), (limited, LIMITED)):
        program.unlink(missing_ok=True)
        whole = [*command, *flags, str(source), "-o", str(program)]
        running.append(subprocess.Popen(whole, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    said = [process.communicate()[0] for process in running]
    if running[0].returncode != 0:
        raise RuntimeError(f"micro.cu does not compile:\n{said[0]}")
    return plain, limited


def measure(program: Path, name: str, seconds: float = SECONDS) -> dict[str, float]:
    """What the program measures under this name.

    Raises:
        RuntimeError: one line that says what it did instead.
    """
    try:
        done = subprocess.run([str(program), name], capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"hung: nothing for {seconds:.0f} s") from None
    except OSError as error:
        raise RuntimeError(f"cannot be run: {error}") from None
    said = " ".join((done.stderr.strip() or done.stdout.strip()).split())
    if done.returncode != 0:
        raise RuntimeError(f"status {done.returncode}: {said[:300]}")
    try:
        values = json.loads(done.stdout)
        return {str(key): float(value) for key, value in values.items()}
    except (ValueError, AttributeError, TypeError):
        raise RuntimeError(f"printed no measurement: {said[:300]!r}") from None


def where_it_stands(program: Path, name: str) -> list[str]:
    """What the program with limited waits says of a measurement that failed."""
    if not program.exists():
        return []
    try:
        done = subprocess.run([str(program), name], capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line for line in (done.stdout + done.stderr).splitlines() if "WAITED TOO LONG" in line][:12]


def main() -> int:
    """Returns 0 if all of them were measured, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", required=True, help="e.g. 90a")
    parser.add_argument("--json", type=Path, help="write what was measured, after each")
    parser.add_argument("--only", action="append", default=[], help="this measurement (may be repeated)")
    arguments = parser.parse_args()
    try:
        plain, limited = compile_programs(arguments.arch)
    except RuntimeError as error:
        print(error)
        return 1
    names = subprocess.run([str(plain)], capture_output=True, text=True, check=True).stdout.split()
    found: dict[str, Any] = {}
    failed = 0
    for name in names:
        if arguments.only and name not in arguments.only:
            continue
        print(f"{name}: ", end="", flush=True)
        try:
            found[name] = measure(plain, name)
            print(", ".join(f"{key} {value:.4g}" for key, value in found[name].items()), flush=True)
        except RuntimeError as error:
            failed += 1
            found[name] = str(error)
            print(error, flush=True)
            for line in where_it_stands(limited, name):
                print(line, flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=1))
    print(f"{len(found) - failed} of {len(found)} measured")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
