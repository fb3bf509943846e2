"""Recurrent layers and cells as functions of their parameters.

Shapes, with T steps, B batch rows, I ``input_size``, H ``hidden_size``, P ``proj_size`` (H without a projection),
L layers, D directions and G gates per unit (LSTM 4, GRU 3, RNN 1)::

    input        (T, B, I); (B, T, I) with batch_first; (T, I) without a batch; packed data (N, I) with batch_sizes
    h_0, h_n     (L*D, B, P), or (L*D, P) without a batch
    c_0, c_n     (L*D, B, H), or (L*D, H) without a batch
    output       as the input, with D*P in place of I
    lengths      (B), or () without a batch
    mask, reset  (T, B); (B, T) with batch_first; (T) without a batch
    reset_state  as the initial states
    h, c         of every step: (L*D, T, B, P or H), (L*D, B, T, .) with batch_first, (L*D, T, .) without a batch,
                 (L*D, N, .) of packed data

``params`` is the flat list of :mod:`torch.nn`, for each layer, and in it each direction: ``weight_ih`` (G*H, I; D*P in
place of I above the first layer), ``weight_hh`` (G*H, P; with ``num_heads`` H / num_heads in place of P), with ``bias``
``bias_ih`` (G*H) and ``bias_hh`` (G*H), with a projection ``weight_hr`` (P, H), with ``peephole`` ``weight_peephole``
(3*H), with ``layer_norm`` ``weight_norm_ih`` and ``weight_norm_hh`` (G*H), and for an LSTM ``weight_norm_c`` and, with
``bias``, ``bias_norm_c`` (H). :func:`torch.nn.Module.parameters` of a layer gives it in this order. The rows of a
weight are in the order i, f, g, o for an LSTM and r, z, n for a GRU, those of the peepholes i, f, o.
``recurrent_bias=False`` is without ``bias_hh``.

Dtypes: float32, float64, bfloat16 and float16, and the complex ones through the reference; input, states and
parameters share one. Under :class:`torch.autocast` they are cast as ``torch.nn`` has it: to the autocast dtype, except
that on the CPU a GRU, an LSTM with a packed input, ``lstm_cell`` and ``gru_cell`` keep the dtype of their state.

Errors: ``TypeError`` for an argument of another kind, ``ValueError`` for a wrong number of dimensions or an input of
another dtype than the parameters, ``RuntimeError`` for every other size, dtype or device that does not fit, each naming
the argument.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import _checks, backend, onnx_nodes
from .settings import (
    CALL_OPTIONS,
    EVERY_STEP,
    FUNCTION_OPTIONS,
    INDRNN_CALL_OPTIONS,
    INDRNN_STEP_OPTIONS,
    NO_CONTROLS,
    NOTHING_AROUND,
    NOTHING_WITHIN,
    OF_INDEPENDENT_UNITS,
    OTHER_NONLINEARITIES,
    STATES_OF_EVERY_STEP,
    STEP_FUNCTION_OPTIONS,
    STEP_OPTIONS,
    Around,
    CallOptions,
    CellKind,
    Controls,
    FunctionKeywords,
    IndRNNCallOptions,
    IndRNNStepFunctionOptions,
    LSTMKeywords,
    RNNKeywords,
    Settings,
    StepFunctionOptions,
    Steps,
    Within,
    cell_settings,
    show_options,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["gru", "gru_cell", "indrnn", "indrnn_cell", "lstm", "lstm_cell", "rnn", "rnn_cell"]

# What autocast casts; float64 and complex tensors it leaves alone.
_LSTM, _GRU = CellKind.LSTM, CellKind.GRU
_AUTOCAST_FROM = (torch.float32, torch.float16, torch.bfloat16)


@overload
def lstm(
    input: Tensor,
    hx: Sequence[Tensor] | None,
    params: Sequence[Tensor],
    *,
    return_states: Literal[False] = False,
    **keywords: Unpack[LSTMKeywords],
) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...


@overload
def lstm(
    input: Tensor,
    hx: Sequence[Tensor] | None,
    params: Sequence[Tensor],
    *,
    return_states: Literal[True],
    **keywords: Unpack[LSTMKeywords],
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]: ...


@show_options(CALL_OPTIONS)
def lstm(
    input: Tensor,
    hx: Sequence[Tensor] | None,
    params: Sequence[Tensor],
    *,
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    proj_size: int = 0,
    batch_sizes: Tensor | None = None,
    **options: Unpack[CallOptions],
) -> Any:
    """A stack of LSTM layers over a sequence (Hochreiter and Schmidhuber 1997; Gers 2000; projection: Sak 2014).

    Args:
        input, params: see the module for shapes and order.
        hx: ``(h_0, c_0)``, or ``None`` for zeros.
        bias: whether ``params`` holds biases.
        num_layers: L.
        dropout: probability with which an element of every layer's output but the last is zeroed while ``training``.
        training: whether dropout is applied.
        bidirectional: D = 2.
        batch_first: ``input`` and ``output`` are (B, T, .); without effect on unbatched and packed input.
        proj_size: P, 0 for none.
        batch_sizes: int64 (T) on the CPU, the number of sequences still running at each step, never rising; ``input``
            is then packed data as in :class:`torch.nn.utils.rnn.PackedSequence`.
        recompute: keep only the states for the backward pass, and compute the gates there again: less memory, more
            time, the same numbers.
        input_dropout, recurrent_dropout, weight_dropout, zoneout, zoneout_cell: as :class:`fused_rnn.LSTM` has them;
            drawn while ``training``.
        activation, recurrent_activation, recurrent_bias, peephole, coupled_gates, num_heads, cell_clip: the same.
        layer_norm, recurrent_grad_clip, bptt_steps: the same.
        lengths: steps of each row from the first, any integer dtype on any device, 0 to T. On the CPU an error says if
            one is not in that range; on other devices, and under :func:`torch.compile`, a negative one counts as 0 and
            a larger one as T.
        mask: bool on the input's device, True for each step that counts. With ``lengths`` both must say so. In any
            other step a row keeps its state exactly, in either direction, and its output is 0; what stands in the input
            there, NaN included, changes nothing, and its gradient is 0. A row of no step ends in its initial state.
            Neither goes with ``batch_sizes``.
        reset: bool on the input's device, shaped like ``mask``. Where True the row's state is thrown away before that
            step, in every layer, and begins anew; the reverse direction begins anew after it has read that step. No
            gradient goes from one side to the other. In a step that does not count, too. Not with ``batch_sizes``.
        reset_state: ``(h, c)`` that rows begin anew from, shaped like ``hx``; ``None`` for zeros. Only with ``reset``.
        return_states: whether to return the states of every step, too.

    Returns:
        ``(output, (h_n, c_n))``. With ``batch_first`` the output is a transposed view of (T, B, D*P) storage.

        With ``return_states`` ``(output, (h_n, c_n), (h, c))``, the last two of every layer and direction after every
        step, as :class:`fused_rnn.LSTM` has them.
    """
    if not _gives_sizes(params):
        given = {"bias": bias, "num_layers": num_layers, "dropout": dropout, "training": training}
        given |= {"bidirectional": bidirectional, "batch_first": batch_first, "proj_size": proj_size}
        return _call_without_sizes(lstm, input, hx, params, given | {"batch_sizes": batch_sizes} | options)
    settings = _settings_of_params(
        CellKind.LSTM, params, proj_size, bias, num_layers, dropout, training, bidirectional, batch_first, options
    )
    return call_layers(settings, input, hx, params, _steps_of(batch_sizes, options))


@overload
def gru(
    input: Tensor,
    hx: Tensor | None,
    params: Sequence[Tensor],
    *,
    return_states: Literal[False] = False,
    **keywords: Unpack[FunctionKeywords],
) -> tuple[Tensor, Tensor]: ...


@overload
def gru(
    input: Tensor,
    hx: Tensor | None,
    params: Sequence[Tensor],
    *,
    return_states: Literal[True],
    **keywords: Unpack[FunctionKeywords],
) -> tuple[Tensor, Tensor, Tensor]: ...


@show_options(CALL_OPTIONS)
def gru(
    input: Tensor,
    hx: Tensor | None,
    params: Sequence[Tensor],
    *,
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    **options: Unpack[CallOptions],
) -> Any:
    """A stack of GRU layers over a sequence (Cho 2014; reset gate after the product with W_hh).

    Args:
        hx: ``h_0``, or ``None`` for zeros.
        reset_after: ``False`` for the reset gate before the product. The others: see :func:`lstm`.

    Returns:
        ``(output, h_n)``; with ``return_states`` ``(output, h_n, h)``.
    """
    if not _gives_sizes(params):
        given = {"bias": bias, "num_layers": num_layers, "dropout": dropout, "training": training}
        given |= {"bidirectional": bidirectional, "batch_first": batch_first}
        return _call_without_sizes(gru, input, hx, params, given | {"batch_sizes": batch_sizes} | options)
    settings = _settings_of_params(
        CellKind.GRU, params, 0, bias, num_layers, dropout, training, bidirectional, batch_first, options
    )
    return call_layers(settings, input, hx, params, _steps_of(batch_sizes, options))


@overload
def rnn(
    input: Tensor,
    hx: Tensor | None,
    params: Sequence[Tensor],
    *,
    return_states: Literal[False] = False,
    **keywords: Unpack[RNNKeywords],
) -> tuple[Tensor, Tensor]: ...


@overload
def rnn(
    input: Tensor,
    hx: Tensor | None,
    params: Sequence[Tensor],
    *,
    return_states: Literal[True],
    **keywords: Unpack[RNNKeywords],
) -> tuple[Tensor, Tensor, Tensor]: ...


@show_options(CALL_OPTIONS)
def rnn(
    input: Tensor,
    hx: Tensor | None,
    params: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    **options: Unpack[CallOptions],
) -> Any:
    """A stack of Elman layers over a sequence (Elman 1990).

    Args:
        hx: ``h_0``, or ``None`` for zeros.
        nonlinearity: as :class:`fused_rnn.RNN` has it. The others: see :func:`lstm`.

    Returns:
        ``(output, h_n)``; with ``return_states`` ``(output, h_n, h)``.
    """
    if not _gives_sizes(params):
        given = {"nonlinearity": nonlinearity, "bias": bias, "num_layers": num_layers, "dropout": dropout}
        given |= {"training": training, "bidirectional": bidirectional, "batch_first": batch_first}
        return _call_without_sizes(rnn, input, hx, params, given | {"batch_sizes": batch_sizes} | options)
    settings = _settings_of_params(
        rnn_kind(nonlinearity), params, 0, bias, num_layers, dropout, training, bidirectional, batch_first, options
    )
    settings = settings._replace(within=with_nonlinearity(settings.within, nonlinearity))
    return call_layers(settings, input, hx, params, _steps_of(batch_sizes, options))


@show_options(INDRNN_CALL_OPTIONS)
def indrnn(
    input: Tensor,
    hx: Tensor | None,
    params: Sequence[Tensor],
    *,
    nonlinearity: str = "relu",
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    **options: Unpack[IndRNNCallOptions],
) -> tuple[Tensor, Tensor]:
    """A stack of independently recurrent layers over a sequence (Li, Li, Cook, Zhu and Gao 2018).

    Args:
        params: for each layer, and in it each direction, ``weight_ih`` (H, I; D*H in place of I above the first layer),
            ``weight_hh`` (H), with ``bias`` ``bias_ih`` (H).
        nonlinearity: as :class:`fused_rnn.IndRNN` has it. The others: see :func:`rnn`.

    Returns:
        ``(output, h_n)``.
    """
    if not _gives_sizes(params):
        given = {"nonlinearity": nonlinearity, "bias": bias, "num_layers": num_layers, "dropout": dropout}
        given |= {"training": training, "bidirectional": bidirectional, "batch_first": batch_first}
        return _call_without_sizes(indrnn, input, hx, params, given | {"batch_sizes": batch_sizes} | options)
    _checks.check_names("this function", options, INDRNN_CALL_OPTIONS)
    as_rnn: CallOptions = {**options, "num_heads": max(1, params[0].shape[0]), "recurrent_bias": False}
    settings = _settings_of_params(
        rnn_kind(nonlinearity), params, 0, bias, num_layers, dropout, training, bidirectional, batch_first, as_rnn
    )
    settings = settings._replace(
        around=(settings.around or NOTHING_AROUND)._replace(independent=True),
        within=with_nonlinearity(settings.within, nonlinearity),
    )
    return call_layers(settings, input, hx, params, _steps_of(batch_sizes, options))


@show_options(STEP_FUNCTION_OPTIONS)
def lstm_cell(
    input: Tensor,
    hx: Sequence[Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    reset_state: tuple[Tensor, Tensor] | None = None,
    w_peephole: Tensor | None = None,
    norms: Sequence[Tensor] | None = None,
    training: bool = False,
    **options: Unpack[StepFunctionOptions],
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM.

    Args:
        input: (B, I), or (I) without a batch.
        hx: ``(h, c)``, each (B, H), or (H) without a batch; ``None`` for zeros.
        w_ih, w_hh: (4*H, I) and (4*H, H / num_heads). b_ih, b_hh: (4*H), or ``None``.
        w_peephole: (3*H) of i, f, o, or ``None``.
        norms: of layer normalisation the gains of W_ih x and W_hh h (4*H), that of c (H), and where there are biases
            the bias of c (H), in this order; or ``None``.
        reset: bool (B), or () without a batch, on the input's device: rows whose state is thrown away before the step.
        reset_state: ``(h, c)`` that they begin anew from, shaped like ``hx``; ``None`` for zeros. Only with ``reset``.
        training: whether recurrent_dropout and zoneout are drawn, for this step alone.
        recurrent_dropout, zoneout, zoneout_cell, activation, recurrent_activation, coupled_gates, num_heads, cell_clip:
            as :class:`fused_rnn.LSTM` has them.

    Returns:
        ``(h, c)`` after the step.
    """
    given = (w_ih, w_hh, b_ih, b_hh)
    steps = cell_steps(reset, reset_state)
    extras = _CellExtras(w_peephole, norms)
    return _functional_cell(CellKind.LSTM, "tanh", input, hx, given, extras, steps, training, options)


