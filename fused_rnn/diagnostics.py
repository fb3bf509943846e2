"""What goes on inside the recurrent layers of a model: how far gradients reach, and what the gates do.

Both functions run a program of the caller once, with the layers taken step by step, so that every state is at hand.
That is slow, as a look inside may be; the layers are what they were afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from . import _checks, carried, formulas, functional
from .indrnn import IndRNN
from .layers import GRU, LSTM, RNN
from .settings import CellKind, Controls, Settings, Steps

__all__ = ["GateStatistics", "GradientFlow", "gate_statistics", "gradient_flow"]

_LAYERS = (LSTM, GRU, RNN, IndRNN)


class _Direction(NamedTuple):
    """One layer in one direction during one call; lists in order of time."""

    inputs: list[Tensor]  # (B, I)
    before: list[Tensor]  # h (B, P) that each step began with, as W_hh was given it
    c_before: list[Tensor]
    h: list[Tensor]  # after it
    c: list[Tensor]  # empty without a cell state
    new_c: list[Tensor]  # before a masked row had its own again
    c_of_h: list[Tensor]  # what h was made of, before zoneout
    live: list[Tensor] | None  # bool (B, 1)
    params: list[Tensor]


@dataclass
class GradientFlow:
    """Norms of the gradient of a loss with respect to the states of one module; see :func:`gradient_flow`.

    Attributes:
        module: its name in the model, "" for the model itself.
        h: (L, D, T) float64 on the CPU, by layer, direction and step: the norm of a row of dL/dh_t, mean over the rows.
        c: the same for c, ``None`` unless the module is an LSTM.
    """

    module: str
    h: Tensor
    c: Tensor | None

    def __str__(self) -> str:
        T = self.h.shape[2]
        steps = sorted({0, T // 4, T // 2, 3 * T // 4, T - 1})
        rows = [["", *(f"t={t}" for t in steps)]]
        for name, values in self._states():
            for label, line in _by_direction(values):
                rows.append([f"|dL/d{name}| {label}", *(f"{line[t]:.2e}" for t in steps)])
        return f"gradient flow of {self.module or 'the model'}\n" + _table(rows)

    def plot(self, axes: Any = None) -> Any:
        """Draw the norms over the steps with matplotlib, on ``axes`` or new ones, which are returned."""
        axes = axes or _new_axes()
        for name, values in self._states():
            for label, line in _by_direction(values):
                axes.semilogy(line.clamp(min=1e-30).tolist(), label=f"{name}, {label}", ls="-" if name == "h" else "--")
        axes.set(xlabel="step", ylabel="mean norm of the gradient", title=self.module)
        axes.legend()
        return axes

    def _states(self) -> list[tuple[str, Tensor]]:
        return [("h", self.h), *([] if self.c is None else [("c", self.c)])]


@dataclass
class GateStatistics:
    """What the gates of one module do; see :func:`gate_statistics`.

    Attributes:
        module: its name in the model, "" for the model itself.
        low, high: by gate (i, f, g, o of an LSTM, r, z, n of a GRU, h of an RNN), (L, D) float64: the share of its
            values, over steps, rows and units, that are at the lower and at the upper end of its range.
        dead: bool (L, D, H): units whose output is the same, to 5e-7, at all steps of all rows.
    """

    module: str
    low: dict[str, Tensor]
    high: dict[str, Tensor]
    dead: Tensor = field(repr=False)

    def __str__(self) -> str:
        gates = list(self.low)
        rows = [["", *(f"{gate} {end}" for gate in gates for end in ("low", "high")), "dead units"]]
        L, D, H = self.dead.shape
        for layer in range(L):
            for direction in range(D):
                shares = [f"{end[gate][layer, direction]:.0%}" for gate in gates for end in (self.low, self.high)]
                dead = int(self.dead[layer, direction].sum())
                rows.append([_label(layer, direction, D), *shares, f"{dead} of {H}"])
        return f"gates of {self.module or 'the model'}\n" + _table(rows)

    def plot(self, axes: Any = None) -> Any:
        """Draw the shares as bars with matplotlib, on ``axes`` or new ones, which are returned."""
        axes = axes or _new_axes()
        L, D, _ = self.dead.shape
        labels, lows, highs = [], [], []
        for layer in range(L):
            for direction in range(D):
                for gate in self.low:
                    labels.append(f"{gate}, {_label(layer, direction, D)}")
                    lows.append(-float(self.low[gate][layer, direction]))
                    highs.append(float(self.high[gate][layer, direction]))
        places = range(len(labels))
        axes.barh(places, lows, label="at the lower end")
        axes.barh(places, highs, label="at the upper end")
        axes.set(yticks=places, yticklabels=labels, xlim=(-1, 1), xlabel="share of the values", title=self.module)
        axes.invert_yaxis()
        axes.legend()
        return axes


def gradient_flow(model: nn.Module, loss: Callable[[], Tensor]) -> list[GradientFlow]:
    """How far the gradient of a loss reaches back in every layer of a model.

    Args:
        model: a layer of this package, or a model with some in it.
        loss: runs the model, forward alone, and returns the loss, a tensor of one element.

    Returns:
        For each layer that ran, in the order of its first call, a :class:`GradientFlow`; print it, or ``plot()`` it.
        The steps of several calls of a layer stand one after the other. A masked step has the state that it carries.

    Raises:
        TypeError: ``model`` is no module, or ``loss`` is no function.
        ValueError: the model has no layer of this package, none of them ran, or the loss has more than one element or
            no gradient.
    """
    _check_call("loss", loss)
    with torch.enable_grad(), _recording(model) as calls:
        value = loss()
    _check_ran(calls)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ValueError(f"loss: expected it to return a tensor of one element, got {_checks._describe(value)}")
    if not value.requires_grad:
        raise ValueError("loss: expected a loss that has a gradient, got one that depends on nothing that requires it")
    states = [s for cells in calls.values() for call in cells for d in call for s in (*d.h, *d.c, *d.new_c)]
    gradients = dict(
        zip(map(id, states), torch.autograd.grad(value.reshape(()), states, allow_unused=True), strict=True)
    )

    def norms(states: list[Tensor], new: list[Tensor], live: list[Tensor] | None) -> Tensor:
        means = []
        for t, (state, of_step) in enumerate(zip(states, new, strict=True)):
            g, g_new = (gradients[id(s)] for s in (state, of_step))
            g = torch.zeros_like(state) if g is None else g
            if live is not None and of_step is not state:
                g = torch.where(live[t], torch.zeros_like(state) if g_new is None else g_new, g)
            means.append(g.detach().double().norm(dim=-1).mean().cpu())
        return torch.stack(means)

    flows = []
    for name, cells in calls.items():
        D = 2 if model.get_submodule(name).bidirectional else 1
        columns = [[call[k] for call in cells] for k in range(len(cells[0]))]
        h = torch.stack([torch.cat([norms(d.h, d.h, None) for d in column]) for column in columns]).unflatten(
            0, (-1, D)
        )
        c = None
        if cells[0][0].c:
            c = torch.stack([torch.cat([norms(d.c, d.new_c, d.live) for d in column]) for column in columns])
            c = c.unflatten(0, (-1, D))
        flows.append(GradientFlow(name, h, c))
    return flows


def gate_statistics(model: nn.Module, call: Callable[[], Any], saturation: float = 0.05) -> list[GateStatistics]:
    """How many gates are saturated, and which units are dead, in every layer of a model.

    Args:
        model: a layer of this package, or a model with some in it.
        call: runs the model; what it returns is not looked at.
        saturation: a sigmoid below this share of its range, or above 1 minus it, is saturated; and so is a tanh of the
            corresponding share of (-1, 1). The h of a ReLU is at its lower end where it is 0.

    Returns:
        For each layer that ran a :class:`GateStatistics`, over all steps that count of all its calls.

    Raises:
        TypeError: ``model`` is no module, or ``call`` is no function.
        ValueError: the model has no layer of this package, none of them ran, or ``saturation`` is not from 0 to 0.5.
    """
    _check_call("call", call)
    if not _checks._is_number(saturation) or not 0 <= saturation <= 0.5:
        raise ValueError(f"saturation: expected a number from 0 to 0.5, got {_checks._describe(saturation)}")
    with torch.no_grad(), _recording(model) as calls:
        call()
    _check_ran(calls)
    statistics = []
    with torch.no_grad():
        for name, cells in calls.items():
            layer: Any = model.get_submodule(name)
            D = 2 if layer.bidirectional else 1
            columns = [[made[k] for made in cells] for k in range(len(cells[0]))]
            found = [_statistics_of(layer._settings(), column, saturation) for column in columns]
            low, high = (_by_gate([f[end] for f in found], D) for end in ("low", "high"))
            dead = torch.stack([f["dead"] for f in found]).unflatten(0, (-1, D))
            statistics.append(GateStatistics(name, low, high, dead))
    return statistics


def _by_gate(shares: list[dict[str, float]], D: int) -> dict[str, Tensor]:
    return {
        gate: torch.tensor([share[gate] for share in shares], dtype=torch.float64).unflatten(0, (-1, D))
        for gate in shares[0]
    }


_RANGES = {"tanh": (-1.0, 1.0), "softsign": (-1.0, 1.0), "sigmoid": (0.0, 1.0), "hard_sigmoid": (0.0, 1.0)}


def _statistics_of(settings: Settings, calls: Sequence[_Direction], saturation: float) -> dict[str, Any]:
    """Shares at both ends by gate, and dead units, of one layer and direction."""
    of_calls = [_gates_of_call(settings, made) for made in calls]  # each with the weights that its dropout left
    gates = {gate: torch.cat([of_call[0][gate] for of_call in of_calls]) for gate in of_calls[0][0]}
    hidden = torch.cat([of_call[1] for of_call in of_calls])
    low, high = {}, {}
    within = formulas.within_of(settings)
    for gate, values in gates.items():
        activation = within.recurrent_activation if gate in ("i", "f", "o", "r", "z") else within.activation
        if activation not in _RANGES:
            low[gate], high[gate] = float((values == 0).double().mean()) if activation == "relu" else 0.0, 0.0
            continue
        bottom, top = _RANGES[activation]
        margin = saturation * (top - bottom)
        low[gate] = float((values < bottom + margin).double().mean())
        high[gate] = float((values > top - margin).double().mean())
    return {"low": low, "high": high, "dead": ((hidden - hidden[:1]).abs() <= 5e-7).all(0).cpu()}


def _gates_of_call(settings: Settings, made: _Direction) -> tuple[dict[str, Tensor], Tensor]:
    """By gate, and h of the units before a projection, (N, H) of the steps that count."""
    counts = None if made.live is None else torch.cat(made.live).squeeze(1)

    def rows(states: list[Tensor]) -> Tensor:
        joined = torch.cat(states).double()
        return joined if counts is None else joined[counts]

    within = formulas.within_of(settings)
    if settings.kind in (CellKind.RNN_TANH, CellKind.RNN_RELU):
        return {"h": rows(made.h)}, rows(made.h)
    activation, recurrent = (formulas.ACTIVATIONS[name] for name in (within.activation, within.recurrent_activation))
    w_ih, w_hh, *others = (p.double() for p in made.params)
    b_ih, b_hh = others[:2] if settings.bias else (None, None)
    before = rows(made.before)
    norms = formulas.Norms(*others[-settings.num_norms :]) if settings.num_norms else None
    peephole = others[len(others) - settings.num_norms - 1] if within.peephole else None
    cell = formulas.Cell(w_hh, b_hh, peephole, within, norms)
    of_x = formulas.input_gates(rows(made.inputs), w_ih, b_ih, norms)
    of_h = cell.recurrent(before)
    if settings.kind == CellKind.LSTM:
        c = rows(made.c_of_h)
        i, f, g, o = (of_x + of_h).chunk(4, dim=-1)
        if peephole is not None:
            c_before = rows(made.c_before)
            p_i, p_f, p_o = peephole.chunk(3)
            i, f, o = i + p_i * c_before, f + p_f * c_before, o + p_o * c
        f, o = recurrent(f), recurrent(o)
        i = 1 - f if within.coupled_gates else recurrent(i)
        if norms is not None:
            assert norms.w_c is not None
            c = formulas.layer_norm(c, norms.w_c, norms.b_c)
        return {"i": i, "f": f, "g": activation(g), "o": o}, o * activation(c)
    (x_r, x_z, x_n), (h_r, h_z, h_n) = of_x.chunk(3, dim=-1), of_h.chunk(3, dim=-1)
    r, z = recurrent(x_r + h_r), recurrent(x_z + h_z)
    if within.reset_after:
        n = x_n + r * h_n
    else:
        w_n, b_n = w_hh.chunk(3)[2], None if b_hh is None else b_hh.chunk(3)[2]
        n = x_n + formulas.block_diagonal_linear(r * before, w_n, b_n, within.num_heads)
    return {"r": r, "z": z, "n": activation(n)}, rows(made.h)


# Layers taken step by step.


@contextlib.contextmanager
def _recording(model: Any) -> Iterator[dict[str, list[list[_Direction]]]]:
    """What it gives fills with the steps of every call of a layer: by name, call, and layer and direction."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {_checks._describe(model)}")
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, _LAYERS)]
    if not layers:
        raise ValueError("model: expected an LSTM, GRU or RNN of fused_rnn in it; fused_rnn.convert makes some")
    calls: dict[str, list[list[_Direction]]] = {}
    before = [(layer, layer.carried_h, layer.carried_c) for _, layer in layers if layer.stateful]
    for name, layer in layers:

        def run(input: Any, hx: Any, steps: Any, layer: Any = layer, name: str = name) -> Any:
            if layer.stateful:
                hx = carried.state_of(layer, input, hx)
            results, made = _run_by_steps(layer, input, hx, steps)
            calls.setdefault(name, []).append(made)
            if layer.stateful:
                carried.keep(layer, results[1])
            return results

        vars(layer)["_run"] = run
    try:
        yield calls
    finally:
        for _, layer in layers:
            del vars(layer)["_run"]
        for layer, h, c in before:
            layer.carried_h, layer.carried_c = h, c


