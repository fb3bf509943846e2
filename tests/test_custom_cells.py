"""`load_cell`: a step written down once, as a header, runs as the cells that are built in do."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.backends import fused_available
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fused_rnn
from fused_rnn import compiling
from fused_rnn.custom import CustomLayer
from fused_rnn.expressions import Graph, Step, Trace, differentiate, evaluate

HEADERS = Path(__file__).parent / "cells"
F64 = torch.float64

# Loading compiles: once for all processes and runs of the suite, by content.
pytestmark = pytest.mark.compiles


EXAMPLES = Path(__file__).parent.parent / "examples" / "cells"


def cell(name: str) -> type[CustomLayer]:
    if name == "SLSTM":
        return fused_rnn.SLSTM
    header = "like_ours.h" if name in ("Lstm", "Gru", "Rnn", "LstmByHand") else "others.h"
    return fused_rnn.load_cell(HEADERS / header, name)


OTHERS = ("SLSTM", "Apart", "AllFunctions")
TWINS: dict[str, Callable[..., nn.Module]] = {
    "Lstm": fused_rnn.LSTM,
    "LstmByHand": fused_rnn.LSTM,
    "Gru": fused_rnn.GRU,
    "Rnn": lambda *args, **options: fused_rnn.RNN(*args, nonlinearity="relu", **options),
}


def flat(states: Any) -> list[Tensor]:
    return list(states) if isinstance(states, tuple) else [states]


def run(layer: nn.Module, input: Tensor, hx: Any = None, **steps: Any) -> list[Tensor]:
    """Output and final states, and the gradients of input, hx and parameters."""
    input = input.detach().clone().requires_grad_()
    leaves = [] if hx is None else [s.detach().clone().requires_grad_() for s in flat(hx)]
    hx = None if hx is None else tuple(leaves) if isinstance(hx, tuple) else leaves[0]
    output, states = layer(input, hx, **steps)
    results = [output, *flat(states)]
    generator = torch.Generator().manual_seed(3)
    loss = sum((r.double() * torch.randn(r.shape, generator=generator, dtype=F64)).sum() for r in results)
    params = list(layer.parameters())
    grads = torch.autograd.grad(loss, [input, *leaves, *params], allow_unused=True)
    return [*results, *(torch.zeros_like(p) if g is None else g for g, p in zip(grads, [input, *leaves, *params]))]


def states_of(layer: CustomLayer, batch: int, seed: int = 7) -> Any:
    generator = torch.Generator().manual_seed(seed)
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    shape = (rows, batch, layer.hidden_size)
    dtype = layer.weight_ih_l0.dtype
    states = [torch.rand(shape, generator=generator, dtype=F64).to(dtype) for _ in range(1 + layer._custom.num_states)]
    return states[0] if len(states) == 1 else tuple(states)


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-11) -> None:
    assert len(found) == len(expected)
    for f, e in zip(found, expected, strict=True):
        assert f.shape == e.shape and torch.isfinite(f).all()
        assert (f.double() - e.double()).abs().max() <= tolerance * max(1.0, float(e.detach().abs().max()))


# Every pair of a cell and a dtype is compiled, so a dtype beside float64 has the cells that kernels tell apart: of
# private states, of gates whose x and r are apart, of one gate. Written by hand, the step alone is another.
BESIDE_FLOAT64 = {torch.float32: ("Lstm", "Gru", "Rnn"), torch.bfloat16: ("Gru", "Rnn")}
TOLERANCES = {F64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype, name", [(d, n) for d in TOLERANCES for n in BESIDE_FLOAT64.get(d, TWINS)], ids=str)
def test_cells_written_anew_are_those_that_are_built_in(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = cell(name)(5, 19, num_layers=2, bidirectional=True).to(dtype)
    twin = TWINS[name](5, 19, num_layers=2, bidirectional=True).to(dtype)
    twin.load_state_dict(layer.state_dict())
    x, hx = torch.randn(7, 3, 5).to(dtype), states_of(layer, 3)
    assert_close(run(layer, x, hx), run(twin, x, hx), TOLERANCES[dtype])


@pytest.mark.kernels
@pytest.mark.parametrize("name", [*TWINS, *OTHERS])
@pytest.mark.parametrize("hidden_size, batch", [(1, 1), (16, 2), (37, 5)])
def test_kernels_are_the_formulas(name: str, hidden_size: int, batch: int) -> None:
    torch.manual_seed(1)
    layer = cell(name)(4, hidden_size, num_layers=2, bidirectional=True, dtype=F64)
    x, hx = torch.randn(6, batch, 4, dtype=F64), states_of(layer, batch)
    reset = torch.rand(6, batch) < 0.3
    reset_state = states_of(layer, batch, seed=8)
    calls: list[tuple[Any, dict[str, Any]]] = [
        (None, {}),
        (hx, {"lengths": torch.arange(batch) % 7}),
        (hx, {"mask": torch.rand(6, batch) < 0.7}),
        (hx, {"reset": reset, "reset_state": reset_state, "lengths": torch.full((batch,), 5)}),
    ]
    for states, steps in calls:
        assert fused_rnn.explain(layer, x).backend == "fused"
        found = run(layer, x, states, **steps)
        layer.recompute = True
        again = run(layer, x, states, **steps)
        layer.recompute = False
        with fused_rnn.use_backend("reference"):
            expected = run(layer, x, states, **steps)
        assert_close(found, expected)
        assert_close(again, expected)


OTHER_DTYPES = {torch.float32: (5e-6, OTHERS), torch.bfloat16: (5e-2, ("SLSTM", "AllFunctions"))}
OTHER_DTYPES[torch.float16] = 5e-3, ("Apart", "AllFunctions")


@pytest.mark.kernels
@pytest.mark.parametrize("dtype, name", [(d, n) for d, (_, names) in OTHER_DTYPES.items() for n in names], ids=str)
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    layer = cell(name)(12, 24).to(dtype)
    x, hx = torch.randn(5, 4, 12).to(dtype), states_of(layer, 4)
    found = run(layer, x, hx)
    with fused_rnn.use_backend("reference"):
        expected = run(copy.deepcopy(layer).double(), x.double(), states_of(layer.double(), 4))
    assert all(t.dtype == dtype for t in found)
    assert_close(found, expected, OTHER_DTYPES[dtype][0])


@pytest.mark.parametrize("name", OTHERS)
def test_second_derivatives(name: str) -> None:
    torch.manual_seed(3)
    layer = cell(name)(2, 3, dtype=F64)
    x, hx = torch.randn(3, 2, 2, dtype=F64, requires_grad=True), states_of(layer, 2)
    leaves = [s.requires_grad_() for s in flat(hx)]
    params = list(layer.parameters())

    def call(x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        output, final = layer(x, tuple(states) if len(states) > 1 else states[0])
        return output, *flat(final)

    assert torch.autograd.gradcheck(lambda x, *rest: call(x, *rest[: len(leaves)]), (x, *leaves, *params))
    assert torch.autograd.gradgradcheck(lambda x, *rest: call(x, *rest), (x, *leaves), atol=1e-4)
    jvp = torch.func.jvp(lambda x: call(x, *leaves)[0], (x,), (torch.ones_like(x),))[1]
    numeric = (call(x + 1e-6, *leaves)[0] - call(x - 1e-6, *leaves)[0]) / 2e-6
    torch.testing.assert_close(jvp, numeric, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["Gru", "SLSTM"])
def test_options_of_the_loops(name: str) -> None:
    torch.manual_seed(4)
    options: dict[str, Any] = {"zoneout": 0.3, "recurrent_dropout": 0.2, "input_dropout": 0.1, "num_heads": 2}
    layer = cell(name)(5, 32, num_layers=2, dtype=F64, recurrent_grad_clip=0.05, **options)
    x, hx = torch.randn(6, 3, 5, dtype=F64), states_of(layer, 3)
    torch.manual_seed(5)
    found = run(layer, x, hx)
    torch.manual_seed(5)
    with fused_rnn.use_backend("reference"):
        expected = run(layer, x, hx)
    assert_close(found, expected)
    if name == "Gru":
        twin = fused_rnn.GRU(5, 32, num_layers=2, dtype=F64, recurrent_grad_clip=0.05, **options)
        twin.load_state_dict(layer.state_dict())
        torch.manual_seed(5)
        assert_close(run(twin, x, hx), expected)
    assert "zoneout=0.3" in repr(layer) and "num_heads=2" in repr(layer)


@pytest.mark.parametrize("name", ["Gru", "Lstm", "SLSTM"])
def test_the_states_of_every_step(name: str) -> None:
    torch.manual_seed(14)
    layer = cell(name)(5, 8, num_layers=2, dtype=F64)
    x, hx = torch.randn(6, 3, 5, dtype=F64, requires_grad=True), states_of(layer, 3)

    def gradients(states: list[Tensor]) -> tuple[Tensor, ...]:
        weighted = [(s * torch.arange(s.numel(), dtype=F64).view_as(s).cos()).sum() for s in states]
        return torch.autograd.grad(torch.stack(weighted).sum(), [x, *layer.parameters()])

    output, final, states = layer(x, hx, return_states=True)
    for state, last in zip(flat(states), flat(final), strict=True):
        assert state.shape == (2, 6, 3, 8)
        torch.testing.assert_close(state[:, -1], last)
    torch.testing.assert_close(flat(states)[0][1], output)
    found = gradients(flat(states))
    parts, h = [], hx
    for step in x.unbind(0):
        h = layer(step.unsqueeze(0), h)[1]
        parts.append(flat(h))
    by_hand = [torch.stack(part, 1) for part in zip(*parts, strict=True)]
    for f, e in zip(flat(states), by_hand, strict=True):
        torch.testing.assert_close(f, e)
    for f, e in zip(found, gradients(by_hand), strict=True):
        torch.testing.assert_close(f, e)


def test_packed_batches() -> None:
    torch.manual_seed(5)
    layer = cell("SLSTM")(5, 8, bidirectional=True, dtype=F64)
    lengths = torch.tensor([3, 6, 1])
    x, hx = torch.randn(6, 3, 5, dtype=F64), states_of(layer, 3)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    output, states = layer(packed, hx)
    padded, expected = layer(x, hx, lengths=lengths)
    torch.testing.assert_close(nn.utils.rnn.pad_packed_sequence(output)[0], padded)
    for state, other in zip(states, expected, strict=True):
        torch.testing.assert_close(state, other)


def test_without_a_batch_and_batch_first() -> None:
    torch.manual_seed(6)
    layer = cell("SLSTM")(5, 8, batch_first=True, dtype=F64)
    x = torch.randn(2, 4, 5, dtype=F64)
    output, states = layer(x)
    alone, states_alone = layer(x[1])
    torch.testing.assert_close(alone, output[1])
    for state, other in zip(states_alone, states, strict=True):
        torch.testing.assert_close(state, other[:, 1])


def test_a_stateful_layer_carries_every_state() -> None:
    torch.manual_seed(7)
    layer = cell("SLSTM")(5, 8, stateful=True, dtype=F64)
    x = torch.randn(6, 3, 5, dtype=F64)
    parts = [layer(part)[0] for part in x.split(2)]
    layer.stateful = False
    torch.testing.assert_close(torch.cat(parts), layer(x)[0])


@pytest.mark.kernels
def test_any_number_of_threads(threads: None) -> None:
    torch.manual_seed(8)
    for name in ("SLSTM", "Apart"):
        layer = cell(name)(16, 128, bidirectional=True)
        x = torch.randn(12, 6, 16)
        results = []
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            results.append(run(layer, x))
        for other in results[1:]:
            assert_close(other, results[0], 1e-5)


@pytest.mark.kernels
def test_compile_in_one_graph() -> None:
    torch.manual_seed(9)
    for name in ("Apart", "SLSTM"):
        layer = cell(name)(4, 8, dtype=F64)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x = torch.randn(5, 2, 4, dtype=F64)
        assert_close(run(compiled, x), run(layer, x))


def test_vmap_and_functional_call() -> None:
    torch.manual_seed(10)
    layer = cell("Apart")(4, 8, dtype=F64)
    x = torch.randn(3, 5, 2, 4, dtype=F64)
    batched = torch.func.vmap(lambda x: layer(x)[0])(x)
    torch.testing.assert_close(batched, torch.stack([layer(one)[0] for one in x]))
    doubled = {name: 2 * p for name, p in layer.named_parameters()}
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(torch.func.functional_call(layer, doubled, (x[0],))[0], other(x[0])[0])


def test_copies_files_and_classes() -> None:
    torch.manual_seed(11)
    layer = cell("SLSTM")(4, 8, zoneout=0.1, dtype=F64).eval()
    x = torch.randn(5, 2, 4, dtype=F64)
    expected = layer(x)[0]
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        assert type(other) is type(layer) and other.zoneout == 0.1
        torch.testing.assert_close(other(x)[0], expected)
    assert cell("SLSTM") is type(layer)
    assert repr(layer) == "SLSTM(4, 8, zoneout=0.1)"
    assert [tuple(p.shape) for p in layer.parameters()] == [(32, 4), (32, 8), (32,), (32,)]


def test_a_subclass_is_copied_as_one() -> None:
    layer = OfSLSTM(4, 8)
    assert type(pickle.loads(pickle.dumps(layer))) is type(copy.deepcopy(layer)) is OfSLSTM


class OfSLSTM(fused_rnn.SLSTM):
    pass


def test_the_trace_that_comes_with_slstm_is_that_of_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_RNN_CACHE", str(tmp_path))
    headers = Path(fused_rnn.__file__).parent / "headers"
    text = (headers / "slstm.h").read_text()
    assert compiling.trace_of(text, "SLSTM", "slstm.h") == (headers / "slstm.trace").read_text()
    page = (Path(__file__).parent.parent / "docs" / "new-cell.md").read_text()
    assert f"```cpp\n{text}```" in page


def test_what_a_header_includes_is_seen(tmp_path: Path) -> None:
    for factor in (2, 3):
        (tmp_path / "factor.h").write_text(f"constexpr double factor = {factor};\n")
        text = '#include "factor.h"\n' + OF_FACTOR
        (tmp_path / "cell.h").write_text(text)
        trace = Trace(compiling.trace_of(text, "Cell", str(tmp_path / "cell.h")))
        assert any(node.arguments == (factor,) for node in trace.graph.nodes)


OF_FACTOR = """struct Cell { static constexpr int gates = 1;
  template <class V> static void forward(const V* x, const V*, V, const V*, V& h, V*) { h = factor * x[0]; } };