@show_options(STEP_FUNCTION_OPTIONS)
def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    reset_state: Tensor | None = None,
    norms: Sequence[Tensor] | None = None,
    training: bool = False,
    **options: Unpack[StepFunctionOptions],
) -> Tensor:
    """One step of a GRU: ``hx`` and the result are h, weights have 3*H rows, the rest is as for :func:`lstm_cell`.

    ``reset_after`` is :class:`fused_rnn.GRU`'s; ``norms`` are the gains of W_ih x and W_hh h.
    """
    given, steps = (w_ih, w_hh, b_ih, b_hh), cell_steps(reset, reset_state)
    extras = _CellExtras(None, norms)
    return _functional_cell(CellKind.GRU, "tanh", input, hx, given, extras, steps, training, options)


@show_options(STEP_FUNCTION_OPTIONS)
def rnn_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    nonlinearity: str = "tanh",
    *,
    reset: Tensor | None = None,
    reset_state: Tensor | None = None,
    norms: Sequence[Tensor] | None = None,
    training: bool = False,
    **options: Unpack[StepFunctionOptions],
) -> Tensor:
    """One step of an Elman network: weights have H rows, the rest is as for :func:`gru_cell`.

    ``nonlinearity`` is :class:`fused_rnn.RNN`'s; of the options it has ``recurrent_dropout``, ``zoneout`` and
    ``num_heads``.
    """
    given, steps = (w_ih, w_hh, b_ih, b_hh), cell_steps(reset, reset_state)
    extras = _CellExtras(None, norms)
    return _functional_cell(rnn_kind(nonlinearity), nonlinearity, input, hx, given, extras, steps, training, options)


