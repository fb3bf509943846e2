"""Quantized layers: their sums are exact, their calls are the layer's, and nothing of a model is lost."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.backends import available_isas
from support.compare import assert_same
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import fused_rnn
from fused_rnn import QuantizedCell, QuantizedLayer, Stream, StreamPool, backend, quantize

pytestmark = pytest.mark.kernels

F, H = 37, 40
FORMATS = (torch.int8, torch.bfloat16, torch.float16)

LAYERS: dict[str, Callable[[], Any]] = {
    "lstm": lambda: fused_rnn.LSTM(F, H),
    "gru": lambda: fused_rnn.GRU(F, H),
    "rnn": lambda: fused_rnn.RNN(F, H),
    "rnn relu, narrow": lambda: fused_rnn.RNN(F, 7, nonlinearity="relu"),
    "rnn, a dense number of vectors": lambda: fused_rnn.RNN(64, 64),
    "projection": lambda: fused_rnn.LSTM(F, H, proj_size=21),
    "wide projection": lambda: fused_rnn.LSTM(5, 150, proj_size=130, bias=False),
    "both directions": lambda: fused_rnn.GRU(F, H, bidirectional=True),
    "options": lambda: fused_rnn.LSTM(F, H, peephole=True, coupled_gates=True, cell_clip=0.3, zoneout=0.2),
    "activations": lambda: fused_rnn.LSTM(F, H, activation="relu", recurrent_activation="hard_sigmoid"),
    "heads": lambda: fused_rnn.GRU(F, H, num_heads=4),
    "layer_norm": lambda: fused_rnn.LSTM(F, H, layer_norm=True),
    "one bias": lambda: fused_rnn.RNN(F, H, recurrent_bias=False),
    "indrnn": lambda: fused_rnn.IndRNN(F, H, nonlinearity="tanh"),
    "torch.nn": lambda: nn.LSTM(F, H),
    "many features": lambda: fused_rnn.GRU(1030, 19),
}
STACKS: dict[str, Callable[[], Any]] = {
    "two layers": lambda: fused_rnn.LSTM(F, H, 2),
    "two layers, both directions": lambda: fused_rnn.LSTM(F, H, 2, bidirectional=True, proj_size=9, dropout=0.3),
    "batch_first": lambda: nn.GRU(F, H, 2, batch_first=True),
}
CELLS: dict[str, Callable[[], Any]] = {
    "lstm cell": lambda: fused_rnn.LSTMCell(F, H),
    "gru cell": lambda: nn.GRUCell(F, H),
    "rnn cell": lambda: fused_rnn.RNNCell(F, H, nonlinearity="relu", bias=False),
    "cell with options": lambda: fused_rnn.LSTMCell(F, H, layer_norm=True),
}


def on_grid(module: nn.Module) -> Any:
    """Weights that int8 has exactly: multiples of a power of two, the largest of each row 127 of them."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.dim() == 2 or (name.startswith("weight_hh") and isinstance(module, fused_rnn.IndRNN)):
                rows = p.view(len(p), -1)
                q = torch.randint(-127, 128, rows.shape)
                q[torch.arange(len(q)), torch.randint(rows.shape[1], (len(q),))] = 127
                rows.copy_(q * 2.0 ** torch.randint(-11, -8, (len(q), 1)))
    return module.eval()


def grid_rows(*shape: int) -> Tensor:
    """Activations that a row of 256 values has exactly, with zero one of them."""
    q = torch.randint(0, 256, shape)
    q[..., 0], q[..., -1] = 0, 255
    return (q - 100) * 2.0**-7


def with_heads(settings: fused_rnn.settings.Settings, state: Tensor) -> Tensor:
    """h of a state: each head is quantized by itself."""
    heads = 1 if settings.within is None else settings.within.num_heads
    blocks = state.unflatten(-1, (heads, -1)).clone()
    blocks[..., 0], blocks[..., -1] = -100 * 2.0**-7, 155 * 2.0**-7
    return blocks.flatten(-2)


