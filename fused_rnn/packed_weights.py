"""Packed weights that stay in memory from one inference call to the next.

The kernels multiply by weights in an order of their own. A call of few steps (at most 64, and 1024 rows of all steps)
that records no gradient and sees the same large weights a second time keeps them in that order for the next one. Each
call compares fingerprints of all their bytes with those of the kept copy (a difference is missed with probability
2^-128), so a weight may change in any way, by an optimizer, through ``.data`` or NumPy or by another process: the next
call packs it anew.

Copies take as much memory as the weights themselves, together no more than a limit of 256 MiB per process; beyond
it, those unused for longest go. A model that is deleted leaves its copies behind until then, or until :func:`clear`.

A quantized layer (:func:`fused_rnn.quantize`) keeps its packed weights always, beyond that limit; they go with it.
"""

from __future__ import annotations

from . import backend

__all__ = ["clear", "held", "limit", "set_limit"]


def held() -> int:
    """Bytes of all copies; 0 if the kernels are not built."""
    return 0 if backend.ops is None else int(backend.ops.packed_bytes_held())


def limit() -> int:
    """The most bytes that copies may take; 0 if the kernels are not built."""
    return 0 if backend.ops is None else int(backend.ops.packed_bytes_limit())


def set_limit(bytes: int) -> None:
    """Change :func:`limit` for this process; 0 keeps nothing. Copies beyond it are freed now.

    Raises:
        ValueError: a negative number.
    """
    if bytes < 0:
        raise ValueError(f"bytes: expected at least 0, got {bytes}")
    if backend.ops is not None:
        backend.ops.set_packed_bytes_limit(bytes)


def clear() -> None:
    """Free all copies, and the packed weights of quantized layers, which their next call makes anew."""
    if backend.ops is not None:
        backend.ops.clear_packed()
