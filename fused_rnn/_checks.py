"""Every check of arguments, and every sentence a caller reads when one fails.

Each error names the argument, what it got and what it needs. The exception types are those of ``torch.nn`` where it
raises something sensible: ``ValueError`` for a wrong number of dimensions or the input's dtype, ``RuntimeError`` for
sizes and for what belongs together but differs, ``TypeError`` for another kind of object.

Letters in shapes: see :mod:`fused_rnn.settings`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import Parameter, RNNBase
from torch.nn.utils.rnn import PackedSequence

from .settings import ACTIVATIONS, LAYER_OPTIONS, AnyCellKind, CellKind, Settings, Steps

ParamSpec = tuple[str, tuple[int, ...]]


# Constructors


def check_constructor(
    options: Mapping[str, Any],
    *,
    input_size: Any,
    hidden_size: Any,
    num_layers: Any,
    bias: Any,
    batch_first: Any,
    dropout: Any,
    bidirectional: Any,
    proj_size: Any,
) -> None:
    """Arguments of a layer, all that ``torch.nn`` checks and what it leaves to fail later."""
    for name, flag in (("bias", bias), ("batch_first", batch_first), ("bidirectional", bidirectional)):
        check_flag(name, flag)
    for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
        if not isinstance(size, int):
            raise TypeError(f"{name}: expected an int, got {_describe(size)}")
        if size <= 0:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    check_counts(num_layers, proj_size, hidden_size)
    check_dropout(dropout)
    check_names("a layer", options, LAYER_OPTIONS)
    check_options(options)


def check_flag(name: str, flag: Any) -> None:
    if not isinstance(flag, bool):
        raise TypeError(f"{name}: expected a bool, got {_describe(flag)}")


def check_names(what: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Keywords that nobody knows; the error is Python's own for such a call."""
    for name in given:
        if name not in known:
            raise TypeError(f"{name}: unexpected keyword argument of {what}, which has {', '.join(known)}")


def check_options(options: Mapping[str, Any]) -> None:
    """Values of the options of layers and cells that are given."""
    flags = ("recompute", "recurrent_bias", "stateful", "reset_after", "peephole", "coupled_gates", "layer_norm")
    for name in flags:
        if name in options:
            check_flag(name, options[name])
    for name in ("input_dropout", "recurrent_dropout", "weight_dropout", "zoneout", "zoneout_cell"):
        if name in options:
            check_rate(name, options[name])
    for name in ("activation", "recurrent_activation"):
        if name in options:
            _check_activation(name, options[name])
    for name in ("cell_clip", "recurrent_grad_clip"):
        limit = options.get(name)
        if limit is not None:
            if not _is_number(limit):
                raise TypeError(f"{name}: expected a number or None, got {_describe(limit)}")
            if not 0 < limit < math.inf:
                raise ValueError(f"{name}: expected a positive finite number, got {limit}")
    bptt_steps, forget_bias = options.get("bptt_steps"), options.get("forget_bias")
    if bptt_steps is not None:
        if not isinstance(bptt_steps, int) or isinstance(bptt_steps, bool):
            raise TypeError(f"bptt_steps: expected an int or None, got {_describe(bptt_steps)}")
        if bptt_steps < 1:
            raise ValueError(f"bptt_steps: expected at least 1, got {bptt_steps}")
    num_heads = options.get("num_heads", 1)
    if not isinstance(num_heads, int) or isinstance(num_heads, bool):
        raise TypeError(f"num_heads: expected an int, got {_describe(num_heads)}")
    if num_heads < 1:
        raise ValueError(f"num_heads: expected at least 1, got {num_heads}")
    if forget_bias is not None and not _is_number(forget_bias):
        raise TypeError(f"forget_bias: expected a number or None, got {_describe(forget_bias)}")
    init = options.get("init", "torch")
    if init not in ("torch", "keras"):
        raise ValueError(f"init: expected 'torch' or 'keras', got {init!r}")


