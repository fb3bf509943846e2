"""Options of layers that act around the operators, against torch.nn given what they stand for by hand."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.compare import assert_same
from support.pairwise import Row, pairwise
from support.values import data, flat
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close

import fused_rnn
from fused_rnn import functional
from fused_rnn.settings import CONVERT_OPTIONS, LAYER_OPTIONS

LAYERS = ("LSTM", "GRU", "RNN")
T, B, INPUT, H = 7, 3, 5, 6


def make(name: str, **keywords: Any) -> Any:
    torch.manual_seed(0)
    return getattr(fused_rnn, name)(INPUT, H, dtype=torch.float64, **keywords)


def twin_of(layer: Any, **keywords: Any) -> Any:
    """torch.nn's layer with the same parameters; a bias that there is not is zeros."""
    twin = getattr(nn, type(layer).__name__)(INPUT, H, dtype=torch.float64, **keywords)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            given = getattr(layer, name, None)
            parameter.copy_(torch.zeros_like(parameter) if given is None else given)
    return twin


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def detached(states: Any) -> Any:
    return tuple(state.detach() for state in states) if isinstance(states, tuple) else states.detach()


# ---- dropouts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["time first", "batch first", "no batch", "packed"])
@pytest.mark.parametrize("name", LAYERS)
def test_input_dropout_is_one_factor_a_row_and_feature(name: str, layout: str) -> None:
    batch_first = layout == "batch first"
    layer = make(name, num_layers=2, bidirectional=True, input_dropout=0.4, batch_first=batch_first)
    twin = twin_of(layer, num_layers=2, bidirectional=True, batch_first=batch_first)
    x = data(*((B, T) if batch_first else (T,) if layout == "no batch" else (T, B)), INPUT)
    torch.manual_seed(3)
    factors = dropout(torch.ones(1 if layout == "no batch" else B, INPUT, dtype=torch.float64), 0.4)
    assert 0 < int((factors == 0).sum()) < factors.numel()
    dropped = x * (factors.unsqueeze(1) if batch_first else factors)
    lengths = torch.tensor([T, T - 2, 2])
    torch.manual_seed(3)
    if layout == "packed":
        packed = pack_padded_sequence(x, lengths)
        output = pad_packed_sequence(layer(packed)[0])[0]
        expected = pad_packed_sequence(twin(pack_padded_sequence(dropped, lengths))[0])[0]
    else:
        output, expected = layer(x)[0], twin(dropped)[0]
    assert_close(output, expected)
    of_ours, of_twin = gradients(layer, output.square().sum()), gradients(twin, expected.square().sum())
    for key, value in of_ours.items():
        assert_close(value, of_twin[key])
    assert_close(layer.eval()(x)[0], twin.eval()(x)[0])


@pytest.mark.parametrize("name", LAYERS)
def test_weight_dropout_is_drawn_once_a_call(name: str) -> None:
    layer = make(name, num_layers=2, bidirectional=True, weight_dropout=0.5)
    twin = twin_of(layer, num_layers=2, bidirectional=True)
    x = data(T, B, INPUT)
    torch.manual_seed(3)
    factors = {key: dropout(torch.ones_like(p), 0.5) for key, p in layer.named_parameters() if "weight_hh" in key}
    with torch.no_grad():
        for key, factor in factors.items():
            getattr(twin, key).mul_(factor)
    torch.manual_seed(3)
    output, expected = layer(x)[0], twin(x)[0]
    assert_close(output, expected)
    of_ours, of_twin = gradients(layer, output.square().sum()), gradients(twin, expected.square().sum())
    for key, value in of_ours.items():
        assert_close(value, of_twin[key] * factors.get(key, 1.0))
    assert_close(layer.eval()(x)[0], twin_of(layer, num_layers=2, bidirectional=True).eval()(x)[0])