def _run_by_steps(layer: Any, input: Any, hx: Any, steps: Any) -> tuple[Any, list[_Direction]]:
    """A call of the layer, and its steps."""
    if isinstance(input, PackedSequence):
        given = functional.steps_of(None, steps)
        _checks.check_padded(given)
        x, lengths = pad_packed_sequence(input)
        steps = {"lengths": lengths.to(x.device), "return_states": given.return_states}
        settings = layer._settings()._replace(batch_first=False)
    else:
        x, settings = input, layer._settings()
    params = layer._params()
    given = functional.steps_of(None, steps)
    region = functional.autocast_region(settings, x)
    if region is not None:
        x, hx, params = functional.autocast(settings, region, x, hx, params, packed=x is not input)
        given = functional.cast_reset_state(given, x)
        with torch.autocast(region, enabled=False):
            return _run_checked(settings, input, x, hx, params, given)
    return _run_checked(settings, input, x, hx, params, given)


def _run_checked(
    settings: Settings, input: Any, x: Any, hx: Any, params: Sequence[Tensor], given: Steps
) -> tuple[Any, list[_Direction]]:
    """The same after the casts of autocast; x is the input, padded where that is packed."""
    call = functional.prepare_layers(settings, x, hx, params, given)
    if settings.around is not None:
        params = functional._params_of_operator(settings, settings.around, params)
        if settings.around.input_dropout:
            x = functional._drop_inputs(settings, settings.around.input_dropout, call)
        settings = settings._replace(around=None)
    if call.batch is None:
        x = x.unsqueeze(1)
    elif settings.batch_first:
        x = x.transpose(0, 1)
    h0, c0 = (None if s is None else s.unsqueeze(1) if call.batch is None else s for s in (call.h, call.c))
    anew = tuple(s.unsqueeze(1) if call.batch is None else s for s in call.anew)
    live, reset = (
        None if steps is None else list(steps.unsqueeze(-1).unbind(0))
        for steps in (call.controls.mask, call.controls.reset)
    )
    within = formulas.within_of(settings)
    drawn = functional._draw_within(settings, within, call, call.controls)
    made, h_n, c_n = [], [], []
    per_cell = len(params) // (settings.num_layers * settings.num_directions)
    for k in range(settings.num_layers):
        outputs = []
        for d in range(settings.num_directions):
            index = k * settings.num_directions + d
            of_cell = list(params[index * per_cell : (index + 1) * per_cell])
            states = tuple(None if s is None else s[index] for s in (h0, c0))
            beginnings = None if reset is None else (reset, tuple(s[index] for s in anew))
            cell = _run_direction(settings, x, states, of_cell, d == 1, live, _drawn_for(drawn, index), beginnings)
            made.append(cell)
            last = 0 if d == 1 else -1
            h_n.append(cell.h[last])
            c_n += cell.c[last:][:1]
            output = torch.stack(cell.h)
            outputs.append(output if live is None else torch.where(torch.stack(live), output, 0))
        x = torch.cat(outputs, -1)
        if k + 1 < settings.num_layers:
            x = nn.functional.dropout(x, settings.dropout, training=True)
    ends: Any = torch.stack(h_n)
    if call.batch is None:
        x = x.squeeze(1)
    elif settings.batch_first:
        x = x.transpose(0, 1)
    if c_n:
        ends = (ends, torch.stack(c_n).to(x.dtype))
    if call.batch is None:
        ends = tuple(s.squeeze(1) for s in ends) if c_n else ends.squeeze(1)
    results: tuple[Any, ...] = (x, ends)
    if isinstance(input, PackedSequence):
        assert given.lengths is not None
        order = input.sorted_indices
        results = (pack_padded_sequence(x, given.lengths.cpu(), enforce_sorted=order is None), ends)
    if given.return_states:
        results = (*results, _states_of(settings, call, input, made))
    return results, made


