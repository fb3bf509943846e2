"""Which kernels the suite can run here."""

from __future__ import annotations

import functools
import os

import torch


@functools.cache
def fused_available() -> bool:
    """False when the environment asks for the reference formulas: a developer's run without compiled kernels."""
    return os.environ.get("FUSED_RNN_BACKEND") != "reference"


@functools.cache
def available_isas() -> tuple[str, ...]:
    """Names for the `isa` fixture: what `_C` can switch to, or one placeholder for the reference."""
    if not fused_available():
        return ("reference",)
    from fused_rnn import _C

    return tuple(_C.isa_supported())


@functools.cache
def why_no_cuda() -> str | None:
    """Why the tests marked `cuda` cannot run here; None where they can."""
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    if not fused_available():
        return "the fused backend is not in use"
    from fused_rnn import _C

    return None if _C.build_info()["cuda"] else "fused_rnn was built without CUDA"
