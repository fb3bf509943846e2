"""`recompute=True`: the backward pass computes the gates again, and everything else is as without it."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from support.cases import CELLS, Case, run
from support.compare import assert_same, assert_within
from torch import Tensor, nn

import fused_rnn

CASES = [
    *(Case(cell=cell, num_layers=2, bidirectional=True, hx=True, steps=9) for cell in CELLS),
    *(Case(cell=cell, packing="unsorted", hidden_size=33, steps=20) for cell in CELLS),
    *(Case(cell=cell, dtype=dtype) for cell in CELLS[:2] for dtype in (torch.float64, torch.bfloat16, torch.float16)),
    Case(proj=True, batch_first=True, hidden_size=40),
    Case(cell="GRU", bias=False, batch=1, steps=30),
    Case(cell="LSTM", num_layers=3, dropout=0.5),
    # more than one chunk of 384 rows in the backward pass, and more rows than a chunk in one step
    Case(cell="LSTM", batch=40, steps=25, hidden_size=20, input_size=30),
    Case(cell="GRU", batch=400, steps=3, hidden_size=9, bidirectional=True),
]


def build(case: Case, **options: bool) -> nn.Module:
    module = case.build(fused_rnn)
    for name, value in options.items():
        setattr(module, name, value)
    return module


@pytest.mark.asan
@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers_are_those_of_saved_gates(case: Case, isa: str) -> None:
    torch.manual_seed(5)
    expected = run(build(case), case.data())
    torch.manual_seed(5)
    found = run(build(case, recompute=True), case.data())
    for name in ("output", "h_n", "c_n"):
        if name in expected:
            assert torch.equal(found[name], expected[name])
    assert_within(found, {name: tensor.double() for name, tensor in expected.items()})


@pytest.mark.kernels
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[-2]], ids=str)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_bits_are_the_same_from_run_to_run(case: Case, count: int, threads: None) -> None:
    from fused_rnn import _C

    previous = _C.set_processors(8)
    try:
        torch.set_num_threads(count)
        module = build(case, recompute=True)
        expected = run(module, case.data())
        for _ in range(3):
            assert_same(run(module, case.data()), expected)
    finally:
        _C.set_processors(previous)


def saved_bytes(call: Callable[[], Tensor]) -> int:
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        if not isinstance(tensor, nn.Parameter) and not tensor.is_leaf:
            total += tensor.numel() * tensor.element_size()
        elif tensor.grad_fn is None and not tensor.requires_grad:
            total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return total


@pytest.mark.kernels
@pytest.mark.parametrize(("cell", "saved", "recomputed"), [("LSTM", 6, 2), ("GRU", 5, 1), ("RNN_TANH", 1, 1)])
def test_only_the_states_are_kept(cell: str, saved: int, recomputed: int) -> None:
    """Numbers per unit and step: gates, c and h, or c and h."""
    case = Case(cell=cell, steps=10, batch=3, hidden_size=16)
    data = case.data()
    one = 10 * 3 * 16 * 4
    assert saved_bytes(lambda: build(case)(data.input)[0]) == saved * one
    assert saved_bytes(lambda: build(case, recompute=True)(data.input)[0]) == recomputed * one


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_second_derivatives_and_transforms(case: Case) -> None:
    case = case.replace(dtype=torch.float64)
    sequence = case.data().sequence

    def gradient(module: nn.Module) -> Tensor:
        first = torch.autograd.grad(module(sequence)[0].square().sum(), sequence, create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), sequence)[0]

    torch.testing.assert_close(gradient(build(case, recompute=True)), gradient(build(case)), rtol=1e-9, atol=1e-12)

    def loss(x: Tensor) -> Tensor:
        return build(case, recompute=True)(x)[0].square().sum()

    expected = torch.autograd.grad(loss(sequence), sequence)[0]
    torch.testing.assert_close(torch.func.grad(loss)(sequence.detach()), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_compiled() -> None:
    module, data = build(CASES[0], recompute=True), CASES[0].data()
    expected = torch.autograd.grad(module(data.sequence)[0].sum(), data.sequence)[0]
    compiled = torch.compile(lambda x: module(x)[0].sum(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(data.sequence), data.sequence)[0], expected)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_it_is_an_option_of_the_layer_and_no_part_of_its_state(name: str) -> None:
    layer = getattr(fused_rnn, name)(3, 4, recompute=True)
    plain = getattr(fused_rnn, name)(3, 4)
    assert repr(layer) == f"{name}(3, 4, recompute=True)" and repr(plain) == f"{name}(3, 4)"
    assert list(layer.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(layer.state_dict())
    assert not plain.recompute and copy.deepcopy(layer).recompute
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=False).recompute
    assert "recompute" not in vars(plain)  # as in those that an earlier version pickled
    assert not plain.recompute and plain(torch.randn(2, 1, 3))[0].shape == (2, 1, 4)


def test_what_is_no_bool_is_refused() -> None:
    with pytest.raises(TypeError, match="recompute: expected a bool, got 1"):
        fused_rnn.LSTM(3, 4, recompute=1)


def test_convert_and_revert() -> None:
    model = nn.Sequential(nn.LSTM(3, 4), nn.LSTMCell(3, 4), nn.Linear(2, 2))
    names = set(vars(model[0]))
    fused_rnn.convert(model, recompute=True)
    assert model[0].recompute and "recompute" not in vars(model[1]) and "recompute" not in vars(model[2])
    fused_rnn.revert(model)
    assert set(vars(model[0])) == names
    assert not fused_rnn.convert(model)[0].recompute


def test_the_function_takes_it_with_every_backend() -> None:
    layer, x = fused_rnn.GRU(3, 4), torch.randn(5, 2, 3)
    expected = layer(x)[0]
    for backend in ("auto", "reference"):
        with fused_rnn.use_backend(backend):
            found = fused_rnn.functional.gru(x, None, list(layer.parameters()), recompute=True)[0]
        torch.testing.assert_close(found, expected)


def test_explain_says_it() -> None:
    x = torch.randn(5, 2, 3)
    assert "gates computed again" in str(fused_rnn.explain(fused_rnn.LSTM(3, 4, recompute=True), x))
    assert "gates computed again" not in str(fused_rnn.explain(fused_rnn.LSTM(3, 4), x))
    with torch.no_grad():
        assert "gates computed again" not in str(fused_rnn.explain(fused_rnn.LSTM(3, 4, recompute=True), x))