def _states_of(settings: Settings, call: functional.Call, input: Any, made: Sequence[_Direction]) -> Any:
    """h, or (h, c), of every step as a call returns them."""
    of_lists = [[cell.h for cell in made], [cell.c for cell in made if cell.c]]
    states = [torch.stack([torch.stack(steps) for steps in lists]) for lists in of_lists if lists]
    states = [state.to(states[0].dtype) for state in states]  # (L*D, T, B, .)
    if isinstance(input, PackedSequence):
        sizes, order = input.batch_sizes.tolist(), input.sorted_indices
        in_order = states if order is None else [state.index_select(2, order) for state in states]
        states = [torch.cat([state[:, t, :rows] for t, rows in enumerate(sizes)], 1) for state in in_order]
    elif call.batch is None:
        states = [state.squeeze(2) for state in states]
    elif settings.batch_first:
        states = [state.transpose(1, 2) for state in states]
    return tuple(states) if settings.kind == CellKind.LSTM else states[0]


class _Drawn(NamedTuple):
    """What was drawn at random for one layer and direction; :class:`Controls` has the shapes."""

    factors: Tensor | None
    zoneout: Tensor | None
    zoneout_cell: Tensor | None


def _drawn_for(controls: Controls, index: int) -> _Drawn:
    return _Drawn(*(None if t is None else t[index] for t in controls[-3:]))


