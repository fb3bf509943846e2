"""Layers and cells as ONNX has them: an LSTM, GRU or RNN node for each layer.

:func:`torch.onnx.export` calls a model once and writes down what it does. A call that it sees comes here in place of
the operators and the formulas, with both of PyTorch's exporters: that of ``torch.export`` (``dynamo=True``) is given a
symbolic operation for each node, that of ``torch.jit.trace`` (``dynamo=False``) an autograd function that says how it
is written. What a node does not have is refused by name, never left out and never unrolled into a file that holds for
one number of steps.

What the nodes compute: https://onnx.ai/onnx/operators/onnx__LSTM.html, onnx__GRU.html and onnx__RNN.html. Letters in
shapes: :mod:`fused_rnn.settings`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import formulas
from .settings import NOTHING_AROUND, AnyCellKind, CellKind, Controls, Settings, Steps, Within

__all__ = ["check_call", "run_stack", "run_step"]

# The newest of all three nodes before 22, which has bfloat16 besides.
_OPSET = 14
_DTYPES = (torch.float32, torch.float64, torch.float16)

_NODES: dict[AnyCellKind, str] = {
    CellKind.LSTM: "LSTM",
    CellKind.GRU: "GRU",
    CellKind.RNN_TANH: "RNN",
    CellKind.RNN_RELU: "RNN",
}
# Blocks of rows of a weight in the order in which ONNX has them: LSTM i, f, g, o -> i, o, f, g; GRU r, z, n -> z, r, n.
_GATES: dict[AnyCellKind, tuple[int, ...]] = {
    CellKind.LSTM: (0, 3, 1, 2),
    CellKind.GRU: (1, 0, 2),
    CellKind.RNN_TANH: (0,),
    CellKind.RNN_RELU: (0,),
}
_PEEPHOLES = (0, 2, 1)  # i, f, o -> i, o, f
_INPUT, _FORGET = 0, 1  # in both

# The functions that a node knows, with their alpha and beta where they have any.
_ACTIVATIONS: dict[str, tuple[str, tuple[float, float] | None]] = {
    "tanh": ("Tanh", None),
    "sigmoid": ("Sigmoid", None),
    "relu": ("Relu", None),
    "hard_sigmoid": ("HardSigmoid", (1 / 6, 0.5)),
    "softsign": ("Softsign", None),
    "identity": ("Affine", (1.0, 0.0)),
}
# Functions a with a(-x) = 1 - a(x), for which 1 - f is the input gate of weights with the other sign.
_ODD_ABOUT_A_HALF = ("sigmoid", "hard_sigmoid")


def check_call(settings: Settings, steps: Steps, input: Tensor) -> None:
    """See that nodes of ONNX can say this call.

    Raises:
        RuntimeError: they cannot; the message has the name of what they lack.
    """
    if settings.kind not in _NODES or settings.is_independent:
        name = "IndRNN" if settings.is_independent else settings.kind.name.removeprefix("CUSTOM_")
        raise RuntimeError(
            f"torch.onnx.export: expected an LSTM, GRU or RNN, as ONNX has no node of another cell, got {name}"
        )
    node = _NODES[settings.kind]
    lacking = next(_what_no_node_has(settings, steps), None)
    if lacking is not None:
        name, needed, given = lacking
        raise RuntimeError(
            f"{name}: expected {needed} in torch.onnx.export, as no {node} node of ONNX has it, got {given}"
        )
    if input.dtype not in _DTYPES:
        raise RuntimeError(
            f"input: expected float32, float64 or float16 in torch.onnx.export, as the {node} node of ONNX has them, "
            f"got {input.dtype}"
        )


# Of the records of a call, what nodes say, or what changes no number. Whatever else there is, also what is added later,
# they do not have.
_SAID = {"recurrent_bias", "independent"}  # by a bias of zeros; check_call sees to the other
_SAID |= {"activation", "recurrent_activation", "reset_after", "peephole", "coupled_gates"}
_SAID |= {"bptt_steps", "recurrent_grad_clip", "training"}  # gradients; whether zoneout is drawn
_SAID |= {"lengths"}
_IN_EVAL_MODE = ("input_dropout", "weight_dropout", "recurrent_dropout")
# What to do, where it is more than to leave something out.
_NEEDED = dict.fromkeys(_IN_EVAL_MODE, "0.0 or a model in eval mode")
_NEEDED["stateful"] = "False, and the states as inputs and outputs of the model,"
_NEEDED["mask"] = "None (it has lengths)"
_NEEDED["batch_sizes"] = "None, a padded Tensor and its lengths, lengths=,"


def _what_no_node_has(settings: Settings, steps: Steps) -> Iterator[tuple[str, str, Any]]:
    """Of a call: the name, what is needed, and what was given."""
    within = formulas.within_of(settings)
    if settings.state_size != settings.hidden_size:
        yield "proj_size", "0", settings.state_size
    if settings.dropout and settings.num_layers > 1:
        yield "dropout", "0.0 or a model in eval mode", settings.dropout
    of_steps = steps._replace(reset=None, reset_state=None) if settings.is_cell else steps  # done around a cell's node
    for record in (settings.around or NOTHING_AROUND, within, of_steps):
        for name, default in record._field_defaults.items():
            value = getattr(record, name)
            if name not in _SAID and value is not default and (isinstance(value, Tensor) or value != default):
                given = "a Tensor" if isinstance(value, Tensor) else value
                yield name, _NEEDED.get(name, repr(default)), given
    if within.coupled_gates and within.recurrent_activation not in _ODD_ABOUT_A_HALF:
        functions = " or ".join(map(repr, _ODD_ABOUT_A_HALF))
        yield "recurrent_activation", f"{functions} with coupled_gates", repr(within.recurrent_activation)


def run_stack(
    settings: Settings,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    params: Sequence[Tensor],
    lengths: Tensor | None,
    compute: Callable[..., tuple[Tensor, ...]],
) -> tuple[Tensor, Tensor, Tensor]:
    """All layers and directions of a call that :func:`check_call` has nothing to say of, a node for each layer.

    Args:
        input: (T, B, I), or (B, T, I) with ``batch_first``.
        h0, c0: (L*D, B, H), or ``None`` for zeros.
        params: for each layer and direction w_ih (G*H, I of the layer), w_hh (G*H, H), with ``bias`` b_ih and b_hh
            (G*H), with ``peephole`` w_peephole (3*H).
        lengths: steps of each row, integers (B), or ``None`` for all.
        compute: ``run_stack`` of the kernels or the formulas, for the numbers that a trace goes on with.

    Returns:
        output (T, B, D*H), transposed with ``batch_first``; h_n and c_n (L*D, B, H), the last an empty tensor unless
        the cell is an LSTM.
    """
    settings = settings._replace(hidden_size=int(settings.hidden_size))  # a function's sizes are traced, too
    num_layers, num_directions = settings.num_layers, settings.num_directions
    per_layer = len(params) // num_layers
    steps_of_rows = None if lengths is None else lengths.reshape(-1).to(input.device, torch.int32)
    x = input.transpose(0, 1) if settings.batch_first else input
    states: list[list[Tensor]] = []
    for layer in range(num_layers):
        of_layer = params[layer * per_layer : (layer + 1) * per_layer]
        rows = slice(layer * num_directions, (layer + 1) * num_directions)
        h, c = (state if state is None or num_layers == 1 else state[rows] for state in (h0, c0))
        y, *last = _run_layer(settings, x, h, c, of_layer, steps_of_rows, compute)
        x = y.squeeze(1) if num_directions == 1 else y.transpose(1, 2).flatten(2)
        states.append(last)
    h_n, *others = (of_layers[0] if num_layers == 1 else torch.cat(of_layers) for of_layers in zip(*states))
    return x.transpose(0, 1) if settings.batch_first else x, h_n, others[0] if others else input.new_empty(0)


def run_step(
    settings: Settings,
    input: Tensor,
    h: Tensor,
    c: Tensor | None,
    params: Sequence[Tensor],
    compute: Callable[..., tuple[Tensor, ...]],
) -> tuple[Tensor, Tensor | None]:
    """A cell's step, a node of one step: input (B, I), h and c (B, H), the rest as for :func:`run_stack`."""
    settings = settings._replace(hidden_size=int(settings.hidden_size))
    first = [None if state is None else state.unsqueeze(0) for state in (h, c)]
    _, *last = _run_layer(settings, input.unsqueeze(0), first[0], first[1], params, None, compute)
    h, *others = (state.squeeze(0) for state in last)
    return h, others[0] if others else None