"""


def test_convert_and_revert_leave_it_alone() -> None:
    model = nn.Sequential(cell("Apart")(4, 8))
    fused_rnn.convert(model)
    assert type(model[0]) is cell("Apart")
    with pytest.raises(Exception, match="Apart"):
        fused_rnn.revert(model)
    assert model(torch.randn(3, 2, 4))[0].shape == (3, 2, 8)


def test_a_cell_of_constants_has_no_gradients() -> None:
    lines = compiling.trace_of((HEADERS / "others.h").read_text(), "Constant", "others.h")
    step = Step(Trace(lines))
    assert set(step.gradients.values()) == {step.graph.constant(0)}
    assert "h = splat<V>(S(0.5));" in step.cpp("Cell") and "grads[0] = splat<V>(S(0.0));" in step.cpp("Cell")


# Functions, at many values: x comes through with W_ih = 1, b = 0.

FUNCTIONS = {
    "exp": torch.exp,
    "log": torch.log,
    "softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
}


@pytest.mark.kernels
@pytest.mark.parametrize("dtype, ulp", [(torch.float32, 2**-23), (F64, 2**-52)], ids=str)
def test_accuracy_of_functions(dtype: torch.dtype, ulp: float) -> None:
    layer = cell("Functions")(1, 1, bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight_ih_l0.fill_(1)
        layer.weight_hh_l0.fill_(0)
    most, tiny = (700 if dtype == F64 else 85), torch.finfo(dtype).tiny
    x = torch.cat([torch.linspace(-most, most, 4001), torch.linspace(-2, 2, 4001), torch.randn(2000).exp()]).to(dtype)
    x = torch.cat([x, x.abs() + tiny, x[x.abs() < 80].exp(), 1 + x / 1e4])
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0], dtype=dtype)
    with torch.no_grad():
        found, (_, *states) = layer(torch.cat([x, special]).view(1, -1, 1))
    for (name, exact), values in zip(FUNCTIONS.items(), (found, *states), strict=True):
        values = values.flatten()
        torch.testing.assert_close(values[-4:], exact(special), equal_nan=True)
        expected = exact(x.double())
        counts = (expected.abs() < torch.finfo(dtype).max) & expected.isfinite()
        near_zero = 1e-3 if name == "log" else tiny  # log of a number near 1
        error = (values[:-4].double() - expected).abs() / expected.abs().clamp(min=near_zero)
        assert error[counts].max() <= 4 * ulp, name
        assert values[:-4][expected.isnan()].isnan().all()


def gru_d(layer: CustomLayer, x: Tensor, until_next: Tensor) -> tuple[Tensor, Tensor]:
    """h before and after its decay, at each step, by the paper's equations; the state starts at zero."""
    H = layer.hidden_size
    h = decayed = x.new_zeros(x.shape[1], H)
    before, after = [], []
    for t in range(x.shape[0]):
        given = torch.cat([x[t], until_next[t]], -1)
        of_x = given @ layer.weight_ih_l0.T + layer.bias_ih_l0
        of_h = decayed @ layer.weight_hh_l0.T + layer.bias_hh_l0
        r = torch.sigmoid(of_x[:, :H] + of_h[:, :H])
        z = torch.sigmoid(of_x[:, H : 2 * H] + of_h[:, H : 2 * H])
        candidate = torch.tanh(of_x[:, 2 * H : 3 * H] + r * of_h[:, 2 * H : 3 * H])
        h = (1 - z) * decayed + z * candidate
        decayed = torch.exp(-torch.clamp(of_x[:, 3 * H :], min=0)) * h
        before.append(h)
        after.append(decayed)
    return torch.stack(before), torch.stack(after)