@pytest.fixture(params=["here", "without dots", *available_isas()[1:]])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set, and that in use without the instructions that not all its processors have."""
    from fused_rnn import _C

    name, before = request.param, _C.isa_used()
    if name == "without dots":
        if not _C.multiplies_bytes():
            pytest.skip("this processor has no instructions that multiply bytes: it runs without them anyway")
        _C.allow_byte_products(False)
    elif name != "here":
        _C.set_isa(name)
    yield name
    _C.allow_byte_products(True)
    _C.set_isa(before)


@pytest.mark.asan
@pytest.mark.parametrize("rows", [1, 2, 3, 17])
@pytest.mark.parametrize("name", LAYERS)
def test_int8_sums_are_exact(name: str, rows: int, kernels: str) -> None:
    """Where rounding to 8 bits changes nothing, a step is the float layer's."""
    torch.manual_seed(rows)
    layer = on_grid(LAYERS[name]())
    small = quantize(layer)
    settings = small._settings()
    x = grid_rows(1, rows, layer.input_size)
    h = with_heads(settings, grid_rows(settings.num_directions, rows, settings.state_size))
    c = torch.randn(settings.num_directions, rows, settings.hidden_size)
    hx = (h, c) if settings.kind == 2 else h
    with torch.no_grad():
        wanted, wanted_states = layer.double()(
            x.double(), (h.double(), c.double()) if settings.kind == 2 else h.double()
        )
        found, states = small(x, hx)
    # h before a projection is not on the grid: half a unit of its row for each of its features
    limit = {"projection": 0.02, "wide projection": 0.05}.get(name, 2e-6)
    for a, b in zip((found, *flat(states)), (wanted, *flat(wanted_states)), strict=True):
        torch.testing.assert_close(a, b.float(), rtol=limit, atol=limit)
    for p in layer.parameters():
        p.data = p.data.float()


def flat(states: Any) -> tuple[Tensor, ...]:
    return states if isinstance(states, tuple) else (states,)


def simulated(small: Any, x: Tensor, steps: int) -> Tensor:
    """An LSTM's int8 arithmetic in plain PyTorch: (T, B, H)."""
    w_ih, w_hh = (getattr(small, n).double() for n in ("weight_ih_l0", "weight_hh_l0"))
    s_ih, s_hh = (getattr(small, n).double() for n in ("weight_ih_l0_scale", "weight_hh_l0_scale"))
    b = (small.bias_ih_l0 + small.bias_hh_l0).double()

    def rounded(rows: Tensor) -> Tensor:
        low, high = rows.amin(-1, True).clamp(max=0), rows.amax(-1, True).clamp(min=0)
        scale = (high - low) / 255
        scale = torch.where(scale == 0, 1.0, scale)
        zero = (-128 - low / scale).round()
        return ((rows / scale + zero).round().clamp(-128, 127) - zero) * scale

    h = c = torch.zeros(x.shape[1], small.hidden_size, dtype=torch.float64)
    output = []
    for t in range(steps):
        gates = rounded(x[t].double()) @ w_ih.T * s_ih + b + rounded(h) @ w_hh.T * s_hh
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = (o.sigmoid() * c.tanh()).float().double()
        output.append(h)
    return torch.stack(output)


