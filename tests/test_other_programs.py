"""Options against programs that have them, too: ONNX Runtime and Keras.

Both compute in float32. Where one of them is not installed, its tests are skipped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from support.values import flat
from torch import Tensor
from torch.nn.functional import dropout
from torch.testing import assert_close

import fused_rnn

T, B, INPUT, H = 9, 4, 5, 7


def make(name: str, *, scale: float = 2.0, **keywords: Any) -> Any:
    torch.manual_seed(0)
    layer = getattr(fused_rnn, name)(INPUT, H, **keywords)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(scale)  # so that gates leave the middle
    return layer


def data(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_near(actual: Any, expected: Any, *, atol: float = 2e-6) -> None:
    """To the accuracy of sums in float32."""
    assert_close(actual, expected, rtol=1e-5, atol=atol)


def reordered(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """The gates, blocks of rows, in another order."""
    blocks = tensor.chunk(len(order))
    return torch.cat([blocks[gate] for gate in order])


# ---- ONNX ---------------------------------------------------------------------------------------------------------

# Of blocks of rows here: LSTM i, f, g, o -> i, o, f, c; GRU r, z, n -> z, r, h; peepholes i, f, o -> i, o, f.
ONNX_ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}
ONNX_PEEPHOLES = (0, 2, 1)
ONNX_ACTIVATIONS: dict[str, tuple[str, list[float], list[float]]] = {  # name, alpha, beta
    "tanh": ("Tanh", [], []),
    "sigmoid": ("Sigmoid", [], []),
    "relu": ("Relu", [], []),
    "hard_sigmoid": ("HardSigmoid", [1 / 6], [0.5]),
    "softsign": ("Softsign", [], []),
    "identity": ("Affine", [1.0], [0.0]),
}


def onnx_weights(layer: Any) -> dict[str, Tensor]:
    """W (D, G H, I), R (D, G H, H), B (D, 2 G H) and P (D, 3 H), where there are peepholes."""
    order = ONNX_ORDER[type(layer).__name__]
    found: dict[str, list[Tensor]] = {"W": [], "R": [], "B": [], "P": []}
    for suffix in ("_l0", "_l0_reverse")[: 1 + layer.bidirectional]:
        W, R, b = (getattr(layer, name + suffix) for name in ("weight_ih", "weight_hh", "bias_ih"))
        b_hh = getattr(layer, f"bias_hh{suffix}", None)
        biases = [reordered(t, order) for t in (b, torch.zeros_like(b) if b_hh is None else b_hh)]
        found["W"].append(reordered(W, order))
        found["R"].append(reordered(R, order))
        found["B"].append(torch.cat(biases))
        if getattr(layer, "peephole", False):
            found["P"].append(reordered(getattr(layer, "weight_peephole" + suffix), ONNX_PEEPHOLES))
    return {name: torch.stack(tensors).detach() for name, tensors in found.items() if tensors}


def with_activations(names: Sequence[str], directions: int) -> dict[str, Any]:
    """The attributes that name the functions of each direction."""
    chosen = [ONNX_ACTIVATIONS[name] for name in names] * directions
    return {
        "activations": [name for name, _, _ in chosen],
        "activation_alpha": [value for _, alpha, _ in chosen for value in alpha],
        "activation_beta": [value for _, _, beta in chosen for value in beta],
    }


def run_onnx(
    operator: str,
    x: Tensor,
    weights: Mapping[str, Tensor],
    *,
    hx: Sequence[Tensor] = (),
    lengths: Tensor | None = None,
    **attributes: Any,
) -> list[Tensor]:
    """Output (T, B, D H) and final states, each (D, B, H), of one node that ONNX Runtime runs."""
    pytest.importorskip("onnx", reason="onnx is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    from onnx import TensorProto, helper, numpy_helper

    operands: dict[str, Tensor | None] = {"X": x, "W": weights["W"], "R": weights["R"], "B": weights["B"]}
    operands["sequence_lens"] = None if lengths is None else lengths.int()
    operands |= dict.fromkeys(("initial_h", "initial_c"))
    operands |= dict(zip(("initial_h", "initial_c"), hx))
    operands["P"] = weights.get("P")
    if operator != "LSTM":
        del operands["initial_c"], operands["P"]
    names = [name if tensor is not None else "" for name, tensor in operands.items()]
    results = ["Y", "Y_h", "Y_c"][: 3 if operator == "LSTM" else 2]
    directions = weights["W"].shape[0]
    given = {key: value for key, value in attributes.items() if value != []}
    node = helper.make_node(
        operator, names, results, hidden_size=H, direction=("forward", "bidirectional")[directions - 1], **given
    )
    constants = [
        numpy_helper.from_array(tensor.detach().contiguous().numpy(), name)
        for name, tensor in operands.items()
        if tensor is not None and name != "X"
    ]
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names] for names in (["X"], results)
    )
    graph = helper.make_graph([node], "node", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    y, *states = (torch.from_numpy(result) for result in session.run(None, {"X": x.numpy()}))
    return [y.permute(0, 2, 1, 3).flatten(2), *states]


def check_onnx(layer: Any, *, lengths: Tensor | None = None, with_states: bool = True, **attributes: Any) -> None:
    directions = 1 + layer.bidirectional
    name = type(layer).__name__
    x = data(T, B, INPUT)
    hx = [data(directions, B, H, seed=seed) for seed in (2, 3)][: 2 if name == "LSTM" else 1] if with_states else []
    found = run_onnx(name, x, onnx_weights(layer), hx=hx, lengths=lengths, **attributes)
    steps = {} if lengths is None else {"lengths": lengths}
    with torch.no_grad():
        output, states = layer(x, (tuple(hx) if name == "LSTM" else hx[0]) if hx else None, **steps)
    for actual, expected in zip((output, *flat(states)), found, strict=True):
        assert_near(actual, expected)


BOTH_DIRECTIONS = pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both"])


@BOTH_DIRECTIONS
def test_onnx_peepholes(bidirectional: bool) -> None:
    layer = make("LSTM", peephole=True, bidirectional=bidirectional)
    check_onnx(layer)
    x, weights = data(T, B, INPUT), onnx_weights(layer)
    del weights["P"]
    assert not torch.allclose(layer(x)[0], run_onnx("LSTM", x, weights)[0], atol=1e-2)


@BOTH_DIRECTIONS
@pytest.mark.parametrize("recurrent_activation", ["sigmoid", "hard_sigmoid"])
@pytest.mark.parametrize("peephole", [False, True], ids=["", "peephole"])
def test_onnx_input_forget_is_coupled_gates_of_negated_weights(
    recurrent_activation: str, peephole: bool, bidirectional: bool
) -> None:
    """There f = 1 - i, here i = 1 - f; and 1 - f(x) = f(-x) of both functions."""
    layer = make(
        "LSTM",
        coupled_gates=True,
        peephole=peephole,
        recurrent_activation=recurrent_activation,
        bidirectional=bidirectional,
    )
    weights = onnx_weights(layer)
    for name, tensor in weights.items():
        for begin in (0, 4 * H) if name == "B" else (0,):
            i, f = tensor[:, begin : begin + H], tensor[:, begin + 2 * H : begin + 3 * H]
            i.copy_(-f)
            f.fill_(100.0)  # without effect
    x, directions = data(T, B, INPUT), 1 + bidirectional
    hx = data(directions, B, H, seed=2), data(directions, B, H, seed=3)
    attributes = with_activations((recurrent_activation, "tanh", "tanh"), directions)
    found = run_onnx("LSTM", x, weights, hx=hx, input_forget=1, **attributes)
    with torch.no_grad():
        output, states = layer(x, hx)
    for actual, expected in zip((output, *states), found, strict=True):
        assert_near(actual, expected)


PAIRS = [
    ("tanh", "hard_sigmoid"),
    ("relu", "sigmoid"),
    ("softsign", "hard_sigmoid"),
    ("hard_sigmoid", "softsign"),
    ("sigmoid", "tanh"),
    ("identity", "sigmoid"),
]


@BOTH_DIRECTIONS
@pytest.mark.parametrize(("activation", "recurrent_activation"), PAIRS)
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_onnx_activations(name: str, activation: str, recurrent_activation: str, bidirectional: bool) -> None:
    layer = make(name, activation=activation, recurrent_activation=recurrent_activation, bidirectional=bidirectional)
    names = (recurrent_activation, activation, activation)[: 3 if name == "LSTM" else 2]
    attributes = with_activations(names, 1 + bidirectional)
    check_onnx(layer, **attributes, **({"linear_before_reset": 1} if name == "GRU" else {}))


@pytest.mark.parametrize("nonlinearity", ONNX_ACTIVATIONS)
def test_onnx_nonlinearities_of_an_rnn(nonlinearity: str) -> None:
    layer = make("RNN", nonlinearity=nonlinearity, bidirectional=True, scale=1.0)
    check_onnx(layer, **with_activations((nonlinearity,), 2))


@BOTH_DIRECTIONS
@pytest.mark.parametrize("reset_after", [False, True])
def test_onnx_linear_before_reset_is_reset_after(reset_after: bool, bidirectional: bool) -> None:
    layer = make("GRU", reset_after=reset_after, bidirectional=bidirectional)
    check_onnx(layer, linear_before_reset=int(reset_after))
    x, weights = data(T, B, INPUT), onnx_weights(layer)
    other = run_onnx("GRU", x, weights, linear_before_reset=int(not reset_after))[0]
    assert not torch.allclose(layer(x)[0], other, atol=1e-2)


@BOTH_DIRECTIONS
@pytest.mark.parametrize(
    ("name", "options"),
    [("LSTM", {}), ("LSTM", {"peephole": True}), ("GRU", {}), ("GRU", {"reset_after": False}), ("RNN", {})],
    ids=str,
)
def test_onnx_sequence_lens_are_lengths(name: str, options: dict[str, Any], bidirectional: bool) -> None:
    attributes = {"linear_before_reset": int(options.get("reset_after", True))} if name == "GRU" else {}
    layer = make(name, bidirectional=bidirectional, **options)
    check_onnx(layer, lengths=torch.tensor([T, 3, 1, T - 1]), **attributes)
    # A row without steps ends in its initial state here and in zeros there: from zeros it is the same.
    check_onnx(layer, lengths=torch.tensor([2, 0, T, 5]), with_states=False, **attributes)


@pytest.mark.parametrize(("name", "options"), [("LSTM", {}), ("GRU", {"reset_after": False}), ("RNN", {})], ids=str)
def test_onnx_with_half_of_the_bias_is_one_bias(name: str, options: dict[str, Any]) -> None:
    layer = make(name, recurrent_bias=False, **options)
    assert not onnx_weights(layer)["B"][:, layer.bias_ih_l0.shape[0] :].any()
    check_onnx(layer, lengths=torch.tensor([T, 3, 1, T - 1]))


@BOTH_DIRECTIONS
def test_onnx_with_all_that_a_node_of_an_lstm_has(bidirectional: bool) -> None:
    layer = make(
        "LSTM",
        peephole=True,
        activation="softsign",
        recurrent_activation="hard_sigmoid",
        recurrent_bias=False,
        bidirectional=bidirectional,
    )
    attributes = with_activations(("hard_sigmoid", "softsign", "softsign"), 1 + bidirectional)
    check_onnx(layer, lengths=torch.tensor([4, T, 1, 7]), **attributes)


# ---- Keras --------------------------------------------------------------------------------------------------------

# Of columns there: LSTM i, f, c, o; GRU z, r, h.
KERAS_ORDER = {"LSTM": (0, 1, 2, 3), "GRU": (1, 0, 2), "RNN": (0,)}
KERAS_LAYERS = {"LSTM": "LSTM", "GRU": "GRU", "RNN": "SimpleRNN"}
KERAS_ACTIVATIONS = {"identity": "linear"}


@pytest.fixture(scope="module")
def keras(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "torch")
        patch.setenv("KERAS_TORCH_DEVICE", "cpu")
        patch.setenv("KERAS_HOME", str(tmp_path_factory.mktemp("keras")))  # it writes a file of settings
        module = pytest.importorskip("keras", minversion="3", reason="Keras is not installed")
    if module.backend.backend() != "torch":
        pytest.skip("Keras has been imported with another backend")
    return module


def keras_weights(layer: Any, tensors: Mapping[str, Tensor] | None = None, *, suffix: str = "_l0") -> list[Tensor]:
    """Kernel (I, G H), recurrent kernel (H, G H) and bias, (2, G H) where a reset gate acts on its second row.

    Of the layer's parameters, or of other tensors by the same names, such as gradients.
    """
    tensors = dict(layer.named_parameters()) if tensors is None else tensors
    order = KERAS_ORDER[type(layer).__name__]
    kernel, recurrent, bias = (
        reordered(tensors[name + suffix], order) for name in ("weight_ih", "weight_hh", "bias_ih")
    )
    if layer.recurrent_bias:
        bias = torch.stack([bias, reordered(tensors["bias_hh" + suffix], order)])
    return [t.detach() for t in (kernel.T, recurrent.T, bias)]


def keras_options(layer: Any) -> dict[str, Any]:
    name = type(layer).__name__
    named = {"activation": layer.nonlinearity if name == "RNN" else layer.activation}
    if name != "RNN":
        named["recurrent_activation"] = layer.recurrent_activation
    options: dict[str, Any] = {key: KERAS_ACTIVATIONS.get(value, value) for key, value in named.items()}
    if name == "GRU":
        options["reset_after"] = layer.reset_after
    return options


def keras_twin(keras: Any, layer: Any, **options: Any) -> Any:
    """Keras's layer with the options and weights of one of ours in one direction, which is batch_first."""
    twin = getattr(keras.layers, KERAS_LAYERS[type(layer).__name__])(
        layer.hidden_size, **{"return_sequences": True, "return_state": True} | keras_options(layer) | options
    )
    twin.build((B, T, layer.input_size))
    twin.set_weights([t.numpy() for t in keras_weights(layer)])
    return twin


