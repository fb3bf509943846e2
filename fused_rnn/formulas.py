"""The recurrent layers in plain PyTorch: one step function per cell, one loop over time, one over the stack.

This is what the kernels are compared with, what forward mode and second derivatives go through, and what runs where no
kernel exists (complex numbers, devices other than the kernels'). It is written to be read beside the papers, not to be
fast: every line is an ordinary differentiable tensor operation, so it works for any dtype and device and to any
derivative.

:func:`run_stack` and :func:`run_step` have the signatures of the fused operators in :mod:`fused_rnn.ops`. Letters in
shapes: :mod:`fused_rnn.settings`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from .settings import NOTHING_WITHIN, CellKind, Controls, Settings, Within

__all__ = ["run_stack", "run_step"]


State = tuple[Tensor, Tensor | None]


class Norms(NamedTuple):
    """Parameters of layer normalisation of one layer and direction."""

    w_ih: Tensor  # gain of W_ih x (G*H)
    w_hh: Tensor  # of W_hh h (G*H)
    w_c: Tensor | None = None  # of an LSTM's c (H)
    b_c: Tensor | None = None  # what is added to it (H)


def layer_norm(x: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    """Layer normalisation (Ba, Kiros and Hinton 2016): over all of the last dimension together.

    1e-5 is added to the variance, as :func:`torch.nn.functional.layer_norm` does.
    """
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred * centred.conj()).real.mean(-1, keepdim=True)
    normal = centred / torch.sqrt(variance + 1e-5) * gain
    return normal if bias is None else normal + bias


class Cell(NamedTuple):
    """What a step is given beside the state: the weights of one layer and direction, and what changes the formulas."""

    w_hh: Tensor
    b_hh: Tensor | None
    peephole: Tensor | None  # of i, f, o: (3*H)
    within: Within
    norms: Norms | None = None

    def recurrent(self, h: Tensor) -> Tensor:
        if self.norms is None:
            return block_diagonal_linear(h, self.w_hh, self.b_hh, self.within.num_heads)
        normal = layer_norm(block_diagonal_linear(h, self.w_hh, None, self.within.num_heads), self.norms.w_hh)
        return normal if self.b_hh is None else normal + self.b_hh


def input_gates(x: Tensor, w_ih: Tensor, b_ih: Tensor | None, norms: Norms | None) -> Tensor:
    """W_ih x + b_ih of any rows x; with layer normalisation that of W_ih x, over all gates together, plus b_ih."""
    if norms is None:
        return linear(x, w_ih, b_ih)
    normal = layer_norm(linear(x, w_ih), norms.w_ih)
    return normal if b_ih is None else normal + b_ih


def block_diagonal_linear(h: Tensor, w: Tensor, b: Tensor | None, num_heads: int) -> Tensor:
    """W h + b for each gate, where W is block-diagonal: a unit sees what its own head has in h (Beck et al. 2024).

    h (B, H); w (G*H, H / num_heads), of which the row of a gate's unit has the columns of the unit's block; b (G*H).
    """
    if num_heads == 1:
        return linear(h, w, b)
    head_size = w.shape[1]
    blocks = w.unflatten(0, (-1, num_heads, head_size))
    of_gates = torch.einsum("gnuk,bnk->bgnu", blocks, h.unflatten(-1, (num_heads, head_size))).flatten(1)
    return of_gates if b is None else of_gates + b


# The functions that options name.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "hard_sigmoid": lambda x: (x / 6 + 0.5).clamp(0, 1),  # torch.nn's own has no second derivative
    "softsign": torch.nn.functional.softsign,
    "identity": lambda x: x,
}


# The cells. x_gates = W_ih x_t + b_ih (B, G*H); h (B, H or P), c (B, H). For what is multiplied by W_hh there is
# h_dropped, which is h times the factors of recurrent_dropout (Gal and Ghahramani 2016), if any.


def rnn_step(cell: Cell, x_gates: Tensor, h_dropped: Tensor, h: Tensor, c: Tensor | None) -> State:
    """Elman network (Elman 1990): h' = tanh(W_ih x + b_ih + W_hh h + b_hh), or another function in place of tanh.

    Of rectified units: Le, Jaitly and Hinton 2015. With a head for each unit W_hh h is u * h, u the one column of w_hh:
    an independently recurrent network (Li, Li, Cook, Zhu and Gao 2018).
    """
    return ACTIVATIONS[cell.within.activation](x_gates + cell.recurrent(h_dropped)), c


def lstm_step(cell: Cell, x_gates: Tensor, h_dropped: Tensor, h: Tensor, c: Tensor | None) -> State:
    """Long short-term memory (Hochreiter and Schmidhuber 1997) with a forget gate (Gers 2000); gates i, f, g, o.

    With peepholes (Gers and Schmidhuber 2000) i and f see the old c, and o the new one; coupled, i is 1 - f (Greff et
    al. 2015). With layer normalisation (Ba et al. 2016) h is made of the normalised c; c itself goes on as it is.
    """
    assert c is not None
    options = cell.within
    activation, recurrent_activation = ACTIVATIONS[options.activation], ACTIVATIONS[options.recurrent_activation]
    i, f, g, o = (x_gates + cell.recurrent(h_dropped)).chunk(4, dim=-1)
    if cell.peephole is not None:
        p_i, p_f, p_o = cell.peephole.chunk(3)
        i, f = i + p_i * c, f + p_f * c
    f = recurrent_activation(f)
    i = 1 - f if options.coupled_gates else recurrent_activation(i)
    c = f * c + i * activation(g)
    if options.cell_clip is not None:
        c = c.clamp(-options.cell_clip, options.cell_clip)
    if cell.peephole is not None:
        o = o + p_o * c
    seen = c
    if cell.norms is not None:
        assert cell.norms.w_c is not None
        seen = layer_norm(c, cell.norms.w_c, cell.norms.b_c)
    h = recurrent_activation(o) * activation(seen)
    return h, c


def gru_step(cell: Cell, x_gates: Tensor, h_dropped: Tensor, h: Tensor, c: Tensor | None) -> State:
    """Gated recurrent unit (Cho 2014), the reset gate after the product with W_hh as in cuDNN; gates r, z, n.

    With ``reset_after=False`` it is before the product, as Cho has it.
    """
    options = cell.within
    activation, recurrent_activation = ACTIVATIONS[options.activation], ACTIVATIONS[options.recurrent_activation]
    x_r, x_z, x_n = x_gates.chunk(3, dim=-1)
    h_r, h_z, h_n = cell.recurrent(h_dropped).chunk(3, dim=-1)
    r = recurrent_activation(x_r + h_r)
    z = recurrent_activation(x_z + h_z)
    if options.reset_after:
        n = activation(x_n + r * h_n)
    else:
        b_n = None if cell.b_hh is None else cell.b_hh.chunk(3)[2]
        w_n = cell.w_hh.chunk(3)[2]
        n = activation(x_n + block_diagonal_linear(r * h_dropped, w_n, b_n, options.num_heads))
    return (1 - z) * n + z * h, c


STEPS: dict[int, Callable[[Cell, Tensor, Tensor, Tensor, Tensor | None], State]] = {
    CellKind.RNN_TANH: rnn_step,
    CellKind.RNN_RELU: rnn_step,
    CellKind.LSTM: lstm_step,
    CellKind.GRU: gru_step,
}


class _ClampedGradient(torch.autograd.Function):
    """x itself, whose gradient is clamped; differentiable again, and under vmap."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, limit: float) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.limit = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.clamp(-ctx.limit, ctx.limit), None