@pytest.mark.parametrize("option", ["input_dropout", "weight_dropout"])
def test_a_dropout_of_1_leaves_nothing(option: str) -> None:
    layer = make("LSTM", **{option: 1.0})
    x = data(T, B, INPUT)
    output = layer(x)[0]
    if option == "input_dropout":
        assert_same(output, layer(torch.zeros_like(x))[0])
    else:
        with torch.no_grad():
            layer.weight_hh_l0.zero_()
        layer.weight_dropout = 0.0
        assert_same(output, layer(x)[0])


def test_dropouts_are_drawn_the_same_again_under_checkpoint() -> None:
    layer = make("GRU", input_dropout=0.5, weight_dropout=0.5, num_layers=2, dropout=0.5)
    x = data(T, B, INPUT)
    results = []
    for run in (layer, lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(5)
        output, _ = run(x)
        results.append((output, gradients(layer, output.square().sum())))
    assert_same(results[0][0], results[1][0])
    for key, value in results[0][1].items():
        assert_same(value, results[1][1][key])


# ---- one bias -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    ("name", "keywords"),
    [
        ("LSTM", {}),
        ("LSTM", {"bidirectional": True, "num_layers": 2}),
        ("LSTM", {"proj_size": 4}),
        ("RNN", {}),
        ("RNN", {"bidirectional": True, "num_layers": 2}),
    ],
    ids=str,
)
def test_one_bias_is_two_of_which_one_is_zero(name: str, keywords: dict[str, Any], packed: bool) -> None:
    layer = make(name, recurrent_bias=False, **keywords)
    twin = twin_of(layer, **keywords)
    assert [key for key, _ in layer.named_parameters()] == [
        key for key, _ in twin.named_parameters() if not key.startswith("bias_hh")
    ]
    assert [len(weights) for weights in layer.all_weights] == [len(weights) - 1 for weights in twin.all_weights]
    x: Any = data(T, B, INPUT)
    if packed:
        x = pack_padded_sequence(x, [T, T - 2, 2])
    (output, states), (expected, of_twin) = layer(x), twin(x)
    if packed:
        output, expected = output.data, expected.data
    for a, b in zip((output, *flat(states)), (expected, *flat(of_twin)), strict=True):
        assert_close(a, b)
    found, wanted = gradients(layer, output.square().sum()), gradients(twin, expected.square().sum())
    for key, value in found.items():
        assert_close(value, wanted[key])
    other = make(name, recurrent_bias=False, **keywords)
    other.load_state_dict(layer.state_dict())
    for again in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        again_output = again(x)[0]
        assert_same(again_output.data if packed else again_output, output)


def test_bias_false_has_no_bias_at_all() -> None:
    assert [key for key, _ in make("LSTM", bias=False, recurrent_bias=False).named_parameters()] == [
        "weight_ih_l0",
        "weight_hh_l0",
    ]


# ---- gradients that stop ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 6, 7, 9])
@pytest.mark.parametrize("kind", ["all", "lengths", "mask"])
@pytest.mark.parametrize("name", LAYERS)
def test_bptt_steps_are_slices_by_hand(name: str, kind: str, k: int) -> None:
    batch_first = k % 2 == 1
    layer = make(name, num_layers=2, bptt_steps=k, batch_first=batch_first)
    plain = make(name, num_layers=2, batch_first=batch_first)
    x = data(T, B, INPUT).requires_grad_()
    lengths = torch.tensor([T, 4, 0])
    mask = torch.rand(T, B, generator=torch.Generator().manual_seed(4)) < 0.6
    steps: dict[str, Tensor] = {}
    if kind == "lengths":
        steps = {"lengths": lengths}
    elif kind == "mask":
        steps = {"mask": mask.t() if batch_first else mask}
    in_layout = (lambda t: t.transpose(0, 1)) if batch_first else (lambda t: t)
    output, states = layer(in_layout(x), **steps)

    hx, outputs = None, []
    for first in range(0, T, k):
        of_slice = {}
        if kind == "lengths":
            of_slice = {"lengths": (lengths - first).clamp(0, min(k, T - first))}
        elif kind == "mask":
            of_slice = {"mask": in_layout(mask[first : first + k])}
        part, last = plain(in_layout(x[first : first + k]), hx, **of_slice)
        outputs.append(in_layout(part))
        hx = detached(last)
    expected = torch.cat(outputs)
    assert_close(in_layout(output), expected)
    for a, b in zip(flat(states), flat(last), strict=True):
        assert_close(a, b)
    loss = in_layout(output).square().sum() + sum(s.sum() for s in flat(states))
    wanted = expected.square().sum() + sum(s.sum() for s in flat(last))
    for a, b in zip(
        torch.autograd.grad(loss, [x, *layer.parameters()]),
        torch.autograd.grad(wanted, [x, *plain.parameters()]),
        strict=True,
    ):
        assert_close(a, b)
    with torch.no_grad():
        assert_close(layer(in_layout(x), **steps)[0], plain(in_layout(x), **steps)[0])