def make_for_keras(name: str, **options: Any) -> Any:
    """One bias per gate, but for a GRU whose reset gate acts on the second."""
    one_bias = not (name == "GRU" and options.get("reset_after", True))
    return make(name, batch_first=True, **{"recurrent_bias": not one_bias} | options)


def check_keras(layer: Any, twin: Any, *, seed: int = 3, **arguments: Any) -> None:
    """Output, states and all gradients in training mode."""
    x = data(B, T, INPUT).requires_grad_()
    torch.manual_seed(seed)
    output, states = layer(x, **({} if not arguments else {"mask": arguments["mask"]}))
    ours = [output, *(state.squeeze(0) for state in flat(states))]
    theirs = list(twin(x, training=True, **arguments))
    incoming = [data(*t.shape, seed=4 + k) for k, t in enumerate(ours)]
    for actual, expected in zip(ours, theirs, strict=True):
        assert_near(actual, expected.detach())
    names, parameters = zip(*layer.named_parameters(), strict=True)
    of_x, *found = torch.autograd.grad(ours, [x, *parameters], incoming)
    variables = [variable.value for variable in twin.trainable_variables]
    expected_x, *expected_weights = torch.autograd.grad(theirs, [x, *variables], incoming)
    assert_near(of_x, expected_x, atol=1e-5)
    for actual, expected in zip(keras_weights(layer, dict(zip(names, found))), expected_weights, strict=True):
        assert_near(actual, expected, atol=3e-5)