class _ClampedGradientForwardToo(_ClampedGradient):
    """The same with forward mode, a function that the tracer of torch.compile does not take."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Tensor:
        return tangent.clone()


def clamp_gradient(x: Tensor, limit: float) -> Tensor:
    """x, whose gradient is clamped to -limit to limit on its way back."""
    function = _ClampedGradient if torch.compiler.is_compiling() else _ClampedGradientForwardToo
    result: Tensor = function.apply(x, limit)
    return result


def read_state(h: Tensor, made: Tensor, limit: float) -> Tensor:
    """h as the next step reads it, whose gradient is clamped on its way back (FlashRNN, Poeppel et al. 2024).

    ``made``: bool (B, 1), False for rows whose h no step has made: that of the caller gets its gradient whole.
    """
    return torch.where(made, clamp_gradient(h, limit), h)


def unpack_bits(bits: Tensor, size: int) -> Tensor:
    """bool (..., size), of which bit u % 8 of byte u / 8 of ``bits`` (..., ceil(size / 8)) is element u."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.unsqueeze(-1) >> shifts & 1).flatten(-2)[..., :size].bool()


def zone(new: Tensor, old: Tensor, keeps: Tensor | None, rate: float) -> Tensor:
    """Zoneout (Krueger et al. 2017): units that keep what they had; without a draw, what that is on average."""
    if keeps is not None:
        return torch.where(keeps, old, new)
    return (1 - rate) * new + rate * old if rate else new


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision is summed, and c kept, in float32 as the kernels do; every other dtype is its own."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _carry(new: Tensor, old: Tensor) -> Tensor:
    """The state after a step that concerned only the first rows: the others keep theirs."""
    b = new.shape[0]
    return new if b == old.shape[0] else torch.cat([new, old[b:]])


