"""torch.onnx.export: a standard node for each layer, run by ONNX Runtime; what a node cannot say is refused by name."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from support.compare import assert_within
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.utils.rnn import pack_padded_sequence

import fused_rnn
from fused_rnn import backend

pytestmark = pytest.mark.filterwarnings(
    "ignore:You are using the legacy TorchScript",
    "ignore:.*torch.jit.*is deprecated",
    "ignore::torch.jit.TracerWarning",
    "ignore:The feature will be removed",
    "ignore:It is recommended that constant folding",
    "ignore:Exporting a model while it is in training mode",
)

SIZE, UNITS = 3, 4
STATES = 4  # of two layers in two directions
# Named by letter: the input (T, B, SIZE), lengths (B), states (4, B, UNITS), which rows begin anew (B).
Inputs = dict[str, Tensor]
Call = Callable[[nn.Module, Inputs], Any]


def plain(layer: nn.Module, given: Inputs) -> Any:
    return layer(given["x"])


def with_lengths(layer: nn.Module, given: Inputs) -> Any:
    return layer(given["x"], lengths=given["lengths"])


def with_states(layer: nn.Module, given: Inputs) -> Any:
    """All that a call of a layer may have, in the layer's own form."""
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    h, c = given["h"][:count], given["c"][:count]
    sequence = given["x"].transpose(0, 1) if layer.batch_first else given["x"]
    return layer(sequence, (h, c) if isinstance(layer, fused_rnn.LSTM) else h, lengths=given["lengths"])


def one_step(cell: nn.Module, given: Inputs) -> Any:
    h, c = given["h"][0], given["c"][0]
    return cell(given["x"][0], (h, c) if isinstance(cell, fused_rnn.LSTMCell) else h, reset=given["reset"])


LAYERS: dict[str, tuple[nn.Module, Call]] = {
    "lstm": (fused_rnn.LSTM(SIZE, UNITS, num_layers=2, bidirectional=True, batch_first=True, dropout=0.5), with_states),
    "gru": (fused_rnn.GRU(SIZE, UNITS, num_layers=2, bidirectional=True), with_states),
    "rnn": (fused_rnn.RNN(SIZE, UNITS, nonlinearity="relu", batch_first=True), with_states),
    "no bias": (fused_rnn.GRU(SIZE, UNITS, bias=False), plain),
    "one bias": (fused_rnn.LSTM(SIZE, UNITS, bidirectional=True, recurrent_bias=False), plain),
    "peephole": (fused_rnn.LSTM(SIZE, UNITS, bidirectional=True, peephole=True), with_lengths),
    "coupled": (
        fused_rnn.LSTM(SIZE, UNITS, coupled_gates=True, peephole=True, recurrent_activation="hard_sigmoid"),
        plain,
    ),
    "functions": (fused_rnn.LSTM(SIZE, UNITS, activation="hard_sigmoid", recurrent_activation="identity"), plain),
    "reset before": (fused_rnn.GRU(SIZE, UNITS, reset_after=False, activation="softsign"), with_states),
    "identity": (fused_rnn.RNN(SIZE, UNITS, nonlinearity="identity", bidirectional=True), with_lengths),
    "of gradients": (fused_rnn.LSTM(SIZE, UNITS, recurrent_grad_clip=1.0, bptt_steps=2, recompute=True), with_lengths),
    "in training": (fused_rnn.LSTM(SIZE, UNITS, input_dropout=0.5, weight_dropout=0.5, recurrent_dropout=0.5), plain),
    "unbatched": (
        fused_rnn.GRU(SIZE, UNITS),
        lambda layer, given: layer(given["x"][:, 0], lengths=given["lengths"][0]),
    ),
    "function": (
        fused_rnn.GRU(SIZE, UNITS),
        lambda layer, given: fused_rnn.functional.gru(given["x"], None, list(layer.parameters())),
    ),
    "lstm cell": (fused_rnn.LSTMCell(SIZE, UNITS, peephole=True), one_step),
    "gru cell": (fused_rnn.GRUCell(SIZE, UNITS, bias=False), one_step),
    "rnn cell": (fused_rnn.RNNCell(SIZE, UNITS), lambda cell, given: cell(given["x"][0])),
}
NODES = {"LSTM": 9, "GRU": 7, "RNN": 3}