def check_fit(
    options: Mapping[str, Any],
    *,
    is_lstm: bool,
    is_gru: bool,
    hidden_size: int,
    bias: bool = True,
    bidirectional: bool = False,
    proj_size: int = 0,
) -> None:
    """Options that have no meaning for a layer or cell such as this."""
    if is_gru and options.get("reset_after", True) and not options.get("recurrent_bias", True):
        raise ValueError(
            "recurrent_bias: expected True for a GRU with reset_after=True, whose reset gate acts on the recurrent "
            "bias alone: without it the layer is another model"
        )
    if not is_gru and not options.get("reset_after", True):
        raise ValueError("reset_after: expected True, only a GRU has a reset gate")
    if options.get("layer_norm", False) and not options.get("reset_after", True):
        raise ValueError(
            "layer_norm: expected False with reset_after=False, where W_hn multiplies another state than r and z do: "
            "there is no W_hh h to normalise"
        )
    if not is_lstm:
        for name in ("peephole", "coupled_gates"):
            if options.get(name, False):
                raise ValueError(f"{name}: expected False, only an LSTM has it")
        if options.get("cell_clip") is not None:
            raise ValueError("cell_clip: expected None, only an LSTM has a cell state")
        if options.get("zoneout_cell", 0.0):
            raise ValueError(f"zoneout_cell: expected 0, only an LSTM has a cell state, got {options['zoneout_cell']}")
        if not is_gru:
            if options.get("activation", "tanh") != "tanh":
                raise ValueError(
                    f"activation: expected 'tanh' for an RNN, whose activation is its nonlinearity=, "
                    f"got {options['activation']!r}"
                )
            if options.get("recurrent_activation", "sigmoid") != "sigmoid":
                raise ValueError(
                    "recurrent_activation: expected 'sigmoid' for an RNN, which has no gates, "
                    f"got {options['recurrent_activation']!r}"
                )
    num_heads = options.get("num_heads", 1)
    if num_heads > 1:
        if proj_size:
            raise ValueError(
                f"num_heads: expected 1 with proj_size, which mixes the units of all heads, got {num_heads}"
            )
        if num_heads > hidden_size or hidden_size % num_heads:
            raise ValueError(f"num_heads: expected a divisor of hidden_size ({hidden_size}), got {num_heads}")
    if options.get("forget_bias") is not None:
        if not is_lstm:
            raise ValueError("forget_bias: expected None, only an LSTM has a forget gate")
        if not bias:
            raise ValueError("forget_bias: expected None with bias=False, where no gate has a bias")
    if bidirectional:
        if options.get("stateful", False):
            raise ValueError(
                "stateful: expected False with bidirectional=True: the reverse direction begins at the end of each "
                "call's sequence, and what it left belongs to the beginning"
            )
        if options.get("bptt_steps") is not None:
            raise ValueError(
                "bptt_steps: expected None with bidirectional=True: the reverse direction comes through the whole "
                "sequence before the first step's output is there"
            )


def check_fit_of_layer(options: Mapping[str, Any], layer: RNNBase) -> None:
    """The same of a layer that exists, a fused one or ``torch.nn``'s."""
    check_fit(
        options,
        is_lstm=layer.mode == "LSTM",
        is_gru=layer.mode == "GRU",
        hidden_size=layer.hidden_size,
        bias=layer.bias,
        bidirectional=layer.bidirectional,
        proj_size=layer.proj_size,
    )


def check_only_value(name: str, expected: Any, value: Any) -> None:
    """An option of other layers that is what it is in an IndRNN."""
    if value != expected:
        raise ValueError(f"{name}: expected {expected!r} for an IndRNN, got {_describe(value)}")


def check_same_heads(num_heads: int, made_with: int) -> None:
    """A layer or cell that exists has the parameters of one number of heads."""
    if num_heads != made_with:
        raise ValueError(f"num_heads: expected {made_with}, as the module was made with, got {num_heads}")


def check_counts(num_layers: Any, proj_size: Any, hidden_size: int) -> None:
    for name, count, least in (("num_layers", num_layers, 1), ("proj_size", proj_size, 0)):
        if not isinstance(count, numbers.Integral):
            raise TypeError(f"{name}: expected an int, got {_describe(count)}")
        if count < least:
            raise ValueError(f"{name}: expected at least {least}, got {count}")
    if proj_size >= hidden_size:
        raise ValueError(f"proj_size: expected less than hidden_size ({hidden_size}), got {proj_size}")


def check_dropout(dropout: Any) -> None:
    check_rate("dropout", dropout)


def check_rate(name: str, rate: Any) -> None:
    if not _is_number(rate) or not 0 <= rate <= 1:
        raise ValueError(f"{name}: expected a number from 0 to 1, got {_describe(rate)}")


def check_range(name: str, value: Any) -> None:
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(map(_is_number, value)):
        raise TypeError(f"{name}: expected two numbers (low, high), got {_describe(value)}")
    if not -math.inf < value[0] <= value[1] < math.inf:
        raise ValueError(f"{name}: expected finite numbers, the lower first, got {value}")


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_nonlinearity(nonlinearity: Any) -> None:
    _check_activation("nonlinearity", nonlinearity)


def _check_activation(name: str, value: Any) -> None:
    if value not in ACTIVATIONS:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, ACTIVATIONS))}, got {value!r}")


def check_no_projection(cell: str, proj_size: Any) -> None:
    if proj_size != 0:
        raise ValueError(f"proj_size: expected 0 for {cell}, got {_describe(proj_size)}; only an LSTM has a projection")


def check_cell_constructor(input_size: Any, hidden_size: Any, least: int) -> None:
    """Sizes of a cell; those of ``torch.nn`` may be 0."""
    for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
        if not isinstance(size, numbers.Integral):
            raise TypeError(f"{name}: expected an int, got {_describe(size)}")
        if size < least:
            raise ValueError(f"{name}: expected at least {least}, got {size}")


# What a call must look like


# Those of every set of sizes in use, a few per model. Not functools.lru_cache: torch.compile warns of it.
_param_specs: dict[Settings, tuple[ParamSpec, ...]] = {}