def test_int8_is_what_the_documentation_says() -> None:
    """Of random numbers, where a value between two of the 256 may be rounded to the other one."""
    torch.manual_seed(0)
    layer = fused_rnn.LSTM(24, 48).eval()
    small = quantize(layer)
    x = torch.randn(50, 4, 24)
    with torch.no_grad():
        found, wanted, plain = small(x)[0], simulated(small, x, 50), layer(x)[0]
    of_simulation, of_rounding = (found - wanted).abs().max(), (wanted - plain).abs().max()
    assert of_rounding > 1e-3
    assert of_simulation < 0.2 * of_rounding
    torch.testing.assert_close(found[0], wanted[0].float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", LAYERS)
def test_16_bit_weights_are_float32_arithmetic(name: str, weights: str, kernels: str) -> None:
    torch.manual_seed(1)
    layer = LAYERS[name]().eval()
    small = quantize(layer, weights=weights)
    plain = small.dequantize()
    x = torch.randn(20, 3, layer.input_size)
    with torch.no_grad():
        found = small(x)[0]
        if small._settings().bidirectional:
            torch.testing.assert_close(found, plain(x)[0], rtol=1e-5, atol=1e-6)
        else:
            assert_same(found, Stream(plain, batch_size=3).chunk(x))
    matrix = dict(plain.named_parameters())["weight_ih_l0"]
    assert_same(matrix.detach(), dict(layer.named_parameters())["weight_ih_l0"].detach().to(small.weight_dtype).float())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", [*LAYERS, *STACKS])
def test_calls_in_every_form_agree(name: str, format: torch.dtype) -> None:
    """A row of its own length in a padded, masked or packed batch, alone, without a batch, from its state: the bits."""
    torch.manual_seed(2)
    layer = (LAYERS | STACKS)[name]().eval()
    small = quantize(layer, format)
    T, lengths = 9, [9, 4, 1, 6]
    x = torch.randn(T, 4, layer.input_size)
    settings = small._settings()
    count = settings.num_layers * settings.num_directions
    h = torch.randn(count, 4, settings.state_size)
    c = torch.randn(count, 4, settings.hidden_size)
    hx = (h, c) if settings.kind == 2 else h

    def ordered(t: Tensor) -> Tensor:
        return t.transpose(0, 1) if settings.batch_first else t

    mask = torch.arange(T).unsqueeze(1) < torch.tensor(lengths)
    noisy = x.masked_fill(~mask.unsqueeze(2), float("nan"))
    output, states = small(ordered(noisy), hx, lengths=torch.tensor(lengths))
    by_mask = small(ordered(noisy), hx, mask=ordered(mask))
    assert_same((output, *flat(states)), (by_mask[0], *flat(by_mask[1])))
    packed, packed_states = small(pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False), hx)
    padded, _ = pad_packed_sequence(packed, total_length=T)
    assert_same((padded, *flat(packed_states)), (ordered(output), *flat(states)))
    for row, length in enumerate(lengths):
        own = tuple(state[:, row] for state in flat(hx))
        alone, alone_states = small(x[:length, row], own if settings.kind == 2 else own[0])
        assert_same(alone, ordered(output)[:length, row])
        assert_same(flat(alone_states), tuple(state[:, row] for state in flat(states)))
        assert (ordered(output)[length:, row] == 0).all()


def test_a_masked_step_in_the_middle_keeps_the_state() -> None:
    small = quantize(fused_rnn.LSTM(F, H, bidirectional=True).eval())
    x = torch.randn(6, 2, F)
    mask = torch.ones(6, 2, dtype=torch.bool)
    mask[2, 0] = False
    output, (h, c) = small(x, mask=mask)
    without, (h_without, c_without) = small(torch.cat([x[:2], x[3:]])[:, :1])
    assert_same(output[[0, 1, 3, 4, 5], :1], without)
    assert_same((h[:, :1], c[:, :1]), (h_without, c_without))
    assert (output[2, 0] == 0).all()


def test_a_row_of_no_step_keeps_its_state() -> None:
    small = quantize(fused_rnn.GRU(F, H).eval())
    h = torch.full((1, 2, H), float("nan"))
    h[0, 1] = 0.5
    _, found = small(torch.randn(3, 2, F), h, lengths=torch.tensor([0, 2]))
    assert found[0, 0].isnan().all()
    assert found[0, 1].isfinite().all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["lstm", "gru", "rnn", "projection", "options", "heads", "layer_norm", "two layers"])