class _Course(NamedTuple):
    """What happens to one layer in one direction, step by step; each a list of T tensors in order of time."""

    inputs: Sequence[Tensor]  # (b_t, I)
    live: Sequence[Tensor] | None  # (B, 1): rows that are False there keep their state, and their output is 0
    reset: Sequence[Tensor] | None  # (B, 1): rows that begin anew before the step; in the reverse direction after it
    zoneout: Sequence[Tensor] | None  # bool (b_t, P): units that keep their h
    zoneout_cell: Sequence[Tensor] | None  # bool (b_t, H)


def _layer(
    kind: int,
    course: _Course,
    state: State,
    weights: Sequence[Tensor | None],
    reverse: bool,
    within: Within,
    anew: tuple[Tensor | float, Tensor | float] = (0, 0),
    factors: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor | None]:
    """One layer in one direction.

    Sequences are sorted by falling length, so step t concerns the first b_t rows of the state; of the others the
    forward direction has passed the end, the backward one not yet reached it. ``anew``: h (B, P) and c (B, H) that rows
    begin anew from. ``factors``: (B, P), of h before W_hh. Returns, in order of time, the T outputs (b_t, P), each the
    h after a step, and the T c (b_t, H) after it in the dtype of sums, none without a cell state; then h_n (B, P) and
    c_n (B, H). Outputs and c are 0 in rows for which a step does not count.
    """
    h, c = state
    dtype = h.dtype
    accumulate = _accumulation_dtype(dtype)
    w_ih, w_hh, b_ih, b_hh, w_hr, peephole, *norms = (None if w is None else w.to(accumulate) for w in weights)
    assert w_ih is not None and w_hh is not None
    cell = Cell(w_hh, b_hh, peephole, within, Norms(*norms) if norms else None)  # type: ignore[arg-type]
    if c is not None:
        c = c.to(accumulate)
    anew_h, anew_c = (s.to(t) if isinstance(s, Tensor) else s for s, t in zip(anew, (dtype, accumulate), strict=True))
    made = None  # (B, 1): rows whose h an earlier step has made, where that matters
    if within.recurrent_grad_clip is not None:
        made = torch.zeros(h.shape[0], 1, dtype=torch.bool, device=h.device)
    outputs, cells = [], []
    inputs, live, reset = course[:3]
    k, num_steps = within.bptt_steps, len(inputs)
    order = reversed(range(num_steps)) if reverse else range(num_steps)
    for t in order:
        x = inputs[t]
        b = x.shape[0]
        if k is not None and t > 0 and t % k == 0:
            h, c = h.detach(), None if c is None else c.detach()
        mark = t + 1 if reverse else t
        if reset is not None and mark < num_steps:  # after the cut, which is of what the steps before have left
            h = torch.where(reset[mark], anew_h, h)
            c = None if c is None else torch.where(reset[mark], anew_c, c)
            made = None if made is None else made & ~reset[mark]
        h_previous, c_previous = h[:b], None if c is None else c[:b]
        if made is not None and within.recurrent_grad_clip is not None:
            h_previous = read_state(h_previous, made[:b], within.recurrent_grad_clip)
        h_previous = h_previous.to(accumulate)
        if live is not None:
            # The state of a row without any step is whatever the caller gave: it must meet neither a product, which
            # would bring it into the weights' gradients, nor another gate.
            h_previous = torch.where(live[t], h_previous, 0)
            c_previous = None if c_previous is None else torch.where(live[t], c_previous, 0)
        x_gates = input_gates(x.to(accumulate), w_ih, b_ih, cell.norms)
        h_dropped = h_previous if factors is None else h_previous * factors[:b].to(accumulate)
        h_t, c_t = STEPS[kind](cell, x_gates, h_dropped, h_previous, c_previous)
        if w_hr is not None:  # Sak, Senior and Beaufays 2014: h is projected from H to P before it is used again
            h_t = linear(h_t, w_hr)
        h_t = zone(h_t, h_previous, None if course.zoneout is None else course.zoneout[t], within.zoneout)
        if c_t is not None and c_previous is not None:
            keeps = None if course.zoneout_cell is None else course.zoneout_cell[t]
            c_t = zone(c_t, c_previous, keeps, within.zoneout_cell)
        h_t = h_t.to(dtype)
        outputs.append(h_t if live is None else torch.where(live[t], h_t, 0))
        if c_t is not None:
            cells.append(c_t if live is None else torch.where(live[t], c_t, 0))
        if live is not None:
            h_t = torch.where(live[t], h_t, h)
            c_t = None if c is None or c_t is None else torch.where(live[t], c_t, c)
        h = _carry(h_t, h)
        c = None if c is None or c_t is None else _carry(c_t, c)
        if made is not None:
            made = _carry(made[:b] | (True if live is None else live[t]), made)
    if reverse:
        outputs.reverse()
        cells.reverse()
    return outputs, cells, h, None if c is None else c.to(dtype)