def _run_direction(
    settings: Settings,
    x: Tensor,
    states: tuple[Tensor | None, ...],
    params: list[Tensor],
    reverse: bool,
    live: list[Tensor] | None,
    drawn: _Drawn,
    beginnings: tuple[list[Tensor], tuple[Tensor, ...]] | None,
) -> _Direction:
    """One layer in one direction; a state is one tensor, whoever reads it.

    ``beginnings``: where rows begin anew, T of bool (B, 1), and the states that they begin from, none for zeros.
    """
    B, H, P = x.shape[1], settings.hidden_size, settings.state_size
    accumulate = formulas._accumulation_dtype(x.dtype)
    w_ih, w_hh, *others = (p.to(accumulate) for p in params)
    within = formulas.within_of(settings)
    others, of_norms = others[: len(others) - settings.num_norms], others[len(others) - settings.num_norms :]
    peephole = others.pop() if within.peephole else None
    w_hr = others.pop() if P != H else None
    b_ih, b_hh = others if settings.bias else (None, None)
    norms = formulas.Norms(*of_norms) if of_norms else None
    cell = formulas.Cell(w_hh, b_hh, peephole, within, norms)
    zoned, zoned_cell = (
        None if bits is None else formulas.unpack_bits(bits, size).split(B)
        for bits, size in ((drawn.zoneout, P), (drawn.zoneout_cell, H))
    )
    h = x.new_zeros(B, P) if states[0] is None else states[0]
    c = None
    if settings.kind == CellKind.LSTM:
        c = (x.new_zeros(B, H) if states[1] is None else states[1]).to(accumulate)
    if live is not None:  # what stands in a masked step must not meet a product, nor its gradient
        x = torch.where(torch.stack(live), x, 0)
    x_gates = formulas.input_gates(x.to(accumulate), w_ih, b_ih, norms)
    if torch.is_grad_enabled() and not x_gates.requires_grad:
        x_gates.requires_grad_()  # the states of a frozen layer have gradients, too
    of_x = x_gates.unbind(0)
    T = x.shape[0]
    own = torch.zeros(B, 1, dtype=torch.bool, device=x.device)  # rows whose h a step has made
    made = _Direction(list(x.unbind(0)), [h] * T, [], [h] * T, [], [], [], live, params)
    if c is not None:
        made = made._replace(c_before=[c] * T, c=[c] * T, new_c=[c] * T, c_of_h=[c] * T)
    for t in range(T - 1, -1, -1) if reverse else range(T):
        if within.bptt_steps is not None and t % within.bptt_steps == 0 and t > 0:
            h, c = h.detach(), None if c is None else c.detach()
        mark = t + 1 if reverse else t
        if beginnings is not None and mark < T:
            rows, anew = beginnings[0][mark], beginnings[1] or (h.new_zeros(()), h.new_zeros(()))
            h = torch.where(rows, anew[0].to(h.dtype), h)
            c = None if c is None else torch.where(rows, anew[-1].to(c.dtype), c)
            own = own & ~rows
        h_before = h.to(accumulate)
        if within.recurrent_grad_clip is not None:
            h_before = formulas.read_state(h_before, own, within.recurrent_grad_clip)
        made.before[t] = h_dropped = h_before if drawn.factors is None else h_before * drawn.factors.to(accumulate)
        new_h, new_c = formulas.STEPS[settings.kind](cell, of_x[t], h_dropped, h_before, c)
        if w_hr is not None:
            new_h = nn.functional.linear(new_h, w_hr)
        new_h = formulas.zone(new_h, h_before, None if zoned is None else zoned[t], within.zoneout).to(x.dtype)
        if new_c is not None and c is not None:
            made.c_before[t], made.c_of_h[t] = c, new_c
            keeps = None if zoned_cell is None else zoned_cell[t]
            made.new_c[t] = new_c = formulas.zone(new_c, c, keeps, within.zoneout_cell)
        if live is not None:
            new_h = torch.where(live[t], new_h, h)
            new_c = None if new_c is None or c is None else torch.where(live[t], new_c, c)
        made.h[t] = h = new_h
        own = own | (True if live is None else live[t])
        if new_c is not None:
            made.c[t] = c = new_c
    return made


def _check_call(name: str, call: Any) -> None:
    if not callable(call):
        raise TypeError(
            f"{name}: expected a function without arguments that runs the model, got {_checks._describe(call)}"
        )


def _check_ran(calls: dict[str, Any]) -> None:
    if not calls:
        raise ValueError("model: expected a call of one of its layers, none ran")


# Tables and pictures.


def _label(layer: int, direction: int, D: int) -> str:
    return f"layer {layer}" + (" reverse" if direction else " forward" if D == 2 else "")


def _by_direction(values: Tensor) -> list[tuple[str, Tensor]]:
    L, D, _ = values.shape
    return [(_label(k, d, D), values[k, d]) for k in range(L) for d in range(D)]


def _table(rows: list[list[str]]) -> str:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *others = (
            cell.ljust(w) if k == 0 else cell.rjust(w) for k, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(["  " + first, *others]).rstrip())
    return "\n".join(lines)


def _new_axes() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("plot: needs matplotlib, pip install matplotlib") from error
    return pyplot.subplots()[1]