def param_specs(settings: Settings) -> tuple[ParamSpec, ...]:
    """Name and shape of every parameter, in the order of the flat list."""
    if torch.compiler.is_compiling() or any(type(size) is not int for size in settings[:3]):
        # The dictionary changes with every layer, and what is compiled would be compiled again; symbols have no hash.
        return _make_param_specs(settings)
    specs = _param_specs.get(settings)
    if specs is None:
        specs = _param_specs[settings] = _make_param_specs(settings)
    return specs


def _make_param_specs(settings: Settings) -> tuple[ParamSpec, ...]:
    """Names and order of a layer's parameters are ``torch.nn``'s."""
    rows = settings.kind.num_gates * settings.hidden_size
    state_size = settings.state_size
    columns_hh = state_size // settings.num_heads
    shape_hh: tuple[int, ...] = (rows,) if settings.is_independent else (rows, columns_hh)
    if settings.is_cell:
        shapes: list[tuple[int, ...]] = [(rows, settings.input_size), shape_hh]
        shapes += [(rows,)] * settings.num_biases + [(3 * state_size,)] * settings.has_peepholes
        shapes += [shape for _, shape in norm_specs(settings)]
        return tuple(zip(settings.cell_names, shapes, strict=False))
    specs: list[ParamSpec] = []
    for layer in range(settings.num_layers):
        columns = settings.input_size if layer == 0 else state_size * settings.num_directions
        for suffix in (f"_l{layer}", f"_l{layer}_reverse") if settings.bidirectional else (f"_l{layer}",):
            specs += [(f"weight_ih{suffix}", (rows, columns)), (f"weight_hh{suffix}", shape_hh)]
            biases = ("bias_ih", "bias_hh")[: settings.num_biases]
            specs += [(f"{bias}{suffix}", (rows,)) for bias in biases]
            if state_size != settings.hidden_size:
                specs.append((f"weight_hr{suffix}", (state_size, settings.hidden_size)))
            if settings.has_peepholes:
                specs.append((f"weight_peephole{suffix}", (3 * settings.hidden_size,)))
            specs += [(f"{name}{suffix}", shape) for name, shape in norm_specs(settings)]
    return tuple(specs)


def check_norms(kind: CellKind, bias: bool, norms: Any) -> None:
    """``norms`` of a functional cell: as many as it has with these biases."""
    expected = 2 if kind != CellKind.LSTM else 3 + bias
    if not isinstance(norms, (tuple, list)):
        raise TypeError(f"norms: expected a tuple of {expected} Tensors or None, got {_describe(norms)}")
    if len(norms) != expected:
        raise RuntimeError(f"norms: expected {expected} Tensors, got {len(norms)}")


def norm_specs(settings: Settings) -> tuple[ParamSpec, ...]:
    """Name and shape of the parameters of layer normalisation of one layer and direction."""
    rows = (settings.kind.num_gates * settings.hidden_size,)
    of_cell = (settings.hidden_size,)
    specs = (("weight_norm_ih", rows), ("weight_norm_hh", rows), ("weight_norm_c", of_cell), ("bias_norm_c", of_cell))
    return specs[: settings.num_norms]


def check_param_count(settings: Settings, params: Sequence[Any]) -> None:
    """Before anything is worked out for each of so many layers."""
    has_projection = settings.state_size != settings.hidden_size
    per_direction = 2 + settings.num_biases + has_projection + settings.has_peepholes + settings.num_norms
    per_layer = settings.num_directions * per_direction
    expected = len(settings.cell_names) if settings.is_cell else settings.num_layers * per_layer
    if len(params) == expected:
        return
    names = ""
    if expected <= 16:
        names = f" ({', '.join(name for name, _ in param_specs(settings))})"
    raise RuntimeError(f"params: expected {expected} tensors{names}, got {len(params)}")


# Calls: kinds of objects


def raise_input_type(settings: Settings, input: Any) -> NoReturn:
    """``input`` is no Tensor."""
    hint = ""
    if isinstance(input, PackedSequence):
        hint = "; a cell takes one step" if settings.is_cell else "; pass its data and batch_sizes"
    raise TypeError(f"input: expected a Tensor, got {_describe(input)}{hint}")


def split_state(kind: AnyCellKind, hx: Any, name: str = "hx") -> tuple[Tensor | None, Tensor | None]:
    """``hx`` as ``(h, c)``: both ``None`` if it is, c ``None`` unless the cell is an LSTM's."""
    if hx is None:
        return None, None
    if kind.num_states:
        if not isinstance(hx, (tuple, list)) or len(hx) != 2:
            error = RuntimeError if isinstance(hx, (tuple, list)) else TypeError
            raise error(f"{name}: expected a tuple (h_0, c_0) of two Tensors or None, got {_describe(hx)}")
        for index, state in enumerate(hx):
            if not isinstance(state, Tensor):
                raise TypeError(f"{name}[{index}]: expected a Tensor, got {_describe(state)}")
        return hx[0], hx[1]
    if not isinstance(hx, Tensor):
        hint = "; only an LSTM takes a pair (h_0, c_0)" if isinstance(hx, (tuple, list)) else ""
        raise TypeError(f"{name}: expected a Tensor or None, got {_describe(hx)}{hint}")
    return hx, None


