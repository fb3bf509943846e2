"""Options within the recurrence, against the formulas of their papers written out here step by step in float64."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.backends import available_isas
from support.compare import assert_same
from support.pairwise import Row, pairwise
from support.values import data, flat
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import fused_rnn
from fused_rnn import formulas, functional
from fused_rnn.check import instruction_set
from fused_rnn.settings import ACTIVATIONS, CELL_OPTIONS, Controls, Settings

LAYERS = ("LSTM", "GRU", "RNN")
T, B, INPUT, H = 6, 3, 4, 5


def make(name: str, *, scale: float = 2.0, **keywords: Any) -> Any:
    torch.manual_seed(0)
    layer = getattr(fused_rnn, name)(INPUT, H, dtype=torch.float64, **keywords)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(scale)  # so that gates leave the middle
    return layer


def differ(a: Tensor, b: Tensor) -> bool:
    return not torch.allclose(a, b, rtol=1e-3, atol=1e-3)


# ---- one layer, step by step --------------------------------------------------------------------------------------

Step = Callable[[Any, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]  # layer, x, h, c, t


def of_gates(layer: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    """W_ih x + b_ih + W_hh h + b_hh, gate by gate."""
    total = x @ layer.weight_ih_l0.T + layer.bias_ih_l0 + h @ layer.weight_hh_l0.T + layer.bias_hh_l0
    return total.chunk(total.shape[-1] // H, dim=-1)


def of_gru(layer: Any, x: Tensor, h: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    of_x, of_h = x @ layer.weight_ih_l0.T + layer.bias_ih_l0, h @ layer.weight_hh_l0.T + layer.bias_hh_l0
    return of_x.chunk(3, dim=-1), of_h.chunk(3, dim=-1)


def lstm(layer: Any, x: Tensor, h: Tensor, c: Tensor, t: int) -> tuple[Tensor, Tensor]:
    i, f, g, o = of_gates(layer, x, h)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru(layer: Any, x: Tensor, h: Tensor, c: Tensor, t: int) -> tuple[Tensor, Tensor]:
    (x_r, x_z, x_n), (h_r, h_z, h_n) = of_gru(layer, x, h)
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    return (1 - z) * (x_n + r * h_n).tanh() + z * h, c


def rnn(layer: Any, x: Tensor, h: Tensor, c: Tensor, t: int) -> tuple[Tensor, Tensor]:
    return of_gates(layer, x, h)[0].tanh(), c


PLAIN: dict[str, Step] = {"LSTM": lstm, "GRU": gru, "RNN": rnn}


def check_by_hand(layer: Any, step: Step, seed: int = 7) -> None:
    """Output, states and all gradients of a layer are those of the step, one after the other."""
    is_lstm = isinstance(layer, fused_rnn.LSTM)
    x, h0, c0 = (t.requires_grad_() for t in (data(T, B, INPUT), data(1, B, H, seed=2), data(1, B, H, seed=3)))
    torch.manual_seed(seed)
    output, states = layer(x, (h0, c0) if is_lstm else h0)
    h, c = h0[0], c0[0]
    outputs = []
    for t in range(T):
        h, c = step(layer, x[t], h, c, t)
        outputs.append(h)
    expected = [torch.stack(outputs), h.unsqueeze(0), c.unsqueeze(0)][: 3 if is_lstm else 2]
    actual = [output, *flat(states)]
    leaves = [x, h0, *([c0] if is_lstm else []), *layer.parameters()]
    incoming = [data(*t.shape, seed=4 + k) for k, t in enumerate(expected)]
    found, wanted = (torch.autograd.grad(results, leaves, incoming) for results in (actual, expected))
    for a, b in zip((*actual, *found), (*expected, *wanted), strict=True):
        assert_close(a, b)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "relu": lambda x: x.clamp(min=0),
    "hard_sigmoid": lambda x: (x / 6 + 0.5).clamp(0, 1),
    "softsign": lambda x: x / (1 + x.abs()),
    "identity": lambda x: x,
}
PAIRS = [(a, ACTIVATIONS[(k + 1) % 6]) for k, a in enumerate(ACTIVATIONS)] + [("tanh", "hard_sigmoid")]


SCALES = dict.fromkeys(ACTIVATIONS, 2.0) | {"relu": 0.5, "identity": 0.5}  # gates without a bound: a state may explode


@pytest.mark.parametrize(("activation", "recurrent"), PAIRS)
def test_activations_of_an_lstm(backend: str, activation: str, recurrent: str) -> None:
    f1, f2 = FUNCTIONS[activation], FUNCTIONS[recurrent]

    def step(layer: Any, x: Tensor, h: Tensor, c: Tensor, t: int) -> tuple[Tensor, Tensor]:
        i, f, g, o = of_gates(layer, x, h)
        c = f2(f) * c + f2(i) * f1(g)
        return f2(o) * f1(c), c

    check_by_hand(make("LSTM", activation=activation, recurrent_activation=recurrent, scale=SCALES[recurrent]), step)


@pytest.mark.parametrize(("activation", "recurrent"), PAIRS)
def test_activations_of_a_gru(backend: str, activation: str, recurrent: str) -> None:
    f1, f2 = FUNCTIONS[activation], FUNCTIONS[recurrent]

    def step(layer: Any, x: Tensor, h: Tensor, c: Tensor, t: int) -> tuple[Tensor, Tensor]:
        (x_r, x_z, x_n), (h_r, h_z, h_n) = of_gru(layer, x, h)
        r, z = f2(x_r + h_r), f2(x_z + h_z)
        return (1 - z) * f1(x_n + r * h_n) + z * h, c

    check_by_hand(make("GRU", activation=activation, recurrent_activation=recurrent, scale=SCALES[recurrent]), step)


@pytest.mark.parametrize("nonlinearity", ACTIVATIONS)
def test_nonlinearities_of_an_rnn(backend: str, nonlinearity: str) -> None:
    layer = make("RNN", nonlinearity=nonlinearity)
    assert (layer.nonlinearity, layer.mode) == (nonlinearity, f"RNN_{nonlinearity.upper()}")

    def step(layer: Any, x: Tensor, h: Tensor, c: Tensor, t: int) -> tuple[Tensor, Tensor]:
        return FUNCTIONS[nonlinearity](of_gates(layer, x, h)[0]), c

    check_by_hand(layer, step)


@pytest.mark.parametrize("recurrent_bias", [True, False])
def test_reset_after_false_resets_before_the_product(backend: str, recurrent_bias: bool) -> None:
    """Cho et al. 2014, equations 5 to 8."""

    def step(layer: Any, x: Tensor, h: Tensor, c: Tensor, t: int) -> tuple[Tensor, Tensor]:
        b_hh = layer.bias_hh_l0 if recurrent_bias else torch.zeros(3 * H, dtype=torch.float64)
        (w_r, w_z, w_n), (b_r, b_z, b_n) = layer.weight_hh_l0.chunk(3), b_hh.chunk(3)
        x_r, x_z, x_n = (x @ layer.weight_ih_l0.T + layer.bias_ih_l0).chunk(3, dim=-1)
        r, z = (x_r + h @ w_r.T + b_r).sigmoid(), (x_z + h @ w_z.T + b_z).sigmoid()
        return (1 - z) * (x_n + (r * h) @ w_n.T + b_n).tanh() + z * h, c

    check_by_hand(make("GRU", reset_after=False, recurrent_bias=recurrent_bias), step)


def test_peepholes(backend: str) -> None:
    """Gers and Schmidhuber 2000: i and f see the old c, o the new one."""

    def step(layer: Any, x: Tensor, h: Tensor, c: Tensor, t: int) -> tuple[Tensor, Tensor]:
        p_i, p_f, p_o = layer.weight_peephole_l0.chunk(3)
        i, f, g, o = of_gates(layer, x, h)
        new_c = (f + p_f * c).sigmoid() * c + (i + p_i * c).sigmoid() * g.tanh()
        return (o + p_o * new_c).sigmoid() * new_c.tanh(), new_c

    check_by_hand(make("LSTM", peephole=True), step)


def test_coupled_gates(backend: str) -> None:
    """Greff et al. 2015, CIFG."""

    def step(layer: Any, x: Tensor, h: Tensor, c: Tensor, t: int) -> tuple[Tensor, Tensor]:
        i, f, g, o = of_gates(layer, x, h)
        c = f.sigmoid() * c + (1 - f.sigmoid()) * g.tanh()
        return o.sigmoid() * c.tanh(), c + 0 * i

    check_by_hand(make("LSTM", coupled_gates=True), step)


def test_cell_clip(backend: str) -> None:
    """Of the new c, before peepholes and h see it."""
    clipped = []

    def step(layer: Any, x: Tensor, h: Tensor, c: Tensor, t: int) -> tuple[Tensor, Tensor]:
        p_i, p_f, p_o = layer.weight_peephole_l0.chunk(3)
        i, f, g, o = of_gates(layer, x, h)
        unclipped = (f + p_f * c).sigmoid() * c + (i + p_i * c).sigmoid() * g.tanh()
        c = unclipped.clamp(-0.3, 0.3)
        clipped.append((c != unclipped).double().mean())
        return (o + p_o * c).sigmoid() * c.tanh(), c

    check_by_hand(make("LSTM", cell_clip=0.3, peephole=True), step)
    assert 0.1 < torch.stack(clipped).mean() < 0.9


@pytest.mark.parametrize("name", LAYERS)
def test_recurrent_grad_clip_clamps_what_comes_back_through_time(backend: str, name: str) -> None:
    """Not what comes from the output or as the gradient of the final state, nor what goes to the initial state."""
    clamped = []

    def clamp(gradient: Tensor) -> Tensor:
        clamped.append((gradient.abs() > 0.5).double().mean())
        return gradient.clamp(-0.5, 0.5)

    def step(layer: Any, x: Tensor, h: Tensor, c: Tensor, t: int) -> tuple[Tensor, Tensor]:
        if t > 0:
            h = h.clone()  # as this step alone reads it
            h.register_hook(clamp)
        return PLAIN[name](layer, x, h, c, t)

    check_by_hand(make(name, recurrent_grad_clip=0.5), step)
    assert len(clamped) == T - 1 and 0.1 < torch.stack(clamped).mean() < 0.9


@pytest.mark.parametrize("name", LAYERS)
def test_recurrent_dropout_is_one_factor_a_row_and_unit_before_w_hh(backend: str, name: str) -> None:
    torch.manual_seed(7)
    factors = dropout(torch.ones(1, B, H, dtype=torch.float64), 0.4)[0]
    assert 0 < int((factors == 0).sum()) < factors.numel()

    def step(layer: Any, x: Tensor, h: Tensor, c: Tensor, t: int) -> tuple[Tensor, Tensor]:
        if name == "GRU":  # of z h_{t-1} all units are there
            (x_r, x_z, x_n), (h_r, h_z, h_n) = of_gru(layer, x, h * factors)
            r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
            return (1 - z) * (x_n + r * h_n).tanh() + z * h, c
        return PLAIN[name](layer, x, h * factors, c, t)

    layer = make(name, recurrent_dropout=0.4)
    check_by_hand(layer, step)
    check_by_hand(layer.eval(), PLAIN[name])


def bits_of(seed: int, rate: float, *sizes: int) -> list[Tensor]:
    """What units of T * B rows keep, as a call draws it: whole bytes of units."""
    torch.manual_seed(seed)
    drawn = [functional._draw_bits(torch.zeros(1), (1, T * B), size, rate) for size in sizes]
    return [formulas.unpack_bits(t[0], size).view(T, B, size) for t, size in zip(drawn, sizes, strict=True)]


@pytest.mark.parametrize("name", LAYERS)
def test_zoneout_keeps_h(backend: str, name: str) -> None:
    """Krueger et al. 2017."""
    (keeps,) = bits_of(7, 0.4, H)
    assert 0.2 < keeps.double().mean() < 0.6

    def training(layer: Any, x: Tensor, h: Tensor, c: Tensor, t: int) -> tuple[Tensor, Tensor]:
        new_h, c = PLAIN[name](layer, x, h, c, t)
        return torch.where(keeps[t], h, new_h), c

    def in_eval(layer: Any, x: Tensor, h: Tensor, c: Tensor, t: int) -> tuple[Tensor, Tensor]:
        new_h, c = PLAIN[name](layer, x, h, c, t)
        return 0.4 * h + 0.6 * new_h, c

    layer = make(name, zoneout=0.4)
    check_by_hand(layer, training)
    check_by_hand(layer.eval(), in_eval)


def test_zoneout_keeps_c_and_makes_h_of_the_new_one(backend: str) -> None:
    """Krueger et al. 2017, of an LSTM: the tanh is of f c + i g, whatever is kept."""
    keeps_h, keeps_c = bits_of(7, 0.4, H, H)

    def training(layer: Any, x: Tensor, h: Tensor, c: Tensor, t: int) -> tuple[Tensor, Tensor]:
        new_h, new_c = lstm(layer, x, h, c, t)
        return torch.where(keeps_h[t], h, new_h), torch.where(keeps_c[t], c, new_c)

    def in_eval(layer: Any, x: Tensor, h: Tensor, c: Tensor, t: int) -> tuple[Tensor, Tensor]:
        new_h, new_c = lstm(layer, x, h, c, t)
        return 0.4 * h + 0.6 * new_h, 0.4 * c + 0.6 * new_c

    layer = make("LSTM", zoneout=0.4, zoneout_cell=0.4)
    check_by_hand(layer, training)
    check_by_hand(layer.eval(), in_eval)


@pytest.mark.parametrize("name", LAYERS)
def test_rates_of_1_and_of_0(backend: str, name: str) -> None:
    x, h = data(T, B, INPUT), data(1, B, H, seed=2)
    hx = (h, data(1, B, H, seed=3)) if name == "LSTM" else h
    layer = make(name, zoneout=1.0)
    for _ in range(2):
        assert_same(layer(x, hx)[0], h.expand(T, B, H))
        layer.eval()
    layer = make(name, recurrent_dropout=1.0)
    output = layer(x)[0]
    with torch.no_grad():
        layer.weight_hh_l0.zero_()
    layer.recurrent_dropout = 0.0
    assert layer._within is None
    assert_close(output, layer(x)[0])


# ---- shapes of a call ---------------------------------------------------------------------------------------------

# Each by itself, of a layer that has it: what changes the numbers, or the gradients, without a draw.
ALONE: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {"activation": "softsign"}),
    ("LSTM", {"recurrent_activation": "hard_sigmoid"}),
    ("LSTM", {"peephole": True, "recurrent_bias": False}),
    ("LSTM", {"coupled_gates": True}),
    ("LSTM", {"cell_clip": 0.4}),
    ("GRU", {"num_heads": 5}),
    ("GRU", {"activation": "relu"}),
    ("GRU", {"recurrent_activation": "softsign"}),
    ("GRU", {"reset_after": False}),
    ("RNN", {"nonlinearity": "hard_sigmoid"}),
    ("RNN", {"nonlinearity": "identity"}),
    *((name, {"recurrent_grad_clip": 0.2}) for name in LAYERS),
]
DRAWN: list[tuple[str, dict[str, Any]]] = [
    *((name, {"zoneout": 0.3}) for name in LAYERS),
    ("LSTM", {"zoneout_cell": 0.3}),
    *((name, {"recurrent_dropout": 0.3}) for name in LAYERS),
]


@pytest.mark.parametrize(("name", "options"), ALONE, ids=str)
def test_a_stack_is_its_layers_and_a_reverse_one_a_flipped_sequence(
    backend: str, name: str, options: dict[str, Any]
) -> None:
    proj = {"proj_size": 3} if name == "LSTM" else {}
    layer = make(name, num_layers=2, bidirectional=True, **proj, **options)
    x = data(T, B, INPUT)
    output, states = layer(x)
    below, ends = x, []
    for k in range(2):
        sides = []
        for suffix in ("", "_reverse"):
            names = [n for n in layer._flat_weights_names if n.endswith(f"_l{k}{suffix}")]
            torch.manual_seed(0)
            one = getattr(fused_rnn, name)(below.shape[-1], H, dtype=torch.float64, **proj, **options)
            one.load_state_dict({n.removesuffix(f"_l{k}{suffix}") + "_l0": getattr(layer, n) for n in names})
            part, last = one(below.flip(0) if suffix else below)
            sides.append(part.flip(0) if suffix else part)
            ends.append(flat(last))
        below = torch.cat(sides, dim=-1)
    assert_close(output, below)
    for state, parts in zip(flat(states), zip(*ends, strict=True), strict=True):
        assert_close(state, torch.cat(parts))


@pytest.mark.parametrize("layout", ["lengths", "mask", "packed", "batch first"])
@pytest.mark.parametrize(("name", "options"), ALONE, ids=str)
def test_rows_of_other_lengths_are_rows_by_themselves(
    backend: str, name: str, options: dict[str, Any], layout: str
) -> None:
    layer = make(name, num_layers=2, bidirectional=True, batch_first=layout == "batch first", **options)
    x, lengths = data(T, B, INPUT), torch.tensor([T, 2, 4])
    if layout == "packed":
        packed, states = layer(pack_padded_sequence(x, lengths, enforce_sorted=False))
        output = pad_packed_sequence(packed)[0]
    elif layout == "batch first":
        output, states = layer(x.transpose(0, 1), lengths=lengths)
        output = output.transpose(0, 1)
    else:
        steps = {"lengths": lengths} if layout == "lengths" else {"mask": torch.arange(T).unsqueeze(1) < lengths}
        spoiled = torch.where(torch.arange(T).view(T, 1, 1) < lengths.view(1, B, 1), x, torch.nan)
        output, states = layer(spoiled, **steps)
    found = torch.autograd.grad(output.square().sum(), list(layer.parameters()))
    wanted = [torch.zeros_like(p) for p in layer.parameters()]
    for row, length in enumerate(lengths.tolist()):
        alone, last = layer(x[:length, row].unsqueeze(0 if layer.batch_first else 1))
        alone = alone.squeeze(0 if layer.batch_first else 1)
        assert_close(output[:length, row], alone)
        assert not output[length:, row].any()
        for a, b in zip(flat(states), flat(last), strict=True):
            assert_close(a[:, row : row + 1], b)
        gradients = torch.autograd.grad(alone.square().sum(), list(layer.parameters()))
        wanted = [total + gradient for total, gradient in zip(wanted, gradients, strict=True)]
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize(("name", "options"), ALONE + DRAWN, ids=str)
def test_an_empty_batch_and_no_batch(backend: str, name: str, options: dict[str, Any]) -> None:
    layer, x = make(name, num_layers=2, **options), data(T, 1, INPUT)
    assert layer(x[:, :0])[0].shape == (T, 0, H)
    results = []
    for unbatched in (False, True):
        torch.manual_seed(1)
        output, states = layer(x[:, 0] if unbatched else x)
        results.append([t if unbatched else t.squeeze(1) for t in (output, *flat(states))])
    for a, b in zip(*results, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("layout", ["lengths", "packed"])
@pytest.mark.parametrize("name", LAYERS)
def test_draws_of_rows_of_other_lengths(backend: str, name: str, layout: str) -> None:
    """Bits are of the steps of a packed batch in its order, else of all steps; factors of its sorted rows."""
    layer = make(name, zoneout=0.5, recurrent_dropout=0.4)
    x, lengths = data(T, B, INPUT), torch.tensor([T, 4, 2])
    seed = 11
    torch.manual_seed(seed)
    if layout == "packed":
        packed, _ = layer(pack_padded_sequence(x, lengths))
        output, sizes = pad_packed_sequence(packed)[0], packed.batch_sizes.tolist()
    else:
        output, _ = layer(x, lengths=lengths)
        sizes = [B] * T
    torch.manual_seed(seed)
    factors = dropout(torch.ones(1, B, H, dtype=torch.float64), 0.4)[0]
    keeps = formulas.unpack_bits(functional._draw_bits(x, (1, sum(sizes)), H, 0.5)[0], H).split(sizes)
    h, c = torch.zeros(B, H, dtype=torch.float64), torch.zeros(B, H, dtype=torch.float64)
    for t in range(T):
        n = int((lengths > t).sum())
        if name == "GRU":
            (x_r, x_z, x_n), (h_r, h_z, h_n) = of_gru(layer, x[t, :n], h[:n] * factors[:n])
            z = (x_z + h_z).sigmoid()
            new_h = (1 - z) * (x_n + (x_r + h_r).sigmoid() * h_n).tanh() + z * h[:n]
            new_c = c[:n]
        else:
            new_h, new_c = PLAIN[name](layer, x[t, :n], h[:n] * factors[:n], c[:n], t)
        h = torch.cat([torch.where(keeps[t][:n], h[:n], new_h), h[n:]])
        c = torch.cat([new_c, c[n:]])
        assert_close(output[t, :n], h[:n])


# ---- derivatives --------------------------------------------------------------------------------------------------

FACTORS = {
    "name": ("LSTM", "GRU", "RNN", "LSTM "),  # the LSTM has most options
    "activation": ACTIVATIONS,
    "recurrent_activation": ACTIVATIONS,
    "reset_after": (True, False),
    "peephole": (False, True),
    "coupled_gates": (False, True),
    "num_heads": (1, 2),
    "cell_clip": (None, 0.4),
    "zoneout": (0.0, 0.3),
    "zoneout_cell": (0.0, 0.3),
    "recurrent_dropout": (0.0, 0.3),
    "recompute": (False, True),
    "training": (True, False),
    "bidirectional": (False, True),
    "proj_size": (0, 1),
    "layout": ("time first", "batch first", "mask", "packed", "reset"),
}
NOT_FOR = {
    "LSTM": {"reset_after"},
    "GRU": {"peephole", "coupled_gates", "cell_clip", "zoneout_cell", "proj_size"},
    "RNN": {"peephole", "coupled_gates", "cell_clip", "zoneout_cell", "proj_size", "reset_after"},
}
NOT_FOR["RNN"].add("recurrent_activation")


def without_what_does_not_fit(row: Row) -> Row:
    name = row["name"].strip()
    unfit = NOT_FOR[name] | ({"proj_size"} if row["num_heads"] > 1 else set())
    return {key: FACTORS[key][0] if key in unfit else value for key, value in (row | {"name": name}).items()}


def distinct(rows: list[Row]) -> list[Row]:
    return list({str(row): row for row in map(without_what_does_not_fit, rows)}.values())


ROWS = distinct(pairwise(FACTORS, candidates=20))[:40]
FIRST = {key: levels[0] for key, levels in FACTORS.items()}
ROWS_ALONE = distinct(
    [
        FIRST | {"name": name, key: level}
        for name in LAYERS
        for key in ("activation", "recurrent_activation", "reset_after", "peephole", "coupled_gates", "num_heads")
        + ("cell_clip", "zoneout", "zoneout_cell", "recurrent_dropout")
        for level in FACTORS[key][1:]
    ]
)


def build(row: Row) -> tuple[Any, Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """The layer of a row, and a call as a function of input, states and parameters, with the same draws each time."""
    keywords = dict(row)
    name, layout, training = (keywords.pop(key) for key in ("name", "layout", "training"))
    for key in NOT_FOR[name] - {"proj_size"}:
        keywords.pop(key)
    if name == "RNN":
        keywords["nonlinearity"] = keywords.pop("activation")
    torch.manual_seed(3)
    layer = getattr(fused_rnn, name)(3, 2, 1, batch_first=layout == "batch first", dtype=torch.float64, **keywords)
    layer.train(training)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    steps: dict[str, Tensor] = {}
    if layout == "mask":
        steps = {"mask": torch.tensor([[True, True], [False, True], [True, False]])}
    if layout == "reset":
        steps = {"reset": torch.tensor([[False, False], [False, True], [True, False]])}

    def call(x: Tensor, h: Tensor, c: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        given = dict(zip(names, values, strict=True))
        argument: Any = pack_padded_sequence(x, [3, 2]) if layout == "packed" else x
        hx = (h, c) if name == "LSTM" else h
        output, states = torch.func.functional_call(layer, given, (argument, hx), steps)
        return getattr(output, "data", output) if layout == "packed" else output, *flat(states)

    size = row["proj_size"] or 2
    states = [data(2 if row["bidirectional"] else 1, 2, n, seed=5 + n) for n in (size, 2)]
    x = data(*((2, 3) if layout == "batch first" else (3, 2)), 3)
    arguments = [x, *states, *(p.detach().clone() for p in parameters)]
    if name != "LSTM":
        arguments[2] = torch.zeros(1, dtype=torch.float64)
        return layer, call, [t.requires_grad_(k != 2) for k, t in enumerate(arguments)]
    return layer, call, [t.requires_grad_() for t in arguments]


def name_of(row: Row) -> str:
    return " ".join(f"{key}={value}" for key, value in row.items() if value != FIRST[key] or key == "name")


@pytest.mark.parametrize(
    ("backend", "row"),
    [(name, row) for name in ("reference", "fused") for row in (ROWS if name == "fused" else []) + ROWS_ALONE],
    ids=lambda value: value if isinstance(value, str) else name_of(value),
    indirect=["backend"],
)
def test_derivatives(backend: str, row: Row) -> None:
    _, call, arguments = build(row)
    assert torch.autograd.gradcheck(call, arguments, fast_mode=True)
    if backend == "reference" or row in ROWS:
        assert torch.autograd.gradgradcheck(call, arguments, fast_mode=True)


@pytest.mark.parametrize("option", ["recurrent_grad_clip", "bptt_steps"])
@pytest.mark.parametrize("name", LAYERS)
def test_second_derivatives_of_gradients_that_are_cut(backend: str, name: str, option: str) -> None:
    """What stops or clamps a gradient does so again with the gradient of the gradient."""
    layer = make(name, **{option: {"recurrent_grad_clip": 0.5, "bptt_steps": 2}[option]})
    x = data(T, B, INPUT).requires_grad_()
    output = layer(x)[0]
    h, c = torch.zeros(B, H, dtype=torch.float64), torch.zeros(B, H, dtype=torch.float64)
    outputs = []
    for t in range(T):
        if option == "bptt_steps" and t % 2 == 0:
            h, c = h.detach(), c.detach()
        if option == "recurrent_grad_clip" and t > 0:
            h = h.clone()
            h.register_hook(lambda gradient: gradient.clamp(-0.5, 0.5))
        h, c = PLAIN[name](layer, x[t], h, c, t)
        outputs.append(h)
    leaves = [x, *layer.parameters()]
    results = []
    for result in (output, torch.stack(outputs)):
        first = torch.autograd.grad(result, leaves, data(T, B, H, seed=6), create_graph=True)
        results.append(torch.autograd.grad([g.square().sum() for g in first], leaves))
    for a, b in zip(*results, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("row", [row | {"recompute": False} for row in ROWS], ids=name_of)
def test_fused_kernels_are_the_formulas_with_gates_kept_or_computed_again(row: Row, clip: float | None) -> None:
    results = []
    for name, recompute in (("reference", False), ("auto", False), ("auto", True)):
        with fused_rnn.use_backend(name):
            _, call, arguments = build(row | {"recompute": recompute, "recurrent_grad_clip": clip})
            outputs = call(*arguments)
            leaves = [t for t in arguments if t.requires_grad]
            found = torch.autograd.grad(outputs, leaves, [data(*t.shape, seed=9) for t in outputs])
            results.append((*outputs, *found))
    for others in results[1:]:
        for a, b in zip(others, results[0], strict=True):
            assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_other_dtypes_and_autocast(backend: str, name: str, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"zoneout": 0.3, "recurrent_dropout": 0.3, "recurrent_grad_clip": 1.0}
    options |= {"LSTM": {"peephole": True, "zoneout_cell": 0.2}, "GRU": {}, "RNN": {"nonlinearity": "softsign"}}[name]
    layer, x = make(name, num_layers=2, **options), data(T, B, INPUT)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.1, "atol": 0.1}
    results = []
    for cast in (torch.float64, dtype):
        torch.manual_seed(2)
        low = copy.deepcopy(layer).to(cast)
        output, _ = low.eval()(x.to(cast))
        results.append(output.double())
    assert_close(results[1], results[0], **tolerance)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = layer.float().train()(x.float())
    output.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


# ---- what is drawn ------------------------------------------------------------------------------------------------


def test_bits_of_a_byte_are_in_the_order_of_units_where_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional.backend, "ops", None)
    for size in (1, 7, 8, 9, 20):
        torch.manual_seed(4)
        bits = functional._draw_bits(torch.zeros(1), (2, 5), size, 0.5)
        torch.manual_seed(4)
        drawn = torch.empty(2, 5, 8 * -(-size // 8), dtype=torch.bool).bernoulli_(0.5)
        assert bits.dtype is torch.uint8 and bits.shape == (2, 5, -(-size // 8))
        for unit in range(drawn.shape[-1]):
            assert torch.equal(bits[..., unit // 8] >> unit % 8 & 1, drawn[..., unit].to(torch.uint8))


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.9, 1.0])
def test_so_many_bits_are_drawn_and_none_depends_on_its_neighbours(rate: float) -> None:
    torch.manual_seed(0)
    drawn = formulas.unpack_bits(functional._draw_bits(torch.zeros(1), (4, 500), 64, rate), 64).double()
    if rate in (0, 1):
        assert (drawn == rate).all()
        return
    variance = rate * (1 - rate)
    assert abs(drawn.mean() - rate) < 4 * (variance / drawn.numel()) ** 0.5
    for a, b in ((drawn[1:], drawn[:-1]), (drawn[:, 1:], drawn[:, :-1]), (drawn[..., 1:], drawn[..., :-1])):
        correlation = ((a - rate) * (b - rate)).mean() / variance
        assert abs(correlation) < 4 / a.numel() ** 0.5
    # Sums over what is in one row, and in one unit of all rows, scatter as those of independent draws do.
    for dims in ((0, 1), (2,)):
        sums = drawn.sum(dims)
        count = drawn.numel() / sums.numel()
        assert 0.7 < sums.var() / (count * variance) < 1.4


@pytest.mark.kernels
def test_bits_are_the_same_on_every_instruction_set_and_number_of_threads() -> None:
    seed, found, before = torch.tensor([-5]), [], torch.get_num_threads()
    try:
        for isa in available_isas():
            for threads in (1, 2):
                torch.set_num_threads(threads)
                with instruction_set(isa):
                    draw = torch.ops.fused_rnn.draw_bits
                    found.append([draw(seed, 3, 400, units, 0.3) for units in (1, 3, 8, 17, 64, 77)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    assert not torch.equal(found[0][4], torch.ops.fused_rnn.draw_bits(torch.tensor([-6]), 3, 400, 64, 0.3))
    last = found[0][1]  # behind the third unit there is nothing
    assert last.shape == (3, 400, 1) and int(last.max()) == 7


def test_draws_that_cannot_be_are_refused() -> None:
    draw, seed = torch.ops.fused_rnn.draw_bits, torch.tensor([1])
    for rate in (-0.1, 1.1, float("nan")):
        with pytest.raises(RuntimeError, match="rate: expected 0 to 1"):
            draw(seed, 1, 1, 1, rate)
    with pytest.raises(RuntimeError, match="seed: expected one int64"):
        draw(torch.ones(1), 1, 1, 1, 0.5)
    with pytest.raises(RuntimeError, match="sizes that are not negative"):
        draw(seed, 1, -1, 1, 0.5)


@pytest.mark.parametrize(("name", "options"), DRAWN, ids=str)
def test_the_seed_gives_the_numbers_whatever_the_threads(backend: str, name: str, options: dict[str, Any]) -> None:
    if backend == "reference":
        sizes = (3, 4)
    else:
        sizes = (30, 16)  # enough work for two threads
    layer = getattr(fused_rnn, name)(8, 40, num_layers=2, bidirectional=True, **options)
    x = torch.randn(*sizes, 8)
    outputs = []
    threads = torch.get_num_threads()
    try:
        for seed, count in ((0, 1), (0, 1), (0, 2), (1, 1)):
            torch.set_num_threads(count)
            torch.manual_seed(seed)
            outputs.append(layer(x)[0].detach())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outputs[0], outputs[1])
    assert_close(outputs[0], outputs[2])
    assert differ(outputs[0], outputs[3]) and differ(layer(x)[0], layer(x)[0])
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


@pytest.mark.parametrize(("name", "options"), DRAWN, ids=str)
def test_nothing_is_drawn_in_eval_mode(backend: str, name: str, options: dict[str, Any]) -> None:
    layer, x = make(name, **options).eval(), data(T, B, INPUT)
    before = torch.get_rng_state()
    layer(x)
    assert torch.equal(before, torch.get_rng_state())
    layer.train()
    layer(x)
    assert not torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("name", "options"), DRAWN, ids=str)
def test_checkpoint_draws_the_same_again(backend: str, name: str, options: dict[str, Any]) -> None:
    layer, x = make(name, num_layers=2, **options), data(T, B, INPUT)
    results = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(5)
        output, _ = run(x)
        results.append((output, *torch.autograd.grad(output.square().sum(), list(layer.parameters()))))
    for a, b in zip(*results, strict=True):
        assert_same(a, b)


def test_recurrent_dropout_is_the_same_in_all_slices_of_bptt_steps(backend: str) -> None:
    layer, plain = (make("GRU", recurrent_dropout=0.5, bptt_steps=k) for k in (2, None))
    x, lengths = data(T, B, INPUT), torch.tensor([T, 4, 3])
    outputs = []
    for module in (layer, plain):
        torch.manual_seed(5)
        outputs.append(module(x, lengths=lengths)[0])
    assert_close(outputs[0], outputs[1])


COMPILED: list[tuple[str, dict[str, Any]]] = [
    ("GRU", {"activation": "relu", "bptt_steps": 1, "recurrent_grad_clip": 0.5}),
    ("LSTM", {"zoneout": 0.3, "zoneout_cell": 0.3, "recurrent_dropout": 0.3, "peephole": True, "cell_clip": 1.0}),
    ("GRU", {"reset_after": False}),
    ("RNN", {"nonlinearity": "softsign", "zoneout": 0.3}),
    ("LSTMCell", {"zoneout": 0.3, "peephole": True}),
    ("RNNCell", {"nonlinearity": "sigmoid"}),
]


@pytest.mark.parametrize(
    ("backend", "name", "options"),
    [("reference", *COMPILED[0]), *(("fused", *given) for given in COMPILED)],
    ids=str,
    indirect=["backend"],
)
def test_torch_compile_has_the_options_in_one_graph(backend: str, name: str, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    layer = make(name, **options)
    x = data(B, INPUT) if name.endswith("Cell") else data(2, B, INPUT)
    other = copy.deepcopy(layer)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        results = []
        for module, run in ((layer, layer), (other, compiled)):
            module.train(training)
            torch.manual_seed(4)
            result = run(x)
            output = result[0] if isinstance(result, tuple) else result
            results.append((output, *torch.autograd.grad(output.square().sum(), list(module.parameters()))))
        for a, b in zip(*results, strict=True):
            assert_close(a, b)


@pytest.mark.parametrize("options", [{"zoneout": 0.5}, {"recurrent_dropout": 0.5}], ids=str)
def test_vmap_draws_for_each_example_or_the_same(backend: str, options: dict[str, Any]) -> None:
    layer, x = make("GRU", **options), data(T, B, INPUT)
    twice = torch.stack([x, x])
    different, same = (torch.func.vmap(lambda x: layer(x)[0], randomness=r)(twice) for r in ("different", "same"))
    assert differ(different[0], different[1])
    assert_close(same[0], same[1])


# ---- cells --------------------------------------------------------------------------------------------------------

CELLS: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {"peephole": True, "coupled_gates": True, "cell_clip": 0.5}),
    ("LSTM", {"activation": "relu", "recurrent_activation": "hard_sigmoid", "peephole": True}),
    ("LSTM", {"zoneout": 0.5, "zoneout_cell": 0.4, "recurrent_dropout": 0.3}),
    ("GRU", {"reset_after": False, "activation": "softsign"}),
    ("GRU", {"zoneout": 0.5, "recurrent_dropout": 0.3, "recurrent_activation": "hard_sigmoid"}),
    ("LSTM", {"num_heads": 5, "peephole": True}),
    ("RNN", {"nonlinearity": "identity"}),
    ("RNN", {"nonlinearity": "relu", "zoneout": 0.5, "recurrent_dropout": 0.3}),
]


@pytest.mark.parametrize("batched", [True, False], ids=["batch", "no batch"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(("name", "options"), CELLS, ids=str)
def test_a_cell_is_a_layer_of_one_step(
    backend: str, name: str, options: dict[str, Any], training: bool, bias: bool, batched: bool
) -> None:
    cell, layer = (make(kind, bias=bias, **options).train(training) for kind in (name + "Cell", name))
    layer.load_state_dict({key + "_l0": value for key, value in cell.state_dict().items()})
    shape = (B,) if batched else ()
    x, h, c = (t.requires_grad_() for t in (data(*shape, INPUT), data(*shape, H, seed=2), data(*shape, H, seed=3)))
    hx: Any = (h, c) if name == "LSTM" else h
    function = getattr(functional, f"{name.lower()}_cell")
    weights = {"weight_ih": "w_ih", "weight_hh": "w_hh", "bias_ih": "b_ih", "bias_hh": "b_hh"}
    weights["weight_peephole"] = "w_peephole"
    given = {weights[key]: parameter for key, parameter in cell.named_parameters()}
    given |= {key: value for key, value in options.items() if key != "peephole"}
    calls = (
        lambda: layer(x.unsqueeze(0), tuple(s.unsqueeze(0) for s in hx) if name == "LSTM" else h.unsqueeze(0))[1],
        lambda: cell(x, hx),
        lambda: function(x, hx, training=training, **given),
    )
    results = []
    for parameters, call in zip((layer.parameters(), cell.parameters(), cell.parameters()), calls, strict=True):
        torch.manual_seed(3)
        states = [s.squeeze(0) if call is calls[0] else s for s in flat(call())]
        leaves = [x, h, *([c] if name == "LSTM" else []), *parameters]
        results.append((*states, *torch.autograd.grad(sum(s.square().sum() for s in states), leaves)))
    for others in results[1:]:
        for a, b in zip(others, results[0], strict=True):
            assert_close(a, b)
    assert [s.shape for s in flat(cell(x))] == [(*shape, H)] * (2 if name == "LSTM" else 1)


def test_a_cell_begins_anew_before_its_step(backend: str) -> None:
    cell, x = make("LSTMCell", peephole=True, zoneout=0.5), data(B, INPUT)
    hx, anew = ((data(B, H, seed=k), data(B, H, seed=k + 1)) for k in (2, 4))
    rows = torch.tensor([True, False, True])
    for begin, given in ((anew, {"reset_state": anew}), ([torch.zeros(B, H, dtype=torch.float64)] * 2, {})):
        results = []
        for state, keywords in ((hx, {"reset": rows, **given}), (None, {})):
            if state is None:
                state = tuple(torch.where(rows.unsqueeze(1), b, s) for b, s in zip(begin, hx, strict=True))
            torch.manual_seed(3)
            results.append(cell(x, state, **keywords))
        for a, b in zip(*results, strict=True):
            assert_close(a, b)


def test_cells_without_options_have_none() -> None:
    for name in ("LSTMCell", "GRUCell", "RNNCell"):
        cell = make(name)
        assert cell._within is None and cell._settings().within is None
        assert {option: getattr(cell, option) for option in CELL_OPTIONS} == CELL_OPTIONS
    cell = make("LSTMCell", recurrent_dropout=0.5).eval()
    assert cell._settings().within is None


def test_a_cell_of_size_0_has_options() -> None:
    cell = fused_rnn.LSTMCell(3, 0, peephole=True, zoneout=0.5)
    assert cell(torch.zeros(2, 3))[0].shape == (2, 0)


# ---- parameters, attributes, copies -------------------------------------------------------------------------------


def test_peepholes_are_the_last_of_each_layer_and_direction() -> None:
    layer = make("LSTM", num_layers=2, bidirectional=True, proj_size=3, peephole=True, recurrent_bias=False)
    kinds = ("weight_ih", "weight_hh", "bias_ih", "weight_hr", "weight_peephole")
    expected = [f"{kind}_l{k}{side}" for k in range(2) for side in ("", "_reverse") for kind in kinds]
    assert [name for name, _ in layer.named_parameters()] == expected == list(layer.state_dict())
    assert layer._flat_weights_names == expected
    assert [len(weights) for weights in layer.all_weights] == [5] * 4
    assert all(getattr(layer, n).shape == (3 * H,) for n in expected if "peephole" in n)


@pytest.mark.parametrize("name", ["LSTM", "LSTMCell"])
def test_peepholes_are_drawn_as_the_other_parameters(name: str) -> None:
    torch.manual_seed(0)
    layer = getattr(fused_rnn, name)(3, 400, peephole=True)
    torch.manual_seed(0)
    plain = getattr(fused_rnn, name)(3, 400)
    peephole = layer.weight_peephole_l0 if name == "LSTM" else layer.weight_peephole
    for _ in range(2):
        assert 0.99 / 20 < float(peephole.detach().abs().max()) <= 1 / 20
        before = peephole.detach().clone()
        layer.reset_parameters()
        assert differ(before, peephole)
    for key, value in plain.state_dict().items():
        torch.manual_seed(0)
        assert torch.equal(value, getattr(fused_rnn, name)(3, 400, peephole=True).state_dict()[key])
    if name == "LSTM":
        layer = fused_rnn.LSTM(3, 4, peephole=True, init="keras")
        layer.reset_parameters()
        assert not layer.weight_peephole_l0.any() and layer.bias_ih_l0.any()


def test_peepholes_come_and_go_with_the_attribute() -> None:
    layer, plain, x = make("LSTM", num_layers=2), make("LSTM", num_layers=2), data(T, B, INPUT)
    layer.peephole = True
    assert "weight_peephole_l1" in dict(layer.named_parameters())
    with fused_rnn.use_backend("reference"):
        assert_close(layer(x)[0], plain(x)[0])  # zeros
        layer.peephole = False
        assert_same(layer(x)[0], plain(x)[0])
    assert [*layer.state_dict()] == [*plain.state_dict()] and layer._within is None


def test_attributes_are_read_and_set_and_checked() -> None:
    layer = make("GRU", zoneout=0.25)
    assert (layer.zoneout, layer.recurrent_dropout, layer.reset_after, layer.cell_clip) == (0.25, 0.0, True, None)
    layer.zoneout = 0.0
    assert layer._within is None and layer._settings().within is None
    layer.recurrent_dropout = 0.5
    assert layer._settings().within is not None and layer.eval()._settings().within is None
    for name, value in (("zoneout", 1.5), ("activation", "gelu"), ("peephole", True), ("recurrent_grad_clip", 0.0)):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            setattr(layer, name, value)
    assert (layer.zoneout, layer.activation, layer.peephole) == (0.0, "tanh", False)


OPTIONS_OF = [
    ("LSTM", {"zoneout": 0.2, "zoneout_cell": 0.1, "peephole": True, "cell_clip": 2.0}),
    ("GRU", {"activation": "relu", "recurrent_activation": "hard_sigmoid", "reset_after": False}),
    ("GRU", {"num_heads": 5}),
    ("RNN", {"nonlinearity": "softsign", "recurrent_dropout": 0.2, "recurrent_grad_clip": 1.5}),
    ("LSTMCell", {"zoneout": 0.2, "peephole": True, "coupled_gates": True, "num_heads": 5}),
    ("RNNCell", {"nonlinearity": "identity", "recurrent_dropout": 0.1}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS_OF, ids=str)
def test_copies_and_repr(backend: str, name: str, options: dict[str, Any]) -> None:
    module = make(name, **options)
    x = data(B, INPUT) if name.endswith("Cell") else data(T, B, INPUT)
    other = getattr(fused_rnn, name)(INPUT, H, dtype=torch.float64, **options)
    other.load_state_dict(module.state_dict())
    outputs = []
    for copied in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module)), other):
        torch.manual_seed(0)
        result = copied(x)
        outputs.append(result[0] if isinstance(result, tuple) else result)
        assert {key: getattr(copied, key) for key in options} == options
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    for key, value in options.items():
        shown = str(value) if key == "nonlinearity" and name.endswith("Cell") else repr(value)
        assert f", {key}={shown}" in repr(module)


def test_functions_take_the_options_that_layers_have(backend: str) -> None:
    options = {"zoneout": 0.2, "zoneout_cell": 0.1, "peephole": True, "cell_clip": 2.0, "recurrent_dropout": 0.3}
    options |= {"activation": "softsign", "coupled_gates": True, "recurrent_grad_clip": 1.0, "bptt_steps": 4}
    layer, x = make("LSTM", num_layers=2, **options), data(T, B, INPUT)
    outputs = []
    for training in (True, False):
        for run in (layer.train(training), None):
            torch.manual_seed(2)
            if run is None:
                params = list(layer.parameters())
                outputs.append(functional.lstm(x, None, params, num_layers=2, training=training, **options)[0])
            else:
                outputs.append(run(x)[0])
        assert_same(outputs[-1], outputs[-2])
    rnn, params = make("RNN", nonlinearity="sigmoid"), None
    params = list(rnn.parameters())
    assert_same(functional.rnn(x, None, params, nonlinearity="sigmoid")[0], rnn(x)[0])


@pytest.mark.parametrize(("name", "options"), OPTIONS_OF, ids=str)
def test_a_mode_sees_the_options_of_a_call(backend: str, name: str, options: dict[str, Any]) -> None:
    class Seen(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__module__", "") == functional.__name__:
                seen.append(dict(kwargs))
            return func(*args, **(kwargs or {}))

    seen: list[Any] = []
    module = make(name, **options)
    x = data(B, INPUT) if name.endswith("Cell") else data(T, B, INPUT)
    torch.manual_seed(0)
    with Seen():
        output = flat(module(x))[0]
    (given,) = seen
    wanted = dict(options)
    if name == "LSTMCell":
        assert given.pop("w_peephole") is module.weight_peephole
        del wanted["peephole"]
    if name != "GRU":
        wanted["training"] = True
    assert given == wanted
    torch.manual_seed(0)
    assert_same(output, flat(module(x))[0])


# ---- who computes it, convert, revert -----------------------------------------------------------------------------


def test_explain_has_a_sentence_for_each_option() -> None:
    options = {"zoneout": 0.2, "zoneout_cell": 0.1, "peephole": True, "cell_clip": 2.0, "recurrent_dropout": 0.3}
    options |= {"activation": "softsign", "coupled_gates": True, "recurrent_grad_clip": 1.0, "bptt_steps": 4}
    options |= {"recurrent_activation": "hard_sigmoid", "num_heads": 5}
    layer, x = make("LSTM", **options), data(T, B, INPUT)
    with fused_rnn.use_backend("reference"):
        found = fused_rnn.explain(layer, x)
    assert len(found.options) == len(options)
    for option in options:
        assert sum(sentence.startswith(option) for sentence in found.options) == (2 if option == "zoneout" else 1)
    assert all("formulas" in sentence for sentence in found.options)
    with fused_rnn.use_backend("reference"), torch.no_grad():
        found = fused_rnn.explain(layer.eval(), x)
    assert len(found.options) == len(options) - 3 and "mean" in str(found)
    with fused_rnn.use_backend("reference"):
        assert fused_rnn.explain(make("LSTMCell", peephole=True), x[0]).options == (
            "peephole=True: the formulas have it in each step",
        )


@pytest.mark.kernels
def test_what_no_kernel_has_runs_on_the_formulas_and_says_so() -> None:
    x = data(T, B, INPUT)
    gru, rnn = make("GRU", reset_after=False), make("RNN", zoneout=0.5)
    assert "reset_after=False" in str(fused_rnn.explain(gru, x).reason)
    assert fused_rnn.explain(rnn, x).backend == "fused"
    assert "zoneout of an RNN" in str(fused_rnn.explain(rnn.eval(), x).reason)
    with torch.no_grad():
        assert fused_rnn.explain(rnn, x).backend == "fused"
    for name in ("LSTM", "GRU"):
        assert fused_rnn.explain(make(name, zoneout=0.5, activation="relu").eval(), x).backend == "fused"
    with fused_rnn.use_backend("fused"), pytest.raises(RuntimeError, match="backend in use is 'fused'.*reset_after"):
        gru(x)


@pytest.mark.parametrize("row", ROWS[:12], ids=name_of)
def test_what_is_within_comes_out_of_the_operators_lists_as_it_went_in(row: Row) -> None:
    layer, _, _ = build(row)
    layer.recurrent_grad_clip = 0.25
    settings = layer._settings()
    integers, numbers = settings.flatten()
    assert all(type(value) is int for value in integers) and all(type(value) is float for value in numbers)
    restored = Settings.restore(integers, numbers, torch.empty(3, 2, 3), layer._params())
    # what Python has drawn by is no part of the lists
    assert restored.within == settings.within._replace(recurrent_dropout=0.0, training=False)
    assert restored.flatten() == (integers, numbers)


@pytest.mark.kernels
def test_a_kernel_never_sees_what_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[float]] = []
    run = fused_rnn.ops.run_stack
    monkeypatch.setattr(fused_rnn.ops, "run_stack", lambda s, *rest: seen.append(s.flatten()[1]) or run(s, *rest))
    layer, x = make("LSTM", recurrent_dropout=0.5, bptt_steps=T), data(T, B, INPUT)
    layer(x)
    assert seen.pop() == [0.0] * 4
    layer.eval()(x)
    layer.bptt_steps = 2
    with torch.no_grad():
        layer(x)
    layer(x, lengths=torch.tensor([T, 2, 1]))
    assert seen == [[]] * 5


def test_convert_gives_options_and_revert_refuses_them() -> None:
    model = nn.ModuleDict({"a": nn.LSTM(INPUT, H, 2, dtype=torch.float64), "b": nn.LSTMCell(INPUT, H)})
    x = data(T, B, INPUT)
    before = model["a"](x)[0]
    fused_rnn.convert(model, peephole=True)
    with fused_rnn.use_backend("reference"):
        assert_close(model["a"](x)[0], before)
    assert [n for n, _ in model["a"].named_parameters() if "peephole" in n] == [f"weight_peephole_l{k}" for k in (0, 1)]
    with pytest.raises(ValueError, match="'a': it has peephole=True, which torch.nn.LSTM has not"):
        fused_rnn.revert(model)
    model["a"].peephole = False
    assert_close(fused_rnn.revert(model)["a"](x)[0], before)
    model = nn.ModuleDict({"a": nn.LSTM(INPUT, H), "b": nn.GRU(INPUT, H)})
    with pytest.raises(ValueError, match=r"cell_clip: expected None, only an LSTM has a cell state \(of 'b'\)"):
        fused_rnn.convert(model, cell_clip=1.0)
    fused_rnn.convert(model, zoneout=0.1, recurrent_activation="hard_sigmoid")
    assert all(layer.zoneout == 0.1 and layer.recurrent_activation == "hard_sigmoid" for layer in model.values())


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
@pytest.mark.parametrize(("name", "options"), OPTIONS_OF, ids=str)
def test_revert_and_script_refuse_by_name(name: str, options: dict[str, Any]) -> None:
    module = nn.Sequential(make(name, **options))
    with pytest.raises(ValueError, match=rf"'0': it has \w+=.*, which torch.nn.{name} has not"):
        fused_rnn.revert(module)
    with pytest.raises(RuntimeError, match="torch.jit.script: cannot express"):
        torch.jit.script(module)


def test_a_module_with_a_part_of_such_a_name_is_left_alone() -> None:
    class WithActivation(nn.LSTM):
        def __init__(self) -> None:
            super().__init__(INPUT, H)
            self.activation = nn.ReLU()

    module, report = fused_rnn.convert(WithActivation(), return_report=True)
    assert type(module) is WithActivation and "an attribute activation" in report.left_alone[""]


@pytest.mark.parametrize("base", ["LSTM", "LSTMCell"])
def test_a_subclass_may_have_a_part_of_such_a_name(base: str) -> None:
    with fused_rnn.patch():

        class WithActivation(getattr(nn, base)):
            def __init__(self) -> None:
                super().__init__(INPUT, H)
                self.activation = nn.ReLU()

            def forward(self, x: Tensor) -> Tensor:
                return self.activation(super().forward(x)[0])

    module, x = WithActivation(), torch.randn(B, INPUT)
    assert module._within is None
    assert_same(module(x), getattr(fused_rnn, base).forward(module, x)[0].relu())


def test_diagnostics_have_the_options(backend: str) -> None:
    options = {"zoneout": 0.3, "zoneout_cell": 0.2, "peephole": True, "cell_clip": 0.5, "recurrent_dropout": 0.3}
    for name, given in (("LSTM", options), ("GRU", {"reset_after": False, "activation": "relu"})):
        layer, x = make(name, num_layers=2, **given), data(T, B, INPUT)
        outputs: list[Tensor] = []

        def run(layer: Any = layer, x: Tensor = x, outputs: list[Tensor] = outputs) -> Tensor:
            torch.manual_seed(3)
            outputs.append(layer(x)[0])
            return outputs[-1].square().sum()

        run()
        (flow,) = fused_rnn.diagnostics.gradient_flow(layer, run)
        assert_close(outputs[1], outputs[0])
        assert flow.h.shape == (2, 1, T) and (flow.h > 0).any()
        (gates,) = fused_rnn.diagnostics.gate_statistics(layer, run)
        assert_close(outputs[2], outputs[0].detach())
        assert all(0 <= float(share.min()) <= float(share.max()) <= 1 for share in gates.low.values())


def test_gradient_flow_is_that_of_states_whose_gradients_are_clamped_through_time() -> None:
    layer, x = make("RNN", recurrent_grad_clip=0.5), data(T, B, INPUT)
    h, outputs = torch.zeros(B, H, dtype=torch.float64), []
    for t in range(T):
        if t > 0:
            h = h.clone()
            h.register_hook(lambda gradient: gradient.clamp(-0.5, 0.5))
        h, _ = rnn(layer, x[t], h, h, t)
        outputs.append(h)
    wanted = torch.autograd.grad(torch.stack(outputs).square().sum(), outputs)
    (flow,) = fused_rnn.diagnostics.gradient_flow(layer, lambda: layer(x)[0].square().sum())
    assert_close(flow.h[0, 0], torch.stack([gradient.norm(dim=-1).mean() for gradient in wanted]))


# ---- bad input ----------------------------------------------------------------------------------------------------

REFUSED: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    *(
        ("LSTM", {option: value}, ValueError, f"{option}: expected a number from 0 to 1, got {shown}")
        for option in ("recurrent_dropout", "zoneout", "zoneout_cell")
        for value, shown in ((1.5, "1.5"), (-0.1, "-0.1"), (float("nan"), "nan"), (True, "True"), ("a", "'a'"))
    ),
    *(
        ("LSTM", {option: value}, ValueError, f"{option}: expected a positive finite number, got {value}")
        for option in ("cell_clip", "recurrent_grad_clip")
        for value in (0, -1.0, float("inf"), float("nan"))
    ),
    ("LSTM", {"cell_clip": "1"}, TypeError, "cell_clip: expected a number or None, got '1'"),
    ("GRU", {"recurrent_grad_clip": True}, TypeError, "recurrent_grad_clip: expected a number or None, got True"),
    *(
        ("LSTM", {option: value}, ValueError, f"{option}: expected one of 'tanh', 'sigmoid', 'relu', .* got")
        for option in ("activation", "recurrent_activation")
        for value in ("gelu", "TANH", None, ["tanh"])
    ),
    ("RNN", {"nonlinearity": "elu"}, ValueError, "nonlinearity: expected one of 'tanh', .*, got 'elu'"),
    ("RNN", {"activation": "relu"}, ValueError, "activation: expected 'tanh' for an RNN.*nonlinearity=, got 'relu'"),
    ("RNN", {"recurrent_activation": "relu"}, ValueError, "recurrent_activation: expected 'sigmoid' for an RNN"),
    *(
        ("GRU" if option == "reset_after" else "LSTM", {option: 1}, TypeError, f"{option}: expected a bool, got 1")
        for option in ("reset_after", "peephole", "coupled_gates")
    ),
    *(
        (name, {option: value}, ValueError, f"{option}: expected .*, only an LSTM has")
        for name in ("GRU", "RNN")
        for option, value in (("peephole", True), ("coupled_gates", True), ("cell_clip", 1.0), ("zoneout_cell", 0.1))
    ),
    ("LSTM", {"reset_after": False}, ValueError, "reset_after: expected True, only a GRU has a reset gate"),
    ("RNN", {"reset_after": False}, ValueError, "reset_after: expected True, only a GRU has a reset gate"),
]


@pytest.mark.parametrize(("name", "keywords", "error", "message"), REFUSED, ids=lambda v: str(v) if v else "")
def test_constructors_refuse(name: str, keywords: dict[str, Any], error: type[Exception], message: str) -> None:
    kinds = [name]
    if set(keywords) <= {*CELL_OPTIONS, "nonlinearity"}:
        kinds.append(name + "Cell")
    for kind in kinds:
        with pytest.raises(error, match=message):
            make(kind, **keywords)


def test_functions_refuse() -> None:
    layer, cell, x = make("LSTM", peephole=True), make("LSTMCell", peephole=True), data(T, B, INPUT)
    params = list(layer.parameters())
    with pytest.raises(RuntimeError, match="params: expected 4 tensors"):
        functional.lstm(x, None, params)
    with pytest.raises(RuntimeError, match="params: expected 5 tensors.*weight_peephole_l0"):
        functional.lstm(x, None, params[:4], peephole=True)
    with pytest.raises(RuntimeError, match=r"weight_peephole_l0: expected \(15,\), got \(14,\)"):
        functional.lstm(x, None, [*params[:4], params[4][1:]], peephole=True)
    with pytest.raises(ValueError, match="zoneout_cell: expected 0, only an LSTM has a cell state"):
        functional.gru(x, None, list(make("GRU").parameters()), zoneout_cell=0.1)
    weights = [p.detach() for p in cell.parameters()]
    with pytest.raises(RuntimeError, match=r"w_peephole: expected \(15,\), got \(14,\)"):
        functional.lstm_cell(x[0], None, *weights[:4], w_peephole=weights[4][1:])
    with pytest.raises(ValueError, match="zoneout: expected a number from 0 to 1"):
        functional.lstm_cell(x[0], None, *weights[:4], zoneout=2.0)
    with pytest.raises(TypeError, match="peephole: unexpected keyword argument of this function"):
        functional.lstm_cell(x[0], None, *weights[:4], peephole=True)
    with pytest.raises(TypeError, match="bptt_steps: unexpected keyword argument of a cell"):
        make("LSTMCell", bptt_steps=3)
    with pytest.raises(TypeError, match="training: expected a bool"):
        functional.gru_cell(x[0], None, *make("GRUCell").parameters(), training=1, zoneout=0.5)
    with pytest.raises(RuntimeError, match=r"hx\[0\]: expected \(3, 5\), got \(2, 5\)"):
        cell(x[0], (data(2, H), data(2, H)))
    layer.weight_peephole_l0.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="weight_peephole_l0: expected a tensor with memory"):
        layer(x)


@pytest.mark.kernels
def test_the_operator_obeys_what_was_drawn_whatever_the_settings() -> None:
    layer, x = make("LSTM"), data(T, B, INPUT)
    params, settings = [p.detach() for p in layer.parameters()], layer._settings()
    factors = dropout(torch.ones(1, B, H, dtype=torch.float64), 0.5)
    bits = functional._draw_bits(x, (1, T * B), H, 0.5)
    plain = formulas.run_stack(settings, x, None, None, params, Controls())[0]
    for given in ({"recurrent_dropout": factors}, {"zoneout": bits}, {"zoneout_cell": bits}):
        controls = Controls(**given)
        expected = formulas.run_stack(settings, x, None, None, params, controls)[0]
        arguments = (params, controls.flatten(x), *settings.flatten(), False)
        assert_close(torch.ops.fused_rnn.rnn_forward(x, None, None, *arguments)[0], expected)
        assert differ(expected, plain)


@pytest.mark.kernels
def test_no_kernel_gives_a_plain_recurrence_gradients_of_states_on_average() -> None:
    layer, x = make("RNN", zoneout=0.5).eval(), data(T, B, INPUT)
    arguments = (list(layer.parameters()), [], *layer._settings().flatten(), False)
    output = torch.ops.fused_rnn.rnn_forward(x, None, None, *arguments)[0]
    with pytest.raises(RuntimeError, match="zoneout: the plain recurrence has no backward kernel"):
        output.sum().backward()
