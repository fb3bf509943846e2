"""Gradients and gates as the diagnostics give them, against a loop over torch.nn's cells."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.values import data
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close

import fused_rnn
from fused_rnn.diagnostics import gate_statistics, gradient_flow

T, B, INPUT, H = 6, 3, 4, 5


def make(name: str, **keywords: Any) -> Any:
    torch.manual_seed(0)
    return getattr(fused_rnn, name)(INPUT, H, dtype=torch.float64, **keywords)


def by_cells(layer: Any, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, list[list[Any]]]:
    """Output (T, B, D*H) of a stack, and of each layer and direction the states after each step, in order of time."""
    directions = 2 if layer.bidirectional else 1
    made = []
    for k in range(layer.num_layers):
        outputs = []
        for suffix in ("", "_reverse")[:directions]:
            name = type(layer).__name__
            cell = getattr(nn, f"{name}Cell")(x.shape[-1], H, dtype=torch.float64)
            weights = {w: getattr(layer, f"{w}_l{k}{suffix}") for w, _ in cell.named_parameters()}
            state: Any = torch.zeros(B, H, dtype=torch.float64)
            state = (state, state) if name == "LSTM" else state
            states: list[Any] = [None] * T
            fresh: list[Any] = [None] * T
            for t in reversed(range(T)) if suffix else range(T):
                new = torch.func.functional_call(cell, weights, (x[t], state))
                fresh[t] = new
                if mask is not None:
                    keep = mask[t].unsqueeze(1)
                    pairs = zip(new, state, strict=True) if name == "LSTM" else [(new, state)]
                    chosen = [torch.where(keep, a, b) for a, b in pairs]
                    new = tuple(chosen) if name == "LSTM" else chosen[0]
                state = states[t] = new
            made.append(list(zip(states, fresh, strict=True)))
            h = torch.stack([s[0] if name == "LSTM" else s for s in states])
            outputs.append(h if mask is None else torch.where(mask.unsqueeze(2), h, 0))
        x = torch.cat(outputs, -1)
    return x, made


def mean_norms(loss: Tensor, made: list[list[Any]], which: int, mask: Tensor | None) -> Tensor:
    """Of c in a step that counts: with what comes by way of the same step's h."""

    def gradient(state: Any) -> Tensor:
        chosen = state[which] if isinstance(state, tuple) else state
        (found,) = torch.autograd.grad(loss, chosen, retain_graph=True, allow_unused=True)
        return torch.zeros(B, H, dtype=torch.float64) if found is None else found

    lines = []
    for steps in made:
        line = []
        for t, (state, fresh) in enumerate(steps):
            g = gradient(state)
            if which == 1 and mask is not None:
                g = torch.where(mask[t].unsqueeze(1), gradient(fresh), g)
            line.append(g.norm(dim=1).mean().item())
        lines.append(line)
    return torch.tensor(lines, dtype=torch.float64)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("keywords", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_gradient_flow_is_the_gradient_of_every_state(name: str, keywords: dict[str, Any], masked: bool) -> None:
    layer, x = make(name, **keywords), data(T, B, INPUT)
    weights = data(T, B, H * (2 if layer.bidirectional else 1), seed=2)
    mask = torch.rand(T, B, generator=torch.Generator().manual_seed(3)) < 0.7 if masked else None
    steps = {"mask": mask} if masked else {}
    before = dict(vars(layer))
    (flow,) = gradient_flow(layer, lambda: (layer(x, **steps)[0] * weights).sum())
    assert vars(layer).keys() == before.keys()
    output, made = by_cells(layer, x, mask)
    assert_close(output, layer(x, **steps)[0])
    loss = (output * weights).sum()
    assert_close(flow.h.flatten(0, 1), mean_norms(loss, made, 0, mask))
    assert flow.h.shape == (layer.num_layers, 2 if layer.bidirectional else 1, T)
    if name == "LSTM":
        assert flow.c is not None
        assert_close(flow.c.flatten(0, 1), mean_norms(loss, made, 1, mask))
    else:
        assert flow.c is None
    assert "|dL/dh| layer 0" in str(flow) and str(flow).count("\n") == len(made) * (2 if name == "LSTM" else 1) + 1


def test_results_of_a_call_are_what_they_are_without() -> None:
    """In every layout, with everything that a call may have."""
    x, lengths = data(B, T, INPUT), torch.tensor([T, 2, 4])
    cases: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
        (make("LSTM", batch_first=True, num_layers=2), (x,), {"lengths": lengths}),
        (make("LSTM", proj_size=3, bidirectional=True), (x, (data(2, T, 3), data(2, T, H))), {}),
        (make("GRU"), (x[0], data(1, H)), {}),
        (make("RNN", nonlinearity="relu", bias=False), (x,), {}),
        (make("LSTM", recurrent_bias=False, stateful=True, bptt_steps=2), (x,), {}),
        (make("GRU", bidirectional=True), (pack_padded_sequence(x, lengths, True, enforce_sorted=False),), {}),
    ]
    for layer, arguments, keywords in cases:
        seen: list[Any] = []

        def loss(layer: Any = layer, arguments: Any = arguments, keywords: Any = keywords, seen: Any = seen) -> Tensor:
            output, states = layer(*arguments, **keywords)
            seen.append((output, states))
            data = output.data if hasattr(output, "batch_sizes") else output
            return data.square().sum()

        gradient_flow(layer, loss)
        if layer.stateful:
            layer.reset_state()
        loss()
        (output, states), (expected, of_expected) = seen
        if hasattr(output, "batch_sizes"):
            assert torch.equal(output.batch_sizes, expected.batch_sizes)
            assert torch.equal(output.sorted_indices, expected.sorted_indices)
            output, expected = output.data, expected.data
        assert_close(output, expected)
        assert_close(states, of_expected)


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_dtypes_of_results_are_those_of_the_layer(name: str, autocast: bool) -> None:
    layer = make(name).to(torch.float32 if autocast else torch.bfloat16)
    x = data(T, B, INPUT).bfloat16()
    seen: list[Any] = []

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output, states = layer(x)
        seen.append([output, *(states if name == "LSTM" else [states])])
        return output.float().square().sum()

    (flow,) = gradient_flow(layer, loss)
    loss()
    assert bool((flow.h > 0).all())
    for found, expected in zip(*seen, strict=True):
        assert found.dtype == expected.dtype
        assert_close(found.float(), expected.float(), rtol=0.05, atol=0.02)