# Calls: shapes and dtypes


def check_params(settings: Settings, params: Sequence[Any], input: Tensor) -> None:
    """Parameters against their names and shapes, and against the input's dtype and device."""
    check_param_count(settings, params)
    specs = param_specs(settings)
    if input.is_cpu:  # the short way: this is a good part of what a small call costs
        dtype = input.dtype
        try:
            for param, expected in zip(params, specs, strict=True):
                if param.shape != expected[1] or param.dtype is not dtype or not param.is_cpu:
                    break
            else:
                return
        except AttributeError:  # no Tensor
            pass
    _check_params_in_turn(settings, params, input)


def _check_params_in_turn(settings: Settings, params: Sequence[Any], input: Tensor) -> None:
    specs = param_specs(settings)
    for param, (name, shape) in zip(params, specs, strict=True):
        if not isinstance(param, Tensor):
            raise TypeError(f"{name}: expected a Tensor of shape {shape}, got {_describe(param)}")
        if param.shape != shape:
            raise RuntimeError(f"{name}: expected {shape}, got {_shape(param)}")
    dtype = params[0].dtype
    for param, (name, _) in zip(params, specs, strict=True):
        if param.dtype is not dtype:
            raise RuntimeError(f"{name}: expected {dtype} as {specs[0][0]} has, got {param.dtype}")
    for param, (name, _) in zip(params, specs, strict=True):
        if param.device != input.device:
            raise RuntimeError(f"{name}: expected on {input.device} as the input is, got {param.device}")
    if input.dtype is dtype:
        return
    convertible = input.is_floating_point() or input.is_complex()
    hint = f"; convert the input, input.to({dtype})" + (f", or the weights, .to({input.dtype})" if convertible else "")
    # torch.nn's layers check this themselves, its cells leave it to the matrix product
    error = RuntimeError if settings.is_cell else ValueError
    raise error(f"input: expected {dtype} as the weights have, got {input.dtype}{hint}")


def check_layer_input(settings: Settings, input: Tensor, batch_sizes: Tensor | None) -> tuple[int, int | None]:
    """Shape of a layer's input. Returns T and B, B ``None`` for an unbatched input (T, I)."""
    input_size, batch_first = settings.input_size, settings.batch_first
    shape = input.shape
    dims = len(shape)
    if batch_sizes is not None:
        if dims != 2:
            raise RuntimeError(f"input: expected 2 dimensions (N, {input_size}) with batch_sizes, got {_shape(input)}")
    elif dims != 3 and dims != 2:
        layout = "B, T" if batch_first else "T, B"
        raise ValueError(
            f"input: expected 3 dimensions ({layout}, {input_size}), or 2 without a batch (T, {input_size}), "
            f"got {dims}, {_shape(input)}"
        )
    if shape[-1] != input_size:
        raise RuntimeError(f"input: expected input_size {input_size} as its last dimension, got {_shape(input)}")
    if batch_sizes is not None:
        return check_batch_sizes(batch_sizes, shape[0])
    if dims == 2:
        steps, batch = shape[0], None
    else:
        steps, batch = (shape[1], shape[0]) if batch_first else (shape[0], shape[1])
    if steps == 0:
        raise RuntimeError(f"input: expected a sequence of at least one step, got {_shape(input)}")
    return steps, batch


UNKNOWN = -1  # B of a packed batch whose sizes have no values yet


def check_batch_sizes(batch_sizes: Any, rows: int) -> tuple[int, int]:
    """``batch_sizes`` of a packed batch against the rows of its data. Returns T and B.

    In a program that is exported they have no values yet, and B is :data:`UNKNOWN`: the operator checks them.
    """
    if not isinstance(batch_sizes, Tensor):
        raise TypeError(f"batch_sizes: expected a Tensor, got {_describe(batch_sizes)}")
    if batch_sizes.dim() != 1 or batch_sizes.dtype is not torch.int64 or batch_sizes.device.type != "cpu":
        raise RuntimeError(
            "batch_sizes: expected int64 of 1 dimension on the CPU, "
            f"got {batch_sizes.dtype} {_shape(batch_sizes)} on {batch_sizes.device}"
        )
    if torch.compiler.is_exporting():
        return batch_sizes.shape[0], UNKNOWN
    _check_memory("batch_sizes", batch_sizes)
    sizes = batch_sizes.tolist()
    if not sizes:
        raise RuntimeError("batch_sizes: expected at least one step, got none")
    if sizes[-1] < 1 or any(later > earlier for earlier, later in pairwise(sizes)):
        raise RuntimeError(f"batch_sizes: expected positive numbers that never rise, got {_shorten(sizes)}")
    if sum(sizes) != rows:
        raise RuntimeError(f"batch_sizes: expected to sum to the {rows} rows of the data, got a sum of {sum(sizes)}")
    return len(sizes), sizes[0]


