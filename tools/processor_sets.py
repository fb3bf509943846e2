"""Print the instruction sets that this processor runs, as FUSED_RNN_ISAS takes them.

    python tools/processor_sets.py            # portable,avx2
    python tools/processor_sets.py --others   # compile the other sets' sources, for their errors alone

Tests cannot run the other sets' kernels, whose optimisation is half of a build.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from kernel_flags import MATH_FLAGS, RUNS_EVERYWHERE, known_sets

ROOT = Path(__file__).resolve().parents[1]
CPUINFO = Path("/proc/cpuinfo")


def features(cpuinfo: str) -> set[str]:
    """Of the first processor, in the kernel's words."""
    for line in cpuinfo.splitlines():
        name, _, values = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return set(values.split())
    return set()


def runnable(sets: Mapping[str, Iterable[str]], found: set[str]) -> list[str]:
    """Those of the sets for whose compiler flags the processor has all features."""
    # -mavx512bf16 is avx512_bf16 there, -mamx-tile amx_tile, -march=armv8.2-a+bf16 bf16; -f... is no feature.
    plain = {name.replace("_", "") for name in found}

    def has(flag: str) -> bool:
        return not flag.startswith("-m") or flag.removeprefix("-m").rpartition("+")[2].replace("-", "") in plain

    return [name for name, flags in sets.items() if name in RUNS_EVERYWHERE or all(map(has, flags))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--others", action="store_true", help="compile the sets that this processor does not run")
    others = parser.parse_args().others
    sets = known_sets(platform.machine())
    own = runnable(sets, features(CPUINFO.read_text() if CPUINFO.exists() else ""))
    if not others:
        print(",".join(own))
        return 0
    status = 0
    for name in sets.keys() - set(own):
        command = [os.environ.get("CXX", "g++"), "-std=c++17", "-fopenmp", "-Wall", "-Wextra", "-Werror", *MATH_FLAGS]
        command += [*sets[name], f"-I{ROOT / 'csrc'}", "-fsyntax-only", str(ROOT / f"csrc/cpu/isa_{name}.cpp")]
        print(f"{name}: {'ok' if (result := subprocess.run(command, check=False).returncode) == 0 else 'failed'}")
        status = status or result
    return status


if __name__ == "__main__":
    sys.exit(main())
