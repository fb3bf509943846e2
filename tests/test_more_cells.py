"""Single steps of the layers that `torch.nn` lacks: `IndRNNCell`, `SLSTMCell`, and `Cell` of what `load_cell` gives."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from support.compare import assert_same, assert_within
from support.values import data
from torch import Tensor, fx, nn
from torch.testing import assert_close

import fused_rnn
from fused_rnn import functional, reference
from fused_rnn.custom import CustomCell
from fused_rnn.settings import INDRNN_STEP_OPTIONS

# Kernels of the custom cells are compiled: once for all processes and runs of the suite, by content.
pytestmark = pytest.mark.compiles

F64 = torch.float64
B, INPUT, H = 3, 4, 16
CELLS = ("IndRNN", "SLSTM", "Gru", "Lstm")  # the last two from tests/cells: of no private state, and of one


def layer_class(name: str) -> Any:
    if name in ("IndRNN", "SLSTM"):
        return getattr(fused_rnn, name)
    return fused_rnn.load_cell(Path(__file__).parent / "cells" / "like_ours.h", name)


def cell_class(name: str) -> Any:
    return fused_rnn.IndRNNCell if name == "IndRNN" else layer_class(name).Cell


def made(name: str, hidden_size: int = H, dtype: torch.dtype = F64, **keywords: Any) -> Any:
    torch.manual_seed(0)
    keywords = ({"nonlinearity": "tanh"} if name == "IndRNN" else {}) | keywords
    return cell_class(name)(INPUT, hidden_size, dtype=dtype, **keywords)


def layer_of(cell: Any, name: str, **options: Any) -> Any:
    """A layer with the cell's weights and options."""
    options |= {"nonlinearity": cell.nonlinearity} if name == "IndRNN" else {"num_heads": cell.num_heads}
    options |= {"zoneout": cell.zoneout, "recurrent_dropout": cell.recurrent_dropout, "bias": bool(cell.bias)}
    layer = layer_class(name)(cell.input_size, cell.hidden_size, dtype=cell.weight_ih.dtype, **options)
    layer.load_state_dict({f"{key}_l0": value for key, value in cell.state_dict().items()})
    return layer


def flat(states: Any) -> list[Tensor]:
    return list(states) if isinstance(states, tuple) else [states]


def num_states(name: str) -> int:
    return {"SLSTM": 4, "Lstm": 2}.get(name, 1)


def states_of(name: str, *batch: int, hidden_size: int = H, seed: int = 2, dtype: torch.dtype = F64) -> list[Tensor]:
    """sLSTM's normaliser n is positive."""
    return [data(*batch, hidden_size, seed=seed + k).abs().add(0.1).to(dtype) for k in range(num_states(name))]


def as_hx(states: list[Tensor]) -> Any:
    return states[0] if len(states) == 1 else tuple(states)


def results_of(module: Any, x: Tensor, states: list[Tensor], **steps: Any) -> list[Tensor]:
    """States after a step, and the gradients of input, states and parameters."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, *states)]
    found = flat(module(leaves[0], as_hx(leaves[1:]) if states else None, **steps))
    incoming = [data(*t.shape[-2:], seed=11 + k).to(t.dtype).view_as(t) for k, t in enumerate(found)]
    leaves += list(module.parameters())
    gradients = torch.autograd.grad(found, leaves, incoming, allow_unused=True)
    return [*found, *(torch.zeros_like(t) if g is None else g for g, t in zip(gradients, leaves, strict=True))]


class OneStep(nn.Module):
    """The layer, called as a cell is."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, hx: Any, **steps: Any) -> Any:
        def sequence(t: Tensor) -> Tensor:
            return t.unsqueeze(0)

        steps = {name: sequence(t) if isinstance(t, Tensor) else tuple(map(sequence, t)) for name, t in steps.items()}
        hx = None if hx is None else as_hx([sequence(t) for t in flat(hx)])
        return as_hx([t.squeeze(0) for t in flat(self.layer(sequence(x), hx, **steps)[1])])