@show_options(INDRNN_STEP_OPTIONS)
def indrnn_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    nonlinearity: str = "relu",
    *,
    reset: Tensor | None = None,
    reset_state: Tensor | None = None,
    training: bool = False,
    **options: Unpack[IndRNNStepFunctionOptions],
) -> Tensor:
    """One step of an independently recurrent network: ``w_hh`` is (H), and there is one bias (H), or ``None``.

    ``nonlinearity`` is :class:`fused_rnn.IndRNN`'s; of the options it has ``recurrent_dropout`` and ``zoneout``. The
    rest is as for :func:`rnn_cell`.
    """
    weights, steps = (w_ih, w_hh, b_ih), cell_steps(reset, reset_state)
    if not _is_matrix(w_ih):
        given = {"nonlinearity": nonlinearity, "training": training}
        return _call_cell_without_sizes(indrnn_cell, input, hx, weights, given, steps, options)
    kind = rnn_kind(nonlinearity)
    hidden_size, input_size = w_ih.shape
    if hidden_size < 1 or input_size < 1:
        _checks.raise_first_weight_empty(kind, w_ih, "w_ih")
    _checks.check_names("this function", options, INDRNN_STEP_OPTIONS)
    _checks.check_flag("training", training)
    as_rnn: StepFunctionOptions = {**options, "num_heads": hidden_size}
    within = with_nonlinearity(_within_cell(kind, hidden_size, _NO_EXTRAS, training, as_rnn), nonlinearity)
    params = indrnn_cell_params(*weights)
    names = _CELL_NAMES[: len(params)]
    settings = cell_settings(kind, input_size, hidden_size, names, within, OF_INDEPENDENT_UNITS)
    return call_cell(settings, input, hx, params, steps)


def rnn_kind(nonlinearity: str) -> CellKind:
    _checks.check_nonlinearity(nonlinearity)
    return CellKind.RNN_RELU if nonlinearity == "relu" else CellKind.RNN_TANH


def with_nonlinearity(within: Within | None, nonlinearity: str) -> Within | None:
    """What an RNN of :func:`rnn_kind` has within."""
    if nonlinearity not in OTHER_NONLINEARITIES:
        return within
    return (within or NOTHING_WITHIN)._replace(activation=nonlinearity)


def _settings_of_params(
    kind: CellKind,
    params: Sequence[Tensor],
    proj_size: int,
    bias: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
    options: CallOptions,
) -> Settings:
    """Where no module says what the sizes are, the first input weight (G*H, I) does."""
    rows, input_size = params[0].shape
    hidden_size = rows // kind.num_gates
    if hidden_size < 1 or input_size < 1:
        _checks.raise_first_weight_empty(kind, params[0])
    _checks.check_names("this function", options, CALL_OPTIONS)
    _checks.check_counts(num_layers, proj_size, hidden_size)
    _checks.check_dropout(dropout)
    flags = (("bias", bias), ("training", training), ("bidirectional", bidirectional), ("batch_first", batch_first))
    for name, flag in flags:
        _checks.check_flag(name, flag)
    _checks.check_options(options)
    _checks.check_fit(
        options,
        is_lstm=kind == CellKind.LSTM,
        is_gru=kind == CellKind.GRU,
        hidden_size=hidden_size,
        bias=bias,
        bidirectional=bidirectional,
        proj_size=proj_size,
    )
    given: dict[str, Any] = {name: value for name, value in options.items() if name in FUNCTION_OPTIONS}
    around = Around(**{name: given.pop(name) for name in Around._fields if name in given})
    if not training:
        around = around.in_eval_mode()
    within = Within(**{name: given.pop(name) for name in Within._fields if name in given}).in_mode(training)
    return Settings(
        input_size,
        hidden_size,
        proj_size or hidden_size,
        kind,
        bias,
        num_layers,
        bidirectional,
        batch_first,
        dropout=dropout if training else 0.0,
        around=None if around == NOTHING_AROUND else around,
        within=None if within == NOTHING_WITHIN else within,
        **given,
    )


def _gives_sizes(params: Any) -> bool:
    return isinstance(params, (list, tuple)) and len(params) > 0 and _is_matrix(params[0])


def _call_without_sizes(
    function: Callable[..., Any], input: Any, hx: Any, params: Any, given: Mapping[str, Any]
) -> Any:
    """A call whose first weight has no sizes to tell: one for ``__torch_function__``, of a graph's node, or wrong."""
    states, weights = (v if isinstance(v, (tuple, list)) else (v,) for v in (hx, params))
    of_steps = [given[name] for name in Steps._fields if name in given]
    tensors = (input, *states, *weights, *_flat(of_steps))
    if not _is_overridden(tensors):
        _checks.raise_first_weight(params)
    defaults = CALL_OPTIONS | (function.__kwdefaults__ or {})
    changed = {name: value for name, value in given.items() if name not in defaults or value is not defaults[name]}
    return handle_torch_function(function, tensors, input, hx, params, **changed)


def _steps_of(batch_sizes: Tensor | None, options: CallOptions | IndRNNCallOptions) -> Steps:
    return steps_of(batch_sizes, {name: value for name, value in options.items() if name in STEP_OPTIONS})


class _CellExtras(NamedTuple):
    """Parameters of a cell's options, as its caller gave them."""

    w_peephole: Any = None
    norms: Any = None


