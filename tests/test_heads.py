"""`num_heads`: a layer with heads is the layer whose W_hh is the block-diagonal matrix of its heads' blocks."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from support.compare import assert_within
from support.pairwise import Row, pairwise
from support.values import data, flat
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import fused_rnn
from fused_rnn import functional
from fused_rnn.settings import NOTHING_WITHIN, Settings

F64 = torch.float64
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
T, B, INPUT = 5, 3, 4


def by_hand(blocks: Tensor, num_heads: int) -> Tensor:
    """(G*H, H) of ``blocks`` (G*H, H / num_heads), element by element."""
    rows, head_size = blocks.shape
    H = head_size * num_heads
    dense = blocks.new_zeros(rows, H)
    for row in range(rows):
        head = row % H // head_size
        dense[row, head * head_size : (head + 1) * head_size] = blocks[row]
    return dense


def dense_of(layer: Any) -> Any:
    """The same function as a layer without heads, in float64."""
    options = {name: getattr(layer, name) for name in fused_rnn.settings.LAYER_OPTIONS if name != "num_heads"}
    if layer.mode.startswith("RNN"):
        options["nonlinearity"] = layer.nonlinearity
    dense = type(layer)(
        layer.input_size,
        layer.hidden_size,
        num_layers=layer.num_layers,
        bias=layer.bias,
        batch_first=layer.batch_first,
        dropout=layer.dropout,
        bidirectional=layer.bidirectional,
        dtype=F64,
        **options,
    )
    state = {name: value.double() for name, value in layer.state_dict().items()}
    for name, value in state.items():
        if name.startswith("weight_hh"):
            state[name] = by_hand(value, layer.num_heads)
    dense.load_state_dict(state)
    return dense.train(layer.training)


def results(layer: Any, layout: str, dtype: torch.dtype, names: list[str], backward: bool = True) -> dict[str, Tensor]:
    """Output, states and all gradients of a call whose numbers are those of the seed."""
    D = 2 if layer.bidirectional else 1
    x = data(*((B, T) if layer.batch_first else (T, B)), INPUT, dtype=dtype)
    states = [data(layer.num_layers * D, B, layer.hidden_size, seed=k, dtype=dtype) for k in (2, 3)]
    states = states[: 2 if layer.mode == "LSTM" else 1]
    leaves = [t.requires_grad_() for t in (x, *states)]
    steps: dict[str, Any] = {}
    argument: Any = x
    if layout == "packed":
        argument = pack_padded_sequence(x, [T, 3, 2], batch_first=layer.batch_first)
    if layout == "lengths":
        steps["lengths"] = torch.tensor([3, T, 0])
    if layout in ("mask", "reset"):
        steps[layout] = data(*x.shape[:2], seed=4) > 0
    if layout == "reset":
        anew = [data(*s.shape, seed=7 + k, dtype=dtype).requires_grad_() for k, s in enumerate(states)]
        steps["reset_state"] = tuple(anew) if layer.mode == "LSTM" else anew[0]
        leaves += anew
    torch.manual_seed(11)
    output, ends = layer(argument, tuple(states) if layer.mode == "LSTM" else states[0], **steps)
    found = [getattr(output, "data", output) if layout == "packed" else output, *flat(ends)]
    parts = {name: t.detach() for name, t in zip(("output", "h_n", "c_n"), found, strict=False)}
    if backward:
        incoming = [data(*t.shape, seed=20 + k, dtype=dtype) for k, t in enumerate(found)]
        gradients = torch.autograd.grad(found, [*leaves, *(getattr(layer, name) for name in names)], incoming)
        named = zip(["x", *(f"state {k}" for k in range(len(leaves) - 1)), *names], gradients, strict=True)
        parts |= {f"gradient of {name}": gradient for name, gradient in named}
    return parts


def blocks_of(parts: dict[str, Tensor], num_heads: int) -> dict[str, Tensor]:
    """With the gradients of the blocks out of those of the dense matrices."""
    blocks = {}
    for name, value in parts.items():
        if "weight_hh" in name:
            H = value.shape[1]
            head_size = H // num_heads
            heads = [row % H // head_size * head_size for row in range(value.shape[0])]
            value = torch.stack([value[row, h : h + head_size] for row, h in enumerate(heads)])
        blocks[name] = value
    return blocks


def make(name: str, head_size: int, num_heads: int, dtype: torch.dtype = F64, **keywords: Any) -> Any:
    torch.manual_seed(0)
    return getattr(fused_rnn, name)(INPUT, head_size * num_heads, num_heads=num_heads, dtype=dtype, **keywords)


def check_as_dense(layer: Any, layout: str = "steps", dtype: torch.dtype = F64) -> None:
    names = [name for name, _ in layer.named_parameters()]
    expected = blocks_of(results(dense_of(layer), layout, F64, names), layer.num_heads)
    assert_within(results(layer, layout, dtype, names), expected)


# ---- against the block-diagonal matrix ------------------------------------------------------------------------------

FACTORS = {
    "name": tuple(GATES),
    "num_heads": (2, 4, 1),
    "head_size": (8, 1, 3, 16, 64),
    "num_layers": (1, 2),
    "bidirectional": (False, True),
    "bias": (True, False),
    "layout": ("steps", "batch first", "packed", "lengths", "mask", "reset"),
    "recompute": (False, True),
    "dtype": (F64, torch.float32, torch.bfloat16),
}
ROWS = pairwise(FACTORS, candidates=20)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(map(str, row.values())))
def test_heads_are_the_blocks_of_a_diagonal(backend: str, row: Row) -> None:
    keywords = dict(row)
    layout, dtype = keywords.pop("layout"), keywords["dtype"]
    layer = make(**keywords, batch_first=layout == "batch first")
    check_as_dense(layer, layout, dtype)


# Units of a head, and how many heads: some make whole vectors together, of some instruction sets, some none.
SMALL = [(1, 16), (1, 48), (1, 20), (2, 8), (2, 24), (2, 5), (3, 16), (3, 32), (3, 7)]
SMALL += [(4, 12), (4, 3), (8, 2), (8, 6), (8, 5), (12, 4), (12, 8), (12, 3)]


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize(("head_size", "num_heads"), SMALL)
def test_heads_of_a_few_units(isa: str, head_size: int, num_heads: int, name: str, dtype: torch.dtype) -> None:
    layer = make(name, head_size, num_heads, dtype, bidirectional=num_heads == 8)
    names = [parameter for parameter, _ in layer.named_parameters()]
    with fused_rnn.use_backend("reference"):
        expected = blocks_of(results(dense_of(layer), "lengths", F64, names), num_heads)
    with fused_rnn.use_backend("fused"):
        assert_within(results(layer, "lengths", dtype, names), expected)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16], ids=str)
def test_heads_of_a_few_units_cost_a_vector_each(isa: str, dtype: torch.dtype) -> None:
    """By the plan, whose sizes are those that the kernels get: neighbours are one head of a vector of units."""
    from fused_rnn import ops

    sizes = {torch.float32: 4, F64: 8, torch.bfloat16: 4}  # of what is summed
    vector = {"portable": 16, "avx2": 32}.get(isa, 64) // sizes[dtype]

    def plan(H: int, num_heads: int) -> dict[str, Any]:
        settings = make("RNN", H // num_heads, num_heads, dtype)._settings()
        return ops.plan(settings, T=100, B=8, batch_sizes=None, dtype=dtype, device=torch.device("cpu"), training=True)

    for backward in (False, True):
        of_units, of_vectors, of_one = (plan(256, num_heads) for num_heads in (256, 256 // vector, 1))
        if backward:
            of_units, of_vectors, of_one = (found["backward"] for found in (of_units, of_vectors, of_one))
        for time in ("predicted_us", "serial_us", "bound_us"):
            assert of_units[time] == of_vectors[time]
        assert of_units["serial_us"] < 0.7 * of_one["serial_us"]
    assert plan(vector + 1, vector + 1)["serial_us"] == plan(vector + 1, 1)["serial_us"]  # none divides them


WITH: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {"peephole": True, "coupled_gates": True, "cell_clip": 0.5, "recurrent_bias": False}),
    ("LSTM", {"zoneout": 0.3, "zoneout_cell": 0.2, "recurrent_dropout": 0.3, "dropout": 0.4, "input_dropout": 0.2}),
    ("GRU", {"reset_after": False, "recurrent_dropout": 0.3, "recurrent_bias": False}),
    ("GRU", {"zoneout": 0.3, "recurrent_dropout": 0.3, "activation": "relu", "recurrent_activation": "hard_sigmoid"}),
    ("RNN", {"nonlinearity": "softsign", "zoneout": 0.3, "recurrent_dropout": 0.3}),
    *((name, {"recurrent_grad_clip": 0.3, "bptt_steps": 2}) for name in GATES),
]


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(("name", "options"), WITH, ids=str)
def test_other_options_are_what_they_are_without_heads(
    backend: str, name: str, options: dict[str, Any], training: bool
) -> None:
    """What is drawn has the same shapes, so it is drawn alike."""
    check_as_dense(make(name, 3, 2, num_layers=2, **options).train(training))


def test_weight_dropout_is_of_the_blocks(backend: str) -> None:
    layer, x = make("GRU", 3, 2, weight_dropout=0.5), data(T, B, INPUT)
    torch.manual_seed(3)
    output = layer(x)[0]
    torch.manual_seed(3)
    factors = nn.functional.dropout(torch.ones_like(layer.weight_hh_l0), 0.5)
    assert 0 < int((factors == 0).sum()) < factors.numel()
    layer.weight_dropout = 0.0
    with torch.no_grad():
        layer.weight_hh_l0.mul_(factors)
    assert_close(output, layer(x)[0])


@pytest.mark.parametrize("name", GATES)
def test_no_head_sees_another(backend: str, name: str) -> None:
    layer, x = make(name, 3, 2), data(T, B, INPUT)
    h = data(1, B, 6, seed=2).requires_grad_()
    output, _ = layer(x, (h, torch.zeros_like(h)) if name == "LSTM" else h)
    (gradient,) = torch.autograd.grad(output[..., :3].square().sum(), h)
    assert gradient[..., :3].all() and not gradient[..., 3:].any()


@pytest.mark.parametrize("name", GATES)
def test_autocast_and_no_batch(backend: str, name: str) -> None:
    layer, x = make(name, 4, 2, torch.float32), data(T, INPUT, dtype=torch.float32)
    expected = dense_of(layer)(x.double())[0]
    assert_within({"output": layer(x)[0]}, {"output": expected})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)[0]
    assert_close(output.double(), expected, rtol=0.05, atol=0.05)
    assert layer(x.new_zeros(T, 0, INPUT))[0].shape == (T, 0, 8)


@pytest.mark.parametrize("name", GATES)
def test_derivatives(backend: str, name: str) -> None:
    layer, x = make(name, 2, 2), data(3, 2, INPUT).requires_grad_()
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def call(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        output, states = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))
        return output, *flat(states)

    assert torch.autograd.gradcheck(call, (x, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, *parameters), fast_mode=True)
    tangents = tuple(data(*t.shape, seed=9) for t in (x, *parameters))
    forward = torch.func.jvp(call, (x.detach(), *(p.detach() for p in parameters)), tangents)[1]
    dense = dense_of(layer)
    moved = {n: by_hand(t, 2) if "weight_hh" in n else t for n, t in zip(names, tangents[1:], strict=True)}

    def call_dense(x: Tensor, values: dict[str, Tensor]) -> tuple[Tensor, ...]:
        output, states = torch.func.functional_call(dense, values, (x,))
        return output, *flat(states)

    values = {n: p.detach() for n, p in dense.named_parameters()}
    for a, b in zip(forward, torch.func.jvp(call_dense, (x.detach(), values), (tangents[0], moved))[1], strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("name", GATES)
def test_a_cell_is_a_layer_of_one_step(backend: str, name: str) -> None:
    layer, cell = make(name, 3, 2), make(f"{name}Cell", 3, 2)
    assert cell.weight_hh.shape == (GATES[name] * 6, 3)
    layer.load_state_dict({f"{key}_l0": value for key, value in cell.state_dict().items()})
    x, h, c = data(B, INPUT), data(B, 6, seed=2), data(B, 6, seed=3)
    hx: Any = (h, c) if name == "LSTM" else h
    wanted = [s[0] for s in flat(layer(x[None], (h[None], c[None]) if name == "LSTM" else h[None])[1])]
    function = getattr(functional, f"{name.lower()}_cell")
    for found in (cell(x, hx), function(x, hx, *cell.parameters(), num_heads=2)):
        for a, b in zip(flat(found), wanted, strict=True):
            assert_close(a, b)


@pytest.mark.parametrize("name", GATES)
def test_functions_take_heads(backend: str, name: str) -> None:
    layer, x = make(name, 3, 2, num_layers=2), data(T, B, INPUT)
    found = getattr(functional, name.lower())(x, None, list(layer.parameters()), num_layers=2, num_heads=2)[0]
    assert_close(found, layer(x)[0], rtol=0, atol=0)


def test_torch_compile_has_heads_in_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    layer, x = make("GRU", 3, 2), data(2, B, INPUT)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = []
    for run in (layer, compiled):
        output = run(x)[0]
        found.append((output, *torch.autograd.grad(output.square().sum(), list(layer.parameters()))))
    for a, b in zip(*found, strict=True):
        assert_close(a, b)


# ---- parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GATES)
def test_shapes_and_first_values(name: str) -> None:
    H = 400
    layer = make(name, 100, 4, num_layers=2, bidirectional=True)
    plain = getattr(nn, name)(INPUT, H, 2, bidirectional=True)
    assert list(layer.state_dict()) == list(plain.state_dict())
    for key, value in layer.state_dict().items():
        shape = plain.state_dict()[key].shape
        assert value.shape == ((shape[0], 100) if key.startswith("weight_hh") else shape)
        assert 0.99 / math.sqrt(H) < float(value.abs().max()) <= 1 / math.sqrt(H)
    assert [len(weights) for weights in layer.all_weights] == [4] * 4
    assert layer.weight_hh_l0 is layer._flat_weights[1]
    torch.manual_seed(0)
    again = copy.deepcopy(layer)
    again.reset_parameters()
    for a, b in zip(layer.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)  # the constructor draws as often as this


def test_keras_draws_each_head_orthogonal_over_all_gates() -> None:
    layer = make("LSTM", 5, 3, init="keras", peephole=True)
    heads = layer.weight_hh_l0.detach().view(4, 3, 5, 5)
    for head in range(3):
        rows = heads[:, head].reshape(20, 5)
        assert_close(rows.T @ rows, torch.eye(5, dtype=F64))
    assert not torch.allclose(heads[:, 0], heads[:, 1])
    assert layer.bias_ih_l0[15:30].eq(1).all() and not layer.weight_peephole_l0.any()


def test_a_subclass_that_draws_its_parameters_itself_sees_the_blocks_last() -> None:
    class Own(fused_rnn.GRU):
        def reset_parameters(self) -> None:
            super().reset_parameters()
            for name, parameter in self.named_parameters():
                nn.init.constant_(parameter, float(parameter.shape[-1] == 3 and "weight_hh" in name))

    assert Own(4, 6, num_heads=2).weight_hh_l0.eq(1).all()


def test_attribute_copies_and_repr() -> None:
    for name in ("GRU", "GRUCell"):
        module = make(name, 3, 2)
        assert module.num_heads == 2 and "num_heads=2" in repr(module)
        module.num_heads = 2
        with pytest.raises(ValueError, match="num_heads: expected 2, as the module was made with, got 3"):
            module.num_heads = 3
        with pytest.raises(ValueError, match="num_heads: expected 1, as the module was made with, got 2"):
            getattr(fused_rnn, name)(4, 6).num_heads = 2
        for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert copied.num_heads == 2
            with fused_rnn.use_backend("reference"):
                x = data(B, INPUT) if name == "GRUCell" else data(T, B, INPUT)
                assert torch.equal(flat(copied(x))[0], flat(module(x))[0])
        plain = getattr(fused_rnn, name)(4, 6, num_heads=1)
        assert plain._within is None and plain._settings().within is None


def test_settings_come_out_of_the_operators_lists_as_they_went_in() -> None:
    layer = make("LSTM", 3, 2, num_layers=2)
    settings = layer._settings()
    integers, numbers = settings.flatten()
    assert integers[6:-1] == [0, 1, 1, 0, 0, 2, 0, 0, 0, 0] and settings.state_size == 6
    restored = Settings.restore(integers, numbers, torch.empty(T, B, INPUT), layer._params())
    assert restored == settings and restored.within == NOTHING_WITHIN._replace(num_heads=2)


# ---- who computes it, what it costs, convert, revert ----------------------------------------------------------------


def test_explain_and_diagnostics_have_heads() -> None:
    layer, x = make("LSTM", 3, 2), data(T, B, INPUT)
    with fused_rnn.use_backend("reference"):
        (sentence,) = fused_rnn.explain(layer, x).options
        assert sentence == "num_heads=2: the formulas multiply each head's part of h by its own block of W_hh"
        dense = dense_of(layer)
        found, wanted = (
            fused_rnn.diagnostics.gate_statistics(module, lambda module=module: module(x))[0]
            for module in (layer, dense)
        )
        for gate in "ifgo":
            assert_close(found.low[gate], wanted.low[gate])
            assert_close(found.high[gate], wanted.high[gate])
        found, wanted = (
            fused_rnn.diagnostics.gradient_flow(module, lambda module=module: module(x)[0].sum())[0]
            for module in (layer, dense)
        )
        assert_close(found.h, wanted.h)


@pytest.mark.kernels
@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_operations_are_those_of_the_blocks(num_heads: int) -> None:
    layer, x = make("GRU", 8 // num_heads, num_heads), data(T, B, INPUT).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        output = layer(x)[0]
    forward = 2 * T * B * 3 * 8 * (INPUT + 8 // num_heads)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() == 2 * forward


def test_convert_and_revert_refuse_by_name() -> None:
    model = nn.Sequential(nn.GRU(INPUT, 6))
    with pytest.raises(TypeError, match="num_heads: unexpected keyword argument of convert.*weight_hh"):
        fused_rnn.convert(model, num_heads=2)
    assert type(model[0]) is nn.GRU
    for name in ("GRU", "GRUCell"):
        with pytest.raises(ValueError, match=f"'0': it has num_heads=2, which torch.nn.{name} has not"):
            fused_rnn.revert(nn.Sequential(make(name, 3, 2)))


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"num_heads": 4}, ValueError, r"num_heads: expected a divisor of hidden_size \(6\), got 4"),
    ({"num_heads": 12}, ValueError, r"num_heads: expected a divisor of hidden_size \(6\), got 12"),
    ({"num_heads": 0}, ValueError, "num_heads: expected at least 1, got 0"),
    ({"num_heads": -2}, ValueError, "num_heads: expected at least 1, got -2"),
    ({"num_heads": 2.0}, TypeError, r"num_heads: expected an int, got 2.0 \(float\)"),
    ({"num_heads": True}, TypeError, "num_heads: expected an int, got True"),
    ({"num_heads": None}, TypeError, "num_heads: expected an int, got None"),
]


@pytest.mark.parametrize(("keywords", "error", "message"), REFUSED, ids=lambda v: str(v))
def test_constructors_and_functions_refuse(keywords: dict[str, Any], error: type[Exception], message: str) -> None:
    for name in GATES:
        for kind in (name, f"{name}Cell"):
            with pytest.raises(error, match=message):
                getattr(fused_rnn, kind)(INPUT, 6, **keywords)
            plain, function = getattr(fused_rnn, kind)(INPUT, 6), kind.lower().replace("cell", "_cell")
            given = plain.parameters() if kind != name else [list(plain.parameters())]
            with pytest.raises(error, match=message):
                getattr(functional, function)(torch.zeros(2, INPUT), None, *given, **keywords)


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="num_heads: expected 1 with proj_size, .* got 2"):
        fused_rnn.LSTM(INPUT, 6, proj_size=2, num_heads=2)
    with pytest.raises(ValueError, match=r"num_heads: expected a divisor of hidden_size \(0\), got 2"):
        fused_rnn.GRUCell(INPUT, 0, num_heads=2)
    x, layer, plain = data(T, B, INPUT), make("GRU", 3, 2), fused_rnn.GRU(INPUT, 6, dtype=F64)
    with pytest.raises(RuntimeError, match=r"weight_hh_l0: expected \(18, 6\), got \(18, 3\)"):
        functional.gru(x, None, list(layer.parameters()))
    with pytest.raises(RuntimeError, match=r"weight_hh_l0: expected \(18, 3\), got \(18, 6\)"):
        functional.gru(x, None, list(plain.parameters()), num_heads=2)
    with pytest.raises(RuntimeError, match=r"w_hh: expected \(18, 3\), got \(18, 6\)"):
        functional.gru_cell(x[0], None, *plain.parameters(), num_heads=2)
    with pytest.raises(RuntimeError, match=r"hx: expected \(1, 3, 6\), got \(1, 3, 3\)"):
        layer(x, data(1, B, 3))
    with pytest.raises(RuntimeError, match="size mismatch for weight_hh_l0"):
        layer.load_state_dict(plain.state_dict())