def check_as_layer(cell: Any, name: str, x: Tensor, states: list[Tensor], seed: int = 5, **steps: Any) -> None:
    """States and all gradients, bit for bit."""
    layer = layer_of(cell, name).train(cell.training)
    torch.manual_seed(seed)
    found = results_of(cell, x, states, **steps)
    torch.manual_seed(seed)
    assert_same(found, results_of(OneStep(layer), x, states, **steps))


# ---- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ("IndRNN", "SLSTM", "Gru"))
def test_a_step_is_that_of_the_layer(name: str, dtype: torch.dtype, backend: str) -> None:
    cell = made(name, dtype=dtype)
    check_as_layer(cell, name, data(B, INPUT).to(dtype), states_of(name, B, dtype=dtype))


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("hidden_size", [1, 33])
def test_sizes_bias_and_no_batch(name: str, hidden_size: int, backend: str) -> None:
    cell = made(name, hidden_size, bias=False)
    check_as_layer(cell, name, data(B, INPUT), states_of(name, B, hidden_size=hidden_size))
    check_as_layer(cell, name, data(INPUT), states_of(name, hidden_size=hidden_size))
    check_as_layer(cell, name, data(1, INPUT), states_of(name, 1, hidden_size=hidden_size))
    assert all(t.shape == (0, hidden_size) for t in flat(cell(data(0, INPUT))))


@pytest.mark.parametrize("name", CELLS)
def test_without_states_it_begins_from_zeros(name: str, backend: str) -> None:
    cell, x = made(name), data(B, INPUT)
    zeros = [torch.zeros(B, H, dtype=F64)] * num_states(name)
    assert_same(cell(x), cell(x, as_hx(zeros)))
    assert_same(cell(x[0]), as_hx([t[0] for t in flat(cell(x[:1]))]))


def test_indrnn_is_the_formula_of_the_paper(backend: str) -> None:
    for nonlinearity, function in (("relu", torch.relu), ("tanh", torch.tanh), ("identity", lambda a: a)):
        cell, x, h = made("IndRNN", nonlinearity=nonlinearity), data(B, INPUT), data(B, H, seed=2)
        assert_close(cell(x, h), function(x @ cell.weight_ih.T + cell.bias_ih + cell.weight_hh * h))


def test_slstm_is_the_formula_of_the_paper(backend: str) -> None:
    """Beck et al. 2024, without the stabiliser, which changes no h."""
    cell, state = made("SLSTM"), None
    h, c, n = (torch.zeros(B, H, dtype=F64) for _ in range(3))
    for t in range(3):
        x = data(B, INPUT, seed=t)
        state = cell(x, state)
        z, i, f, o = (x @ cell.weight_ih.T + cell.bias_ih + h @ cell.weight_hh.T + cell.bias_hh).chunk(4, dim=1)
        c, n = f.sigmoid() * c + i.exp() * z.tanh(), f.sigmoid() * n + i.exp()
        h = o.sigmoid() * c / n
        assert_close(state[0], h)
        assert_close(state[1] * state[3].exp(), c)  # c and n are kept over e^m


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ("IndRNN", "SLSTM"))
def test_kernels_are_the_reference_in_float64(name: str, dtype: torch.dtype) -> None:
    cell, x, states = made(name, dtype=dtype), data(B, INPUT).to(dtype), states_of(name, B, dtype=dtype)
    found = results_of(cell, x, states)
    with fused_rnn.use_backend("reference"):
        expected = results_of(copy.deepcopy(cell).double(), x.double(), [s.double() for s in states])
    named = [{str(k): t.detach() for k, t in enumerate(tensors)} for tensors in (found, expected)]
    assert_within(*named)


# ---- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CELLS[1:])
def test_heads_are_those_of_the_layer(name: str, backend: str) -> None:
    cell = made(name, num_heads=4)
    assert cell.weight_hh.shape[1] == H // 4
    check_as_layer(cell, name, data(B, INPUT), states_of(name, B))