def _functional_cell(
    kind: CellKind,
    nonlinearity: str,
    input: Tensor,
    hx: Any,
    weights: tuple[Any, ...],
    extras: _CellExtras,
    steps: Steps,
    training: bool,
    options: StepFunctionOptions,
) -> Any:
    w_ih = weights[0]
    if not _is_matrix(w_ih):
        given = {"nonlinearity": nonlinearity, **extras._asdict(), "training": training}
        return _call_cell_without_sizes(_PUBLIC_CELLS[kind], input, hx, weights, given, steps, options)
    rows, input_size = w_ih.shape
    params = cell_params(*weights)
    names = _CELL_NAMES[: len(params)]
    cell = (kind, input_size, rows // kind.num_gates)
    if extras == _NO_EXTRAS and not options and nonlinearity not in OTHER_NONLINEARITIES:
        return call_cell(cell_settings(*cell, names), input, hx, params, steps)
    _checks.check_flag("training", training)
    within = _within_cell(kind, cell[2], extras, training, options)
    within = with_nonlinearity(within, nonlinearity)
    if extras.w_peephole is not None:
        names, params = (*names, "w_peephole"), [*params, extras.w_peephole]
    if extras.norms is not None:
        _checks.check_norms(kind, len(params) > 3, extras.norms)
        names = (*names, *(f"norms[{index}]" for index in range(len(extras.norms))))
        params = [*params, *extras.norms]
    return call_cell(cell_settings(*cell, names, *([] if within is None else [within])), input, hx, params, steps)


def _call_cell_without_sizes(
    function: Callable[..., Any],
    input: Any,
    hx: Any,
    weights: tuple[Any, ...],
    given: Mapping[str, Any],
    steps: Steps,
    options: Mapping[str, Any],
) -> Any:
    """:func:`_call_without_sizes` of a cell; ``given``: its keywords but for those of its options and steps."""
    tensors = (*_flat([hx]), input, *weights, *_flat(list(given.values())), *_flat(steps))
    if not _is_overridden(tensors):
        _checks.raise_not_matrix("w_ih", weights[0])
    defaults = _CELL_DEFAULTS | ({"nonlinearity": "relu"} if function is indrnn_cell else {})
    changed: dict[str, Any] = {k: value for k, value in given.items() if value is not defaults[k]}
    changed |= {**_given(steps), **options}
    return handle_torch_function(function, tensors, input, hx, *weights, **changed)


def _within_cell(
    kind: CellKind, hidden_size: int, extras: _CellExtras, training: bool, options: StepFunctionOptions
) -> Within | None:
    _checks.check_names("this function", options, STEP_FUNCTION_OPTIONS)
    _checks.check_options(options)
    is_lstm, is_gru = kind == CellKind.LSTM, kind == CellKind.GRU
    has = {"peephole": extras.w_peephole is not None, "layer_norm": extras.norms is not None}
    _checks.check_fit({**options, **has}, is_lstm=is_lstm, is_gru=is_gru, hidden_size=hidden_size)
    within = Within(**has, **options).in_mode(training)
    return None if within == NOTHING_WITHIN else within


def cell_params(w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any) -> list[Any]:
    """Parameters of a cell as a list of four, or of two without biases; a bias missing beside the other is zeros."""
    if b_ih is None and b_hh is None:
        return [w_ih, w_hh]
    b_ih = torch.zeros_like(b_hh) if b_ih is None else b_ih
    b_hh = torch.zeros_like(b_ih) if b_hh is None else b_hh
    return [w_ih, w_hh, b_ih, b_hh]


def indrnn_cell_params(w_ih: Any, w_hh: Any, b_ih: Any) -> list[Any]:
    """The same of an IndRNN's cell, which has one bias or none."""
    return [w_ih, w_hh] if b_ih is None else [w_ih, w_hh, b_ih]


def _is_matrix(weight: Any) -> bool:
    return isinstance(weight, Tensor) and weight.dim() == 2


# What layers, cells and explain share.


class Call(NamedTuple):
    """A checked call, and who computes it."""

    input: Tensor
    h: Tensor | None
    c: Tensor | None
    controls: Controls
    num_steps: int
    batch: int | None  # None: no batch dimension
    why_reference: str | None  # None: the kernels compute it
    anew: tuple[Tensor, ...] = ()  # h, and c of an LSTM, that rows begin anew from; none: zeros


def steps_of(batch_sizes: Tensor | None, given: Mapping[str, Any]) -> Steps:
    """The record of what a caller says of its steps; :data:`EVERY_STEP` itself where that is nothing."""
    _checks.check_names("this call", given, STEP_OPTIONS)
    if "return_states" in given:
        _checks.check_flag("return_states", given["return_states"])
    if batch_sizes is None and all(value is STEP_OPTIONS[name] for name, value in given.items()):
        return EVERY_STEP
    steps = Steps(batch_sizes, **given)
    only_states = steps.return_states and all(value is None for value in steps[:-1])
    return STATES_OF_EVERY_STEP if only_states else steps


def cell_steps(reset: Any, reset_state: Any) -> Steps:
    """The same of a cell."""
    if reset is None and reset_state is None:
        return EVERY_STEP
    return Steps(reset=reset, reset_state=reset_state)


def call_layers(settings: Settings, input: Any, hx: Any, params: Sequence[Any], steps: Steps = EVERY_STEP) -> Any:
    """A whole stack: ``(output, (h_n, c_n))`` of an LSTM, ``(output, h_n)`` of the others; with ``return_states`` the
    states of every step after them, ``(h, c)`` or h."""
    results = None
    if (
        steps is EVERY_STEP
        and settings.around is None
        and settings.within is None
        and not (settings.dropout and settings.num_layers > 1)
    ):
        # The operator checks what it is given, so the usual call need not be checked twice, which would take as long as
        # a small one computes. What is wrong with a call that is not valid, prepare_layers says in the user's terms.
        kernels = backend.eager_kernels()
        if kernels is not None:
            results = kernels.try_stack(settings, input, hx, params)
        # (Of a custom cell the long way asks first whether there are kernels.)
        elif settings.kind <= _GRU and (kernels := backend.traced_kernels()) is not None:
            results = kernels.trace_stack(settings, input, hx, params)
    if results is None:
        if steps is STATES_OF_EVERY_STEP:
            results = _try_states(settings, input, hx, params)
        if results is None:
            tensors = _tensors(input, hx, params, steps)
            if settings.kind in _PUBLIC and _is_overridden(tensors):  # a custom cell has no function
                return _call_override(settings, tensors, input, hx, params, steps)
            results = _run_layers(settings, input, hx, params, steps)
        if steps.return_states:
            output, h_n, c_n, states = results
            return (output, (h_n, c_n), states) if settings.kind.num_states else (output, h_n, states[0])
    output, h_n, c_n = results
    has_cell = settings.kind is _LSTM or (settings.kind > _GRU and settings.kind.num_states > 0)
    return (output, (h_n, c_n)) if has_cell else (output, h_n)


def _try_states(settings: Settings, input: Any, hx: Any, params: Sequence[Any]) -> tuple[Any, ...] | None:
    """The usual call that wants the states of every step, and nothing else of its steps; ``None`` for any other."""
    if settings.around is not None or settings.within is not None or (settings.dropout and settings.num_layers > 1):
        return None
    kernels = backend.eager_kernels()
    found = None if kernels is None else kernels.try_stack(settings, input, hx, params, True)
    if found is None:
        return None
    output, h_n, c_n, cells, hidden = found
    num_steps, batch = input.shape[:2][::-1] if settings.batch_first else input.shape[:2]
    return output, h_n, c_n, _states_of_steps(settings, num_steps, batch, cells, hidden)


def call_cell(settings: Settings, input: Any, hx: Any, params: Sequence[Any], steps: Steps = EVERY_STEP) -> Any:
    """One step of a cell: ``(h, c)`` of one with private states, h of the others."""
    results = None
    kind = settings.kind
    if steps is EVERY_STEP and settings.within is None:
        kernels = backend.eager_kernels()  # as in call_layers
        if kernels is not None:
            results = kernels.try_step(settings, input, hx, params)  # not of a custom cell, nor of vectors as W_hh
        elif kind <= _GRU and settings.around is None and (kernels := backend.traced_kernels()) is not None:
            results = kernels.trace_step(settings, input, hx, params)
    if results is None:
        tensors = _tensors(input, hx, params, steps)
        if kind in _PUBLIC_CELLS and _is_overridden(tensors):  # a custom cell has no function
            return _call_override(settings, tensors, input, hx, params, steps)
        results = _run_cell(settings, input, hx, params, steps)
    return results if kind is _LSTM or (kind > _GRU and kind.num_states > 0) else results[0]


def _tensors(input: Any, hx: Any, params: Sequence[Any], steps: Steps) -> tuple[Any, ...]:
    if steps is EVERY_STEP:
        states = hx if isinstance(hx, (tuple, list)) else (hx,)
        return (input, *states, *params)
    return (*_flat([input, hx]), *params, *_flat(steps))


def _flat(arguments: Sequence[Any]) -> list[Any]:
    """With the states of an LSTM one by one."""
    return [t for value in arguments for t in (value if isinstance(value, (tuple, list)) else (value,))]


def _given(steps: Steps) -> dict[str, Any]:
    return {name: value for name, value in steps._asdict().items() if value is not _DEFAULTS[name]}


def _is_overridden(tensors: tuple[Any, ...]) -> bool:
    """Whether one of these, or a mode, gives functions of tensors its own meaning. A tracer sees operators instead."""
    return not torch.compiler.is_compiling() and has_torch_function(tensors)


def _call_override(
    settings: Settings, tensors: tuple[Any, ...], input: Any, hx: Any, params: Sequence[Any], steps: Steps
) -> Any:
    """The call as that of a public function, which ``__torch_function__`` of its tensors sees."""
    function, also = _PUBLIC[settings.kind]
    of_cell = _PUBLIC_CELLS[settings.kind]
    around, within = settings.around or NOTHING_AROUND, settings.within or NOTHING_WITHIN
    if settings.kind == CellKind.RNN_TANH and within.activation != "tanh":
        also = {"nonlinearity": within.activation}
        within = within._replace(activation="tanh")
    if around.independent:
        function, of_cell, also = indrnn, indrnn_cell, {"nonlinearity": "tanh"} | also
        around, within = around._replace(recurrent_bias=True), within._replace(num_heads=1)
    training = bool(settings.dropout) or around != around.in_eval_mode() or within != within.in_mode(False)
    fields = settings._asdict() | around._asdict() | within._asdict() | steps._asdict()
    if settings.is_cell:
        changed = {name: fields[name] for name in STEP_FUNCTION_OPTIONS if not _is_default(name, fields[name])}
        if count := settings.num_norms:
            params, changed["norms"] = params[:-count], tuple(params[-count:])
        if within.peephole:
            *params, changed["w_peephole"] = params
        changed |= ({"training": True} if training else {}) | _given(steps)
        return handle_torch_function(of_cell, tensors, input, hx, *params, **also, **changed)
    names = (*_ARGUMENTS, *FUNCTION_OPTIONS, *Steps._fields)
    arguments = {name: fields[name] for name in names if not _is_default(name, fields[name])}
    if training:
        arguments["training"] = True
    if settings.state_size != settings.hidden_size:
        arguments["proj_size"] = settings.state_size
    return handle_torch_function(function, tensors, input, hx, params, **arguments, **also)


def _is_default(name: str, value: Any) -> bool:
    default = _DEFAULTS[name]
    return value is default or (name not in Steps._fields and bool(value == default))


def prepare_layers(settings: Settings, input: Tensor, hx: Any, params: Sequence[Any], steps: Steps) -> Call:
    """Check a call of a whole stack. What it draws at random it does not have yet."""
    h, c = (None, None) if hx is None else _checks.split_state(settings.kind, hx)
    num_steps, batch = _checks.check_layer_input(settings, input, steps.batch_sizes)
    _checks.check_params(settings, params, input)
    if h is not None:
        if batch != _checks.UNKNOWN:
            _checks.check_layer_states(settings, h, c, batch)
        _checks.check_states_like_input(input, h, c)
    _checks.check_steps(settings, steps, input, num_steps, batch)
    mask = live_steps(settings, steps, input, num_steps, batch)
    reset = None if steps.reset is None else _in_time_order(settings, steps.reset, batch).contiguous()
    controls = Controls(steps.batch_sizes, mask, reset=reset)
    anew = _anew(settings, steps)
    within = _what_is_within(settings, num_steps, steps, (input, h, c, *params, *anew))
    custom = settings.kind if settings.kind > _GRU else None
    why_reference = backend.why_reference(input, *within, custom=custom)
    return Call(input, h, c, controls, num_steps, batch, why_reference, anew)


def _anew(settings: Settings, steps: Steps) -> tuple[Tensor, ...]:
    states = _checks.split_state(settings.kind, steps.reset_state, "reset_state")
    return tuple(state for state in states if state is not None)


def _in_time_order(settings: Settings, steps: Tensor, batch: int | None) -> Tensor:
    """(T, B) of what a caller says of each step."""
    if batch is None:
        return steps.unsqueeze(1)
    return steps.transpose(0, 1) if settings.batch_first else steps


def _what_is_within(
    settings: Settings, num_steps: int, steps: Steps, tensors: tuple[Tensor | None, ...]
) -> tuple[Settings | None, bool]:
    """What :func:`backend.why_reference` has to know of a call whose settings these are, if anything."""
    if steps.return_states:
        settings = _with_states(settings)
    if settings.within is None:
        return None, False
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors if t is not None)
    settings = _of_call(settings, num_steps)
    return (_without_bptt_steps(settings) if _is_sliced(settings, steps, tensors[0]) else settings), recorded


