"""Programs of their own for calls that could end the process: a crash is then a failure, and not the suite's end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fused_rnn

TESTS = Path(__file__).resolve().parent.parent
PACKAGE = Path(fused_rnn.__file__).resolve().parent.parent


def run_apart(*arguments: str, timeout: float = 300) -> list[str]:
    """Lines that `python ARGUMENTS` prints, which imports what this process imports; it must end well."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(PACKAGE), str(TESTS)])}
    # As in conftest.py; other processes run tests beside this one.
    environment["OMP_NUM_THREADS"] = "1"
    # More memory than there is must be PyTorch's error under the address sanitizer, too, and not the end.
    environment["ASAN_OPTIONS"] = ":".join(
        [*filter(None, [os.environ.get("ASAN_OPTIONS")]), "allocator_may_return_null=1"]
    )
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=timeout, check=False
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"ended with {done.returncode} after {lines[-1:]}: {done.stderr[-2000:]}"
    return lines