def test_what_a_stateful_layer_carries_is_left_alone() -> None:
    layer, x = make("LSTM", stateful=True), data(T, B, INPUT)
    layer(x)
    kept = layer.carried_h.clone()
    gradient_flow(layer, lambda: layer(x)[0].sum())
    gate_statistics(layer, lambda: layer(x))
    assert_close(layer.carried_h, kept, rtol=0, atol=0)


def test_gates_are_those_of_each_call_and_its_dropout() -> None:
    layer, x = make("LSTM", weight_dropout=0.5), data(T, B, INPUT)
    shares = []
    for calls in ((0,), (1,), (0, 1)):

        def run(calls: tuple[int, ...] = calls) -> None:
            for seed in calls:
                torch.manual_seed(seed)
                layer(4 * x)

        shares.append(gate_statistics(layer, run, saturation=0.3)[0].low["o"])
    assert shares[0] != shares[1]
    assert_close(shares[2], (shares[0] + shares[1]) / 2)


def test_gradients_stop_where_bptt_steps_says() -> None:
    layer, x = make("LSTM", bptt_steps=3), data(T, B, INPUT)
    (flow,) = gradient_flow(layer, lambda: layer(x)[0][-1].sum())
    assert (flow.h[0, 0] > 0).tolist() == [False] * 3 + [True] * 3


def test_a_frozen_layer_has_gradients_of_its_states() -> None:
    layer, x = make("LSTM"), data(T, B, INPUT)
    (expected,) = gradient_flow(layer, lambda: layer(x)[0].square().sum())
    (flow,) = gradient_flow(layer.requires_grad_(False), lambda: layer(x)[0].square().sum())
    assert_close(flow.h, expected.h)
    assert_close(flow.c, expected.c)


def test_several_layers_and_calls_of_a_model() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"encoder": fused_rnn.GRU(INPUT, H), "decoder": fused_rnn.LSTM(H, H), "idle": nn.Linear(2, 2)}
    )

    def loss() -> Tensor:
        x = torch.ones(T, B, INPUT)
        hidden, state = model["encoder"](x)
        hidden, _ = model["encoder"](x, state)
        return model["decoder"](hidden)[0].square().mean()

    flows = gradient_flow(model, loss)
    assert [(flow.module, flow.h.shape[2]) for flow in flows] == [("encoder", 2 * T), ("decoder", T)]
    assert bool((flows[0].h > 0).all())
    assert not any(p.grad is not None for p in model.parameters())
    assert [s.module for s in gate_statistics(model, loss)] == ["encoder", "decoder"]


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_gate_statistics_count_values_near_the_ends(name: str) -> None:
    layer, x = make(name, num_layers=2, bidirectional=True), data(T, B, INPUT)
    with torch.no_grad():
        for key, parameter in layer.named_parameters():
            if key == "bias_ih_l1_reverse" and name != "RNN":
                parameter[:H] = 30.0  # the first gate, open
                parameter[H : 2 * H] = -30.0  # the second, shut
    (statistics,) = gate_statistics(layer, lambda: layer(x))
    gates = {"LSTM": "ifgo", "GRU": "rzn", "RNN": "h"}[name]
    assert list(statistics.low) == list(gates)
    assert all(share.shape == (2, 2) for share in statistics.low.values())
    assert not statistics.dead.any() and statistics.dead.shape == (2, 2, H)
    if name != "RNN":
        first, second = gates[:2]
        assert statistics.high[first][1, 1] == 1 and statistics.low[second][1, 1] == 1
        assert statistics.high[first][0, 0] < 0.5 and statistics.low[second][0, 0] < 0.5
    assert "layer 1 reverse" in str(statistics) and f"0 of {H}" in str(statistics)