def run_stack(
    settings: Settings,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    params: Sequence[Tensor],
    controls: Controls,
) -> tuple[Tensor, ...]:
    """All layers and directions.

    Args:
        settings: ``recompute`` is without effect here, where autograd keeps every step.
        input: (T, B, I), or (B, T, I) with ``batch_first``, or packed data (N, I) with ``batch_sizes``.
        h0: (L*D, B, P) or ``None`` for zeros. c0: (L*D, B, H) or ``None``; LSTM only.
        params: for each layer and direction in turn w_ih (G*H, I of the layer), w_hh (G*H, P; with ``num_heads``
            H / num_heads in place of P), with ``bias`` b_ih (G*H) and b_hh (G*H), for a projected LSTM w_hr (P, H),
            with ``peephole`` w_peephole (3*H), with ``layer_norm`` w_norm_ih and w_norm_hh (G*H), and for an LSTM
            w_norm_c and with ``bias`` b_norm_c (H). Behind them all, with ``reset_state``, the h (L*D, B, P) and for an
            LSTM c (L*D, B, H) that rows begin anew from.
        controls: which steps there are, where rows begin anew, and what was drawn at random.

    Returns:
        ``(output, h_n, c_n)``: (T, B, D*P) — a transposed view of that with ``batch_first``, (N, D*P) if packed —,
        (L*D, B, P) and (L*D, B, H), the last an empty tensor unless the cell is an LSTM. All in the dtype of ``input``;
        for float16 and bfloat16 sums and c are float32 within the call and h is rounded at every step. With
        ``return_states`` also the states after every step, rows in the order of packed data, those of step 0 first: c
        of each layer and direction (L*D, N, H) in the dtype of sums, and h (L, N, D*P) before dropout; 0 in steps that
        do not count.
    """
    kind, num_layers, num_directions = settings.kind, settings.num_layers, settings.num_directions
    within = within_of(settings)
    batch_sizes, mask, dropout, reset, recurrent_dropout, zoneout, zoneout_cell = controls
    params, anew = split_params(settings, params)
    states = len(anew)
    per_cell = len(params) // (num_layers * num_directions)
    has_projection = per_cell > 2 + 2 * settings.bias + within.peephole + settings.num_norms

    if batch_sizes is not None:
        sizes: list[int] = batch_sizes.tolist()
        inputs: Sequence[Tensor] = input.split(sizes)
        join: Callable[..., Tensor] = torch.cat
    else:
        inputs = (input.transpose(0, 1) if settings.batch_first else input).unbind(0)
        join = torch.stack
        sizes = [inputs[0].shape[0]] * len(inputs)
    batch = inputs[0].shape[0]
    live = None
    if mask is not None:
        live = mask.unsqueeze(-1).unbind(0)
        # What stands in a masked step, NaN included, must not meet a product, nor its gradient.
        inputs = [torch.where(counts, x, 0) for counts, x in zip(live, inputs, strict=True)]
    resets = None if reset is None else reset.unsqueeze(-1).unbind(0)

    def of_steps(bits: Tensor | None, index: int, size: int) -> Sequence[Tensor] | None:
        return None if bits is None else unpack_bits(bits[index], size).split(sizes)

    h_n, c_n, hidden, cells = [], [], [], []
    for layer in range(num_layers):
        directions = []
        for direction in range(num_directions):
            index = layer * num_directions + direction
            weights: list[Tensor | None] = list(params[index * per_cell : (index + 1) * per_cell])
            weights, norms = weights[: per_cell - settings.num_norms], weights[per_cell - settings.num_norms :]
            peephole = weights.pop() if within.peephole else None
            w_hr = weights.pop() if has_projection else None
            w_ih, w_hh, b_ih, b_hh = weights if settings.bias else (*weights, None, None)
            assert w_hh is not None
            rows, size = w_hh.shape[0], w_hh.shape[1] * within.num_heads
            hidden_size = rows // kind.num_gates
            h = h0[index] if h0 is not None else input.new_zeros(batch, size)
            c = None
            if kind.num_states:
                c = c0[index] if c0 is not None else input.new_zeros(batch, kind.num_states * hidden_size)
            outputs, c_of_steps, h, c = _layer(
                kind,
                _Course(
                    inputs, live, resets, of_steps(zoneout, index, size), of_steps(zoneout_cell, index, hidden_size)
                ),
                (h, c),
                (w_ih, w_hh, b_ih, b_hh, w_hr, peephole, *norms),
                direction == 1,
                within,
                (anew[0][index] if states else 0, anew[1][index] if states == 2 else 0),
                None if recurrent_dropout is None else recurrent_dropout[index],
            )
            directions.append(outputs)
            h_n.append(h)
            if c is not None:
                c_n.append(c)
                cells.append(c_of_steps)
        inputs = [torch.cat(both, dim=-1) for both in zip(*directions, strict=True)]
        hidden.append(inputs)
        if dropout is not None and layer < num_layers - 1:
            inputs = [x * f for x, f in zip(inputs, dropout[layer].flatten(0, -2).split(sizes), strict=True)]

    output = join(inputs)
    if settings.batch_first and batch_sizes is None:
        output = output.transpose(0, 1)
    final = (torch.stack(h_n), torch.stack(c_n) if c_n else input.new_empty(0))
    if not within.return_states:
        return output, *final
    of_sums = _accumulation_dtype(input.dtype)
    all_cells = torch.stack([torch.cat(c) for c in cells]) if cells else input.new_empty(0, dtype=of_sums)
    return output, *final, all_cells, torch.stack([torch.cat(h) for h in hidden])