def is_in_slices(settings: Settings, steps: Steps, call: Call) -> bool:
    """Whether gradients are stopped by calls of ``bptt_steps`` steps each; else the operator does it."""
    within = _of_call(settings, call.num_steps).within
    return within is not None and within.bptt_steps is not None and _is_sliced(settings, steps, call.input)


def _is_sliced(settings: Settings, steps: Steps, input: Tensor | None) -> bool:
    assert input is not None
    if any(given is not None for given in (steps.batch_sizes, steps.lengths, steps.mask)):
        return True
    # On CUDA a slice of the plain cell is one launch of any GPU's; what stops gradients within one is sm_90a's alone.
    within = _without_bptt_steps(settings).within or NOTHING_WITHIN
    return input.is_cuda and steps.reset is None and within._replace(num_heads=1) == NOTHING_WITHIN


def settings_of_operator(settings: Settings, steps: Steps, num_steps: int, in_slices: bool = False) -> Settings:
    """What the operator of a call of so many steps has to do; ``in_slices``: of a slice of it."""
    settings = _without_bptt_steps(settings) if in_slices else _of_call(settings, num_steps)
    return _with_states(settings) if steps.return_states else settings


def _of_call(settings: Settings, num_steps: int) -> Settings:
    """Without ``bptt_steps`` where they change nothing."""
    k = None if settings.within is None else settings.within.bptt_steps
    changes = k is not None and k < num_steps and torch.is_grad_enabled()
    return settings if changes or k is None else _without_bptt_steps(settings)


def _with_states(settings: Settings) -> Settings:
    """Of an operator that returns the states of every step."""
    return settings._replace(within=(settings.within or NOTHING_WITHIN)._replace(return_states=True))


