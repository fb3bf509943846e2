"""See to it that kernels for 64-bit Arm can be compiled and run here, for tests/test_arm.py: `make arm-tools`.

What is missing of the cross compiler and the emulator is installed from Debian's packages, which takes root; elsewhere
this fails and says what to do.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

# A program of each of Debian's packages; the disassembler comes with the first.
PACKAGES = {"aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu", "qemu-aarch64": "qemu-user"}


def missing() -> list[str]:
    """Packages of which the program is not on PATH."""
    return [package for program, package in PACKAGES.items() if shutil.which(program) is None]


def main() -> int:
    """Return 0 if both are there in the end."""
    if missing() and shutil.which("apt-get") and os.geteuid() == 0:
        quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "-qq", "update"], env=quiet, check=False)
        install = ["apt-get", "-qq", "install", "-y", "--no-install-recommends", *missing()]
        subprocess.run(install, env=quiet, check=False)
    if lacking := missing():
        print(
            f"error: not installed: {', '.join(lacking)} (`apt-get install {' '.join(lacking)}` as root)",
            file=sys.stderr,
        )
        return 1
    print(f"for 64-bit Arm: {', '.join(PACKAGES)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
