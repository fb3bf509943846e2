"""Which implementation computes a call: the compiled kernels or the plain PyTorch reference.

The only place that imports :mod:`fused_rnn.ops`, and with it the compiled extension.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextvars import ContextVar
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor

from . import formulas
from .settings import AnyCellKind, Settings

__all__ = ["use_backend"]

BACKENDS = ("auto", "fused", "reference")

ops: ModuleType | None
try:
    from . import ops as _ops

    ops, _import_error = _ops, None
except ImportError as error:
    ops, _import_error = None, error


class use_backend:
    """Choose the implementation of every call that follows, or of the calls in a ``with`` block.

    ``"auto"`` (the default): the kernels where they take the device and dtype, else the reference.
    ``"fused"``: the kernels; a call that they cannot take raises ``RuntimeError`` with the reason.
    ``"reference"``: plain PyTorch, :mod:`fused_rnn.formulas`.

    As a statement it sets the default of the process; in a ``with`` statement it holds for the block, in this thread or
    asyncio task only, and there it goes before the default. The environment variable ``FUSED_RNN_BACKEND`` gives the
    default a process starts with. Under :func:`torch.compile` what was set last counts, in whichever thread::

        fused_rnn.use_backend("fused")                # from here on
        with fused_rnn.use_backend("reference"):      # in this block
            expected = layer(input)

    Args:
        name: ``"auto"``, ``"fused"`` or ``"reference"``.

    Raises:
        ValueError: any other name.
    """

    def __init__(self, name: str) -> None:
        _check_name("name", name)
        global _default
        self.name = name
        self._scoped = False
        self._outer: list[str | None] = []
        # Nothing tells here whether a `with` follows, so this is the default until __enter__ takes it back.
        with _lock:
            self._below, _default = _default, self
        _show_compiler()

    def __enter__(self) -> use_backend:
        global _default
        with _lock:
            self._scoped = True
            # Another thread may have stacked its own on top of this one: drop all that turned out to be blocks.
            while _default is not None and _default._scoped:
                _default = _default._below
        self._outer.append(_scope.get())
        _scope.set(self.name)
        _show_compiler()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _scope.set(self._outer.pop())
        _show_compiler()

    def __repr__(self) -> str:
        return f"use_backend({self.name!r})"


def _check_name(argument: str, name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{argument}: expected one of {', '.join(map(repr, BACKENDS))}, got {name!r}")


_lock = threading.Lock()
_scope: ContextVar[str | None] = ContextVar("fused_rnn_backend", default=None)
_default: use_backend | None = None
# Dynamo cannot read a ContextVar, but guards on a global: a compiled function is compiled again when this changes.
_seen_by_compiler = "auto"


def current_backend() -> str:
    """``"auto"``, ``"fused"`` or ``"reference"``: what holds for calls made here and now."""
    if torch.compiler.is_compiling():
        return _seen_by_compiler
    assert _default is not None
    return _scope.get() or _default.name


def _show_compiler() -> None:
    global _seen_by_compiler
    _seen_by_compiler = current_backend()


_name_at_start = os.environ.get("FUSED_RNN_BACKEND", "auto")
_check_name("environment variable FUSED_RNN_BACKEND", _name_at_start)
use_backend(_name_at_start)


def _no_custom_cells(number: int, dtype: torch.dtype, device: torch.device) -> str | None:
    return "no custom cell was loaded"


# Why a custom cell, by the number of its kind, has no kernels for a dtype on the CPU or a CUDA device, None when it
# has: they are compiled when it is first asked. fused_rnn/custom.py puts its function here.
why_no_kernels: Callable[[int, torch.dtype, torch.device], str | None] = _no_custom_cells


def why_reference(
    input: Tensor,
    settings: Settings | None = None,
    recorded: bool = False,
    custom: AnyCellKind | None = None,
) -> str | None:
    """Why the reference computes a call, one sentence; ``None`` if the kernels do.

    Args:
        input: any tensor of the call; the others have its dtype and device.
        settings: of the call, where something is within.
        recorded: whether it keeps what a backward pass needs.
        custom: the kind of a custom cell.

    Raises:
        ImportError: the compiled extension is missing and the backend is not ``"reference"``.
        RuntimeError: the backend is ``"fused"`` and the kernels cannot; the message has the reason. Or the kernels of a
            custom cell for the CPU cannot be compiled.
    """
    name = current_backend()
    if name == "reference":
        return "the backend in use is 'reference'"
    if ops is None:
        raise ImportError(
            f"fused_rnn's compiled extension is not built, or cannot be loaded: {_import_error}. Build it in the "
            "source folder with `pip install --no-build-isolation -e .`, or do without it: "
            "fused_rnn.use_backend('reference')"
        ) from _import_error
    reason: str | None = ops.why_not_fused(input)
    if reason is None and custom is not None and input.device.type in ("cpu", "cuda"):
        reason = why_no_kernels(custom.value, input.dtype, input.device)
    if reason is None and settings is not None and settings.within is not None:
        reason = ops.why_not_within(settings.kind, settings.within, input, recorded)
    if reason is not None and name == "fused":
        raise RuntimeError(f"the backend in use is 'fused': {reason}")
    return reason


def eager_kernels() -> ModuleType | None:
    """The module of the kernels where a call made here and now may try them directly, else ``None``."""
    if torch.compiler.is_compiling() or current_backend() == "reference":
        return None
    return ops


def traced_kernels() -> ModuleType | None:
    """The same for a call that the compiler's tracer sees."""
    if not torch.compiler.is_compiling() or _seen_by_compiler == "reference" or exports_to_onnx():
        return None
    return ops


def exports_to_onnx() -> bool:
    """Whether calls made here and now are written to an ONNX file, by either of PyTorch's exporters."""
    return (torch.compiler.is_exporting() or torch.jit.is_tracing()) and _is_in_onnx_export()


def _is_in_onnx_export() -> bool:
    onnx: Any = sys.modules.get("torch.onnx")  # which takes a while to import: without it there is no export
    if onnx is None or not onnx.is_in_onnx_export():
        return False
    if torch.compiler.is_exporting():
        torch.compiler.allow_in_graph(onnx.ops.symbolic_multi_out)  # what nodes are written with: no part of Dynamo's
    return True


# What torch.compiler.assume_constant_result does, without importing the compiler: Dynamo calls the function instead of
# taking it for one that is False, as it does with torch.onnx's own. The exporter tries Dynamo where it failed without,
# and a call that was refused must be refused again.
_is_in_onnx_export._dynamo_marked_constant = True  # type: ignore[attr-defined]


def implementation(reason: str | None) -> ModuleType:
    """The module that computes a call, by what :func:`why_reference` said: both have ``run_stack`` and ``run_step``."""
    if reason is not None:
        return formulas
    assert ops is not None
    return ops