def _without_bptt_steps(settings: Settings) -> Settings:
    if settings.within is None:
        return settings
    within = settings.within._replace(bptt_steps=None)
    return settings._replace(within=None if within == NOTHING_WITHIN else within)


def live_steps(settings: Settings, steps: Steps, input: Tensor, num_steps: int, batch: int | None) -> Tensor | None:
    """``lengths`` and ``mask`` as one mask (T, B) in the order of memory."""
    lengths, mask = steps.lengths, steps.mask
    if mask is not None:
        mask = _in_time_order(settings, mask, batch)
    if lengths is not None:
        step = torch.arange(num_steps, device=input.device).unsqueeze(1)
        # from the CPU to a GPU without waiting for it; the other way the values must have come before they are read
        before_end = step < lengths.to(input.device, non_blocking=input.is_cuda).reshape(-1)
        mask = before_end if mask is None else mask & before_end
    return None if mask is None else mask.contiguous()


def _run_layers(
    settings: Settings,
    input: Tensor,
    hx: Any,
    params: Sequence[Any],
    steps: Steps,
    recurrent_dropout: Tensor | None = None,
) -> tuple[Any, ...]:
    """``(output, h_n, c_n)``, c_n empty unless it is an LSTM's; with ``return_states`` then the tuple of the states of
    every step. ``recurrent_dropout``: factors, where drawn already.
    """
    region = autocast_region(settings, input)
    if region is not None:
        input, hx, params = autocast(settings, region, input, hx, params, packed=steps.batch_sizes is not None)
        steps = cast_reset_state(steps, input)
        with torch.autocast(region, enabled=False):
            return _run_layers(settings, input, hx, params, steps)

    to_onnx = backend.exports_to_onnx()
    if to_onnx:
        onnx_nodes.check_call(settings, steps, input)
        settings = _without_bptt_steps(settings)  # which change no numbers
    call = prepare_layers(settings, input, hx, params, steps)
    if settings.around is not None:
        return _run_around(settings, settings.around, call, hx, params, steps)
    if is_in_slices(settings, steps, call):
        return _run_slices(settings, call, input, hx, params, steps)
    settings = settings_of_operator(settings, steps, call.num_steps)
    within = settings.within
    input, h, c, controls = call[:4]
    anew = call.anew
    if call.batch is None:
        input = input.unsqueeze(1)
        h = None if h is None else h.unsqueeze(1)
        c = None if c is None else c.unsqueeze(1)
        anew = tuple(state.unsqueeze(1) for state in anew)
    if call.batch is None or controls.batch_sizes is not None:
        settings = settings._replace(batch_first=False)
    if settings.dropout and settings.num_layers > 1:
        controls = controls._replace(dropout=_dropout_factors(settings, input))
    if within is not None:
        controls = _draw_within(settings, within, call, controls, recurrent_dropout)
    of_operator = params
    if anew:
        of_operator = [*params, *anew]
        settings = settings._replace(within=(within or NOTHING_WITHIN)._replace(reset_state=True))
    run = backend.implementation(call.why_reference).run_stack
    if to_onnx:
        output, h_n, c_n, *of_steps = onnx_nodes.run_stack(settings, input, h, c, params, steps.lengths, run)
    else:
        output, h_n, c_n, *of_steps = _compute(run, settings, call, params, input, h, c, of_operator, controls)
    states = None
    if of_steps:
        batch = None if controls.batch_sizes is not None else h_n.shape[1]
        cells, hidden = of_steps
        states = _states_of_steps(settings, call.num_steps, batch, cells, hidden, controls, (h, c), anew)
    if call.batch is None:
        output, h_n = output.squeeze(1), h_n.squeeze(1)
        c_n = c_n.squeeze(1) if settings.kind.num_states else c_n
        states = None if states is None else tuple(state.squeeze(2) for state in states)
    return (output, h_n, c_n) if states is None else (output, h_n, c_n, states)


def _states_of_steps(
    settings: Settings,
    num_steps: int,
    batch: int | None,
    cells: Tensor,
    hidden: Tensor,
    controls: Controls = NO_CONTROLS,
    initial: tuple[Tensor | None, Tensor | None] = (None, None),
    anew: tuple[Tensor, ...] = (),
) -> tuple[Tensor, ...]:
    """h, and c of an LSTM, after every step, ``cells`` and ``hidden`` as the operator returns them.

    (L*D, T, B, .) in the order in which the input has T and B; (L*D, N, .) of packed data, where ``batch`` is ``None``.
    """
    directions = settings.num_directions
    if directions == 1:
        h = hidden
    else:
        of_layers = hidden.unflatten(-1, (directions, settings.state_size))  # (L, N, D, P)
        h = of_layers.transpose(1, 2).flatten(0, 1)
    states: tuple[Tensor, ...] = (h, cells.to(h.dtype)) if settings.kind.num_states else (h,)
    if batch is None:
        return states
    states = tuple(state.view(state.shape[0], num_steps, batch, state.shape[2]) for state in states)
    if controls.mask is not None:
        sources = [
            _steps_of_states(controls.mask, controls.reset, reverse=direction == 1) for direction in range(directions)
        ]
        beginnings = anew or (None, None)
        states = tuple(
            _kept_states(state, sources, first, begin)
            for state, first, begin in zip(states, initial, beginnings, strict=False)
        )
    return tuple(state.transpose(1, 2) for state in states) if settings.batch_first else states


def _steps_of_states(mask: Tensor, reset: Tensor | None, reverse: bool) -> Tensor:
    """int64 (T, B): where a row's state after each step comes from, 2 + t if it is what step t made.

    0 is what the row began with, 1 what it began anew from.
    """
    num_steps = mask.shape[0]
    begins = torch.zeros_like(mask) if reset is None else reset
    if reverse:  # in its own order of steps, in which a row begins anew before a step if the one after it is marked
        mask = mask.flip(0)
        begins = torch.cat([torch.zeros_like(begins[:1]), begins[1:].flip(0)])
    step = torch.arange(num_steps, device=mask.device).unsqueeze(1)
    last_live, last_begin = (torch.where(marks, step, -1).cummax(0).values for marks in (mask, begins))
    made = num_steps - 1 - last_live if reverse else last_live
    source = torch.where(last_live >= last_begin, torch.where(last_live >= 0, 2 + made, 0), 1)
    return source.flip(0) if reverse else source


def _kept_states(states: Tensor, sources: Sequence[Tensor], initial: Tensor | None, anew: Tensor | None) -> Tensor:
    """``states`` (L*D, T, B, F) with what each row carries on in steps that do not count.

    ``sources``: of each direction, :func:`_steps_of_states`. ``initial``, ``anew``: (L*D, B, F), ``None`` for zeros.
    """
    directions = len(sources)
    count, _, batch, size = states.shape
    zeros = states.new_zeros(count, batch, size)
    beginnings = torch.stack([zeros if begin is None else begin for begin in (initial, anew)], 1)
    known = torch.cat([beginnings, states], 1)
    row = torch.arange(batch, device=states.device)
    kept = [
        known[direction::directions].flatten(1, 2).index_select(1, (source * batch + row).flatten())
        for direction, source in enumerate(sources)
    ]
    return torch.stack(kept, 1).view_as(states)


