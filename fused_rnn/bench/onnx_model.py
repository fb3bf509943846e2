"""A case's layers as an ONNX model with fixed sizes, for the engines that read ONNX."""

from typing import Any

import torch
from torch import Tensor, nn

from .cases import Case

_OPERATORS = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}

# Blocks of rows in torch.nn's weights, in the order in which ONNX wants them:
# LSTM i, f, g, o -> i, o, f, c; GRU r, z, n -> z, r, h.
_GATE_ORDER = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn": (0,)}

# Every operator used is defined like this from here on, and all engines know it.
_OPSET = 17
_IR_VERSION = 8


def build(case: Case, module: nn.Module) -> Any:
    """Return the `onnx.ModelProto` that computes what the module computes on the case's sizes, in float32.

    Inputs are "input" (T, B, I; T = 1 for a cell) and, for a cell, the states "h_0" and "c_0" (1, B, H). Outputs:

    - "output": (T, 1, B, H), for both directions (T, B, 2 H). A cell has none.
    - "h_n.<layer>" and, of an LSTM, "c_n.<layer>": (directions, B, H).
    """
    from onnx import TensorProto, helper

    shape = case.shape
    directions = shape.num_directions
    state_shape = [directions, shape.batch_size, shape.hidden_size]
    states = ("h", "c") if case.cell == "lstm" else ("h",)
    nodes, weights, outputs = [], [], []
    inputs = [_value("input", [shape.seq_length, shape.batch_size, shape.input_size])]
    initial_states = []
    if shape.single_step:
        initial_states = [f"{state}_0" for state in states]
        inputs += [_value(name, state_shape) for name in initial_states]

    attributes: dict[str, Any] = {"hidden_size": shape.hidden_size}
    if directions == 2:
        attributes["direction"] = "bidirectional"
    if case.cell == "gru":
        attributes["linear_before_reset"] = 1  # the reset gate is applied to W_hh h + b_hh, as torch.nn does
    if case.cell == "rnn":
        attributes["activations"] = ["Tanh"] * directions

    below = "input"
    for layer in range(shape.num_layers):
        names = [f"{part}.{layer}" for part in ("W", "R", "B")]
        weights += [_constant(name, tensor) for name, tensor in zip(names, _weights(case, module, layer))]
        sequence, output = f"sequence.{layer}", f"output.{layer}"
        if layer == shape.num_layers - 1:
            sequence, output = ("sequence", "output") if directions == 2 else ("output", "")
        last = [f"{state}_n.{layer}" for state in states]
        # The fifth input is the lengths of the sequences: all are whole.
        operands = [below, *names, *(["", *initial_states] if initial_states else [])]
        written = ["" if shape.single_step else sequence, *last]
        nodes.append(helper.make_node(_OPERATORS[case.cell], operands, written, **attributes))
        outputs += [_value(name, state_shape) for name in last]
        # (T, directions, B, H) to (T, B, directions H).
        if directions == 2:
            nodes.append(helper.make_node("Transpose", [sequence], [f"swapped.{layer}"], perm=[0, 2, 1, 3]))
            nodes.append(helper.make_node("Reshape", [f"swapped.{layer}", "joined"], [output]))
        elif output:
            nodes.append(helper.make_node("Reshape", [sequence, "joined"], [output]))
        below = output
    if directions == 2 or shape.num_layers > 1:
        joined = [shape.seq_length, shape.batch_size, directions * shape.hidden_size]
        weights.append(helper.make_tensor("joined", TensorProto.INT64, [3], joined))
    if not shape.single_step:
        outputs.insert(0, _value("output", output_shape(case)))

    graph = helper.make_graph(nodes, case.name, inputs, outputs, weights)
    opset = [helper.make_opsetid("", _OPSET)]
    return helper.make_model(graph, opset_imports=opset, ir_version=_IR_VERSION)


def output_shape(case: Case) -> list[int]:
    """Return the shape of "output"."""
    shape = case.shape
    if shape.bidirectional:
        return [shape.seq_length, shape.batch_size, 2 * shape.hidden_size]
    return [shape.seq_length, 1, shape.batch_size, shape.hidden_size]


def _weights(case: Case, module: nn.Module, layer: int) -> list[Tensor]:
    """Return W (directions, G H, inputs), R (directions, G H, H) and B (directions, 2 G H) of a layer."""
    suffixes = [""] if case.shape.single_step else [f"_l{layer}", f"_l{layer}_reverse"][: case.shape.num_directions]

    def stacked(*names: str) -> Tensor:
        return torch.stack(
            [torch.cat([_reordered(case, getattr(module, name + suffix)) for name in names]) for suffix in suffixes]
        )

    return [stacked("weight_ih"), stacked("weight_hh"), stacked("bias_ih", "bias_hh")]


def _reordered(case: Case, parameter: Tensor) -> Tensor:
    blocks = parameter.detach().float().chunk(len(_GATE_ORDER[case.cell]))
    return torch.cat([blocks[gate] for gate in _GATE_ORDER[case.cell]])


def _value(name: str, shape: list[int]) -> Any:
    from onnx import TensorProto, helper

    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _constant(name: str, tensor: Tensor) -> Any:
    from onnx import numpy_helper

    return numpy_helper.from_array(tensor.contiguous().numpy(), name)