Case = tuple[str, dict[str, Any]]
KERAS_PLAIN: list[Case] = [("LSTM", {}), ("GRU", {}), ("GRU", {"reset_after": False}), ("RNN", {})]
KERAS_ACTIVATED: list[Case] = [
    ("LSTM", {"activation": "softsign", "recurrent_activation": "hard_sigmoid"}),
    ("GRU", {"reset_after": False, "activation": "softsign", "recurrent_activation": "hard_sigmoid"}),
]
KERAS_CASES: list[Case] = [
    *KERAS_PLAIN,
    *KERAS_ACTIVATED,
    ("LSTM", {"recurrent_activation": "hard_sigmoid"}),
    ("LSTM", {"activation": "relu", "scale": 1.0}),
    ("GRU", {"recurrent_activation": "hard_sigmoid"}),
    ("RNN", {"nonlinearity": "relu", "scale": 1.0}),
    ("RNN", {"nonlinearity": "identity", "scale": 1.0}),
    ("RNN", {"nonlinearity": "hard_sigmoid"}),
]


@pytest.mark.parametrize(("name", "options"), KERAS_CASES, ids=str)
def test_keras_computes_the_same(keras: Any, name: str, options: dict[str, Any]) -> None:
    layer = make_for_keras(name, **options)
    twin = keras_twin(keras, layer)
    assert twin.count_params() == sum(p.numel() for p in layer.parameters())
    check_keras(layer, twin)