def check_sorted_indices(packed: PackedSequence) -> None:
    """The orders of a packed batch: each has every row, of which ``batch_sizes`` says the number, once."""
    data, batch_sizes = packed.data, packed.batch_sizes
    if not isinstance(batch_sizes, Tensor) or not isinstance(data, Tensor) or not _values_can_be_read(batch_sizes):
        return
    if batch_sizes.dim() != 1 or not batch_sizes.numel():
        return  # said where the batch is checked
    _check_memory("batch_sizes", batch_sizes)
    batch = int(batch_sizes[0])
    values: dict[str, list[int]] = {}
    for name, order in (("sorted_indices", packed.sorted_indices), ("unsorted_indices", packed.unsorted_indices)):
        if order is None:
            continue
        if not isinstance(order, Tensor):
            raise TypeError(f"{name}: expected a Tensor or None, got {_describe(order)}")
        if order.dtype not in (torch.int64, torch.int32):
            raise RuntimeError(f"{name}: expected int64, got {order.dtype}")
        if order.dim() != 1 or order.numel() != batch:
            raise RuntimeError(f"{name}: expected ({batch},), one for each row of the batch, got {_shape(order)}")
        if order.device != data.device:
            raise RuntimeError(f"{name}: expected on {data.device} as the data is, got {order.device}")
        _check_memory(name, order)
        if _values_can_be_read(order):
            values[name] = order.tolist()
    places = list(range(batch))
    if len(values) == 2:  # the usual call: if one undoes the other, each has every row
        forth, back = values.values()
        if batch and min(back) >= 0 and max(back) < batch and [forth[row] for row in back] == places:
            return
    for name, rows in values.items():
        if sorted(rows) != places:
            raise RuntimeError(f"{name}: expected each of 0 to {batch - 1} once, got {_shorten(rows)}")
    if len(values) == 2:
        raise RuntimeError(
            f"unsorted_indices: expected the inverse of sorted_indices, {_shorten(forth)}, got {_shorten(back)}"
        )


def check_steps(settings: Settings, steps: Steps, input: Tensor, num_steps: int, batch: int | None) -> None:
    """Which steps count, and where rows begin anew; T and ``batch`` as :func:`check_layer_input` returned them."""
    if steps.batch_sizes is not None:
        check_padded(steps)
    lengths, mask, reset = steps.lengths, steps.mask, steps.reset
    for name, value in (("lengths", lengths), ("mask", mask)):
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a Tensor or None, got {_describe(value)}")
    if lengths is not None:
        expected: tuple[int, ...] = () if batch is None else (batch,)
        if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype is torch.bool:
            raise RuntimeError(f"lengths: expected an integer dtype, got {lengths.dtype}")
        if lengths.shape != expected:
            raise RuntimeError(f"lengths: expected {expected}, one for each row, got {_shape(lengths)}")
        if lengths.device.type == "meta" and input.device.type != "meta":
            raise RuntimeError(f"lengths: expected values, as the input on {input.device} has, got a Tensor on meta")
        _check_memory("lengths", lengths)
        if _values_can_be_read(lengths):
            for value in lengths.reshape(-1).tolist():
                if not 0 <= value <= num_steps:
                    raise RuntimeError(f"lengths: expected 0 to {num_steps}, the steps of the input, got {value}")
    shape: tuple[int, ...] = (num_steps,)
    layout = "(T)"
    if batch is not None:
        layout, shape = ("(B, T)", (batch, num_steps)) if settings.batch_first else ("(T, B)", (num_steps, batch))
    if mask is not None:
        _check_bool("mask", mask, input, shape, layout)
    if reset is not None or steps.reset_state is not None:
        states = settings.num_layers * settings.num_directions
        sizes = (states,) if batch is None else (states, batch)
        check_reset(settings, steps, input, shape, layout, sizes)


def check_padded(steps: Steps) -> None:
    """Beside packed data: nothing that speaks of the steps of a padded batch."""
    for name in ("lengths", "mask"):
        if getattr(steps, name) is not None:
            raise RuntimeError(f"{name}: expected None with packed data, which says itself how long each row is")
    for name in ("reset", "reset_state"):
        if getattr(steps, name) is not None:
            raise RuntimeError(
                f"{name}: expected None with packed data; pad it, torch.nn.utils.rnn.pad_packed_sequence, and pass the "
                "lengths, lengths="
            )


def check_reset(
    settings: Settings, steps: Steps, input: Tensor, shape: tuple[int, ...], layout: str, sizes: tuple[int, ...]
) -> None:
    """``reset`` of this shape, by name ``layout``, and ``reset_state`` of these sizes before the last."""
    reset, reset_state = steps.reset, steps.reset_state
    if reset is None:
        raise RuntimeError("reset_state: expected None without reset, which says where rows begin anew from it")
    if not isinstance(reset, Tensor):
        raise TypeError(f"reset: expected a Tensor or None, got {_describe(reset)}")
    _check_bool("reset", reset, input, shape, layout)
    h, c = split_state(settings.kind, reset_state, "reset_state")
    if h is not None:
        h_shape, c_shape = (*sizes, settings.state_size), (*sizes, settings.kind.num_states * settings.hidden_size)
        _check_state_shapes(h, c, h_shape, c_shape, False, "reset_state")
        check_states_like_input(input, h, c, "reset_state")
        check_state_memory(reset_state, "reset_state")


