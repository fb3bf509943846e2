"""Recurrent layers for PyTorch with kernels of their own, drop-in for those of :mod:`torch.nn`.

:class:`LSTM`, :class:`GRU`, :class:`RNN` and the cells take the place of ``torch.nn``'s; :func:`convert` puts them in a
model that exists, :class:`patch` in those that are being built. :class:`IndRNN` and :class:`SLSTM`, each with a cell,
are ones that ``torch.nn`` lacks. :mod:`fused_rnn.functional` has the same as functions, :mod:`fused_rnn.reference` in
plain PyTorch; :func:`use_backend` chooses, :func:`explain` says what runs, :mod:`fused_rnn.packed_weights` what memory
inference keeps, :mod:`fused_rnn.diagnostics` how gradients and gates fare. :class:`Stream` and :class:`StreamPool`
serve a layer step by step, :func:`quantize` makes its weights smaller, :func:`save_weights` writes them for the C
library, which does so without Python.
"""

from . import diagnostics, functional, packed_weights, reference
from .backend import use_backend
from .cells import GRUCell, LSTMCell, RNNCell
from .convert import ConversionReport, ConversionWarning, convert, revert
from .custom import SLSTM, SLSTMCell, load_cell
from .explain import Explanation, explain
from .indrnn import IndRNN, IndRNNCell
from .layers import GRU, LSTM, RNN
from .patching import patch, unpatch
from .quantized import QuantizedCell, QuantizedLayer, quantize
from .saving import save_weights
from .stream import Stream, StreamPool

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "SLSTM",
    "GRUCell",
    "IndRNN",
    "IndRNNCell",
    "LSTMCell",
    "QuantizedCell",
    "QuantizedLayer",
    "RNNCell",
    "SLSTMCell",
    "Stream",
    "StreamPool",
    "ConversionReport",
    "ConversionWarning",
    "Explanation",
    "convert",
    "diagnostics",
    "explain",
    "functional",
    "load_cell",
    "packed_weights",
    "patch",
    "quantize",
    "reference",
    "revert",
    "save_weights",
    "unpatch",
    "use_backend",
]