@pytest.mark.parametrize("num_heads", [1, 4])
def test_slstm_of_the_documentation_is_the_papers(num_heads: int) -> None:
    """Beck et al. 2024, equations 8 to 14, without the stabiliser, of which h does not depend."""
    torch.manual_seed(13)
    layer = cell("SLSTM")(5, 32, num_heads=num_heads, dtype=F64)
    x = torch.randn(7, 3, 5, dtype=F64)
    h = c = n = torch.zeros(3, 32, dtype=F64)
    w_hh = torch.zeros(4, 32, 32, dtype=F64)
    size = 32 // num_heads
    for head in range(num_heads):
        rows = slice(head * size, (head + 1) * size)
        w_hh[:, rows, rows] = layer.weight_hh_l0.view(4, 32, size)[:, rows]
    w_hh = w_hh.flatten(0, 1)
    outputs = []
    for step in x:
        gates = step @ layer.weight_ih_l0.T + layer.bias_ih_l0 + h @ w_hh.T + layer.bias_hh_l0
        z, i, f, o = gates.chunk(4, -1)
        c = torch.sigmoid(f) * c + i.exp() * z.tanh()
        n = torch.sigmoid(f) * n + i.exp()
        h = torch.sigmoid(o) * c / n
        outputs.append(h)
    expected = torch.stack(outputs)
    output, (_, c_n, n_n, m_n) = layer(x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(c_n[0] * m_n[0].exp(), c)
    torch.testing.assert_close(n_n[0] * m_n[0].exp(), n)
    params = list(layer.parameters())
    found = torch.autograd.grad(output.square().sum(), params)
    for a, b in zip(found, torch.autograd.grad(expected.square().sum(), params), strict=True):
        torch.testing.assert_close(a, b)
    large = layer(1000 * x)[0]
    assert torch.isfinite(large).all()


def test_gru_d_of_the_documentation_is_the_papers() -> None:
    torch.manual_seed(12)
    layer = fused_rnn.load_cell(EXAMPLES / "gru_d.h")(6, 17, dtype=F64)
    x, until_next = torch.randn(9, 3, 4, dtype=F64, requires_grad=True), torch.rand(9, 3, 2, dtype=F64)
    output, (_, h) = layer(torch.cat([x, until_next], -1))
    before, after = gru_d(layer, x, until_next)
    torch.testing.assert_close(output, after)
    torch.testing.assert_close(h[0], before[-1])
    leaves = [x, *layer.parameters()]
    found = torch.autograd.grad(output.square().sum() + h.sum(), leaves)
    expected = torch.autograd.grad(after.square().sum() + before[-1].sum(), leaves)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)
    small = type(layer)(3, 2, dtype=F64)
    x = torch.randn(3, 2, 3, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: small(x)[0], (x, *small.parameters()))