def test_streams_of_quantized_layers_give_their_numbers(name: str, format: torch.dtype) -> None:
    torch.manual_seed(3)
    small = quantize((LAYERS | STACKS)[name]().eval(), format)
    x = torch.randn(7, 2, F)
    wanted, wanted_state = small(x)
    stream = Stream(small, batch_size=2)
    assert_same(torch.stack([stream.step(row).clone() for row in x]), wanted)
    assert_same(flat(stream.state), flat(wanted_state))
    assert_same(Stream(small, batch_size=2).chunk(x), wanted)
    pool = StreamPool(small, 3)
    slots = [pool.open(), pool.open()]
    assert_same(torch.stack([pool.step(row, slots).clone() for row in x]), wanted)
    if format is torch.int8:
        assert stream.packed_bytes < 0.6 * Stream(small.dequantize()).packed_bytes


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("format", FORMATS)
def test_cells(name: str, format: torch.dtype) -> None:
    torch.manual_seed(4)
    cell = CELLS[name]().eval()
    small = quantize(cell, format)
    assert isinstance(small, QuantizedCell)
    x = torch.randn(3, F)
    hx = flat(cell(x))
    hx = tuple(state.detach() for state in hx)
    given = hx if len(hx) == 2 else hx[0]
    with torch.no_grad():
        wanted, found = flat(cell(x, given)), flat(small(x, given))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.05)
    apart = small(x.T.contiguous().T, tuple(s.T.contiguous().T for s in hx) if len(hx) == 2 else given.T.contiguous().T)
    assert_same(flat(apart), found)
    alone = flat(small(x[1], tuple(s[1] for s in hx) if len(hx) == 2 else hx[0][1]))
    assert_same(alone, tuple(state[1] for state in found))
    stream = Stream(small, batch_size=3)
    stream.state = given
    assert_same(stream.step(x), found[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_nan_in_its_row_alone(bad: float) -> None:
    small = quantize(fused_rnn.LSTM(F, H).eval())
    x = torch.randn(3, 4, F)
    wanted = small(x)[0]
    x[1, 2, F - 1] = bad
    found = small(x)[0]
    assert found[1:, 2].isnan().all()
    others = [0, 1, 3]
    assert_same(found[:, others], wanted[:, others])
    assert_same(found[0], wanted[0])


@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e-38, 1e30, 3e38])
def test_inputs_of_any_size(factor: float) -> None:
    """A row of zeros has no scale, and one of the largest numbers no difference that a float holds."""
    small = quantize(fused_rnn.RNN(16, 16).eval())
    x = torch.randn(1, 2, 16).clamp(-1, 1) * factor
    with torch.no_grad():
        torch.testing.assert_close(small(x)[0], small.dequantize()(x)[0], rtol=0, atol=2e-2)


def test_weights_of_zeros() -> None:
    layer = fused_rnn.GRU(3, 4).eval()
    with torch.no_grad():
        layer.weight_ih_l0.zero_()
    small = quantize(layer)
    assert (small.weight_ih_l0_scale == 0).all()
    assert small(torch.randn(2, 1, 3))[0].isfinite().all()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.alone
def test_any_number_of_threads_gives_the_same(threads: int) -> None:
    torch.manual_seed(5)
    small = quantize(fused_rnn.LSTM(64, 128, 2, bidirectional=True).eval())
    x = torch.randn(12, 7, 64)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    wanted, wanted_states = small(x)
    try:
        torch.set_num_threads(threads)
        found, states = small(x)
    finally:
        torch.set_num_threads(before)
    assert_same((found, *states), (wanted, *wanted_states))


