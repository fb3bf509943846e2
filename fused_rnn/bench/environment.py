"""Where a figure was measured, and the one process setting that changes figures: whether freed memory is kept."""

import ctypes
import datetime
import os
import platform
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


def describe(*, freed_memory_kept: bool) -> dict[str, Any]:
    """Return what a reader needs to judge the figures of this run, as JSON: `fused_rnn.info.collect` and more."""
    environment = info.collect()
    del environment["fused_rnn"]["folder"]  # says nothing about speed, and results are published
    return environment | {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "backend": current_backend(),
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "torch_onednn": torch.backends.mkldnn.is_available(),
        "freed_memory_kept": freed_memory_kept,
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "environment": {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)},
    }