def give_factors(twin: Any, factors: Mapping[float, Tensor]) -> None:
    """Factors in place of those that Keras draws, by rate. It draws one for each gate; here all gates have the same."""
    count = getattr(twin.cell, "dropout_mask_count", None)

    def create(like: Tensor, rate: float) -> Tensor | list[Tensor]:
        assert like.shape == factors[rate].shape
        return factors[rate] if count is None else [factors[rate]] * count

    twin.cell._create_dropout_mask = create


@pytest.mark.parametrize("rates", [(0.0, 0.5), (0.4, 0.0), (0.4, 0.5)], ids=["recurrent", "input", "both"])
@pytest.mark.parametrize(("name", "options"), KERAS_PLAIN + KERAS_ACTIVATED, ids=str)
def test_keras_dropouts(keras: Any, name: str, options: dict[str, Any], rates: tuple[float, float]) -> None:
    of_input, of_recurrence = rates
    layer = make_for_keras(name, input_dropout=of_input, recurrent_dropout=of_recurrence, **options)
    twin = keras_twin(keras, layer, dropout=of_input, recurrent_dropout=of_recurrence)
    torch.manual_seed(3)
    factors = {
        rate: dropout(torch.ones(B, size), rate) for rate, size in ((of_input, INPUT), (of_recurrence, H)) if rate
    }
    assert all(0 < int((drawn == 0).sum()) < drawn.numel() for drawn in factors.values())
    give_factors(twin, factors)
    check_keras(layer, twin, seed=3)
    x = data(B, T, INPUT)
    with torch.no_grad():
        assert_near(layer.eval()(x)[0], twin(x, training=False)[0])


