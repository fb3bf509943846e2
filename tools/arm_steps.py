"""Instructions that a step of the C library executes on 64-bit Arm, counted by an emulator: no time, no cycles.

    python tools/arm_steps.py [--isas portable] [--out build/library-aarch64]

Needs a cross compiler and qemu (`make arm-tools`), and fused_rnn itself, which writes the layers' files.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PREFIX = "aarch64-linux-gnu-"
FEW, MORE = 3, 7


def compile_program(library: Path, program: Path) -> None:
    """tests/arm/steps.c with the library in a folder."""
    command = [f"{PREFIX}gcc", "-O1", "-static", f"-I{library / 'include'}", str(ROOT / "tests/arm/steps.c")]
    subprocess.run([*command, str(library / "lib/libfused_rnn.a"), "-o", str(program)], check=True)


def instructions_of_a_step(program: Path, weights: Path, rows: int, processor: str = "max") -> float:
    """What more steps execute beyond few, of each."""
    counts = []
    for steps in (FEW, MORE):
        # A line for each instruction.
        trace = ["-singlestep", "-d", "exec,nochain"]
        command = ["qemu-aarch64", "-cpu", processor, *trace, str(program), str(weights), str(rows), str(steps)]
        result = subprocess.run(command, check=True, capture_output=True)
        counts.append(result.stderr.count(b"\n"))
    return (counts[1] - counts[0]) / (MORE - FEW)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isas", help="among portable, neon, neon_bf16; without it those of Arm")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "library-aarch64")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    import torch

    import fused_rnn

    build = [sys.executable, str(ROOT / "tools/build_library.py"), "--cxx", f"{PREFIX}g++", "--out", str(options.out)]
    subprocess.run([*build, *(["--isas", options.isas] if options.isas else [])], check=True)
    print("| layer | rows | float32 | bfloat16 |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        program, weights = Path(folder) / "steps", Path(folder) / "weights"
        compile_program(options.out, program)
        for name in ("LSTM", "GRU"):
            for units in (8, 64):
                for rows in (1, 8):
                    found = []
                    for dtype in (torch.float32, torch.bfloat16):
                        layer: Any = getattr(fused_rnn, name)(units, units)
                        fused_rnn.save_weights(layer, weights, dtype)
                        found.append(f"{instructions_of_a_step(program, weights, rows):,.0f}")
                    print(f"| {name} I{units} H{units} | {rows} | {' | '.join(found)} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