def _run_around(
    settings: Settings, around: Around, call: Call, hx: Any, params: Sequence[Any], steps: Steps
) -> tuple[Any, ...]:
    """A checked call whose options are for Python, as calls without them."""
    _checks.check_memory(settings, call.input, hx, params)
    params = _params_of_operator(settings, around, params)
    input = call.input
    if around.input_dropout:
        input = _drop_inputs(settings, around.input_dropout, call)
    return _run_layers(settings._replace(around=None), input, hx, params, steps)


def _params_of_operator(settings: Settings, around: Around, params: Sequence[Tensor]) -> list[Tensor]:
    """With W_hh as this call's dropout leaves it, as a matrix, and zeros for a recurrent bias that there is not."""
    per_cell = len(params) // (settings.num_layers * settings.num_directions)
    no_bias = None
    result = []
    for first in range(0, len(params), per_cell):
        w_ih, w_hh, *others = params[first : first + per_cell]
        if around.weight_dropout:
            w_hh = torch.nn.functional.dropout(w_hh, around.weight_dropout, training=True)
        if around.independent:
            w_hh = w_hh.unsqueeze(1)
        if settings.num_biases == 1:
            no_bias = torch.zeros_like(others[0], requires_grad=False) if no_bias is None else no_bias
            others.insert(1, no_bias)
        result += [w_ih, w_hh, *others]
    return result


def _drop_inputs(settings: Settings, rate: float, call: Call) -> Tensor:
    """The input times a factor, 0 or 1 / (1 - rate), for each row and feature, which is the same at every step."""
    input = call.input
    batch = 1 if call.batch is None else call.batch
    factors = torch.nn.functional.dropout(input.new_ones(batch, settings.input_size), rate, training=True)
    batch_sizes = call.controls.batch_sizes
    if batch_sizes is not None:
        return input * torch.cat([factors[:rows] for rows in batch_sizes.tolist()])
    return input * (factors.unsqueeze(1) if settings.batch_first and call.batch is not None else factors)


def _run_slices(
    settings: Settings, call: Call, input: Tensor, hx: Any, params: Sequence[Any], steps: Steps
) -> tuple[Any, ...]:
    """Calls of k steps each, one after the other: no gradient goes from one to the one before."""
    if steps.batch_sizes is not None:
        raise RuntimeError(
            "bptt_steps: expected None with packed data, whose rows end in the middle of a slice; pad it, "
            "torch.nn.utils.rnn.pad_packed_sequence, and pass the lengths, lengths="
        )
    assert settings.within is not None and settings.within.bptt_steps is not None
    k = settings.within.bptt_steps
    # one for the whole call; what is drawn step by step is drawn in the slices
    factors = _recurrent_dropout_factors(settings, settings.within, call)
    settings = _without_bptt_steps(settings)
    dim = 1 if settings.batch_first and call.batch is not None else 0
    outputs, of_slices = [], []
    for first in range(0, call.num_steps, k):
        count = min(k, call.num_steps - first)
        of_slice = EVERY_STEP
        if steps is not EVERY_STEP:
            lengths = None if steps.lengths is None else (steps.lengths.long() - first).clamp(0, count)
            mask, reset = (None if s is None else s.narrow(dim, first, count) for s in (steps.mask, steps.reset))
            of_slice = Steps(None, lengths, mask, reset, steps.reset_state, steps.return_states)
        output, h, c, *states = _run_layers(settings, input.narrow(dim, first, count), hx, params, of_slice, factors)
        outputs.append(output)
        of_slices += states
        hx = (h.detach(), c.detach()) if settings.kind.num_states else h.detach()
    output = torch.cat(outputs, dim)
    if not steps.return_states:
        return output, h, c
    return output, h, c, tuple(torch.cat(parts, 1 + dim) for parts in zip(*of_slices, strict=True))


def prepare_cell(settings: Settings, input: Tensor, hx: Any, params: Sequence[Any], steps: Steps = EVERY_STEP) -> Call:
    """Check a call of one cell. States that are not given are zeros afterwards, those of a reset are what it says."""
    h, c = (None, None) if hx is None else _checks.split_state(settings.kind, hx)
    sizes = _checks.check_cell_input(settings, input, h, c)
    _checks.check_params(settings, params, input)
    if h is None:
        h = input.new_zeros(*sizes, settings.hidden_size)
        count = settings.kind.num_states
        c = h if count == 1 else input.new_zeros(*sizes, count * settings.hidden_size) if count else None
    else:
        _checks.check_states_like_input(input, h, c)
    anew: tuple[Tensor, ...] = ()
    if steps is not EVERY_STEP:
        layout = "(B)" if sizes else "without a batch"
        _checks.check_reset(settings, steps, input, tuple(sizes), layout, tuple(sizes))
        anew = _anew(settings, steps)
    is_empty = settings.hidden_size == 0 or settings.input_size == 0
    within = _what_is_within(settings, 1, EVERY_STEP, (input, h, c, *params, *anew))
    custom = settings.kind if settings.kind > _GRU else None
    why_reference = "a size of the cell is 0" if is_empty else backend.why_reference(input, *within, custom=custom)
    return Call(input, h, c, Controls(reset=steps.reset), 1, sizes[0] if sizes else None, why_reference, anew)


def _run_cell(
    settings: Settings, input: Tensor, hx: Any, params: Sequence[Any], steps: Steps = EVERY_STEP
) -> tuple[Tensor, Tensor | None]:
    """``(h, c)``, c ``None`` of a cell without private states."""
    region = autocast_region(settings, input)
    if region is not None:
        input, hx, params = autocast(settings, region, input, hx, params)
        steps = cast_reset_state(steps, input)
        with torch.autocast(region, enabled=False):
            return _run_cell(settings, input, hx, params, steps)

    to_onnx = backend.exports_to_onnx()
    if to_onnx:
        onnx_nodes.check_call(settings, steps, input)
    call = prepare_cell(settings, input, hx, params, steps)
    input, h, c = call[:3]
    assert h is not None
    if steps.reset is not None:
        _checks.check_memory(settings, input, hx, params)
        rows = steps.reset.unsqueeze(-1)
        anew: Any = call.anew or (0, 0)
        h, c = torch.where(rows, anew[0], h), None if c is None else torch.where(rows, anew[-1], c)
    if call.batch is None:
        input, h, c = input.unsqueeze(0), h.unsqueeze(0), None if c is None else c.unsqueeze(0)
    implementation = backend.implementation(call.why_reference)
    if settings.around is not None:
        _checks.check_memory(settings, input, hx, params)
        params = _params_of_operator(settings, settings.around, params)
        settings = settings._replace(around=None, cell_names=_CELL_NAMES[: len(params)])
    if to_onnx:
        h, c = onnx_nodes.run_step(settings, input, h, c, params, implementation.run_stack)
    elif settings.within is None and settings.kind <= _GRU:
        h, c = _compute(implementation.run_step, settings, call, params, input, h, c, params)
    else:  # a stack of one layer and one step
        controls = _draw_within(settings, settings.within or NOTHING_WITHIN, call, Controls())
        states = (h.unsqueeze(0), None if c is None else c.unsqueeze(0))
        run = implementation.run_stack
        _, h, c = _compute(run, settings, call, params, input.unsqueeze(0), *states, params, controls)
        h, c = h.squeeze(0), c.squeeze(0) if settings.kind.num_states else None
    if call.batch is None:
        return h.squeeze(0), None if c is None else c.squeeze(0)
    return h, c