# The graph.


def test_derivatives_of_a_graph_are_those_of_autograd() -> None:
    graph = Graph()
    a, b = graph.input("a", 0), graph.input("b", 0)
    product = graph.add("mul", graph.add("tanh", a), graph.add("exp", b))
    ratio = graph.add("div", product, graph.add("add", graph.constant(2), graph.add("sigmoid", a)))
    result = graph.add("select", graph.add("less", a, b), ratio, graph.add("softplus", graph.add("sub", b, product)))
    seed = graph.input("d", 0)
    gradients = differentiate(graph, {result: seed}, [a, b])
    values = {("a", 0): torch.randn(50, dtype=F64, requires_grad=True)}
    values["b", 0] = torch.randn(50, dtype=F64, requires_grad=True)
    values["d", 0] = torch.randn(50, dtype=F64)
    (value,) = evaluate(graph, [result], values)
    expected = torch.autograd.grad(value, [values["a", 0], values["b", 0]], values["d", 0])
    for found, e in zip(evaluate(graph, [gradients[a], gradients[b]], values), expected, strict=True):
        torch.testing.assert_close(found, e)


def test_graphs_leave_out_what_is_trivial() -> None:
    graph = Graph()
    a, one, zero = graph.input("a", 0), graph.constant(1), graph.constant(0)
    assert graph.add("mul", a, one) == graph.add("add", zero, a) == graph.add("div", a, one) == a
    assert graph.add("neg", graph.add("neg", a)) == a and graph.add("sub", zero, a) == graph.add("neg", a)
    assert graph.add("add", one, one) == graph.constant(2)
    assert graph.add("tanh", a) == graph.add("tanh", a) != graph.add("sigmoid", a)