def test_no_gradient_goes_past_a_multiple_of_bptt_steps() -> None:
    layer = make("LSTM", bptt_steps=3)
    x = data(T, B, INPUT).requires_grad_()
    output, _ = layer(x)
    for step in range(T):
        (gradient,) = torch.autograd.grad(output[step].sum(), x, retain_graph=True)
        reached = gradient.abs().sum((1, 2)) > 0
        assert reached.tolist() == [step // 3 * 3 <= t <= step for t in range(T)]


# ---- state from call to call --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["time first", "batch first", "no batch", "packed"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_stateful_layer_goes_on_where_it_ended(name: str, layout: str) -> None:
    batch_first = layout == "batch first"
    layer, plain = (make(name, num_layers=2, batch_first=batch_first, stateful=s) for s in (True, False))
    shape = {"batch first": (B, T, INPUT), "no batch": (T, INPUT)}.get(layout, (T, B, INPUT))
    hx = None
    for call in range(3):
        x: Any = data(*shape, seed=call)
        if layout == "packed":
            x = pack_padded_sequence(x, [3, T, 1], enforce_sorted=False)
        output, states = layer(x)
        expected, hx = plain(x, hx)
        if layout == "packed":
            output, expected = output.data, expected.data
        assert_same(output, expected)
        for a, b in zip(flat(states), flat(hx), strict=True):
            assert_same(a, b)
        gradients(layer, output.sum())  # the graph of the call before is gone: no gradient goes there
        hx = detached(hx)
    layer.reset_state()
    assert_same(*(m(x)[0].data if layout == "packed" else m(x)[0] for m in (layer, plain)))


def test_a_stateful_layer_takes_hx_that_is_given() -> None:
    layer, plain = make("GRU", stateful=True), make("GRU")
    x, h = data(T, B, INPUT), data(1, B, H, seed=2)
    layer(x)
    assert_same(layer(x, h)[0], plain(x, h)[0])
    assert_same(layer(x)[0], plain(x, plain(x, h)[1])[0])


@pytest.mark.parametrize(
    "rows",
    [[0, 2], torch.tensor([True, False, True]), torch.tensor([2, 0]), (-3, -1)],
    ids=["list", "bool", "index", "-"],
)
def test_reset_state_of_some_rows(rows: Any) -> None:
    layer, plain = make("LSTM", stateful=True), make("LSTM")
    x = data(T, B, INPUT)
    states = detached(layer(x)[1])
    layer.reset_state(rows)
    for state in states:
        state[:, [0, 2]] = 0
    assert_same(layer(x)[0], plain(x, states)[0])
    layer.reset_state([])
    layer.reset_state(1)
    assert bool((layer.carried_h[:, 1] == 0).all()) and not bool((layer.carried_h[:, 0] == 0).any())


def test_carried_state_belongs_to_the_layer() -> None:
    layer = make("LSTM", stateful=True)
    x = data(T, B, INPUT)
    _, (h_n, _) = layer(x)
    kept = layer.carried_h.clone()
    with torch.no_grad():
        h_n.zero_()  # a program's own
    assert_same(layer.carried_h, kept)
    assert not [key for key in layer.state_dict() if "carried" in key]
    twin = copy.deepcopy(layer)
    layer(x)
    assert_same(twin.carried_h, kept)
    assert_same(pickle.loads(pickle.dumps(twin)).carried_h, kept)
    assert twin.float().carried_h.dtype is torch.float32
    twin(x.float())
    for other in (data(T, B + 1, INPUT), data(T, INPUT)):
        with pytest.raises(RuntimeError, match="input: expected a batch of 3 rows, of which this stateful layer"):
            layer(other)
    layer.reset_state()
    layer(data(T, INPUT))
    with pytest.raises(RuntimeError, match="expected a sequence without a batch.*got 3 rows"):
        layer(x)
    with pytest.raises(RuntimeError, match="rows: expected None"):
        layer.reset_state([0])


def test_state_left_in_inference_mode_or_under_autocast_is_used_in_training() -> None:
    layer = make("LSTM", stateful=True).float()
    x = data(T, B, INPUT).float()
    with torch.inference_mode():
        layer(x)
    layer(x)[0].sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x)
    assert layer.carried_h.dtype is torch.bfloat16
    layer(x)[0].sum().backward()