def _run_layer(
    settings: Settings,
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    params: Sequence[Tensor],
    lengths: Tensor | None,
    compute: Callable[..., tuple[Tensor, ...]],
) -> Sequence[Tensor]:
    """y (T, D, B, H), the last h (D, B, H), and of an LSTM the last c (D, B, H)."""
    within, num_directions = formulas.within_of(settings), settings.num_directions
    per_cell = len(params) // num_directions
    cells = [params[i * per_cell : (i + 1) * per_cell] for i in range(num_directions)]
    # W (D, G*H, I), R (D, G*H, H), B (D, 2*G*H), the lengths, the states, and of an LSTM P (D, 3*H)
    inputs: list[Tensor | None] = [x, *(_of_directions([_rows(settings, cell[i]) for cell in cells]) for i in (0, 1))]
    biases = [torch.cat([_rows(settings, bias) for bias in cell[2:4]]) for cell in cells] if settings.bias else None
    inputs += [None if biases is None else _of_directions(biases), lengths, h]
    if settings.kind is CellKind.LSTM:
        inputs.append(c)
        if within.peephole:
            inputs.append(_of_directions([_gates(cell[-1], _PEEPHOLES, within.coupled_gates) for cell in cells]))
    while inputs[-1] is None:
        inputs.pop()

    states = 2 if settings.kind is CellKind.LSTM else 1
    node = _Node(_NODES[settings.kind], _attributes(settings, within), 1 + states)
    if torch.jit.is_tracing():
        one_layer = settings._replace(num_layers=1, batch_first=False)
        found = _TracedNode.apply(node, one_layer, compute, x, h, c, lengths, len(params), *params, *inputs)
    else:
        num_steps, batch = x.shape[:2]
        of_states = (num_directions, batch, settings.hidden_size)
        found = torch.onnx.ops.symbolic_multi_out(
            node.name,
            inputs,
            node.attributes,
            dtypes=[x.dtype] * node.outputs,
            shapes=[(num_steps, *of_states), *[of_states] * states],
            version=_OPSET,
        )
    if lengths is None or h is None:
        return found
    # A row of no step ends in its initial state; that of a node, in zeros.
    is_empty = (lengths == 0).reshape(1, -1, 1)
    y, *last = found
    return [y, *(torch.where(is_empty, first, end) for first, end in zip((h, c), last) if first is not None)]