def _check_bool(name: str, value: Tensor, input: Tensor, shape: tuple[int, ...], layout: str) -> None:
    if value.dtype is not torch.bool:
        raise RuntimeError(f"{name}: expected torch.bool, got {value.dtype}")
    if value.shape != shape:
        raise RuntimeError(f"{name}: expected {shape}, {layout}, got {_shape(value)}")
    if value.device != input.device:
        raise RuntimeError(f"{name}: expected on {input.device} as the input is, got {value.device}")
    _check_memory(name, value)


def _values_can_be_read(tensor: Tensor) -> bool:
    """Whether ``tensor`` has values here and now, without waiting for a device: not for a tracer or ``vmap``."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and tensor.device.type == "cpu"
        and type(tensor) is Tensor
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def check_memory(settings: Settings, input: Any, hx: Any, params: Sequence[Any]) -> None:
    """That the memory of these tensors is there. The kernels check it themselves, but know no names."""
    check_param_count(settings, params)  # before names are made
    _check_memory("input", input)
    check_state_memory(hx)
    for param, (name, _) in zip(params, param_specs(settings)):
        _check_memory(name, param)


def check_state_memory(hx: Any, name: str = "hx") -> None:
    if isinstance(hx, (tuple, list)):
        for index, state in enumerate(hx):
            _check_memory(f"{name}[{index}]", state)
    else:
        _check_memory(name, hx)


def _check_memory(name: str, tensor: Any) -> None:
    """That a tensor's storage holds what its sizes speak of: one that was freed, as sharding and offloading do, does
    not, and whoever reads it crashes. What is no plain tensor with values is left to others."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(tensor) not in (Tensor, Parameter):
        return
    if tensor.layout is not torch.strided or tensor.device.type == "meta" or not tensor.numel():
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return
    last = tensor.storage_offset() + sum((n - 1) * d for n, d in zip(tensor.shape, tensor.stride()))
    needed, found = (last + 1) * tensor.element_size(), tensor.untyped_storage().nbytes()
    if found < needed:
        raise RuntimeError(
            f"{name}: expected a tensor with memory, {needed} bytes of it, got one whose storage was freed or cut "
            f"to {found} bytes"
        )


def check_layer_states(settings: Settings, h: Tensor, c: Tensor | None, batch: int | None) -> None:
    """Shapes of a layer's initial states; ``batch`` as :func:`check_layer_input` returned it."""
    states = settings.num_layers * settings.num_directions
    sizes = (states,) if batch is None else (states, batch)
    _check_state_shapes(
        h, c, (*sizes, settings.state_size), (*sizes, settings.kind.num_states * settings.hidden_size), settings.is_cell
    )


def check_cell_input(settings: Settings, input: Tensor, h: Tensor | None, c: Tensor | None) -> tuple[int, ...]:
    """Shapes of a cell's input and states. Returns the input's sizes before the last: (B,) or ()."""
    shape = input.shape
    if len(shape) not in (1, 2):
        raise ValueError(
            f"input: expected 2 dimensions (B, {settings.input_size}), or 1 without a batch ({settings.input_size},), "
            f"got {len(shape)}, {_shape(input)}"
        )
    if shape[-1] != settings.input_size:
        raise RuntimeError(
            f"input: expected input_size {settings.input_size} as its last dimension, got {_shape(input)}"
        )
    sizes = shape[:-1]
    if h is not None:
        c_shape = (*sizes, settings.kind.num_states * settings.hidden_size)
        _check_state_shapes(h, c, (*sizes, settings.hidden_size), c_shape, settings.is_cell)
    return sizes


def _check_state_shapes(
    h: Tensor, c: Tensor | None, h_shape: tuple[int, ...], c_shape: tuple[int, ...], is_cell: bool, name: str = "hx"
) -> None:
    if h.shape == h_shape and (c is None or c.shape == c_shape):
        return
    for index, state, shape in ((0, h, h_shape), (1, c, c_shape)):
        if state is not None and state.shape != shape:
            # torch.nn's cells tell a state that is no vector or matrix from one of another size
            error = ValueError if is_cell and state.dim() not in (1, 2) else RuntimeError
            raise error(f"{name if c is None else f'{name}[{index}]'}: expected {shape}, got {_shape(state)}")


def check_states_like_input(input: Tensor, h: Tensor, c: Tensor | None, state_name: str = "hx") -> None:
    """States in the input's dtype, on its device."""
    dtype, device = input.dtype, input.device
    if h.dtype is dtype and h.device == device and (c is None or (c.dtype is dtype and c.device == device)):
        return
    for index, state in enumerate((h, c)):
        name = state_name if c is None else f"{state_name}[{index}]"
        if state is not None and state.dtype is not dtype:
            raise RuntimeError(f"{name}: expected {dtype} as the input has, got {state.dtype}")
        if state is not None and state.device != device:
            raise RuntimeError(f"{name}: expected on {device} as the input is, got {state.device}")