# ---- first values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_keras_draws_as_keras_does(name: str) -> None:
    torch.manual_seed(0)
    layer = getattr(fused_rnn, name)(40, 30, num_layers=2, bidirectional=True, init="keras")
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[name]
    for key, parameter in layer.named_parameters():
        if key.startswith("weight_hh"):
            assert_close(parameter.T @ parameter, torch.eye(30))
        elif key.startswith("weight_ih"):
            limit = (6 / (parameter.shape[1] + gates * 30)) ** 0.5
            assert 0.98 * limit < float(parameter.detach().abs().max()) <= limit
            assert abs(float(parameter.detach().mean())) < 0.05 * limit
        elif name == "LSTM":
            expected = torch.zeros(4, 30)
            expected[1] = 1.0 if key.startswith("bias_ih") else 0.0
            assert_same(parameter.detach(), expected.flatten())
        else:
            assert not parameter.any()
    before = layer.weight_ih_l0.detach().clone()
    layer.reset_parameters()
    assert not torch.equal(before, layer.weight_ih_l0) and layer.weight_ih_l0.abs().max() <= before.abs().max() * 1.02


@pytest.mark.parametrize("keywords", [{}, {"recurrent_bias": False}, {"init": "keras"}], ids=str)
def test_forget_bias_is_the_sum_of_both(keywords: dict[str, Any]) -> None:
    layer, plain = make("LSTM", forget_bias=2.5, **keywords), make("LSTM", **keywords)
    gate = slice(H, 2 * H)
    biases = [p for key, p in layer.named_parameters() if key.startswith("bias")]
    assert_same(sum(bias[gate] for bias in biases), torch.full((H,), 2.5, dtype=torch.float64))
    for (key, a), b in zip(layer.named_parameters(), plain.parameters(), strict=True):
        if key.startswith("bias"):
            a, b = (torch.cat([p[:H], p[2 * H :]]) for p in (a, b))
        assert_same(a, b)


def test_without_options_the_same_seed_gives_the_numbers_of_torch_nn() -> None:
    layers = []
    for module in (fused_rnn, nn):
        torch.manual_seed(0)
        layers.append(module.LSTM(INPUT, H, 2))
    for a, b in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
        assert_same(a, b)


# ---- together -----------------------------------------------------------------------------------------------------

FACTORS = {
    "name": LAYERS,
    "input_dropout": (0.0, 0.4),
    "weight_dropout": (0.0, 0.4),
    "recurrent_bias": (True, False),
    "recompute": (False, True),
    "num_layers": (1, 2),
    "dropout": (0.0, 0.4),
    "batch_first": (False, True),
    "lengths": (False, True),
}
ROWS = pairwise(FACTORS, allowed=lambda row: row["name"] != "GRU" or row["recurrent_bias"])