def _compute(run: Callable[..., Any], settings: Settings, call: Call, params: Sequence[Any], *arguments: Any) -> Any:
    """``run(settings, *arguments)``, where a tensor whose memory is gone is an error with the caller's name of it."""
    if torch.compiler.is_compiling():
        return run(settings, *arguments)
    given = (settings, call.input, call.h if call.c is None else (call.h, call.c), params)
    if call.why_reference is not None:  # PyTorch's own operations read such a tensor, and crash
        _checks.check_memory(*given)
    try:
        return run(settings, *arguments)
    except RuntimeError:
        _checks.check_memory(*given)
        raise


def _dropout_factors(settings: Settings, input: Tensor) -> Tensor:
    """A factor, 0 or 1 / (1 - dropout), for the output of every layer but the last, in order of time.

    Drawn as ``torch.nn`` draws: by :func:`torch.nn.functional.dropout` on a tensor of the output's shape, layer after
    layer, so that the same seed gives the same numbers.
    """
    sizes = input.shape[:-1]
    if settings.batch_first:
        sizes = sizes[::-1]
    ones = input.new_ones(*sizes, settings.state_size * settings.num_directions)
    draws = [torch.nn.functional.dropout(ones, settings.dropout, training=True) for _ in range(settings.num_layers - 1)]
    return draws[0].unsqueeze(0) if len(draws) == 1 else torch.stack(draws)


def _draw_within(
    settings: Settings, within: Within, call: Call, controls: Controls, recurrent_dropout: Tensor | None = None
) -> Controls:
    """With what this call draws at random; ``recurrent_dropout``: factors that are drawn already."""
    if recurrent_dropout is None:
        recurrent_dropout = _recurrent_dropout_factors(settings, within, call)
    controls = controls._replace(recurrent_dropout=recurrent_dropout)
    if within.training:
        batch = 1 if call.batch is None else call.batch
        rows = call.input.shape[0] if controls.batch_sizes is not None else call.num_steps * batch
        cells = settings.num_layers * settings.num_directions
        sizes = (settings.state_size, settings.hidden_size)
        h, c = (
            _draw_bits(call.input, (cells, rows), size, rate) if rate else None
            for size, rate in zip(sizes, (within.zoneout, within.zoneout_cell), strict=True)
        )
        controls = controls._replace(zoneout=h, zoneout_cell=c)
    return controls


def _recurrent_dropout_factors(settings: Settings, within: Within, call: Call) -> Tensor | None:
    """(L*D, B, P), each 0 or 1 / (1 - rate)."""
    if not within.recurrent_dropout:
        return None
    batch = 1 if call.batch is None else call.batch
    ones = call.input.new_ones(settings.num_layers * settings.num_directions, batch, settings.state_size)
    return torch.nn.functional.dropout(ones, within.recurrent_dropout, training=True)


def _draw_bits(like: Tensor, shape: tuple[int, ...], size: int, rate: float) -> Tensor:
    """uint8 (*shape, ceil(size / 8)): bit u % 8 of byte u / 8 is 1 with probability ``rate``."""
    if size == 0:
        return like.new_empty(*shape, 0, dtype=torch.uint8)
    if backend.ops is not None and backend.ops.has_draw_bits(like.device):
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=like.device)
        return backend.ops.draw_bits(seed, *shape, size, rate)
    drawn = like.new_empty(*shape, 8 * -(-size // 8), dtype=torch.bool).bernoulli_(rate)
    # Eight bytes of 0 or 1 as one number. The product has, for byte k, a 1 at bit 8 * k + 7 * j for each j of 1 to 8,
    # no two at the same place: the highest byte is the sum over k of those with j = 8 - k, its bit k.
    return (drawn.view(torch.int64) * 0x0102040810204080 >> 56).to(torch.uint8)


def autocast_region(settings: Settings, input: Any) -> str | None:
    """Device type of the autocast region that a call with this input stands in, if any."""
    if not isinstance(input, Tensor):
        _checks.raise_input_type(settings, input)
    if input.is_cpu:
        return "cpu" if torch.is_autocast_enabled("cpu") else None
    device_type: str = input.device.type
    enabled = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return device_type if enabled else None


def autocast(
    settings: Settings, device_type: str, input: Tensor, hx: Any, params: Sequence[Any], packed: bool = False
) -> tuple[Tensor, Any, Sequence[Any]]:
    """The casts that ``torch.nn`` makes under autocast.

    To the autocast dtype on every device but the CPU, and there for LSTM layers with a padded input, RNN layers and the
    RNN cell. The others keep the state's dtype on the CPU: ``torch.nn`` runs them op by op, with gates promoted
    to it.
    """
    h, c = _checks.split_state(settings.kind, hx)
    state_dtype = input.dtype if h is None else h.dtype
    dtype = torch.get_autocast_dtype(device_type)
    op_by_op = settings.kind == CellKind.GRU or (settings.kind == CellKind.LSTM and (settings.is_cell or packed))
    if op_by_op and device_type == "cpu" and state_dtype in _AUTOCAST_FROM:
        dtype = torch.promote_types(state_dtype, dtype)

    def cast(tensor: Any) -> Any:
        eligible = isinstance(tensor, Tensor) and tensor.dtype in _AUTOCAST_FROM
        return tensor.to(dtype) if eligible else tensor

    _checks.check_memory(settings, input, hx, params)  # a cast reads them
    hx = cast(h) if c is None else (cast(h), cast(c))
    return cast(input), hx, [cast(param) for param in params]


def cast_reset_state(steps: Steps, input: Tensor) -> Steps:
    """``reset_state`` in the dtype to which :func:`autocast` has cast the input, as it has cast ``hx``."""
    if steps.reset_state is None or input.dtype not in _AUTOCAST_FROM:
        return steps
    _checks.check_state_memory(steps.reset_state, "reset_state")

    def cast(state: Any) -> Any:
        return state.to(input.dtype) if isinstance(state, Tensor) and state.dtype in _AUTOCAST_FROM else state

    states = steps.reset_state
    cast_states = tuple(cast(state) for state in states) if isinstance(states, (tuple, list)) else cast(states)
    return steps._replace(reset_state=cast_states)


# How :func:`_call_override` says a call: the function of each kind, and what else it is told.
_PUBLIC: dict[int, tuple[Callable[..., Any], dict[str, Any]]] = {
    CellKind.LSTM: (lstm, {}),
    CellKind.GRU: (gru, {}),
    CellKind.RNN_TANH: (rnn, {}),
    CellKind.RNN_RELU: (rnn, {"nonlinearity": "relu"}),
}
_PUBLIC_CELLS: dict[int, Callable[..., Any]] = {
    CellKind.LSTM: lstm_cell,
    CellKind.GRU: gru_cell,
    CellKind.RNN_TANH: rnn_cell,
    CellKind.RNN_RELU: rnn_cell,
}
_CELL_NAMES = ("w_ih", "w_hh", "b_ih", "b_hh")
_NO_EXTRAS = _CellExtras()
_CELL_DEFAULTS = {"nonlinearity": "tanh", **_NO_EXTRAS._asdict(), "training": False}
_ARGUMENTS = ("bias", "num_layers", "dropout", "bidirectional", "batch_first")
_DEFAULTS: dict[str, Any] = (
    Settings._field_defaults | Around._field_defaults | Within._field_defaults | Steps._field_defaults
)