# Weights and what happens to them.


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["projection", "one bias", "indrnn", "options", "lstm cell", "two layers"])
def test_state_dicts_and_copies(name: str, format: torch.dtype) -> None:
    torch.manual_seed(6)
    module = (LAYERS | STACKS | CELLS)[name]().eval()
    small = quantize(module, format)
    x = torch.randn(3, 2, F) if isinstance(small, QuantizedLayer) else torch.randn(2, F)

    def numbers(of: Any) -> tuple[Tensor, ...]:
        return tuple(t for part in of(x) for t in (part if isinstance(part, tuple) else (part,)))

    wanted = numbers(small)
    originals = set(dict(module.named_parameters()))
    assert {n for n in small.state_dict() if not n.endswith("_scale")} == originals
    file = io.BytesIO()
    torch.save(small.state_dict(), file)
    file.seek(0)
    other = quantize((LAYERS | STACKS | CELLS)[name]().eval(), format)
    assert not torch.equal(numbers(other)[0], wanted[0])
    other.load_state_dict(torch.load(file))
    assert_same(numbers(other), wanted)
    from_float = quantize((LAYERS | STACKS | CELLS)[name]().eval(), format)
    from_float.load_state_dict(module.state_dict())
    assert_same(numbers(from_float), wanted)
    for copied in (copy.deepcopy(small), pickle.loads(pickle.dumps(small)), small.half(), small.to(torch.float64)):
        assert_same(numbers(copied), wanted)
    back = small.dequantize()
    assert type(back).__name__ == type(module).__name__ and back.training is module.training
    again = quantize(back, format)
    for a, b in zip(again.buffers(), small.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    assert dict(back.named_parameters()).keys() == dict(module.named_parameters()).keys()


def test_a_state_dict_of_other_dtypes_is_refused() -> None:
    small, wide = (fused_rnn.LSTM(3, 4).eval() for _ in range(2))
    small = quantize(small)
    with pytest.raises(RuntimeError, match=r"weight_ih_l0: expected torch.int8, or torch.float32 without scales"):
        small.load_state_dict(wide.double().state_dict())
    with pytest.raises(RuntimeError, match="weight_hh_l0: expected torch.int8"):
        small.load_state_dict(small.state_dict() | {"weight_hh_l0": torch.zeros(16, 4)})
    with pytest.raises(RuntimeError, match="weight_hh_l0: expected int8 values from -127 to 127, got -128"):
        small.load_state_dict(small.state_dict() | {"weight_hh_l0": torch.full((16, 4), -128, dtype=torch.int8)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        small.load_state_dict(fused_rnn.LSTM(3, 5).state_dict())


def test_weights_that_change_are_seen() -> None:
    small = quantize(fused_rnn.GRU(F, H).eval())
    x = torch.randn(2, 1, F)
    first = small(x)[0]
    kept = small.weight_ih_l0.clone()
    small.weight_ih_l0.neg_()
    assert not torch.equal(small(x)[0], first)
    small.weight_ih_l0.copy_(kept)
    assert_same(small(x)[0], first)
    own_bias = small.bias_ih_l0
    small.bias_ih_l0 = own_bias + 1
    assert not torch.equal(small(x)[0], first)
    stream = Stream(small)
    before = stream.step(x[0]).clone()
    small.bias_ih_l0.copy_(own_bias)
    stream.reset()
    assert_same(stream.step(x[0]), before)
    stream.refresh()
    stream.reset()
    assert_same(stream.step(x[0]), first[0])


def test_other_weights_at_the_place_of_freed_ones_are_seen() -> None:
    layer, x = fused_rnn.LSTM(F, H).eval(), torch.randn(1, 1, F)
    for _ in range(30):
        with torch.no_grad():
            layer.weight_ih_l0.normal_()
            small = quantize(layer)
            torch.testing.assert_close(small(x)[0], small.dequantize()(x)[0], rtol=0, atol=0.05)
        del small
        gc.collect()


@pytest.fixture
def nothing_packed() -> Callable[[], int]:
    """Bytes of packed weights that are kept, of which there are none at first."""
    from fused_rnn import _C

    gc.collect()
    fused_rnn.packed_weights.clear()
    assert _C.quantized_bytes_held() == 0
    return _C.quantized_bytes_held


@pytest.mark.parametrize("format", FORMATS)
def test_packed_weights_go_with_their_module(format: torch.dtype, nothing_packed: Callable[[], int]) -> None:
    held, x = nothing_packed, torch.randn(2, 1, F)
    small = quantize(nn.Sequential(fused_rnn.LSTM(F, H, 2, bidirectional=True)).eval(), format)
    small(x)
    stored = sum(t.nbytes for t in small.buffers())
    assert held() > stored / 2
    others = copy.deepcopy(small), pickle.loads(pickle.dumps(small)), quantize(fused_rnn.LSTMCell(F, H).eval())
    of_one = held()
    for other in others:
        other(x if isinstance(other, nn.Sequential) else x[0])
    assert held() > 3 * of_one
    del other, others
    gc.collect()
    assert held() == of_one
    before = small(x)[0]
    fused_rnn.packed_weights.clear()
    assert held() == 0
    assert_same(small(x)[0], before)
    del small
    gc.collect()
    assert held() == 0


def test_packed_weights_do_not_pile_up(nothing_packed: Callable[[], int]) -> None:
    """Of tensors that change, are replaced, or die without a module."""
    held, x = nothing_packed, torch.randn(2, 1, F)
    small = quantize(fused_rnn.GRU(F, H).eval())
    small(x)
    of_one = held()
    for _ in range(3):
        small.weight_hh_l0.neg_()
        small(x)
        small.bias_hh_l0 = small.bias_hh_l0 + 1
        small(x)
        alone = [t.clone() for t in small._operator_params()]
        backend.ops.run_quantized(small._settings(), x, None, None, alone, None)
        assert held() == 2 * of_one
        del alone


@pytest.mark.parametrize("name", ["lstm", "projection", "both directions", "heads"])
def test_an_int8_weight_of_the_lowest_value_is_refused(name: str) -> None:
    small = quantize(LAYERS[name]().eval())
    x = torch.randn(2, 1, F)
    matrices = [i for i, t in enumerate(small._operator_params()) if t.dtype is torch.int8]
    assert len(matrices) == {"projection": 3, "both directions": 4}.get(name, 2)
    for i in matrices:
        params = [t.clone() for t in small._operator_params()]
        params[i].T[-1, -1] = -128
        for given in (params, [t.T.contiguous().T if t.dim() == 2 else t for t in params]):
            with pytest.raises(RuntimeError, match=rf"params\[{i}\]: expected int8 values from -127 to 127, got -128"):
                backend.ops.run_quantized(small._settings(), x, None, None, given, None)
    small(x)
    small.weight_hh_l0[0, 0] = -128
    with pytest.raises(RuntimeError, match=r"params\[1\]: expected int8 values from -127"):
        small(x)
    if name != "both directions":
        with pytest.raises(RuntimeError, match=r"params\[1\]: expected int8 values from -127"):
            Stream(small)


# Models.


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, F)
        self.lower = nn.LSTM(F, H, batch_first=True)
        self.blocks = nn.ModuleList([nn.GRU(H, H, batch_first=True), nn.GRU(H, H, batch_first=True).double()])
        self.same = self.blocks[0]
        self.linear = nn.Linear(H, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.lower(self.embedding(tokens))[0]
        return self.linear(self.same(self.blocks[0](x)[0])[0])


def test_quantize_a_model() -> None:
    model = Tagger().eval()
    small, report = quantize(model, return_report=True)
    assert type(model.lower) is nn.LSTM
    assert report.converted == {"lower": "LSTM", "blocks.0": "GRU", "same": "GRU"}
    assert list(report.left_alone) == ["blocks.1"]
    assert "torch.float64 on cpu, and only float32" in report.left_alone["blocks.1"]
    assert small.same is small.blocks[0] and isinstance(small.same, QuantizedLayer)
    assert type(small.blocks[1]) is nn.GRU
    assert small.embedding.weight is model.embedding.weight
    tokens = torch.randint(50, (3, 8))
    with torch.no_grad():
        torch.testing.assert_close(small(tokens), model(tokens), rtol=0, atol=0.05)
    assert (small.lower.input_size, small.lower.batch_first, small.same.hidden_size) == (F, True, H)
    small.lower.flatten_parameters()
    assert "Quantized" in repr(small) and "weights=int8" in repr(small)
    assert quantize(model, inplace=True) is model
    assert isinstance(model.lower, QuantizedLayer)


def test_what_is_left_alone() -> None:
    model = nn.ModuleDict(
        {
            "a_good": fused_rnn.RNN(3, 4),
            "a_half": fused_rnn.LSTM(3, 4, dtype=torch.bfloat16),
            "a_before": fused_rnn.GRU(3, 4, reset_after=False),
            "a_stateful": fused_rnn.LSTM(3, 4, stateful=True),
            "a_normed": parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0"),
            "a_hooked": nn.LSTM(3, 4),
            "a_spoiled": nn.GRU(3, 4),
            "a_meta": nn.GRU(3, 4, device="meta"),
        }
    )
    model["a_hooked"].register_forward_hook(lambda *_: None)
    nn.init.constant_(model["a_spoiled"].weight_hh_l0, float("inf"))
    small, report = quantize(model, return_report=True)
    assert report.converted == {"a_good": "RNN"}
    reasons = {
        "a_half": "torch.bfloat16 on cpu",
        "a_before": "reset_after=False",
        "a_stateful": "stateful=True",
        "a_normed": "parametrizations",
        "a_hooked": "hooks",
        "a_spoiled": "not finite",
        "a_meta": "torch.float32 on meta",
    }
    assert report.left_alone.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in report.left_alone[name]
        assert type(small[name]) is type(model[name])


def test_float16_cannot_hold_every_weight() -> None:
    layer = fused_rnn.RNN(3, 4)
    nn.init.constant_(layer.weight_ih_l0, 1e5)
    with pytest.raises(ValueError, match=r"model: expected .* got none .*not finite, or not as torch.float16"):
        quantize(layer, weights="float16")
    assert isinstance(quantize(layer, weights="bfloat16"), QuantizedLayer)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((3,), {}, TypeError, "model: expected a torch.nn.Module"),
        ((nn.Linear(2, 2),), {}, ValueError, "model: expected a recurrent layer or cell .*there is no recurrent"),
        ((nn.GRU(2, 2), torch.float32), {}, ValueError, "dtype: expected one of torch.int8, torch.bfloat16"),
        ((nn.GRU(2, 2),), {"weights": "int4"}, ValueError, "weights: expected one of 'int8', 'bfloat16', 'float16'"),
        ((nn.GRU(2, 2),), {"inplace": 1}, TypeError, "inplace: expected a bool"),
    ],
)
def test_wrong_arguments(arguments: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quantize(*arguments, **options)


def test_wrong_calls() -> None:
    small = quantize(fused_rnn.LSTM(3, 4).eval())
    x = torch.randn(2, 1, 3)
    for call, error, message in (
        (lambda: small([1]), TypeError, "input: expected a Tensor"),
        (lambda: small(x.double()), ValueError, "input: expected torch.float32 for a quantized layer"),
        (lambda: small(x.to("meta")), RuntimeError, "input: expected a tensor on the CPU"),
        (lambda: small(x[..., :2]), RuntimeError, "input"),
        (lambda: small(x, torch.zeros(1, 1, 4)), TypeError, "hx"),
        (lambda: small(x, (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))), RuntimeError, "hx"),
        (lambda: small(x, lengths=torch.tensor([3])), RuntimeError, "lengths"),
        (lambda: small(x, mask=torch.ones(2, 1)), RuntimeError, "mask"),
        (lambda: small(x.requires_grad_()), RuntimeError, "input, hx: expected tensors without a gradient"),
        (lambda: small.train()(torch.randn(2, 1, 3)), RuntimeError, "training: expected eval mode"),
        (lambda: Stream(small, dtype=torch.bfloat16), ValueError, "dtype: expected None or torch.float32"),
        (lambda: Stream(quantize(fused_rnn.GRU(3, 4, bidirectional=True))), ValueError, "bidirectional"),
        (lambda: small(pack_sequence([torch.randn(2, 3)]), lengths=torch.tensor([1])), RuntimeError, "lengths"),
    ):
        with pytest.raises(error, match=message):
            call()
    with torch.no_grad():
        assert small(torch.randn(2, 1, 3).requires_grad_())[0].shape == (2, 1, 4)


def test_empty_batches_and_autocast() -> None:
    small = quantize(fused_rnn.LSTM(3, 4).eval())
    assert small(torch.randn(2, 0, 3))[0].shape == (2, 0, 4)
    x = torch.randn(2, 1, 3)
    with torch.autocast("cpu", torch.bfloat16):
        output = small(x.bfloat16())[0]
    assert_same(output, small(x.bfloat16().float())[0])


def test_compile_in_one_graph() -> None:
    model = Tagger().eval()
    small = quantize(model)
    tokens = torch.randint(50, (3, 8))
    with torch.no_grad():
        compiled = torch.compile(small, fullgraph=True)
        torch.testing.assert_close(compiled(tokens), small(tokens))
        program = torch.export.export(small, (tokens,))
        torch.testing.assert_close(program.module()(tokens), small(tokens))