def calls(row: Row) -> Iterator[Any]:
    """The layer of a row as a function of its input and parameters, drawing the same numbers in each call."""
    keywords = dict(row)
    name, with_lengths = keywords.pop("name"), keywords.pop("lengths")
    if keywords["num_layers"] == 1:
        keywords["dropout"] = 0.0
    torch.manual_seed(0)
    layer = getattr(fused_rnn, name)(3, 2, dtype=torch.float64, **keywords)
    steps = {"lengths": torch.tensor([4, 2])} if with_lengths else {}
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def call(x: Tensor, *values: Tensor) -> Tensor:
        torch.manual_seed(1)
        given = dict(zip(names, values, strict=True))
        output, states = torch.func.functional_call(layer, given, (x,), steps)
        return output.sum() + sum(state.square().sum() for state in flat(states))

    x = data(*((2, 4) if keywords["batch_first"] else (4, 2)), 3)
    yield call
    yield [x.requires_grad_(), *(p.detach().requires_grad_() for p in parameters)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(f"{k}={v}" for k, v in row.items() if v))
def test_derivatives_of_options_together(row: Row) -> None:
    call, arguments = calls(row)
    assert torch.autograd.gradcheck(call, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, arguments, fast_mode=True)


@pytest.mark.parametrize("name", LAYERS)
def test_functions_take_the_options_that_layers_have(name: str) -> None:
    options = {"input_dropout": 0.3, "weight_dropout": 0.3, "bptt_steps": 3, "recompute": True}
    if name != "GRU":
        options["recurrent_bias"] = False
    layer, x = make(name, num_layers=2, dropout=0.2, **options), data(T, B, INPUT)
    results = []
    for module in (functional, fused_rnn.reference):
        torch.manual_seed(2)
        run = getattr(module, name.lower())
        results.append(run(x, None, list(layer.parameters()), num_layers=2, dropout=0.2, training=True, **options)[0])
    torch.manual_seed(2)
    expected = layer(x)[0]
    assert_same(results[0], expected)
    assert_close(results[1], expected)