def raise_first_weight(params: Any) -> NoReturn:
    """A functional call's first weight, from which its sizes are read, is no matrix."""
    if not isinstance(params, (list, tuple)):
        raise TypeError(f"params: expected a list of Tensors, got {_describe(params)}")
    if not params:
        raise RuntimeError("params: expected at least weight_ih_l0 and weight_hh_l0, got an empty list")
    raise_not_matrix("weight_ih_l0", params[0])


def raise_first_weight_empty(kind: AnyCellKind, weight: Tensor, name: str = "weight_ih_l0") -> NoReturn:
    raise RuntimeError(f"{name}: expected at least ({kind.num_gates}, 1), a unit and a feature, got {_shape(weight)}")


def raise_not_matrix(name: str, weight: Any) -> NoReturn:
    """The weight that gives a functional call its sizes has none to give."""
    error = RuntimeError if isinstance(weight, Tensor) else TypeError
    raise error(f"{name}: expected a Tensor of 2 dimensions, got {_describe(weight)}")


# Words


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _describe(value: Any) -> str:
    """A short name of an unexpected object: its value where that is short, its type in any case."""
    if value is None:
        return "None"
    if isinstance(value, (bool, int, float, str)):
        return f"{value!r} ({type(value).__name__})"
    if isinstance(value, PackedSequence):
        return "a PackedSequence"
    if isinstance(value, Tensor):
        return f"a {type(value).__name__} of shape {_shape(value)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"an object of type {type(value).__module__}.{type(value).__name__}"


def _shorten(sizes: Sequence[int]) -> str:
    return str(list(sizes)) if len(sizes) <= 12 else f"[{', '.join(map(str, sizes[:10]))}, ..., {sizes[-1]}]"


# Streams


def check_stream_module(module: Any) -> None:
    """``module`` of a stream."""
    if not isinstance(module, (torch.nn.RNNBase, torch.nn.RNNCellBase)):
        raise TypeError(f"module: expected a recurrent layer or cell, got {_describe(module)}")


def check_stream_runs(module: Any, reason: str | None) -> None:
    """That kernels take its weights; ``reason``: why they do not."""
    if reason is not None:
        raise ValueError(f"module: expected one that a stream can run, got {type(module).__name__}: {reason}")


def check_stream_sizes(name: str, count: Any, dtype: Any, dtypes: Sequence[torch.dtype]) -> None:
    """``batch_size`` or ``capacity``, and the dtype of a stream."""
    if not isinstance(count, int) or isinstance(count, bool):
        raise TypeError(f"{name}: expected an int, got {_describe(count)}")
    if count < 1:
        raise ValueError(f"{name}: expected at least 1, got {count}")
    if dtype not in dtypes:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, dtypes))}, got {dtype}")


def check_stream_dtype(dtype: Any) -> None:
    """``dtype`` of a stream of a quantized module."""
    if dtype not in (None, torch.float32):
        raise ValueError(f"dtype: expected None or torch.float32 for a quantized module, got {dtype}")


def check_stream_tensor(name: str, value: Tensor, shape: Sequence[int | None], dtype: torch.dtype) -> None:
    """``x``, ``out`` or a state of a stream; ``None`` in ``shape`` is any size."""
    if value.device.type != "cpu" or value.layout is not torch.strided:
        raise RuntimeError(f"{name}: expected a dense tensor on the CPU, got {value.layout} on {value.device}")
    if value.dtype is not dtype:
        raise ValueError(f"{name}: expected {dtype} as the stream has, got {value.dtype}")
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: expected a tensor without a gradient, which a stream does not compute; use {name}.detach(), or "
            "torch.no_grad() around the call"
        )
    expected = "(" + ", ".join("n" if size is None else str(size) for size in shape) + ")"
    if value.dim() != len(shape):
        raise ValueError(f"{name}: expected {expected}, got {_shape(value)}")
    if any(size is not None and found != size for found, size in zip(value.shape, shape, strict=True)):
        raise RuntimeError(f"{name}: expected {expected}, got {_shape(value)}")
    _check_memory(name, value)


def raise_stream_type(name: str, value: Any) -> NoReturn:
    raise TypeError(f"{name}: expected a Tensor or an array, got {_describe(value)}")


def check_writable(is_writable: bool, strides: Sequence[int]) -> None:
    """``out`` as an array."""
    if not is_writable:
        raise ValueError("out: expected an array that may be written to, got one that is read-only")
    if min(strides, default=0) < 0:
        raise ValueError(f"out: expected an array whose strides are not negative, got {tuple(strides)}")


def check_stream_out(out: Tensor) -> None:
    """``out``, whose dtype and size were checked."""
    strides = out.stride()
    columns, rows = out.shape[-1], out.shape[-2]
    if (columns > 1 and strides[-1] != 1) or (rows > 1 and strides[-2] < columns):
        raise ValueError(
            f"out: expected rows of neighbouring features that do not overlap, got strides {strides} of {_shape(out)}"
        )


def check_chunk_out(overlaps: bool) -> None:
    if overlaps:
        raise ValueError("out: expected memory of its own, got some of x, which is read after out is written")