class Zoo(nn.Module):
    """Every layer and cell of LAYERS on the same inputs: an export takes seconds, however little there is."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names
        self.layers = nn.ModuleList([LAYERS[name][0] for name in names])

    def forward(self, x: Tensor, lengths: Tensor, h: Tensor, c: Tensor, reset: Tensor) -> list[Tensor]:
        given = {"x": x, "lengths": lengths, "h": h, "c": c, "reset": reset}
        results: list[Tensor] = []
        for name, layer in zip(self.names, self.layers, strict=True):
            results += tensors_of(LAYERS[name][1](layer, given))
        return results


def tensors_of(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for part in result for t in tensors_of(part)]


def arguments(steps: int, batch: int, seed: int = 0) -> tuple[Tensor, ...]:
    """A row of all steps first, one of none last."""
    torch.manual_seed(seed)
    lengths = torch.linspace(steps, 0, batch).long() if batch > 1 else torch.tensor([steps])
    h, c = torch.randn(2, STATES, batch, UNITS)
    return torch.randn(steps, batch, SIZE), lengths, h, c, torch.arange(batch) % 2 == 0


NAMES = ["x", "lengths", "h", "c", "reset"]


def export(model: nn.Module, args: tuple[Any, ...], dynamo: bool, names: list[str] = NAMES) -> onnx.ModelProto:
    """The file that the exporter writes, with every size of an axis for batch or time open."""
    axes = {"x": {0: "time", 1: "batch"}, "h": {1: "batch"}, "c": {1: "batch"}} | dict.fromkeys(
        ["lengths", "reset"], {0: "batch"}
    )
    if dynamo:
        dims = {"time": Dim("time"), "batch": Dim("batch")}
        shapes = tuple({axis: dims[name] for axis, name in axes[argument].items()} for argument in names)
        return torch.onnx.export(model, args, dynamo=True, dynamic_shapes=shapes, verbose=False).model_proto
    file = io.BytesIO()
    torch.onnx.export(model, args, file, dynamo=False, input_names=names, dynamic_axes={n: axes[n] for n in names})
    return onnx.load_from_string(file.getvalue())


def run(model: onnx.ModelProto, args: tuple[Tensor, ...]) -> list[Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    names = [given.name for given in session.get_inputs()]
    found = session.run(None, {name: t.numpy() for name, t in zip(names, args, strict=True)})
    return [torch.from_numpy(array) for array in found]


@pytest.mark.filterwarnings("ignore:# The axis name", "ignore:.*LeafSpec")
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "trace"])
def test_every_layer_is_a_node_that_computes_its_numbers(dynamo: bool) -> None:
    model = Zoo(list(LAYERS)).eval()
    written = export(model, arguments(5, 3), dynamo)
    onnx.checker.check_model(written, full_check=True)
    kinds = Counter(node.op_type for node in written.graph.node)
    assert {kind: kinds[kind] for kind in NODES} == NODES
    assert not {"Loop", "Scan", "If"} & set(kinds) and not written.functions
    for steps, batch in ((5, 3), (7, 2), (1, 1)):
        args = arguments(steps, batch, seed=steps)
        with torch.no_grad():
            expected = model(*args)
        found = run(written, args)
        numbered = dict(zip(map(str, range(len(found))), found, strict=True))
        assert_within(numbered, {str(i): t.double() for i, t in enumerate(expected)})
        assert [t.shape for t in found] == [t.shape for t in expected]


def test_lengths_are_the_nodes_own_and_a_row_of_no_step_keeps_its_state() -> None:
    class Model(fused_rnn.LSTM):
        def forward(self, x: Tensor, lengths: Tensor, h: Tensor, c: Tensor) -> Any:
            return super().forward(x, (h, c), lengths=lengths)

    x, lengths, h, c, _ = arguments(5, 3)
    args = (x, lengths, h[:2], c[:2])
    written = export(Model(SIZE, UNITS, bidirectional=True), args, False, NAMES[:4])
    (node,) = [node for node in written.graph.node if node.op_type == "LSTM"]
    made = {output: node for node in written.graph.node for output in node.output}
    assert made[node.input[4]].op_type == "Cast" and node.input[5:] == ["h", "c"]
    output, h_n, c_n = run(written, args)
    assert torch.equal(h_n[:, 2], h[:2, 2]) and torch.equal(c_n[:, 2], c[:2, 2]) and not output[:, 2].any()


class Calls(nn.Module):
    def __init__(self, layer: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.call = layer, call
        self.train(layer.training)

    def forward(self, x: Tensor) -> Any:
        return self.call(self.layer, x)


def as_it_is(layer: nn.Module, x: Tensor) -> Any:
    return layer(x)


def test_the_formulas_are_exported_as_the_kernels_are() -> None:
    with fused_rnn.use_backend("reference"):
        written = export(Zoo(["lstm", "gru cell"]).eval(), arguments(5, 3), False)
    assert [node.op_type for node in written.graph.node if node.op_type in NODES] == ["LSTM", "LSTM", "GRU"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_the_file_has_the_layers_dtype(dtype: torch.dtype) -> None:
    layer, args = fused_rnn.GRU(SIZE, UNITS, dtype=dtype).eval(), (arguments(5, 3)[0].to(dtype),)
    written = export(Calls(layer, as_it_is), args, False, NAMES[:1])
    onnx.checker.check_model(written, full_check=True)
    kinds = {tensor.data_type for tensor in written.graph.initializer if len(tensor.dims) > 1}
    assert kinds == {onnx.helper.np_dtype_to_tensor_dtype(torch.empty(0, dtype=dtype).numpy().dtype)}
    if dtype is torch.float16:  # ONNX Runtime's CPU nodes know no float64
        with torch.no_grad():
            expected = layer(*args)
        for found, wanted in zip(run(written, args), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=4 * torch.finfo(dtype).eps)


# ---- what is refused -----------------------------------------------------------------------------------------------


def masked(layer: nn.Module, x: Tensor) -> Any:
    return layer(x, mask=torch.ones(x.shape[:2], dtype=torch.bool))


def reset(layer: nn.Module, x: Tensor) -> Any:
    return layer(x, reset=torch.zeros(x.shape[:2], dtype=torch.bool))


def packed(layer: nn.Module, x: Tensor) -> Any:
    return layer(pack_padded_sequence(x, torch.tensor([5, 3, 1])))[1]


def all_states(layer: nn.Module, x: Tensor) -> Any:
    return layer(x, return_states=True)


REFUSED: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any], str]] = {
    "zoneout": (
        lambda: fused_rnn.LSTM(SIZE, UNITS, zoneout=0.1).eval(),
        as_it_is,
        "zoneout: expected 0.0 .*LSTM.*, got 0.1",
    ),
    "zoneout of c": (
        lambda: fused_rnn.LSTM(SIZE, UNITS, zoneout_cell=0.1).eval(),
        as_it_is,
        "zoneout_cell: expected 0.0",
    ),
    "zoneout of a cell": (
        lambda: fused_rnn.GRUCell(SIZE, UNITS, zoneout=0.1).eval(),
        lambda c, x: c(x[0]),
        "zoneout: .*GRU",
    ),
    "norm": (
        lambda: fused_rnn.GRU(SIZE, UNITS, layer_norm=True),
        as_it_is,
        "layer_norm: expected False .*GRU.*, got True",
    ),
    "heads": (lambda: fused_rnn.RNN(SIZE, UNITS, num_heads=2), as_it_is, "num_heads: expected 1 .*RNN.*, got 2"),
    "clip": (lambda: fused_rnn.LSTM(SIZE, UNITS, cell_clip=1.0), as_it_is, "cell_clip: expected None .*, got 1.0"),
    "projection": (lambda: fused_rnn.LSTM(SIZE, UNITS, proj_size=2), as_it_is, "proj_size: expected 0 .*, got 2"),
    "stateful": (lambda: fused_rnn.GRU(SIZE, UNITS, stateful=True), as_it_is, "stateful: expected False.*, got True"),
    "coupled": (
        lambda: fused_rnn.LSTM(SIZE, UNITS, coupled_gates=True, recurrent_activation="softsign"),
        as_it_is,
        "recurrent_activation: expected 'sigmoid' or 'hard_sigmoid' with coupled_gates .*, got 'softsign'",
    ),
    "dropout": (
        lambda: fused_rnn.GRU(SIZE, UNITS, 2, dropout=0.5),
        as_it_is,
        "dropout: expected 0.0 or a model in eval mode",
    ),
    "input": (
        lambda: fused_rnn.GRU(SIZE, UNITS, input_dropout=0.5),
        as_it_is,
        "input_dropout: expected 0.0 or .* eval mode",
    ),
    "weight": (
        lambda: fused_rnn.GRU(SIZE, UNITS, weight_dropout=0.5),
        as_it_is,
        "weight_dropout: expected 0.0 or .* eval",
    ),
    "recurrent": (
        lambda: fused_rnn.GRU(SIZE, UNITS, recurrent_dropout=0.5),
        as_it_is,
        "recurrent_dropout: expected 0.0 or",
    ),
    "mask": (lambda: fused_rnn.LSTM(SIZE, UNITS), masked, r"mask: expected None \(it has lengths\) .*, got a Tensor"),
    "reset": (lambda: fused_rnn.LSTM(SIZE, UNITS), reset, "reset: expected None .*, got a Tensor"),
    "packed": (
        lambda: fused_rnn.GRU(SIZE, UNITS),
        packed,
        "batch_sizes: expected None, a padded Tensor and its lengths.*a Tensor",
    ),
    "states": (lambda: fused_rnn.GRU(SIZE, UNITS), all_states, "return_states: expected False .*, got True"),
    "dtype": (
        lambda: fused_rnn.GRU(SIZE, UNITS, dtype=torch.bfloat16),
        as_it_is,
        "input: expected float32.*got torch.bfloat",
    ),
    "IndRNN": (lambda: fused_rnn.IndRNN(SIZE, UNITS), as_it_is, "expected an LSTM, GRU or RNN, .*, got IndRNN"),
    "SLSTM": (lambda: fused_rnn.SLSTM(SIZE, UNITS), as_it_is, "expected an LSTM, GRU or RNN, .*, got SLSTM"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_node_says_is_refused_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, call, message = REFUSED[name]
    monkeypatch.setattr(backend, "why_no_kernels", lambda *_: "compiling them takes a while")
    layer = make()
    x = torch.randn(5, 3, SIZE, dtype=next(layer.parameters()).dtype)
    training = torch.onnx.TrainingMode.PRESERVE  # the exporter has its own idea of the model's mode
    with pytest.raises(RuntimeError, match=message):
        torch.onnx.export(Calls(layer, call), (x,), io.BytesIO(), dynamo=False, training=training)


@pytest.mark.parametrize("name", ["zoneout", "mask"])
def test_the_other_exporter_refuses_it_too_and_unrolls_no_loop(name: str) -> None:
    """It tries again through Dynamo, where a formula would be written step by step."""
    make, call, message = REFUSED[name]
    with (
        fused_rnn.use_backend("reference"),
        pytest.raises(torch.onnx.errors.OnnxExporterError, match=f"(?s){message}"),
    ):
        torch.onnx.export(Calls(make(), call), (torch.randn(5, 3, SIZE),), dynamo=True, verbose=False)


class OnlyThroughDynamo(fused_rnn.LSTM):
    def forward(self, x: Tensor) -> Any:
        if not torch.compiler.is_dynamo_compiling():
            raise ValueError("as code that torch.export takes only so does")
        return super().forward(x)


@pytest.mark.filterwarnings("ignore:.*LeafSpec")
def test_a_model_that_is_exported_only_through_dynamo_has_its_nodes() -> None:
    model = OnlyThroughDynamo(SIZE, UNITS, num_layers=2).eval()
    written = export(model, arguments(5, 3)[:1], True, NAMES[:1])
    assert [node.op_type for node in written.graph.node].count("LSTM") == 2
    x = arguments(7, 2)[0]
    with torch.no_grad():
        output, states = fused_rnn.LSTM.forward(model, x)
    for found, expected in zip(run(written, (x,)), (output, *states), strict=True):
        assert_within({"": found}, {"": expected.double()})