def test_a_mode_sees_the_options_of_a_call() -> None:
    class Seen(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is functional.lstm:
                seen.append(kwargs)
            return func(*args, **(kwargs or {}))

    seen: list[Any] = []
    layer, x = make("LSTM", input_dropout=0.3, recurrent_bias=False, bptt_steps=4), data(T, B, INPUT)
    torch.manual_seed(0)
    with Seen():
        output, _ = layer(x)
    assert seen == [{"input_dropout": 0.3, "recurrent_bias": False, "bptt_steps": 4, "training": True}]
    torch.manual_seed(0)
    assert_same(output, layer(x)[0])


@pytest.mark.parametrize(
    "options",
    [
        {"input_dropout": 0.5, "weight_dropout": 0.5},
        {"recurrent_bias": False, "bptt_steps": 3},
        {"stateful": True, "init": "keras", "forget_bias": 1.5},
    ],
    ids=str,
)
def test_torch_compile_has_the_options_in_one_graph(options: dict[str, Any]) -> None:
    layer, x = make("LSTM", **options), data(T, B, INPUT)
    other = copy.deepcopy(layer)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        results = []
        for module in (layer, compiled):
            torch.manual_seed(4)
            results.append(module(x)[0])
        assert_close(*results)
        of_ours, of_compiled = (gradients(m, r.square().sum()) for m, r in zip((layer, other), results, strict=True))
        for key, value in of_ours.items():
            assert_close(of_compiled[key], value)


def test_explain_names_what_python_does() -> None:
    layer = make("LSTM", input_dropout=0.5, weight_dropout=0.5, recurrent_bias=False, bptt_steps=3)
    text = str(fused_rnn.explain(layer, data(T, B, INPUT)))
    for option in ("input_dropout", "weight_dropout", "recurrent_bias=False", "bptt_steps=3: the kernels stop"):
        assert f"  {option}" in text
    assert "bptt_steps=3: 3 calls" in str(fused_rnn.explain(layer, data(T, B, INPUT), lengths=torch.tensor([T, 3, 2])))
    with torch.no_grad():
        text = str(fused_rnn.explain(layer.eval(), data(T, B, INPUT)))
    assert "  recurrent_bias" in text and "bptt_steps=3:" not in text and "_dropout:" not in text


def test_repr_shows_what_is_not_the_default() -> None:
    assert repr(make("LSTM", init="keras", bptt_steps=5)) == "LSTM(5, 6, bptt_steps=5, init='keras')"
    assert repr(make("GRU")) == "GRU(5, 6)"


# ---- convert and revert -------------------------------------------------------------------------------------------


def test_convert_gives_options_to_layers_that_exist() -> None:
    model = nn.ModuleDict({"a": nn.LSTM(INPUT, H), "b": nn.GRU(INPUT, H), "c": nn.LSTMCell(INPUT, H)})
    options = {"input_dropout": 0.2, "weight_dropout": 0.1, "bptt_steps": 4, "stateful": True, "recompute": True}
    assert set(options) <= set(CONVERT_OPTIONS)
    fused_rnn.convert(model, **options)
    for name in "ab":
        assert {option: getattr(model[name], option) for option in options} == options
    model["a"](torch.randn(T, B, INPUT))
    assert model["a"].carried_h is not None
    with pytest.raises(ValueError, match=r"'a': it has input_dropout=0.2, which torch.nn.LSTM has not.*'b': it has"):
        fused_rnn.revert(model)
    assert isinstance(model["a"], fused_rnn.LSTM)
    for layer in (model["a"], model["b"]):
        layer.input_dropout = layer.weight_dropout = 0.0
        layer.stateful, layer.bptt_steps = False, None
    assert type(fused_rnn.revert(model)["a"]) is nn.LSTM


@pytest.mark.parametrize("option", sorted(set(LAYER_OPTIONS) - {"recompute", "init", "forget_bias"}))
def test_revert_refuses_what_torch_nn_has_not(option: str) -> None:
    flags = {name: not default for name, default in LAYER_OPTIONS.items() if isinstance(default, bool)}
    others = {"bptt_steps": 3, "activation": "relu", "recurrent_activation": "hard_sigmoid", "num_heads": 3}
    value = (flags | others).get(option, 0.5)
    name = "GRU" if option == "reset_after" else "LSTM"
    model = nn.Sequential(make(name, **{option: value}))
    with pytest.raises(ValueError, match=f"'0': it has {option}={value!r}, which torch.nn.{name} has not"):
        fused_rnn.revert(model)
    with pytest.raises(RuntimeError, match=option):
        torch.jit.script(model)
    model[0](data(T, B, INPUT))


def test_convert_changes_nothing_where_an_option_does_not_fit() -> None:
    model = nn.ModuleDict({"a": nn.LSTM(INPUT, H), "b": nn.LSTM(INPUT, H, bidirectional=True)})
    with pytest.raises(ValueError, match=r"stateful: expected False with bidirectional=True.*\(of 'b'\)"):
        fused_rnn.convert(model, stateful=True)
    assert type(model["a"]) is nn.LSTM
    with pytest.raises(TypeError, match="recurrent_bias: unexpected keyword argument of convert"):
        fused_rnn.convert(model, recurrent_bias=False)


# ---- bad input ----------------------------------------------------------------------------------------------------

REFUSED = [
    ("LSTM", {"input_dropout": 1.5}, ValueError, "input_dropout: expected a number from 0 to 1, got 1.5"),
    ("LSTM", {"weight_dropout": -0.1}, ValueError, "weight_dropout: expected a number from 0 to 1"),
    ("LSTM", {"weight_dropout": float("nan")}, ValueError, "weight_dropout: expected a number from 0 to 1, got nan"),
    ("LSTM", {"input_dropout": True}, ValueError, "input_dropout: expected a number"),
    ("LSTM", {"input_dropout": "0.5"}, ValueError, "input_dropout: expected a number"),
    ("LSTM", {"recurrent_bias": 1}, TypeError, "recurrent_bias: expected a bool"),
    ("GRU", {"recurrent_bias": False}, ValueError, "recurrent_bias: expected True for a GRU"),
    ("LSTM", {"bptt_steps": 0}, ValueError, "bptt_steps: expected at least 1, got 0"),
    ("LSTM", {"bptt_steps": 2.0}, TypeError, "bptt_steps: expected an int or None"),
    ("LSTM", {"bptt_steps": True}, TypeError, "bptt_steps: expected an int or None"),
    ("LSTM", {"bptt_steps": 3, "bidirectional": True}, ValueError, "bptt_steps: expected None with bidirectional"),
    ("LSTM", {"stateful": "yes"}, TypeError, "stateful: expected a bool"),
    ("GRU", {"stateful": True, "bidirectional": True}, ValueError, "stateful: expected False with bidirectional"),
    ("LSTM", {"init": "glorot"}, ValueError, "init: expected 'torch' or 'keras', got 'glorot'"),
    ("LSTM", {"init": None}, ValueError, "init: expected 'torch' or 'keras', got None"),
    ("LSTM", {"forget_bias": "1"}, TypeError, "forget_bias: expected a number or None"),
    ("GRU", {"forget_bias": 1.0}, ValueError, "forget_bias: expected None, only an LSTM has a forget gate"),
    ("LSTM", {"forget_bias": 1.0, "bias": False}, ValueError, "forget_bias: expected None with bias=False"),
    ("LSTM", {"zoneouts": 0.1}, TypeError, "zoneouts: unexpected keyword argument"),
]


@pytest.mark.parametrize(("name", "keywords", "error", "message"), REFUSED, ids=lambda v: str(v) if v else "")
def test_constructor_refuses(name: str, keywords: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(name, **keywords)


def test_calls_refuse() -> None:
    layer, x = make("LSTM", bptt_steps=3), data(T, B, INPUT)
    with pytest.raises(RuntimeError, match="bptt_steps: expected None with packed data.*lengths="):
        layer(pack_padded_sequence(x, [T, 3, 2]))
    one_bias = make("LSTM", recurrent_bias=False)
    with pytest.raises(RuntimeError, match=r"params: expected 3 tensors \(weight_ih_l0, weight_hh_l0, bias_ih_l0\)"):
        functional.lstm(x, None, list(layer.parameters()), recurrent_bias=False)
    with pytest.raises(RuntimeError, match="params: expected 4 tensors"):
        functional.lstm(x, None, list(one_bias.parameters()))
    with pytest.raises(TypeError, match="stateful: unexpected keyword argument of this function"):
        functional.lstm(x, None, list(layer.parameters()), stateful=True)
    with pytest.raises(RuntimeError, match="reset_state: expected a layer with stateful=True"):
        layer.reset_state()


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([3], IndexError, "rows: expected indices of the 3 rows"),
        ([-4], IndexError, "rows: expected indices of the 3 rows"),
        (torch.tensor([True, False]), IndexError, r"rows: expected \(3,\)"),
        ([0.5], TypeError, "rows: expected a bool tensor, indices or None"),
        ("all", TypeError, "rows: expected a bool tensor, indices or None"),
    ],
    ids=str,
)
def test_reset_state_refuses_rows(rows: Any, error: type[Exception], message: str) -> None:
    layer = make("LSTM", stateful=True)
    layer(data(T, B, INPUT))
    with pytest.raises(error, match=message):
        layer.reset_state(rows)
