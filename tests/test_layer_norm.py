"""`layer_norm`: W_ih x, W_hh h and, for an LSTM, c are normalised over the units of each row in each step."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.backends import available_isas, fused_available
from support.compare import assert_same, assert_within
from support.pairwise import Row, pairwise
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import fused_rnn
from fused_rnn import functional
from fused_rnn.check import instruction_set
from fused_rnn.settings import NOTHING_WITHIN, Settings

F64 = torch.float64
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
T, B, INPUT = 5, 3, 4


@pytest.fixture(params=["reference", "fused"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "fused" and not fused_available():
        pytest.skip("the kernels are not in use")
    with fused_rnn.use_backend("auto" if request.param == "fused" else "reference"):
        yield request.param


def data(*shape: int, seed: int = 1, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def flat(states: Any) -> list[Tensor]:
    return list(states) if isinstance(states, tuple) else [states]


def make(name: str, hidden_size: int = 6, dtype: torch.dtype = F64, **keywords: Any) -> Any:
    """With gains and biases that tell units and gates apart, small enough that rounding does not grow step by step."""
    torch.manual_seed(0)
    module = getattr(fused_rnn, name)(INPUT, hidden_size, layer_norm=True, dtype=dtype, **keywords)
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if "norm" in key:
                parameter.mul_(0.4).add_(0.15 * torch.randn(parameter.shape, dtype=F64))
    return module


# ---- against Ba et al. 2016, step by step ---------------------------------------------------------------------------


def normalised(a: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    return layer_norm(a, a.shape[-1:], gain, bias)


def step(layer: Any, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """One of a layer with both biases, and without other options but a projection and peepholes."""
    of_x = normalised(x @ layer.weight_ih_l0.T, layer.weight_norm_ih_l0) + layer.bias_ih_l0
    of_h = normalised(h @ layer.weight_hh_l0.T, layer.weight_norm_hh_l0) + layer.bias_hh_l0
    if layer.mode == "LSTM":
        i, f, g, o = (of_x + of_h).chunk(4, dim=-1)
        p_i, p_f, p_o = layer.weight_peephole_l0.chunk(3) if layer.peephole else (0, 0, 0)
        c = (f + p_f * c).sigmoid() * c + (i + p_i * c).sigmoid() * g.tanh()
        h = (o + p_o * c).sigmoid() * normalised(c, layer.weight_norm_c_l0, layer.bias_norm_c_l0).tanh()
        return (linear(h, layer.weight_hr_l0) if layer.proj_size else h), c
    if layer.mode == "GRU":
        (x_r, x_z, x_n), (h_r, h_z, h_n) = of_x.chunk(3, dim=-1), of_h.chunk(3, dim=-1)
        r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
        return (1 - z) * (x_n + r * h_n).tanh() + z * h, c
    return (of_x + of_h).tanh() if layer.mode == "RNN_TANH" else (of_x + of_h).relu(), c


BY_HAND: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {}),
    ("LSTM", {"peephole": True}),
    ("LSTM", {"proj_size": 3}),
    ("GRU", {}),
    ("RNN", {}),
    ("RNN", {"nonlinearity": "relu"}),
]


@pytest.mark.parametrize("hidden_size", [1, 5, 16, 33, 70])
@pytest.mark.parametrize(("name", "keywords"), BY_HAND, ids=str)
def test_a_layer_is_its_steps(backend: str, name: str, keywords: dict[str, Any], hidden_size: int) -> None:
    if hidden_size <= keywords.get("proj_size", 0):
        pytest.skip("a projection is smaller than the state")
    layer = make(name, hidden_size, **keywords)
    P = layer.proj_size or hidden_size
    x, h0, c0 = (
        t.requires_grad_() for t in (data(T, B, INPUT), data(1, B, P, seed=2), data(1, B, hidden_size, seed=3))
    )
    is_lstm = name == "LSTM"
    output, states = layer(x, (h0, c0) if is_lstm else h0)
    h, c, outputs = h0[0], c0[0], []
    for t in range(T):
        h, c = step(layer, x[t], h, c)
        outputs.append(h)
    expected = [torch.stack(outputs), h[None], c[None]][: 3 if is_lstm else 2]
    leaves = [x, h0, *([c0] if is_lstm else []), *layer.parameters()]
    incoming = [data(*t.shape, seed=4 + k) for k, t in enumerate(expected)]
    found, wanted = (torch.autograd.grad(t, leaves, incoming) for t in ([output, *flat(states)], expected))
    for a, b in zip((output, *flat(states), *found), (*expected, *wanted), strict=True):
        assert_close(a, b)


# ---- every shape of a call, against the formulas in float64 ---------------------------------------------------------


def results(layer: Any, layout: str, T: int = T, B: int = B) -> dict[str, Tensor]:
    """Output, states and all gradients of a call whose numbers are those of the seed."""
    D = 2 if layer.bidirectional else 1
    dtype = layer.weight_ih_l0.dtype
    x = data(*((B, T) if layer.batch_first else (T, B)), INPUT, dtype=dtype)
    rows, P = layer.num_layers * D, layer.proj_size or layer.hidden_size
    states = [data(rows, B, size, seed=k, dtype=dtype) for k, size in ((2, P), (3, layer.hidden_size))]
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
    incoming = [data(*t.shape, seed=20 + k, dtype=dtype) for k, t in enumerate(found)]
    names = [name for name, _ in layer.named_parameters()]
    gradients = torch.autograd.grad(found, [*leaves, *layer.parameters()], incoming)
    named = zip(["x", *(f"state {k}" for k in range(len(leaves) - 1)), *names], gradients, strict=True)
    parts |= {f"grad({name})": gradient for name, gradient in named}
    return parts


def check_by_formulas(layer: Any, layout: str = "steps", T: int = T, B: int = B) -> None:
    exact = copy.deepcopy(layer).double()
    with fused_rnn.use_backend("reference"):
        expected = results(exact, layout, T, B)
    assert_within(results(layer, layout, T, B), expected)


FACTORS = {
    "name": ("LSTM", "LSTM with a projection", "GRU", "RNN"),
    "hidden_size": (6, 16, 40, 129),
    "num_layers": (1, 2),
    "bidirectional": (False, True),
    "bias": (True, False),
    "layout": ("steps", "batch first", "packed", "lengths", "mask", "reset"),
    "recompute": (False, True),
    "dtype": (F64, torch.float32, torch.bfloat16, torch.float16),
}
ROWS = pairwise(FACTORS, candidates=20)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(map(str, row.values())))
def test_calls_of_every_shape(isa: str, row: Row) -> None:
    keywords = dict(row)
    layout, name = keywords.pop("layout"), keywords.pop("name")
    if "projection" in name:
        keywords["proj_size"] = 3
    layer = make(name.split()[0], **keywords, batch_first=layout == "batch first")
    with instruction_set(isa):
        check_by_formulas(layer, layout)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("T", "B"), [(1, 1), (1, 12), (4, 2), (30, 40)])
@pytest.mark.parametrize("name", GATES)
def test_calls_of_few_rows_and_of_several_chunks(name: str, T: int, B: int, dtype: torch.dtype) -> None:
    """Of few rows weights are read where they stand; 1200 rows are two chunks of the backward pass."""
    for bidirectional in (False, True):
        check_by_formulas(make(name, 110, dtype, bidirectional=bidirectional), T=T, B=B)


WITH: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {"peephole": True, "coupled_gates": True, "cell_clip": 0.5, "recurrent_bias": False}),
    ("LSTM", {"zoneout": 0.3, "zoneout_cell": 0.2, "recurrent_dropout": 0.3, "dropout": 0.4, "input_dropout": 0.2}),
    ("LSTM", {"zoneout": 0.3, "zoneout_cell": 0.2, "proj_size": 3, "peephole": True, "recurrent_grad_clip": 0.3}),
    ("LSTM", {"activation": "softsign", "recurrent_activation": "hard_sigmoid", "cell_clip": 0.4}),
    ("LSTM", {"num_heads": 2, "zoneout_cell": 0.2}),
    ("GRU", {"zoneout": 0.3, "recurrent_dropout": 0.3, "activation": "relu", "recurrent_activation": "hard_sigmoid"}),
    ("GRU", {"num_heads": 3, "recurrent_dropout": 0.3}),
    ("RNN", {"nonlinearity": "softsign", "zoneout": 0.3, "recurrent_dropout": 0.3}),
    ("RNN", {"num_heads": 2}),
    *((name, {"recurrent_grad_clip": 0.3, "bptt_steps": 2, "weight_dropout": 0.2}) for name in GATES),
]


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(("name", "options"), WITH, ids=str)
def test_beside_other_options(name: str, options: dict[str, Any], training: bool, recompute: bool) -> None:
    for hidden_size in (6, 96):
        layer = make(name, hidden_size, num_layers=2, recompute=recompute, **options).train(training)
        check_by_formulas(layer)
        check_by_formulas(layer.float())


@pytest.mark.kernels
@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("name", GATES)
def test_any_number_of_threads_gives_the_same_bits(name: str, recompute: bool) -> None:
    layer = make(name, 70, torch.float32, bidirectional=True, num_layers=2, recompute=recompute)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            found.append(results(layer, "steps"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert_same(other, found[0])


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("name", GATES)
def test_recompute_has_the_same_numbers(name: str, dtype: torch.dtype) -> None:
    layer = make(name, 40, dtype, num_layers=2)
    expected = results(layer, "steps")
    layer.recompute = True
    assert_same(results(layer, "steps"), expected)


def with_constant_rows(name: str, dtype: torch.dtype) -> Any:
    layer = make(name, 20, dtype)
    with torch.no_grad():
        for weight in (layer.weight_ih_l0, layer.weight_hh_l0):
            weight.copy_(weight[:1].expand_as(weight))
    return layer


@pytest.mark.parametrize("name", GATES)
def test_constant_rows_are_zeros(backend: str, name: str) -> None:
    """Less its mean a constant row is 0, and what is added to its variance is the variance."""
    layer, x = with_constant_rows(name, F64), data(T, B, INPUT)
    output = layer(x)[0]
    with torch.no_grad():
        layer.weight_norm_ih_l0.zero_()
        layer.weight_norm_hh_l0.zero_()
    assert_close(output, layer(x)[0])


@pytest.mark.kernels
@pytest.mark.parametrize("name", GATES)
def test_constant_rows_have_no_noise_in_the_kernels(name: str) -> None:
    """The square root of what is added to the variance would make 300 epsilons of one."""
    layer = with_constant_rows(name, torch.float32)
    with fused_rnn.use_backend("reference"):
        expected = results(copy.deepcopy(layer).double(), "steps")
    outputs = [key for key in expected if not key.startswith("grad")]  # gradients come through sums that cancel
    found = results(layer, "steps")
    assert_within({key: found[key] for key in outputs}, {key: expected[key] for key in outputs})


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("name", GATES)
def test_a_large_mean_costs_no_digits(backend: str, name: str, dtype: torch.dtype) -> None:
    """Sums of 1024 and a small whole number for each unit, whose squares float32 cannot tell apart."""
    layer = make(name, 20, dtype)
    rows = GATES[name] * 20
    small = torch.arange(rows) % 5 - 2  # their sum is 0
    with torch.no_grad():
        layer.weight_ih_l0.zero_()[:, 0] = 1024 + small
    x = torch.zeros(1, 2, INPUT, dtype=dtype)
    x[0, :, 0] = torch.tensor([1.0, -2.0])
    found, expected = {}, {}
    for results_of, module, kind in ((found, layer, dtype), (expected, copy.deepcopy(layer).double(), F64)):
        chosen = [p for key, p in module.named_parameters() if "norm" in key or "bias" in key]
        output = module(x.to(kind))[0]
        results_of["output"] = output.detach()
        for k, gradient in enumerate(torch.autograd.grad(output.square().sum(), chosen)):
            results_of[f"grad({k})"] = gradient
    assert_within(found, expected)


def test_a_row_of_one_unit_is_its_biases(backend: str) -> None:
    layer, x = make("RNN", 1), data(T, B, INPUT)
    assert_close(layer(x)[0], (layer.bias_ih_l0 + layer.bias_hh_l0).tanh().expand(T, B, 1))


# ---- derivatives, transforms ----------------------------------------------------------------------------------------


def as_function(layer: Any) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def call(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        output, states = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))
        return output, *flat(states)

    return call, parameters


@pytest.mark.parametrize("name", GATES)
def test_derivatives(backend: str, name: str) -> None:
    call, parameters = as_function(make(name, 4))
    x = data(3, 2, INPUT).requires_grad_()
    assert torch.autograd.gradcheck(call, (x, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, *parameters), fast_mode=True)
    tangents = tuple(data(*t.shape, seed=9) for t in (x, *parameters))
    values = (x.detach(), *(p.detach() for p in parameters))
    forward = torch.func.jvp(call, values, tangents)[1]
    step = 1e-6
    ahead, behind = (call(*(v + sign * step * t for v, t in zip(values, tangents, strict=True))) for sign in (1, -1))
    for a, up, down in zip(forward, ahead, behind, strict=True):
        assert_close(a, (up - down) / (2 * step), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", GATES)
def test_vmap_and_checkpoint(backend: str, name: str) -> None:
    layer, x = make(name), data(2, T, B, INPUT)
    expected = torch.stack([layer(one)[0] for one in x])
    assert_close(torch.vmap(lambda one: layer(one)[0])(x), expected)
    x.requires_grad_()
    found = torch.autograd.grad(checkpoint(lambda t: layer(t)[0], x[0], use_reentrant=False).square().sum(), x)
    assert_close(found, torch.autograd.grad(layer(x[0])[0].square().sum(), x))


@pytest.mark.parametrize("name", GATES)
def test_torch_compile_has_it_in_one_graph(backend: str, name: str) -> None:
    torch._dynamo.reset()
    layer, x = make(name), data(2, B, INPUT)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = []
    for run in (layer, compiled):
        output = run(x)[0]
        found.append((output, *torch.autograd.grad(output.square().sum(), list(layer.parameters()))))
    for a, b in zip(*found, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("name", GATES)
def test_autocast_and_no_batch(backend: str, name: str) -> None:
    layer, x = make(name, 8, torch.float32), data(T, INPUT, dtype=torch.float32)
    with fused_rnn.use_backend("reference"):
        expected = copy.deepcopy(layer).double()(x.double())[0]
    assert_within({"output": layer(x)[0]}, {"output": expected})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)[0]
    assert_close(output.double(), expected, rtol=0.05, atol=0.05)
    assert layer(x.new_zeros(T, 0, INPUT))[0].shape == (T, 0, 8)


@pytest.mark.kernels
@pytest.mark.parametrize("frozen", ["weight_norm_ih_l0", "weight_norm_c_l1", "bias_hh_l0", "weight_hh_l0"])
def test_frozen_parameters_get_no_gradient_and_change_no_other(frozen: str) -> None:
    layer, x = make("LSTM", num_layers=2), data(T, B, INPUT)
    names = [name for name, _ in layer.named_parameters() if name != frozen]
    expected = torch.autograd.grad(layer(x)[0].square().sum(), [getattr(layer, name) for name in names])
    getattr(layer, frozen).requires_grad_(False)
    layer(x)[0].square().sum().backward()
    assert getattr(layer, frozen).grad is None
    for name, gradient in zip(names, expected, strict=True):
        assert_close(getattr(layer, name).grad, gradient, rtol=0, atol=0)


# ---- cells and functions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", GATES)
def test_a_cell_is_a_layer_of_one_step(backend: str, name: str, bias: bool) -> None:
    layer, cell = make(name, bias=bias), make(f"{name}Cell", bias=bias)
    layer.load_state_dict({f"{key}_l0": value for key, value in cell.state_dict().items()})
    x, h, c = data(B, INPUT), data(B, 6, seed=2), data(B, 6, seed=3)
    hx: Any = (h, c) if name == "LSTM" else h
    wanted = [s[0] for s in flat(layer(x[None], (h[None], c[None]) if name == "LSTM" else h[None])[1])]
    function = getattr(functional, f"{name.lower()}_cell")
    parameters = list(cell.parameters())
    count = 4 if bias else 2
    given = parameters[:count]
    for found in (cell(x, hx), function(x, hx, *given, norms=parameters[count:])):
        for a, b in zip(flat(found), wanted, strict=True):
            assert_close(a, b)


def test_a_cell_with_peepholes_too(backend: str) -> None:
    layer, cell = make("LSTM", peephole=True), make("LSTMCell", peephole=True)
    layer.load_state_dict({f"{key}_l0": value for key, value in cell.state_dict().items()})
    x = data(B, INPUT)
    assert_close(cell(x)[0], layer(x[None])[0][0])
    *given, w_peephole = [
        getattr(cell, f"{key}") for key in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_peephole")
    ]
    norms = [cell.weight_norm_ih, cell.weight_norm_hh, cell.weight_norm_c, cell.bias_norm_c]
    found = functional.lstm_cell(x, None, *given, w_peephole=w_peephole, norms=norms)
    assert_close(found[0], cell(x)[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", GATES)
def test_functions_take_the_parameters_in_order(backend: str, name: str) -> None:
    layer, x = make(name, num_layers=2), data(T, B, INPUT)
    found = getattr(functional, name.lower())(x, None, list(layer.parameters()), num_layers=2, layer_norm=True)[0]
    assert_close(found, layer(x)[0], rtol=0, atol=0)


class Seen(Tensor):
    calls: list[tuple[Any, dict[str, Any]]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (functional.lstm, functional.lstm_cell):
            cls.calls.append((func, kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})


def test_torch_function_sees_the_option() -> None:
    Seen.calls.clear()
    layer, cell, x = make("LSTM"), make("LSTMCell"), data(T, B, INPUT).as_subclass(Seen)
    layer(x)
    cell(x[0])
    (_, of_layer), (_, of_cell) = Seen.calls[0], Seen.calls[-1]
    assert of_layer["layer_norm"] is True
    assert of_cell["norms"][3] is cell.bias_norm_c


# ---- parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["torch", "keras"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", GATES)
def test_names_shapes_and_first_values(name: str, bias: bool, init: str) -> None:
    keywords: dict[str, Any] = {"peephole": True, "proj_size": 2} if name == "LSTM" else {}
    torch.manual_seed(0)
    layer = getattr(fused_rnn, name)(INPUT, 6, 2, bidirectional=True, bias=bias, init=init, layer_norm=True, **keywords)
    G = GATES[name]
    expected = {"weight_norm_ih": (G * 6, 1.0), "weight_norm_hh": (G * 6, 1.0)}
    if name == "LSTM":
        expected |= {"weight_norm_c": (6, 1.0)} | ({"bias_norm_c": (6, 0.0)} if bias else {})
    for suffix in ("_l0", "_l0_reverse", "_l1", "_l1_reverse"):
        for key, (size, value) in expected.items():
            assert torch.equal(getattr(layer, key + suffix), torch.full((size,), value))
    assert [names[-len(expected) :] for names in layer._all_weights] == [
        [key + suffix for key in expected] for suffix in ("_l0", "_l0_reverse", "_l1", "_l1_reverse")
    ]
    assert list(layer.state_dict()) == layer._flat_weights_names
    plain = [parameter.clone() for key, parameter in layer.named_parameters() if "norm" not in key]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(7)
    torch.manual_seed(0)
    layer.reset_parameters()
    for suffix in ("_l0", "_l1_reverse"):
        for key, (size, value) in expected.items():
            assert torch.equal(getattr(layer, key + suffix), torch.full((size,), value))
    assert not any(parameter.eq(7).any() for parameter in layer.parameters()) and len(plain) > 0


def test_other_parameters_are_drawn_as_without_it() -> None:
    for name in (*GATES, *(f"{name}Cell" for name in GATES)):
        torch.manual_seed(3)
        plain = getattr(fused_rnn, name)(INPUT, 6)
        torch.manual_seed(3)
        layer = getattr(fused_rnn, name)(INPUT, 6, layer_norm=True)
        for key, value in plain.state_dict().items():
            assert torch.equal(layer.state_dict()[key], value)


@pytest.mark.parametrize("name", ["LSTM", "GRUCell", "LSTMCell"])
def test_as_an_attribute_and_copies(name: str) -> None:
    module = getattr(fused_rnn, name)(INPUT, 6, dtype=F64)
    names = list(module.state_dict())
    module.layer_norm = True
    assert "layer_norm=True" in repr(module) and len(list(module.parameters())) > len(names)
    if name != "GRUCell":
        module.peephole = True
        settings = module._settings()
        assert [tuple(p.shape) for p in module._params()] == [s for _, s in fused_rnn._checks.param_specs(settings)]
    x = data(B, INPUT) if name.endswith("Cell") else data(T, B, INPUT)
    with fused_rnn.use_backend("reference"):
        for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert copied.layer_norm and torch.equal(flat(copied(x))[0], flat(module(x))[0])
    module.layer_norm = False
    if name != "GRUCell":
        module.peephole = False
    assert list(module.state_dict()) == names and module._within is None


def test_settings_come_out_of_the_operators_lists_as_they_went_in() -> None:
    layer = make("LSTM", num_layers=2)
    settings = layer._settings()
    integers, numbers = settings.flatten()
    restored = Settings.restore(integers, numbers, torch.empty(T, B, INPUT), layer._params())
    assert restored == settings and restored.within == NOTHING_WITHIN._replace(layer_norm=True)


# ---- who computes it, convert, revert, what is refused --------------------------------------------------------------


def test_explain_and_diagnostics() -> None:
    layer, x = make("LSTM", peephole=True), data(T, B, INPUT)
    with fused_rnn.use_backend("reference"):
        sentence = fused_rnn.explain(layer, x).options[-1]
        assert sentence == "layer_norm: the formulas normalise W_ih x, W_hh h and c of each row in each step"
        statistics = fused_rnn.diagnostics.gate_statistics(layer, lambda: layer(x), saturation=0.3)[0]
        flow = fused_rnn.diagnostics.gradient_flow(layer, lambda: layer(x)[0].square().sum())[0]
        h, c = (torch.zeros(B, 6, dtype=F64, requires_grad=True) for _ in range(2))
        hidden, o = [], []
        for t in range(T):
            i_to_o = normalised(x[t] @ layer.weight_ih_l0.T, layer.weight_norm_ih_l0) + layer.bias_ih_l0
            i_to_o = i_to_o + normalised(h @ layer.weight_hh_l0.T, layer.weight_norm_hh_l0) + layer.bias_hh_l0
            h, c = step(layer, x[t], h, c)
            o.append((i_to_o.chunk(4, dim=-1)[3] + layer.weight_peephole_l0.chunk(3)[2] * c).sigmoid())
            hidden.append(h)
        assert float(statistics.high["o"]) == pytest.approx(float((torch.stack(o) > 0.7).double().mean()))
        gradients = torch.autograd.grad(torch.stack(hidden).square().sum(), hidden)
        assert_close(
            flow.h[0, 0].double().cpu(), torch.stack([g.norm(dim=-1).mean() for g in gradients]), rtol=1e-5, atol=0
        )


@pytest.mark.kernels
def test_threads_divide_rows_alone() -> None:
    layer = make("GRU", 200, torch.float32)
    for rows in (1, 64):
        plan = fused_rnn.explain(layer, torch.randn(T, rows, INPUT)).plan
        assert plan["unit_groups"] == plan["backward"]["unit_groups"] == 1


def test_convert_and_revert_refuse_by_name() -> None:
    model = nn.Sequential(nn.GRU(INPUT, 6))
    with pytest.raises(TypeError, match="layer_norm: unexpected keyword argument of convert: no gains"):
        fused_rnn.convert(model, layer_norm=True)
    assert type(model[0]) is nn.GRU
    for name in ("GRU", "GRUCell"):
        with pytest.raises(ValueError, match=f"'0': it has layer_norm=True, which torch.nn.{name} has not"):
            fused_rnn.revert(nn.Sequential(make(name)))
    layer = make("LSTM")
    layer.layer_norm = False
    assert type(fused_rnn.revert(nn.Sequential(layer))[0]) is nn.LSTM


def test_what_does_not_fit() -> None:
    for kind in ("GRU", "GRUCell"):
        with pytest.raises(ValueError, match="layer_norm: expected False with reset_after=False"):
            getattr(fused_rnn, kind)(INPUT, 6, layer_norm=True, reset_after=False)
    with pytest.raises(TypeError, match=r"layer_norm: expected a bool, got 1 \(int\)"):
        fused_rnn.LSTM(INPUT, 6, layer_norm=1)
    x, layer, cell = data(T, B, INPUT), make("LSTM"), make("LSTMCell")
    parameters = list(layer.parameters())
    with pytest.raises(RuntimeError, match="params: expected 8 tensors .*weight_norm_ih_l0.*, got 7"):
        functional.lstm(x, None, parameters[:-1], layer_norm=True)
    with pytest.raises(RuntimeError, match=r"weight_norm_c_l0: expected \(6,\), got \(24,\)"):
        functional.lstm(x, None, [*parameters[:6], parameters[4], parameters[7]], layer_norm=True)
    given, norms = list(cell.parameters())[:4], list(cell.parameters())[4:]
    with pytest.raises(RuntimeError, match="norms: expected 4 Tensors, got 3"):
        functional.lstm_cell(x[0], None, *given, norms=norms[:3])
    with pytest.raises(TypeError, match="norms: expected a tuple of 4 Tensors or None, got a Parameter of shape"):
        functional.lstm_cell(x[0], None, *given, norms=norms[0])
    with pytest.raises(RuntimeError, match=r"norms\[1\]: expected \(24,\), got \(6,\)"):
        functional.lstm_cell(x[0], None, *given, norms=[norms[0], norms[2], norms[2], norms[3]])
    with pytest.raises(TypeError, match=r"norms\[0\]: expected a Tensor of shape \(24,\)"):
        functional.lstm_cell(x[0], None, *given, norms=[None, *norms[1:]])
    with pytest.raises(ValueError, match="layer_norm: expected False with reset_after=False"):
        functional.gru_cell(x[0], None, *list(make("GRUCell").parameters())[:4], reset_after=False, norms=norms[:2])