@pytest.mark.parametrize(("name", "options"), KERAS_PLAIN, ids=str)
def test_keras_mask_of_which_the_output_is_zero(keras: Any, name: str, options: dict[str, Any]) -> None:
    layer = make_for_keras(name, **options)
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(5)) < 0.6
    mask[1], mask[2, :3] = False, False
    check_keras(layer, keras_twin(keras, layer, zero_output_for_mask=True), mask=mask)


@pytest.mark.parametrize(("name", "options"), KERAS_PLAIN, ids=str)
def test_keras_in_both_directions(keras: Any, name: str, options: dict[str, Any]) -> None:
    layer = make_for_keras(name, bidirectional=True, **options)
    one = getattr(keras.layers, KERAS_LAYERS[name])(H, return_sequences=True, return_state=True, **keras_options(layer))
    twin = keras.layers.Bidirectional(one)
    twin.build((B, T, INPUT))
    twin.set_weights([t.numpy() for suffix in ("_l0", "_l0_reverse") for t in keras_weights(layer, suffix=suffix)])
    x = data(B, T, INPUT)
    with torch.no_grad():
        (output, states), (expected, *last) = layer(x), twin(x)
    assert_near(output, expected)
    # forward h, c, then backward h, c
    assert_near([state for pair in zip(*flat(states), strict=True) for state in pair], last)


@pytest.mark.parametrize(("name", "options"), KERAS_PLAIN, ids=str)
def test_keras_stateful(keras: Any, name: str, options: dict[str, Any]) -> None:
    layer = make_for_keras(name, stateful=True, **options)
    twin = keras_twin(keras, layer, stateful=True)
    with torch.no_grad():
        for call in range(3):
            x = data(B, T, INPUT, seed=call)
            assert_near(layer(x)[0], twin(x)[0])
        layer.reset_state()
        twin.reset_state()
        assert_near(layer(x)[0], twin(x)[0])


def same_distribution(a: Tensor, b: Tensor) -> bool:
    """Two-sample Kolmogorov-Smirnov test, which independent samples of one distribution fail once in a thousand."""
    a, b = a.flatten().sort().values, b.flatten().sort().values
    values = torch.cat([a, b])
    gap = torch.searchsorted(a, values, right=True) / len(a) - torch.searchsorted(b, values, right=True) / len(b)
    return float(gap.abs().max()) < 1.95 * math.sqrt((len(a) + len(b)) / (len(a) * len(b)))


@pytest.mark.parametrize(
    ("name", "options", "of_keras"),
    [
        ("LSTM", {}, {}),
        ("LSTM", {"forget_bias": 0.0}, {"unit_forget_bias": False}),
        ("GRU", {}, {}),
        ("GRU", {"reset_after": False}, {}),
        ("RNN", {}, {}),
    ],
    ids=str,
)
def test_keras_first_values(keras: Any, name: str, options: dict[str, Any], of_keras: dict[str, Any]) -> None:
    size = (60, 50)
    recurrent_bias = name == "GRU" and "reset_after" not in options
    torch.manual_seed(0)
    layer = getattr(fused_rnn, name)(*size, init="keras", recurrent_bias=recurrent_bias, **options)
    keras.utils.set_random_seed(1)
    twin = getattr(keras.layers, KERAS_LAYERS[name])(size[1], **keras_options(layer) | of_keras)
    twin.build((B, T, size[0]))
    theirs = [variable.value.detach() for variable in twin.trainable_variables]
    ours = keras_weights(layer)
    assert [t.shape for t in ours] == [t.shape for t in theirs]
    limit = math.sqrt(6 / (size[0] + ours[0].shape[1]))
    for kernel, recurrent, _ in (ours, theirs):
        assert 0.99 * limit < float(kernel.abs().max()) <= limit * (1 + 1e-6)
        assert_close(recurrent @ recurrent.T, torch.eye(size[1]), rtol=0, atol=1e-5)
    assert same_distribution(ours[0], theirs[0]) and same_distribution(ours[1], theirs[1])
    assert not same_distribution(ours[0], 1.2 * theirs[0])  # the test would see as much
    assert torch.equal(ours[2], theirs[2])