def test_what_is_kept_is_what_built_in_cells_keep() -> None:
    kept = {name: (c._step.saved, c._step.apart, c._step.reads_h) for name in TWINS for c in [cell(name)]}
    assert kept == {
        "Lstm": (4, 0, False),
        "LstmByHand": (4, 0, False),
        "Gru": (4, 1, True),
        "Rnn": (1, 0, False),
    }


def test_a_step_that_is_traced_by_hand() -> None:
    lines = '["cell", 1, 0, 0]\n["input", "x", 0]\n["input", "r", 0]\n["input", "h", 0]\n["add", 0, 1]\n'
    lines += '["tanh", 3]\n["output", "h", 0, 4]\n'
    step = Step(Trace(lines))
    assert step.apart == 0 and "tanh<V>(r[0])" in step.cpp("Cell")


# What is wrong.

WRONG = {
    "does not compile": "struct Cell { static constexpr int gates = 1; };",
    "assigns nothing to h": """struct Cell { static constexpr int gates = 1;
        template <class V> static void forward(const V*, const V*, V, const V*, V&, V*) {} };""",
    r"assigns nothing to state\[1\]": """struct Cell { static constexpr int gates = 1; static constexpr int states = 2;
        template <class V>
        static void forward(const V* x, const V*, V, const V*, V& h, V* s) { h = s[0] = x[0]; } };""",
    "read before anything was assigned": """struct Cell { static constexpr int gates = 1;
        template <class V> static void forward(const V*, const V*, V, const V*, V& h, V*) { V a; h = a + 1; } };""",
    "a cell has 1 to 6 gates": """struct Cell { static constexpr int gates = 7;
        template <class V> static void forward(const V* x, const V*, V, const V*, V& h, V*) { h = x[0]; } };""",
    "is not finite": """struct Cell { static constexpr int gates = 1;
        template <class V>
        static void forward(const V* x, const V*, V, const V*, V& h, V*) { h = x[0] * (1 / 0.0); } };""",
}