def check_same_sizes(sizes: tuple[int, ...], before: tuple[int, ...]) -> None:
    """Of a stream's module: kind of cell, I, H, P, layers."""
    if sizes != before:
        raise RuntimeError(
            f"module: expected the cell and sizes (kind, I, H, P, L) {before} that it had before, got {sizes}"
        )


def check_saved_dtype(dtype: Any, dtypes: Sequence[torch.dtype]) -> None:
    if dtype not in dtypes:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, dtypes))}, got {dtype}")


def check_saved_sizes(num_layers: int, most_layers: int, size: int, most_features: int) -> None:
    """Of a module whose weights are saved for the C library, whose sizes are limited (include/fused_rnn.h)."""
    if num_layers > most_layers:
        raise ValueError(f"module: expected at most {most_layers} layers, got {num_layers}")
    if size > most_features:
        raise ValueError(f"module: expected at most {most_features} features, got {size}")


def raise_no_safetensors(error: ImportError) -> NoReturn:
    raise ImportError(
        "save_weights: expected the package safetensors, which is not installed: pip install safetensors"
    ) from error


def raise_slots_type(slots: Any) -> NoReturn:
    raise TypeError(f"slots: expected a list of ints, or an int64 Tensor or array, got {_describe(slots)}")


def check_slots(slots: Any, rows: int, is_open: Sequence[bool]) -> None:
    """``slots`` of a pool's step: a list, one for each row."""
    if len(slots) != rows:
        raise RuntimeError(f"slots: expected {rows}, one for each row of x, got {len(slots)}")
    for slot in slots:
        check_slot("slots", slot, is_open)
    if len(set(slots)) != rows:
        twice = next(slot for slot in slots if slots.count(slot) > 1)
        raise RuntimeError(f"slots: expected each slot once, got {twice} twice")


def check_slot(name: str, slot: Any, is_open: Sequence[bool]) -> None:
    if not isinstance(slot, int) or isinstance(slot, bool):
        raise TypeError(f"{name}: expected ints, as open() returns them, got {_describe(slot)}")
    if not (0 <= slot < len(is_open) and is_open[slot]):
        raise IndexError(f"{name}: expected slots that are open, got {slot}")


def raise_pool_is_full(capacity: int) -> NoReturn:
    raise RuntimeError(f"open: all {capacity} slots are open; close one first, or make a pool of a larger capacity")


def check_lengths_of_chunk(lengths: Tensor, rows: int, num_steps: int) -> None:
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype is torch.bool:
        raise RuntimeError(f"lengths: expected an integer dtype, got {lengths.dtype}")
    if lengths.shape != (rows,):
        raise RuntimeError(f"lengths: expected {(rows,)}, one for each row, got {_shape(lengths)}")
    for value in lengths.tolist():
        if not 0 <= value <= num_steps:
            raise RuntimeError(f"lengths: expected 0 to {num_steps}, the steps of the input, got {value}")


# Quantized layers


def check_weight_dtype(dtype: Any, weights: Any, known: Mapping[str, torch.dtype]) -> torch.dtype:
    """``dtype``, or ``weights`` by name in its place."""
    names = ", ".join(map(repr, known))
    if weights is not None:
        if not isinstance(weights, str) or weights not in known:
            raise ValueError(f"weights: expected one of {names}, got {weights!r}")
        return known[weights]
    if dtype not in known.values():
        raise ValueError(f"dtype: expected one of {', '.join(map(str, known.values()))}, got {dtype}")
    found: torch.dtype = dtype
    return found


def check_any_quantized(converted: Mapping[str, str], left_alone: Mapping[str, str]) -> None:
    if not converted:
        reasons = "; ".join(f"{name or 'the model itself'}: {reason}" for name, reason in left_alone.items())
        reasons = reasons or "there is no recurrent module"
        raise ValueError(f"model: expected a recurrent layer or cell that can be quantized, got none ({reasons})")


def check_like_stored(settings: Settings, input: Tensor) -> None:
    """The input of quantized layers."""
    if input.dtype is not torch.float32:
        raise ValueError(f"input: expected torch.float32 for a quantized layer, got {input.dtype}")
    if input.device.type != "cpu":
        raise RuntimeError(f"input: expected a tensor on the CPU for a quantized layer, got one on {input.device}")


def check_quantized_call(training: bool, *tensors: Tensor | None) -> None:
    if not torch.is_grad_enabled():
        return
    if training:
        raise RuntimeError(
            "training: expected eval mode, model.eval(), or torch.no_grad(): quantized layers have no gradients; "
            "dequantize() gives a layer that has"
        )
    if any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(
            "input, hx: expected tensors without a gradient, which quantized layers do not compute; use "
            "torch.no_grad(), or dequantize()"
        )


def check_quantized_kernels(reason: str | None) -> None:
    if reason is not None:
        raise RuntimeError(f"quantized layers need the compiled kernels: {reason}")


def wrong_int8(name: str) -> str:
    return f"{name}: expected int8 values from -127 to 127, got -128"


def wrong_stored_dtype(name: str, expected: torch.dtype, found: torch.dtype) -> str:
    return f"{name}: expected {expected}, or torch.float32 without scales beside it, got {found}"