def split_params(settings: Settings, params: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The parameters of :func:`run_stack`, and the states behind them that rows begin anew from."""
    if settings.within is None or not settings.within.reset_state:
        return params, ()
    end = len(params) - (2 if settings.kind.num_states else 1)
    return params[:end], params[end:]


def within_of(settings: Settings) -> Within:
    """What the formulas are to do beside the plain cell."""
    within = settings.within or NOTHING_WITHIN
    return within._replace(activation="relu") if settings.kind == CellKind.RNN_RELU else within


def run_step(
    settings: Settings, input: Tensor, h: Tensor, c: Tensor | None, params: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """One step of one cell.

    Args:
        settings: which cell, and whether it has biases.
        input: (B, I).
        h: (B, H). c: (B, H) for an LSTM, else ``None``.
        params: w_ih (G*H, I), w_hh (G*H, H), with ``bias`` b_ih and b_hh (G*H).

    Returns:
        ``(h, c)`` after the step in the dtype of ``h``; ``c`` is ``None`` unless the cell is an LSTM.
    """
    weights = (*params, None, None) if settings.bias else (*params, None, None, None, None)
    course = _Course([input], None, None, None, None)
    _, _, h, c = _layer(settings.kind, course, (h, c), weights, False, within_of(settings))
    return h, c