@pytest.mark.parametrize("message", WRONG)
def test_headers_that_are_wrong(message: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.h"
    path.write_text(WRONG[message])
    with pytest.raises(RuntimeError, match=f"(?s)wrong.h.*{message}"):
        fused_rnn.load_cell(path)


def test_a_cache_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_RNN_CACHE", "/proc/none")
    with pytest.raises(RuntimeError, match="set FUSED_RNN_CACHE to a folder that can be written"):
        fused_rnn.load_cell(HEADERS / "others.h", "Constant")


def test_names_that_are_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fused_rnn.load_cell(tmp_path / "none.h")
    with pytest.raises(ValueError, match="name: expected the name of a struct in .*, which has Apart, AllFunctions"):
        fused_rnn.load_cell(HEADERS / "others.h")
    with pytest.raises(ValueError, match="name: expected one of Lstm, .*, got 'Nobody'"):
        fused_rnn.load_cell(HEADERS / "like_ours.h", "Nobody")
    (tmp_path / "empty.h").write_text("// nothing")
    with pytest.raises(ValueError, match="which has none; got None"):
        fused_rnn.load_cell(tmp_path / "empty.h")


def test_arguments_that_are_wrong() -> None:
    layer = cell("SLSTM")(4, 8)
    x, states = torch.randn(3, 2, 4), states_of(layer, 2)
    with pytest.raises(TypeError, match="hx: expected a tuple of 4 Tensors or None, got a Tensor"):
        layer(x, states[0])
    with pytest.raises(RuntimeError, match="hx: expected a tuple of 4 Tensors or None, got a tuple of 2"):
        layer(x, states[:2])
    with pytest.raises(RuntimeError, match=r"hx\[2\]: expected \(1, 2, 8\) as hx\[0\] has, got \(1, 2, 7\)"):
        layer(x, (*states[:2], states[2][..., :7], states[3]))
    with pytest.raises(TypeError, match=r"reset_state\[3\]: expected a Tensor"):
        layer(x, reset=torch.zeros(3, 2, dtype=torch.bool), reset_state=(*states[:3], None))
    with pytest.raises(RuntimeError, match="input: expected"):
        layer(torch.randn(3, 2, 5))
    with pytest.raises(ValueError, match="peephole"):
        cell("SLSTM")(4, 8, peephole=True)
    with pytest.raises(ValueError, match="activation"):
        cell("Gru")(4, 8, activation="relu")
    with pytest.raises(ValueError, match="recurrent_bias: expected True for a Apart"):
        cell("Apart")(4, 8, recurrent_bias=False)
    assert len(list(cell("SLSTM")(4, 8, recurrent_bias=False).parameters())) == 3


IN_A_NEW_PROCESS = """
import os, torch, fused_rnn


def call(name, **environment):
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        print(tuple(fused_rnn.load_cell({path!r}, name)(4, 8)(torch.randn(3, 2, 4))[0].shape))
    except RuntimeError as error:
        print("RuntimeError:", *str(error).split())
    os.environ.clear()
    os.environ.update(before)


compilers, cache = os.environ["PATH"], {cache!r}
os.environ["PATH"] = "/nowhere"
call("Gru")
call("Lstm", FUSED_RNN_CACHE=cache)
call("Lstm", FUSED_RNN_CACHE=cache, CXX="no-such-compiler")
call("Gru", FUSED_RNN_CELL_FLAGS="--no-such-flag", PATH=compilers)  # has its kernels
call("Rnn", FUSED_RNN_CELL_FLAGS="--no-such-flag", PATH=compilers)  # other flags are other kernels
"""
WITHOUT_A_COMPILER = """
import torch, fused_rnn
layer, x = fused_rnn.SLSTM(4, 8), torch.randn(3, 2, 4)
print(fused_rnn.explain(layer, x).reason)
compiled = torch.compile(layer, backend="eager", fullgraph=True)
print(tuple(layer(x)[0].shape), tuple(compiled(x)[0].shape))
layer, x = layer.double(), x.double()
print(tuple(compiled(x)[0].shape), fused_rnn.explain(layer, x).reason)
"""


def run_in_a_new_process(source: str, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {name: value for name, value in os.environ.items() if name != "CXX"} | environment
    root = Path(fused_rnn.__file__).parent.parent
    return subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, env=given, cwd=root, check=False
    )


def test_no_compiler_is_needed_where_the_cell_was_compiled_before(tmp_path: Path) -> None:
    cell("Gru")(4, 8)(torch.randn(3, 2, 4))
    source = IN_A_NEW_PROCESS.format(path=str(HEADERS / "like_ours.h"), cache=str(tmp_path / "cache"))
    result = run_in_a_new_process(source)
    assert result.returncode == 0, result.stderr
    compiled, without, wrong, again, other_flags = result.stdout.splitlines()
    assert compiled == again == "(3, 2, 8)"
    assert "expected a C++ compiler, g++, c++ or clang++" in without
    assert "the C++ compiler does not run" in wrong
    assert other_flags.startswith("RuntimeError") and "no-such-flag" in other_flags


BY_THE_OPERATOR_ALONE = """
import torch, fused_rnn
from fused_rnn import backend
layer, x = fused_rnn.load_cell({path!r}, "Gru")(4, 8), torch.randn(3, 2, 4, requires_grad=True)
backend.why_no_kernels = lambda *call: None  # as in a program that was traced elsewhere, where nobody asks
output = layer(x)[0]
with fused_rnn.use_backend("reference"):
    torch.testing.assert_close(output, layer(x)[0])
print(tuple(output.shape))
layer.half()(x.half())
"""


@pytest.mark.kernels
def test_an_operator_that_finds_no_kernels_has_them_compiled(tmp_path: Path) -> None:
    cell("Gru")(4, 8)(torch.randn(3, 2, 4))
    source = BY_THE_OPERATOR_ALONE.format(path=str(HEADERS / "like_ours.h"))
    result = run_in_a_new_process(source, PATH=str(tmp_path))
    assert result.stdout == "(3, 2, 8)\n", result.stderr
    assert result.returncode == 1 and "RuntimeError: load_cell: expected a C++ compiler" in result.stderr


WITH_THE_OTHERS = """
import logging, sys, torch, fused_rnn
logging.basicConfig(level=logging.INFO, format="%(message)s")
layer = fused_rnn.load_cell({path!r}, "Rnn")(4, 8, dtype=torch.float64)
print("loaded", flush=True)
sys.stdin.readline()
print(tuple(layer(torch.randn(3, 2, 4, dtype=torch.float64))[0].shape))
"""


@pytest.mark.kernels
def test_processes_that_want_a_dtype_at_once_compile_it_once_and_no_other(tmp_path: Path) -> None:
    source = WITH_THE_OTHERS.format(path=str(HEADERS / "like_ours.h"))
    given = os.environ | {"FUSED_RNN_CACHE": str(tmp_path)}
    command, pipe = [sys.executable, "-c", source], subprocess.PIPE
    processes = [
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=given, cwd=HEADERS.parent.parent)
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "loaded\n"
    assert [path.suffix for path in tmp_path.iterdir() if path.suffix != ".lock"] == [".trace"]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate() for process in processes]
    assert [out for out, _ in said] == ["(3, 2, 8)\n"] * 2, said
    compiled = [line for _, err in said for line in err.splitlines() if "compiling a custom cell" in line]
    assert len(compiled) == 1 and "for float64" in compiled[0]
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.suffix != ".lock") == [".so", ".trace"]


