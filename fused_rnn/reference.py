"""The functions of :mod:`fused_rnn.functional` in plain PyTorch, whatever backend is in use.

The same names and arguments. What computes is :mod:`fused_rnn.formulas`: slower than the kernels, for any dtype, on any
device, to any derivative.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from . import functional
from .backend import use_backend

__all__ = ["gru", "gru_cell", "indrnn", "indrnn_cell", "lstm", "lstm_cell", "rnn", "rnn_cell"]

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def _by_formulas(function: FunctionT) -> FunctionT:
    @functools.wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        with use_backend("reference"):
            return function(*args, **options)

    run.__module__ = __name__
    run.__doc__ = f":func:`fused_rnn.functional.{function.__name__}` by the formulas, whatever backend is in use."
    return run  # type: ignore[return-value]


lstm = _by_formulas(functional.lstm)
gru = _by_formulas(functional.gru)
rnn = _by_formulas(functional.rnn)
indrnn = _by_formulas(functional.indrnn)
lstm_cell = _by_formulas(functional.lstm_cell)
gru_cell = _by_formulas(functional.gru_cell)
rnn_cell = _by_formulas(functional.rnn_cell)
indrnn_cell = _by_formulas(functional.indrnn_cell)