def test_gates_of_an_lstm_are_those_of_its_formula() -> None:
    layer, x = make("LSTM"), 4 * data(T, B, INPUT)
    (found,) = gate_statistics(layer, lambda: layer(x), saturation=0.2)
    before = torch.cat([torch.zeros(1, B, H, dtype=torch.float64), layer(x)[0][:-1]])
    sums = x @ layer.weight_ih_l0.T + layer.bias_ih_l0 + before @ layer.weight_hh_l0.T + layer.bias_hh_l0
    for k, (gate, values) in enumerate(zip("ifgo", sums.chunk(4, -1), strict=True)):
        share = torch.tanh(values) * 0.5 + 0.5 if k == 2 else torch.sigmoid(values)
        assert_close(found.low[gate][0, 0], (share < 0.2).double().mean())
        assert_close(found.high[gate][0, 0], (share > 0.8).double().mean())
        assert found.low[gate][0, 0] > 0


def test_dead_units_are_found() -> None:
    relu, lstm, x = make("RNN", nonlinearity="relu"), make("LSTM", proj_size=3), data(T, B, INPUT)
    with torch.no_grad():
        relu.bias_ih_l0[1] = -100.0
        lstm.bias_ih_l0[3 * H + 2] = -100.0  # its output gate lets nothing out
    for layer, unit in ((relu, 1), (lstm, 2)):
        (statistics,) = gate_statistics(layer, lambda layer=layer: layer(x))
        assert statistics.dead[0, 0].nonzero().flatten().tolist() == [unit]
        assert f"1 of {H}" in str(statistics)
    assert gate_statistics(relu, lambda: relu(x))[0].low["h"][0, 0] >= 1 / H


def test_only_steps_that_count_are_looked_at() -> None:
    layer, x = make("GRU"), data(T, B, INPUT)
    lengths = torch.tensor([2, 2, 2])
    short = gate_statistics(layer, lambda: layer(x[:2]))[0]
    masked = gate_statistics(layer, lambda: layer(x, lengths=lengths))[0]
    assert_close(short.low, masked.low)
    assert_close(short.high, masked.high)


def test_both_draw_with_matplotlib() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    layer, x = make("LSTM", num_layers=2), data(T, B, INPUT)
    axes = gradient_flow(layer, lambda: layer(x)[0].sum())[0].plot()
    assert len(axes.get_lines()) == 4
    bars = gate_statistics(layer, lambda: layer(x))[0].plot()
    assert len(bars.patches) == 2 * 2 * 4


def test_layers_are_themselves_again_after_an_error() -> None:
    layer = make("LSTM")

    def fail() -> Tensor:
        layer(data(T, B, INPUT))
        raise KeyError("of the program")

    with pytest.raises(KeyError):
        gradient_flow(layer, fail)
    assert "_run" not in vars(layer)


def test_what_is_wrong_with_a_call_is_named() -> None:
    layer, x = make("LSTM"), data(T, B, INPUT)
    for diagnose in (gradient_flow, gate_statistics):
        with pytest.raises(TypeError, match="model: expected a torch.nn.Module"):
            diagnose(3, lambda: None)  # type: ignore[arg-type]
        with pytest.raises(
            ValueError, match="model: expected an LSTM, GRU or RNN of fused_rnn in it; fused_rnn.convert"
        ):
            diagnose(nn.LSTM(2, 2), lambda: None)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="model: expected a call of one of its layers, none ran"):
            diagnose(layer, lambda: torch.ones(()))
        with pytest.raises(TypeError, match="expected a function without arguments"):
            diagnose(layer, layer(x)[0].sum())
    with pytest.raises(ValueError, match="loss: expected it to return a tensor of one element, got a Tensor of shape"):
        gradient_flow(layer, lambda: layer(x)[0])
    with pytest.raises(ValueError, match="loss: expected a loss that has a gradient"):
        gradient_flow(layer, lambda: layer(x)[0].sum().detach())
    with pytest.raises(ValueError, match="saturation: expected a number from 0 to 0.5, got 0.7"):
        gate_statistics(layer, lambda: layer(x), saturation=0.7)
    with pytest.raises(RuntimeError, match="input: expected input_size 4"):
        gradient_flow(layer, lambda: layer(data(T, B, 3))[0].sum())
