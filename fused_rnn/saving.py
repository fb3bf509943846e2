"""Files of weights for programs without PyTorch: what the C library (include/fused_rnn.h) reads."""

from __future__ import annotations

import os
from typing import Any

import torch

from . import _checks
from .settings import CellKind
from .stream import StreamDescription

__all__ = ["save_weights"]

# csrc/library/file.cpp
FORMAT, FORMAT_VERSION = "fused_rnn.weights", 1
_MOST_LAYERS, _MOST_FEATURES = 64, 1 << 20

_DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}
_MATRICES = {torch.int8: "int8", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_CELLS = {0: "rnn", 1: "rnn", 2: "lstm", 3: "gru"}


def save_weights(module: Any, path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
    """Write the weights of a layer, and what it computes, into a file for ``fused_rnn_weights_load`` of the C library.

    The file is one of safetensors: tensors ``weight_ih_l{k}``, ``weight_hh_l{k}`` (G*H, P / ``num_heads``) and so on,
    of the shapes that :class:`LSTM` describes, and metadata with the cell, sizes, options and the version of the format
    (docs/c-library.md). Of a module that :func:`quantize` has made the matrices are written as they are stored, with
    ``scale_ih_l{k}``, ``scale_hh_l{k}`` (G*H) and ``scale_hr_l{k}`` (P) beside those of int8. It needs the package
    ``safetensors``.

    Args:
        module: what a :class:`Stream` takes: a layer of one direction or a cell, of :mod:`fused_rnn`, quantized or
            not, or :mod:`torch.nn`, of up to 64 layers and 1048576 features. Saved is what it computes in eval mode.
        path: of the file, which is replaced.
        dtype: float32, float64 or bfloat16, to which the weights are rounded; ``None`` for that of the module.

    Raises:
        TypeError: ``module`` is another kind of object.
        ValueError: a module that cannot be a stream, or is too large, with the reason, or another dtype.
        ImportError: ``safetensors`` is not installed.
        OSError: the file cannot be written.
    """
    description = StreamDescription(module, dtype)
    _checks.check_saved_dtype(description.dtype, list(_DTYPES))
    _checks.check_saved_sizes(description.num_layers, _MOST_LAYERS, description.largest_size, _MOST_FEATURES)
    tensors = description.named_weights()
    try:
        from safetensors.torch import save
    except ImportError as error:
        _checks.raise_no_safetensors(error)
    # Its own save_file leaves half a file, and an error of its own kind, where the disk is full.
    contents = save(tensors, metadata=_metadata(description))
    with open(path, "wb") as file:
        file.write(contents)


def _metadata(description: StreamDescription) -> dict[str, str]:
    """Whole numbers in decimals, others as :meth:`float.hex` writes them, so that nothing is rounded."""
    within = description.within
    activation = "relu" if description.kind == CellKind.RNN_RELU else within.activation
    values: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "cell": _CELLS[int(description.kind)],
        "dtype": _DTYPES[description.dtype],
        "num_layers": description.num_layers,
        "input_size": description.input_size,
        "hidden_size": description.hidden_size,
        "proj_size": description.state_size if description.state_size != description.hidden_size else 0,
        "num_heads": within.num_heads,
        "biases": description.num_biases,
        "activation": activation,
        "recurrent_activation": within.recurrent_activation,
        "peephole": int(within.peephole),
        "coupled_gates": int(within.coupled_gates),
        "layer_norm": int(within.layer_norm),
        "cell_clip": float(within.cell_clip or 0.0),
        "zoneout": float(within.zoneout),
        "zoneout_cell": float(within.zoneout_cell),
        "matrices": "same" if description.matrix_dtype is None else _MATRICES[description.matrix_dtype],
    }
    return {name: value.hex() if isinstance(value, float) else str(value) for name, value in values.items()}
