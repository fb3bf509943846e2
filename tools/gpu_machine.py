"""What the machine of a GPU run is: GPU, driver, clocks, processor, compilers. It changes nothing.

python tools/gpu_machine.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

FIELDS = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu")


def said_by(*command: str) -> str:
    """What it prints, or why it did not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"
    return (done.stdout or done.stderr).strip()


def gpu() -> dict[str, str]:
    """FIELDS of the first GPU; empty where nvidia-smi does not know."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in (done.stdout.splitlines() or [""])[0].split(",")]
    return dict(zip(FIELDS, values)) if len(values) == len(FIELDS) else {}


def processor() -> dict[str, str]:
    """Model, and of its instruction sets those that this library has kernels for."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {"model": platform.processor()}
    known = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    fields = {name.strip(): value.strip() for name, value in known.items()}
    flags = set(fields.get("flags", "").split())
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")
    return {
        "model": fields.get("model name", platform.processor()),
        "processors": str(len(os.sched_getaffinity(0))),
        "has": " ".join(name for name in wanted if name in flags),
    }


def compilers() -> dict[str, str]:
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    nvcc = shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])) or "nvcc"
    return {
        "python": platform.python_version(),
        "Python.h": "there" if header.exists() else f"{header} is missing",
        "nvcc": said_by(nvcc, "--version").splitlines()[-1],
        "g++": said_by(os.environ.get("CXX", "g++"), "--version").splitlines()[0],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write it")
    arguments = parser.parse_args()
    found: dict[str, Any] = {"gpu": gpu(), "processor": processor(), "compilers": compilers()}
    for part, values in found.items():
        for name, value in values.items():
            print(f"{part}: {name}: {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    print(said_by("nvidia-smi", "-q", "-d", "CLOCK,MEMORY,PERFORMANCE"))
    return 0 if found["gpu"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
