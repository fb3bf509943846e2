"""Where a figure was measured, and the one process setting that changes figures: whether freed memory is kept."""

import ctypes
import datetime
import math
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .. import info
from ..backend import current_backend

# mallopt(3): parameter numbers of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

# What environment variables that change the speed of one side or of both begin with.
_VARIABLES = tuple("FUSED_RNN_ OMP_ GOMP_ KMP_ MKL_ DNNL_ ONEDNN_ MALLOC_ GLIBC_TUNABLES LD_PRELOAD".split())


def keep_freed_memory() -> bool:
    """Make the C heap keep what is freed, for the rest of the process; return whether it could be done (glibc only).

    By default glibc hands large blocks back to the system when they are freed, and the next call pays a page fault for
    every 4 KiB of them again. LSTM training steps take up to twice the time for it.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # -1 turns trimming off. For the other the largest int: blocks up to 2 GiB come from the heap. 32 MiB is what
    # older glibc allows at most.
    kept = mallopt(_M_TRIM_THRESHOLD, -1) == 1
    return kept and (mallopt(_M_MMAP_THRESHOLD, 2**31 - 1) == 1 or mallopt(_M_MMAP_THRESHOLD, 2**25) == 1)


class OtherProcesses:
    """Whether anything but this process works on its processors: another process, or another virtual machine.

    Linux counts in ticks of 10 ms, so spans of less than some 50 ms are never found to be disturbed.

    Args:
        patience: seconds that may be spent in all on repeating what was disturbed; what is left of them is in the
            attribute of this name.
    """

    # Both must be passed: more than the rounding of ticks, and more than a system's housekeeping.
    _LEAST_SECONDS = 0.03
    _LEAST_SHARE = 0.2

    def __init__(self, patience: float = math.inf) -> None:
        self.patience = patience
        self._processors = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        self.start()

    def start(self) -> None:
        """Begin a span."""
        self._began = time.perf_counter(), self._used_by_others()

    def disturbed(self) -> bool:
        """Tell whether others took a part of the processors since `start`."""
        used = self._used_by_others() - self._began[1]
        return used > max(self._LEAST_SECONDS, self._LEAST_SHARE * self.span())

    def span(self) -> float:
        """Return the seconds since `start`."""
        return time.perf_counter() - self._began[0]

    def _used_by_others(self) -> float:
        try:
            lines = Path("/proc/stat").read_text().splitlines()
        except OSError:
            return 0.0
        ticks = 0
        for name, *counts in map(str.split, lines):
            if name in self._processors:
                user, nice, system, _idle, _waiting, *rest = map(int, counts[:8])
                ticks += user + nice + system + sum(rest)  # interrupts, and what the hypervisor gave to others
        return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


def describe(*, freed_memory_kept: bool, peers: Mapping[str, str]) -> dict[str, Any]:
    """Return what a reader needs to judge the figures of this run, as JSON: `fused_rnn.info.collect` and more.

    Args:
        freed_memory_kept: what `keep_freed_memory` returned.
        peers: versions of the libraries measured, by name.
    """
    environment = info.collect()
    folder = environment["fused_rnn"].pop("folder")  # says nothing about speed, and results are published
    environment["fused_rnn"]["commit"] = _commit(folder)
    return environment | {
        "peers": dict(peers),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "backend": current_backend(),
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "torch_onednn": torch.backends.mkldnn.is_available(),
        "freed_memory_kept": freed_memory_kept,
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "environment": {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)},
    }


def _commit(folder: str) -> str | None:
    """Return the commit of the source tree that the package lies in, with "+" after it where files were changed."""
    try:
        top, commit, changes = (
            subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=10, check=True)
            for arguments in (
                ["rev-parse", "--show-toplevel"],
                ["rev-parse", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no"],
            )
        )
    except (OSError, subprocess.SubprocessError):
        return None
    # An installed package can lie in somebody else's repository.
    if Path(top.stdout.strip()) != Path(folder).resolve().parent:
        return None
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")