@pytest.mark.parametrize("options", [{"zoneout": 0.3}, {"recurrent_dropout": 0.4}], ids=str)
@pytest.mark.parametrize("name", CELLS)
def test_options_are_those_of_the_layer(name: str, options: dict[str, Any], backend: str) -> None:
    plain, cell = made(name), made(name, **options)
    x, states = data(B, INPUT), states_of(name, B)
    check_as_layer(cell, name, x, states)
    torch.manual_seed(5)
    assert not torch.equal(flat(cell(x, as_hx(states)))[0], flat(plain(x, as_hx(states)))[0])
    check_as_layer(cell.eval(), name, x, states)


@pytest.mark.parametrize("name", CELLS)
def test_rows_begin_anew(name: str, backend: str) -> None:
    cell, x, states = made(name), data(B, INPUT), states_of(name, B)
    reset = torch.tensor([True, False, True])
    anew = states_of(name, B, seed=20)
    check_as_layer(cell, name, x, states, reset=reset)
    check_as_layer(cell, name, x, states, reset=reset, reset_state=as_hx(anew))
    begun = [torch.where(reset.unsqueeze(1), b, a) for a, b in zip(states, anew, strict=True)]
    assert_same(cell(x, as_hx(states), reset=reset, reset_state=as_hx(anew)), cell(x, as_hx(begun)))
    one = cell(x[0], as_hx([s[0] for s in states]), reset=reset[0], reset_state=as_hx([s[0] for s in anew]))
    assert_close(one, as_hx([t[0] for t in flat(cell(x, as_hx(begun)))]))