@pytest.mark.kernels
def test_slstm_from_a_file_has_its_kernels(tmp_path: Path) -> None:
    torch.save(fused_rnn.SLSTM(4, 8), tmp_path / "layer.pt")
    source = FROM_A_FILE.replace("PATH", str(tmp_path / "layer.pt"))
    result = run_in_a_new_process(source)
    assert result.stdout == "fused (3, 2, 8)\n", result.stderr


FROM_A_FILE = """
import torch, fused_rnn
layer, x = torch.load("PATH", weights_only=False), torch.randn(3, 2, 4)
print(fused_rnn.explain(layer, x).backend, tuple(layer(x)[0].shape))
"""


@pytest.mark.kernels
def test_where_the_package_is_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = cell("SLSTM")(4, 8)
    kept = compiling.compile_kernels(layer._step, layer._custom.value, isa_used(), F64)
    monkeypatch.setattr(compiling, "HEADERS", tmp_path)
    assert compiling.compile_kernels(layer._step, layer._custom.value, isa_used(), F64) == kept


def isa_used() -> str:
    from fused_rnn import backend

    assert backend.ops is not None
    return str(backend.ops.instruction_set())


@pytest.mark.kernels
def test_slstm_without_a_compiler_runs_by_the_formulas(tmp_path: Path) -> None:
    result = run_in_a_new_process(WITHOUT_A_COMPILER, PATH=str(tmp_path), FUSED_RNN_CACHE=str(tmp_path / "cache"))
    reason = "the kernels of SLSTM could not be compiled: load_cell: expected a C++ compiler"
    first, second, third = result.stdout.splitlines()
    assert first.startswith(reason) and second == "(3, 2, 8) (3, 2, 8)"
    assert third.startswith(f"(3, 2, 8) {reason}")
    assert result.stderr.count(reason) == 2  # a warning for each dtype


@pytest.mark.kernels
def test_a_library_of_something_else_is_refused(tmp_path: Path) -> None:
    from fused_rnn import backend

    assert fused_available() and backend.ops is not None
    for content in (b"nothing", b""):
        (tmp_path / "other.so").write_bytes(content)
        with pytest.raises(RuntimeError, match="path: expected a library of a custom cell"):
            backend.ops.add_custom_kernels(str(tmp_path / "other.so"))
    with pytest.raises(ValueError, match="load_cell\\(\\) the custom cell first"):
        fused_rnn.settings.kind_of(99999)