def _rows(settings: Settings, parameter: Tensor) -> Tensor:
    coupled = settings.within is not None and settings.within.coupled_gates
    return _gates(parameter, _GATES[settings.kind], coupled)


def _gates(parameter: Tensor, order: Sequence[int], coupled: bool) -> Tensor:
    """The blocks of the gates in this order.

    A node's ``input_forget`` makes the forget gate of the input gate, f = 1 - i, and ours i = 1 - f: with all that is
    added up in f negated for i both are the same.
    """
    if len(order) == 1:
        return parameter
    size = parameter.shape[0] // len(order)
    # by slices, which an exporter folds into constants
    blocks = [parameter[gate * size : (gate + 1) * size] for gate in range(len(order))]
    if coupled:
        blocks[_INPUT] = -blocks[_FORGET]
    return torch.cat([blocks[gate] for gate in order])


def _of_directions(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def _attributes(settings: Settings, within: Within) -> dict[str, Any]:
    attributes: dict[str, Any] = {"hidden_size": settings.hidden_size}
    attributes["direction"] = "bidirectional" if settings.bidirectional else "forward"
    functions = [within.activation]
    if settings.kind is CellKind.LSTM:
        functions = [within.recurrent_activation, within.activation, within.activation]
    elif settings.kind is CellKind.GRU:
        functions = [within.recurrent_activation, within.activation]
        attributes["linear_before_reset"] = int(within.reset_after)
    if within.coupled_gates:
        attributes["input_forget"] = 1
    known = [_ACTIVATIONS[name] for name in functions] * settings.num_directions
    attributes["activations"] = [name for name, _ in known]
    # of the functions that have them, in their order
    if constants := [pair for _, pair in known if pair is not None]:
        attributes["activation_alpha"], attributes["activation_beta"] = map(list, zip(*constants))
    return attributes


class _Node(NamedTuple):
    name: str
    attributes: dict[str, Any]
    outputs: int


class _TracedNode(torch.autograd.Function):
    """A node for the exporter that traces: :meth:`symbolic` writes it, :meth:`forward` gives the trace its numbers.

    They are computed in a thread of their own, which is not traced: the exporter would look at every operation.
    """

    @staticmethod
    def forward(ctx: Any, node: _Node, settings: Settings, compute: Any, x: Tensor, *given: Any) -> tuple[Tensor, ...]:
        h, c, lengths, count, *tensors = given

        @torch.no_grad()
        def numbers() -> tuple[Tensor, ...]:
            mask = None if lengths is None else torch.arange(x.shape[0], device=x.device).unsqueeze(1) < lengths
            output, *states = compute(settings, x, h, c, tensors[:count], Controls(mask=mask))
            y = output.unflatten(-1, (settings.num_directions, settings.hidden_size)).transpose(1, 2)
            return (y, *states[: node.outputs - 1])

        with ThreadPoolExecutor(1) as thread:
            found = thread.submit(numbers).result()
        return tuple(t.clone() for t in found)  # the trace has to know where they come from

    @staticmethod
    def symbolic(g: Any, node: _Node, *given: Any) -> Any:
        count = given[6]
        inputs = given[7 + count :]

        def absent() -> Any:
            value = g.op("prim::Constant")
            value.setType(torch._C.OptionalType.ofTensor())
            return value

        values = [absent() if value is None else value for value in inputs]
        attributes = {f"{name}_{_type_of(value)}": value for name, value in node.attributes.items()}
        return g.op(node.name, *values, outputs=node.outputs, **attributes)


def _type_of(value: Any) -> str:
    """The letter by which that exporter knows the type of an attribute."""
    first = value[0] if isinstance(value, list) else value
    return "i" if isinstance(first, int) else "s" if isinstance(first, str) else "f"