@pytest.mark.parametrize("name", CELLS)
def test_autocast(name: str, backend: str) -> None:
    cell, x = made(name, dtype=torch.float32), data(B, INPUT, dtype=torch.float32)
    states = states_of(name, B, dtype=torch.float32)
    expected = flat(cell(x, as_hx(states)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = flat(cell(x, as_hx(states), reset=torch.zeros(B, dtype=torch.bool), reset_state=as_hx(states)))
    assert all(t.dtype is torch.bfloat16 for t in found)
    assert_close([t.float() for t in found], expected, rtol=0.05, atol=0.05)


# ---- derivatives, transforms, compilers -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CELLS)
def test_derivatives(name: str, backend: str) -> None:
    options = {"zoneout": 0.3, "recurrent_dropout": 0.3}
    cell, reset = made(name, 4, **options), torch.tensor([True, False])
    names = [key for key, _ in cell.named_parameters()]
    count = num_states(name)

    def call(x: Tensor, *given: Tensor) -> Any:
        torch.manual_seed(1)
        states, anew, values = given[:count], given[count : 2 * count], given[2 * count :]
        arguments = (x, as_hx(list(states)))
        steps = {"reset": reset, "reset_state": as_hx(list(anew))}
        return torch.func.functional_call(cell, dict(zip(names, values, strict=True)), arguments, steps)

    states = [*states_of(name, 2, hidden_size=4), *states_of(name, 2, hidden_size=4, seed=9)]
    leaves = [data(2, INPUT), *states, *(p.detach().clone() for p in cell.parameters())]
    for leaf in leaves:
        leaf.requires_grad_()
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("name", CELLS)
def test_vmap_and_forward_mode(name: str, backend: str) -> None:
    cell, xs = made(name), data(5, B, INPUT)
    states = states_of(name, B)
    parameters = {key: p.detach() for key, p in cell.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        found = flat(torch.func.functional_call(cell, parameters, (x, as_hx(states))))
        return torch.stack([t.pow(3).sum() for t in found]).sum()

    examples = torch.vmap(lambda x: cell(x, as_hx(states)))(xs)
    for k, x in enumerate(xs):
        assert_close([t[k] for t in flat(examples)], flat(cell(x, as_hx(states))))
    each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, xs)
    for k, x in enumerate(xs):
        assert_close({key: g[k] for key, g in each.items()}, torch.func.grad(loss)(parameters, x))
    models = {key: torch.stack([p, 0.5 * p]) for key, p in parameters.items()}
    assert_close(torch.vmap(loss, in_dims=(0, None))(models, xs[0])[0], loss(parameters, xs[0]))
    along = data(B, INPUT, seed=30)
    tangent = torch.func.jvp(lambda x: loss(parameters, x), (xs[0],), (along,))[1]
    assert_close(tangent, (torch.func.grad(lambda x: loss(parameters, x))(xs[0]) * along).sum())


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("options", [{}, {"zoneout": 0.3}], ids=str)
def test_torch_compile_has_it_in_one_graph(name: str, options: dict[str, Any], backend: str) -> None:
    torch._dynamo.reset()
    cell, x, states = made(name, **options), data(B, INPUT), states_of(name, B)
    reset = torch.tensor([True, False, False])
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    for steps in ({}, {"reset": reset}):
        torch.manual_seed(3)
        found = results_of(compiled, x, states, **steps)
        torch.manual_seed(3)
        assert_close(found, results_of(cell, x, states, **steps))


@pytest.mark.parametrize("name", ("IndRNN", "SLSTM"))
def test_torch_export(name: str) -> None:
    cell, x, states = made(name), data(B, INPUT), states_of(name, B)
    program = torch.export.export(cell, (x, as_hx(states)))
    assert_close(program.module()(x, as_hx(states)), cell(x, as_hx(states)))


# ---- as a module ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CELLS)
def test_weights_are_those_of_the_first_layer(name: str) -> None:
    layer, cell = layer_class(name)(INPUT, H, 2, dtype=F64), made(name)
    names = [key for key, _ in cell.named_parameters()]
    assert [f"{key}_l0" for key in names] == list(layer.state_dict())[: len(names)]
    cell.load_state_dict({key.removesuffix("_l0"): t for key, t in layer.state_dict().items() if key.endswith("_l0")})
    assert all(torch.equal(getattr(layer, f"{key}_l0"), p) for key, p in cell.named_parameters())


@pytest.mark.parametrize("options", [{}, {"bias": False}], ids=str)
@pytest.mark.parametrize("name", CELLS)
def test_first_values_are_the_layers_under_a_seed(name: str, options: dict[str, Any]) -> None:
    modules = []
    for kind in (cell_class(name), layer_class(name)):
        torch.manual_seed(3)
        modules.append(kind(INPUT, H, **options))
    assert_same([p.detach() for p in modules[0].parameters()], [p.detach() for p in modules[1].parameters()])
    torch.manual_seed(3)
    again = copy.deepcopy(modules[0])
    again.reset_parameters()
    assert_same(dict(again.state_dict()), dict(modules[0].state_dict()))


def test_where_the_weights_of_an_indrnn_are_drawn() -> None:
    cell = fused_rnn.IndRNNCell(INPUT, 400, recurrent_range=(0.9, 1.1))
    assert cell.weight_hh.shape == (400,) and not hasattr(cell, "bias_hh")
    assert 0.9 <= cell.weight_hh.min() < 0.92 and 1.08 < cell.weight_hh.max() <= 1.1
    assert cell.weight_ih.abs().max() <= 0.05


@pytest.mark.parametrize("name", CELLS)
def test_copies_and_files(name: str) -> None:
    cell, x = made(name, zoneout=0.25).eval(), data(B, INPUT)
    file = io.BytesIO()
    torch.save(cell, file)
    file.seek(0)
    others = [copy.deepcopy(cell), pickle.loads(pickle.dumps(cell)), torch.load(file, weights_only=False)]
    for other in others:
        assert type(other) is type(cell) and other.zoneout == 0.25 and repr(other) == repr(cell)
        assert_same(other(x), cell(x))
    assert cell_class(name) is type(cell)


def test_reprs_and_classes() -> None:
    assert repr(fused_rnn.IndRNNCell(4, 16)) == "IndRNNCell(4, 16)"
    cell = fused_rnn.IndRNNCell(4, 16, bias=False, nonlinearity="tanh", recurrent_range=(0.5, 1), zoneout=0.2)
    text = "IndRNNCell(4, 16, bias=False, nonlinearity='tanh', recurrent_range=(0.5, 1), zoneout=0.2)"
    assert repr(cell) == text
    assert repr(fused_rnn.SLSTMCell(4, 16, num_heads=4)) == "SLSTMCell(4, 16, num_heads=4)"
    assert fused_rnn.SLSTM.Cell is fused_rnn.SLSTMCell
    gru = layer_class("Gru").Cell
    assert issubclass(gru, CustomCell) and repr(gru(4, 16, bias=False)) == "GruCell(4, 16, bias=False)"
    assert str(gru.__doc__).startswith("One step of the custom cell Gru.")


class OfSLSTMCell(fused_rnn.SLSTMCell):
    pass


def test_a_subclass_is_copied_as_one() -> None:
    cell = OfSLSTMCell(4, 8)
    assert type(pickle.loads(pickle.dumps(cell))) is type(copy.deepcopy(cell)) is OfSLSTMCell


@pytest.mark.parametrize("name", CELLS)
def test_parametrized_and_replaced_weights(name: str, backend: str) -> None:
    cell, x, states = made(name), data(B, INPUT), states_of(name, B)
    expected = copy.deepcopy(cell)
    with torch.no_grad():
        expected.weight_hh.tanh_()
    nn.utils.parametrize.register_parametrization(cell, "weight_hh", nn.Tanh())
    assert_close(cell(x, as_hx(states)), expected(x, as_hx(states)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
@pytest.mark.parametrize("name", CELLS)
def test_whole_models(name: str) -> None:
    model = nn.ModuleList([made(name)])
    kind = type(model[0])
    assert type(fused_rnn.convert(model)[0]) is kind
    with pytest.raises(ValueError, match=f"'0': torch.nn has no {kind.__name__}"):
        fused_rnn.revert(model)
    with pytest.raises(RuntimeError, match=f"torch.jit.script: .*: torch.nn has no {kind.__name__}"):
        torch.jit.script(model[0])


@pytest.mark.kernels
@pytest.mark.parametrize("name", CELLS)
def test_explain(name: str) -> None:
    cell, x, states = made(name, zoneout=0.2), data(B, INPUT), states_of(name, B)
    reset = torch.tensor([True, False, False])
    found = fused_rnn.explain(cell, x, as_hx(states), reset=reset, reset_state=as_hx(states))
    assert (found.backend, found.num_steps, found.batch_size, found.reset_steps) == ("fused", 1, B, 1)
    assert found.reset_from == "reset_state" and found.options[0].startswith("zoneout=0.2: bits are drawn first")
    if name == "IndRNN":
        assert found.options[1] == "weight_hh: the kernels take its 16 weights for as many heads of one unit"
    with pytest.raises(TypeError, match="mask: expected None for a cell"):
        fused_rnn.explain(cell, x, mask=reset)


@pytest.mark.kernels
@pytest.mark.parametrize("options", [{}, {"zoneout": 0.2, "bias": False}], ids=str)
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_streams_and_quantized_cells(options: dict[str, Any], dtype: torch.dtype) -> None:
    cell, xs = made("IndRNN", 17, dtype=dtype, **options).eval(), data(14, B, INPUT).to(dtype)
    layer = layer_of(cell, "IndRNN").eval()
    with torch.no_grad():
        expected, h_n = layer(xs)
    stream = fused_rnn.Stream(cell, B)
    assert_same(torch.stack([stream.step(x).clone() for x in xs]), expected)
    assert_same(stream.state, h_n[0])
    pool = fused_rnn.StreamPool(cell, 2)
    slot = pool.open(h_n[0, :1])
    assert_close(pool.step(xs[0, :1], [slot]), cell(xs[0, :1], h_n[0, :1]))
    if dtype is torch.float32:
        quantized = fused_rnn.quantize(nn.ModuleList([cell]), dtype=torch.bfloat16)[0]
        restored = quantized.dequantize()
        assert type(restored) is fused_rnn.IndRNNCell
        with torch.no_grad():
            assert_close(quantized(xs[0], h_n[0]), restored(xs[0], h_n[0]))
        with pytest.raises(ValueError, match="it is a custom cell"):
            fused_rnn.Stream(made("SLSTM"))


# ---- functions ------------------------------------------------------------------------------------------------------


def test_functions(backend: str) -> None:
    options = {"zoneout": 0.2, "recurrent_dropout": 0.3}
    x, h, reset = data(B, INPUT), data(B, H, seed=2), torch.tensor([True, False, True])
    cell = made("IndRNN", **options)
    for training in (True, False):
        for function in (functional.indrnn_cell, reference.indrnn_cell):
            torch.manual_seed(2)
            expected = cell.train(training)(x, h, reset=reset, reset_state=h)
            torch.manual_seed(2)
            given = {"nonlinearity": "tanh", "training": training, "reset": reset, "reset_state": h}
            assert_close(function(x, h, *cell.parameters(), **given, **options), expected)
    rectified = made("IndRNN", nonlinearity="relu", bias=False)
    assert_same(functional.indrnn_cell(x, None, *rectified.parameters()), rectified(x))


@pytest.mark.parametrize(
    "options", [{}, {"zoneout": 0.2, "nonlinearity": "tanh"}, {"nonlinearity": "softsign", "bias": False}], ids=str
)
@pytest.mark.parametrize("hidden_size", [H, 1])
def test_a_mode_sees_a_call_of_the_function(options: dict[str, Any], hidden_size: int, backend: str) -> None:
    seen: list[Any] = []

    class Seen(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__module__", "") == functional.__name__:
                seen.append((func, args[2:], dict(kwargs)))
            return func(*args, **(kwargs or {}))

    cell, x = made("IndRNN", hidden_size, **{"nonlinearity": "relu"} | options), data(B, INPUT)
    torch.manual_seed(0)
    with Seen():
        result = cell(x)
    ((function, params, given),) = seen
    assert function is functional.indrnn_cell
    assert all(a is b for a, b in zip(params, cell.parameters(), strict=True))
    wanted = {name: value for name, value in options.items() if name != "bias"}
    assert {"nonlinearity": "relu"} | given == {"nonlinearity": "relu"} | wanted | (
        {"training": True} if "zoneout" in options else {}
    )
    torch.manual_seed(0)
    assert_same(result, cell(x))


def test_a_traced_cell_trains_its_own_parameters() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = made("IndRNN", zoneout=0.0)

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return self.cell(x, h)

    model, x, h = Model(), data(B, INPUT), data(B, H, seed=2)
    traced = fx.symbolic_trace(model)
    assert functional.indrnn_cell in {node.target for node in traced.graph.nodes}
    assert_same(traced(x, h), model(x, h))


# ---- bad input ------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    *(
        (
            "IndRNN",
            {name: value},
            TypeError,
            f"{name}: unexpected keyword argument of an IndRNNCell, which has {', '.join(INDRNN_STEP_OPTIONS)}",
        )
        for name, value in (("num_heads", 2), ("peephole", True), ("weight_dropout", 0.1))
    ),
    ("IndRNN", {"nonlinearity": "elu"}, ValueError, "nonlinearity: expected one of 'tanh', .* got 'elu'"),
    ("IndRNN", {"recurrent_range": 1.0}, TypeError, r"recurrent_range: expected two numbers \(low, high\), got 1.0"),
    *(
        (name, {size: 0}, ValueError, f"{size}: expected at least 1, got 0")
        for name in ("IndRNN", "SLSTM")
        for size in ("input_size", "hidden_size")
    ),
    ("IndRNN", {"hidden_size": 2.0}, TypeError, r"hidden_size: expected an int, got 2.0 \(float\)"),
    ("SLSTM", {"zoneout": 1.5}, ValueError, "zoneout: expected a number from 0 to 1, got 1.5"),
    ("SLSTM", {"layer_norm": True}, ValueError, "layer_norm: expected False for a SLSTMCell, a custom cell"),
    ("Gru", {"activation": "relu"}, ValueError, "activation: expected 'tanh' for a GruCell, a custom cell"),
    ("SLSTM", {"num_heads": 3}, ValueError, r"num_heads: expected a divisor of hidden_size \(16\), got 3"),
    ("SLSTM", {"stateful": True}, TypeError, "stateful: unexpected keyword argument of a cell, which has "),
]


@pytest.mark.parametrize(("name", "keywords", "error", "message"), REFUSED, ids=lambda v: str(v)[:50])
def test_the_constructor_refuses(name: str, keywords: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cell_class(name)(**{"input_size": INPUT, "hidden_size": H} | keywords)


def test_attributes_are_read_and_set_and_checked() -> None:
    cell = made("IndRNN")
    cell.zoneout = 0.1
    assert (cell.zoneout, cell.num_heads) == (0.1, H)
    cell.num_heads, cell.peephole = H, False  # what they are
    for name, value, message in (
        ("num_heads", 4, "num_heads: expected 16 for an IndRNN, got 4"),
        ("layer_norm", True, "layer_norm: expected False for an IndRNN, got True"),
        ("zoneout", 2.0, "zoneout: expected a number from 0 to 1, got 2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            setattr(cell, name, value)
    slstm = made("SLSTM")
    slstm.recurrent_dropout = 0.5
    with pytest.raises(ValueError, match="cell_clip: expected None for a SLSTMCell, a custom cell"):
        slstm.cell_clip = 1.0


def test_calls_refuse(backend: str) -> None:
    cell, x, h = made("IndRNN"), data(B, INPUT), data(B, H, seed=2)
    w_ih, w_hh, bias = cell.parameters()
    with pytest.raises(RuntimeError, match=r"w_hh: expected \(16,\), got \(16, 1\)"):
        functional.indrnn_cell(x, h, w_ih, w_hh.unsqueeze(1), bias)
    with pytest.raises(RuntimeError, match=r"b_ih: expected \(16,\), got \(4,\)"):
        functional.indrnn_cell(x, h, w_ih, w_hh, bias[:4])
    with pytest.raises(RuntimeError, match=r"w_ih: expected at least \(1, 1\), a unit and a feature, got \(0, 4\)"):
        functional.indrnn_cell(x, h, w_ih[:0], w_hh)
    with pytest.raises(RuntimeError, match="w_ih: expected a Tensor of 2 dimensions, got a Parameter"):
        functional.indrnn_cell(x, h, bias, w_hh)
    with pytest.raises(TypeError, match="num_heads: unexpected keyword argument of this function"):
        functional.indrnn_cell(x, h, w_ih, w_hh, num_heads=2)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="training: expected a bool"):
        functional.indrnn_cell(x, h, w_ih, w_hh, training=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="only an LSTM takes a pair"):
        cell(x, (h, h))
    with pytest.raises(RuntimeError, match=r"reset: expected \(3,\), \(B\), got \(3, 1\)"):
        cell(x, h, reset=torch.zeros(B, 1, dtype=torch.bool))
    freed = made("IndRNN")
    freed.weight_hh.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="weight_hh: expected a tensor with memory"):
        freed(x, h)
    for name in ("SLSTM", "Lstm"):
        cell, states = made(name), states_of(name, B)
        for argument, given in (("hx", {}), ("reset_state", {"reset": torch.ones(B, dtype=torch.bool)})):

            def call(value: Any, cell: Any = cell, argument: str = argument, given: Any = given) -> None:
                cell(x, **{argument: value}, **given)

            with pytest.raises(TypeError, match=f"{argument}: expected a tuple .* got a Tensor"):
                call(h)
            with pytest.raises(RuntimeError, match=f"{argument}: expected a tuple .* got a tuple of 1"):
                call((h,))
            with pytest.raises(RuntimeError, match=rf"{argument}\[1\]: expected \(3, 16\)"):
                call((states[0], states[1][:2], *states[2:]))
            with pytest.raises(TypeError, match=rf"{argument}\[1\]: expected a Tensor"):
                call((states[0], None, *states[2:]))
        with pytest.raises(RuntimeError, match=r"hx\[0\]: expected \(3, 16\), got \(2, 16\)"):
            cell(x, tuple(s[:2] for s in states))
        with pytest.raises(RuntimeError, match="input: expected input_size 4 as its last dimension"):
            cell(data(B, 5), tuple(states))
        with pytest.raises(TypeError, match="input: expected a Tensor"):
            cell(None)


def test_onnx_has_no_such_nodes() -> None:
    for name in ("IndRNN", "SLSTM"):
        with pytest.raises(Exception, match=f"as ONNX has no node of another cell, got {name}"):
            torch.onnx.export(made(name, dtype=torch.float32).eval(), (data(B, INPUT).float(),), dynamo=True)
