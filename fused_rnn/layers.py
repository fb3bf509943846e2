"""Recurrent layers with the constructor, attributes, parameters and results of ``torch.nn``'s."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, overload

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import _checks, carried, functional, initial
from .options import HasOptionsWithin, changed_options, in_around, in_within, set_options
from .settings import (
    EVERY_STEP,
    LAYER_OPTIONS,
    NOTHING_AROUND,
    NOTHING_WITHIN,
    OTHER_NONLINEARITIES,
    STEP_OPTIONS,
    AnyCellKind,
    Around,
    CellKind,
    ForwardOptions,
    LayerOptions,
    Settings,
    StepOptions,
    Within,
    new_settings,
    show_options,
)
from .twin import HasTwin
from .weights import ByAttribute, FlatWeightsMixin, narrow_to_heads, widen_to_gates

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["GRU", "LSTM", "RNN"]

_KINDS = {kind.name: kind for kind in CellKind}
# Of an RNN, whose mode says which function it has: those that are no kind of cell by themselves.
_OTHER_RNNS = {f"RNN_{name.upper()}": name for name in OTHER_NONLINEARITIES}


class Recurrent(HasTwin, HasOptionsWithin, ByAttribute, FlatWeightsMixin):
    """What all layers share.

    Derives from ``RNNBase`` and not from ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN``, at whose instances Dynamo breaks the
    graph. ``RNNBase`` creates and initialises the parameters, so names, order and random numbers are its own.
    """

    def __init__(
        self,
        mode: str,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        proj_size: int,
        device: Any,
        dtype: Any,
        options: LayerOptions,
    ) -> None:
        _checks.check_constructor(
            options,
            input_size=input_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            proj_size=proj_size,
        )
        _checks.check_fit(
            options,
            is_lstm=mode == "LSTM",
            is_gru=mode == "GRU",
            hidden_size=hidden_size,
            bias=bias,
            bidirectional=bidirectional,
            proj_size=proj_size,
        )
        is_other_rnn = mode in _OTHER_RNNS
        is_custom = self._custom is not None
        # The parameters get their first values in RNNBase's constructor.
        self.init = options.get("init", "torch")
        self.forget_bias = options.get("forget_bias")
        num_heads = options.get("num_heads", 1)
        if num_heads > 1 or is_custom:
            self._has_shapes = False
        super().__init__(
            "RNN_TANH" if is_other_rnn or is_custom else mode,  # RNNBase knows no other
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )
        if is_other_rnn or is_custom:
            self.mode = mode
        if num_heads > 1 or is_custom:
            if self._custom is not None:
                widen_to_gates(self, self._custom.num_gates)
            if num_heads > 1:
                narrow_to_heads(self, num_heads)
                self._within = NOTHING_WITHIN._replace(num_heads=num_heads)
            self._init_flat_weights()
            del self._has_shapes
            self.reset_parameters()
        if bias and not options.get("recurrent_bias", True):
            self._remove_parameters("bias_hh")
        set_options(self, options, LAYER_OPTIONS)
        if self.peephole and self.init == "torch":
            initial.draw_peepholes(self)

    # Of layers without these options, and those that were made, or pickled, before there were any.
    _custom: ClassVar[AnyCellKind | None] = None  # of a custom cell; that of the others is in `mode`
    recompute: bool = False
    init: str = "torch"
    forget_bias: float | None = None
    _around: Around | None = None
    _has_shapes: bool = True  # False while RNNBase's constructor runs, whose W_hh are no heads'

    input_dropout: float = in_around("input_dropout")
    weight_dropout: float = in_around("weight_dropout")
    recurrent_bias: bool = in_around("recurrent_bias")
    stateful: bool = in_around("stateful")

    recurrent_grad_clip: float | None = in_within("recurrent_grad_clip")
    bptt_steps: int | None = in_within("bptt_steps")

    def _prepare_option(self, name: str, value: Any) -> None:
        """Before an option is set: see that it fits, and that what belongs to it is there."""
        options = {option: getattr(self, option) for option in LAYER_OPTIONS} | {name: value}
        _checks.check_options({name: value})
        _checks.check_fit_of_layer(options, self)
        if name == "num_heads":
            _checks.check_same_heads(value, self.num_heads)
        if name == "stateful" and value:
            carried.make_room(self)
        if name == "peephole" and value != self.peephole:
            # as zeros, which change nothing
            specs = (("weight_peephole", (3 * self.hidden_size,)),)
            self._add_parameters(specs) if value else self._remove_parameters("weight_peephole")
        if name == "layer_norm" and value != self.layer_norm:
            if value:
                within = (self._within or NOTHING_WITHIN)._replace(layer_norm=True)
                self._add_parameters(_checks.norm_specs(self._settings()._replace(within=within)))
                initial.set_norms(self)
            else:
                self._remove_parameters("weight_norm", "bias_norm")

    def _add_parameters(self, specs: Sequence[_checks.ParamSpec]) -> None:
        """Zeros of these names and shapes for each layer and direction, behind the others but for those of norms."""
        with_added = []
        for of_cell in self._all_weights:
            first, suffix = of_cell[0], of_cell[0].removeprefix("weight_ih")
            names = [name + suffix for name, _ in specs]
            for name, (_, shape) in zip(names, specs, strict=True):
                zeros = getattr(self, first).detach().new_zeros(shape)
                self.register_parameter(name, nn.Parameter(zeros))
            before = [name for name in of_cell if not initial.is_of_norm(name)]
            with_added.append([*before, *names, *of_cell[len(before) :]])
        self._set_names(with_added)
        parameters = self._parameters
        for name in self._flat_weights_names:  # in the order of the flat list
            if name in parameters:
                parameters[name] = parameters.pop(name)

    def _remove_parameters(self, *prefixes: str) -> None:
        names = [name for name in self._flat_weights_names if name.startswith(prefixes)]
        for name in names:
            delattr(self, name)
        self._set_names([[name for name in of_cell if name not in names] for of_cell in self._all_weights])

    def _set_names(self, all_weights: list[list[str]]) -> None:
        self._all_weights = all_weights
        self._flat_weights_names = [name for of_cell in all_weights for name in of_cell]
        self._init_flat_weights()

    def reset_parameters(self) -> None:
        """Draw the parameters anew, as ``init`` and ``forget_bias`` say."""
        if not self._has_shapes:
            return
        if self.init == "keras":
            initial.draw_as_keras(self)
        else:
            super().reset_parameters()
        initial.set_norms(self)
        if self.forget_bias is not None:
            initial.set_forget_bias(self, self.forget_bias)

    def reset_state(self, rows: Any = None) -> None:
        """Forget the state that a stateful layer carries from call to call: the next call begins from zeros.

        Args:
            rows: of the batch, those to begin anew: a bool tensor (B), or indices; ``None`` for all, after which the
                next call may have another batch size.

        Raises:
            RuntimeError: the layer is not stateful, or ``rows`` are given where there is no batch.
            IndexError: a row is none of the batch.
        """
        carried.reset(self, rows)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        carried.convert(self, fn)
        return self

    def extra_repr(self) -> str:
        changed = [f", {name}={value!r}" for name, value in changed_options(self, LAYER_OPTIONS).items()]
        if self.mode in _OTHER_RNNS:
            changed.insert(0, f", nonlinearity={_OTHER_RNNS[self.mode]!r}")
        return super().extra_repr() + "".join(changed)

    def flatten_parameters(self) -> None:
        """Does nothing: the kernels need no particular placement of the parameters in memory."""

    def _settings(self) -> Settings:
        """Everything a call needs to know but its tensors. A small call feels what this costs."""
        within = self._within
        kind: AnyCellKind
        try:
            kind = self._custom or _KINDS[self.mode]
        except (KeyError, TypeError):
            kind, within = CellKind.RNN_TANH, self._within_other_rnn()
        hidden_size = self.hidden_size
        fields = (
            self.input_size,
            hidden_size,
            self.proj_size or hidden_size,
            kind,
            self.bias,
            self.num_layers,
            self.bidirectional,
            self.batch_first,
            self.recompute,
            self.dropout if self.training else 0.0,
            (),
            None if self._around is None else self._around_call(),
            None if within is None else _not_nothing(within.in_mode(self.training)),
        )
        return new_settings(Settings, fields)

    def _around_call(self) -> Around | None:
        around = self._around if self.training or self._around is None else self._around.in_eval_mode()
        return None if around == NOTHING_AROUND else around

    def _within_other_rnn(self) -> Within:
        if not isinstance(self.mode, str) or self.mode not in _OTHER_RNNS:
            modes = ", ".join(map(repr, (*_KINDS, *_OTHER_RNNS)))
            raise ValueError(f"mode: expected one of {modes}, got {self.mode!r}")
        return (self._within or NOTHING_WITHIN)._replace(activation=_OTHER_RNNS[self.mode])

    def _params(self) -> list[Tensor]:
        """The parameters as they are now: parametrizations, pruning and ``functional_call`` exchange them."""
        names = self._flat_weights_names
        parameters: dict[str, Any] = self._parameters
        try:
            return [parameters[name] for name in names]
        except KeyError:  # parametrized, or replaced by a plain tensor
            return [getattr(self, name) for name in names]

    def _params_by_attribute(self) -> list[Tensor]:
        return [getattr(self, name) for name in self._flat_weights_names]

    def _for_operators(self, hx: Any, steps: ForwardOptions) -> tuple[Any, ForwardOptions]:
        """States as functions and operators have them: h, or (h, c)."""
        return hx, steps

    def _run(self, input: Any, hx: Any, steps: ForwardOptions) -> Any:
        settings = self._settings()
        carries_on = settings.around is not None and settings.around.stateful
        if carries_on:
            hx = carried.state_of(self, input, hx)
        if isinstance(input, PackedSequence):
            results = self._run_packed(settings, input, hx, steps)
        else:
            given = functional.steps_of(None, steps) if steps else EVERY_STEP
            results = functional.call_layers(settings, input, hx, self._params(), given)
        if carries_on:
            carried.keep(self, results[1])
        return results

    def _run_packed(self, settings: Settings, input: PackedSequence, hx: Any, steps: ForwardOptions) -> Any:
        """A packed batch. ``hx`` and the results' states are in the order the sequences had before they were sorted."""
        data, batch_sizes, sorted_indices, unsorted_indices = input
        _checks.check_sorted_indices(input)
        if hx is not None and sorted_indices is not None:
            h, c = _checks.split_state(settings.kind, hx)
            assert h is not None
            _checks.check_layer_states(settings, h, c, sorted_indices.numel())
            _checks.check_state_memory(hx)
            hx = _rows(h if c is None else (h, c), sorted_indices)
        given = functional.steps_of(batch_sizes, steps)
        results = functional.call_layers(settings, data, hx, self._params(), given)
        if given.return_states:
            output, states, of_steps = results
        else:
            output, states = results
        if unsorted_indices is not None:
            states = _rows(states, unsorted_indices)
        packed = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        return (packed, states, of_steps) if given.return_states else (packed, states)


def _not_nothing(within: Within) -> Within | None:
    return None if within == NOTHING_WITHIN else within


def _rows(states: Any, order: Tensor) -> Any:
    """h, or the pair (h, c), with its batch rows in this order."""
    if isinstance(states, tuple):
        return tuple(state.index_select(1, order) for state in states)
    return states.index_select(1, order)


class LSTM(Recurrent):
    r"""Long short-term memory layers over a sequence, drop-in for :class:`torch.nn.LSTM`.

    For each layer and step, with :math:`\sigma` the logistic function and :math:`\odot` the product of elements
    (Hochreiter and Schmidhuber 1997; forget gate: Gers, Schmidhuber and Cummins 2000):

    .. math::
        i, f, o &= \sigma(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh}) \quad\text{(rows of i, of f, of o)} \\
        g &= \tanh(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh}) \quad\text{(rows of g)} \\
        c_t &= f \odot c_{t-1} + i \odot g \\
        h_t &= o \odot \tanh(c_t), \quad\text{or}\quad W_{hr} (o \odot \tanh(c_t)) \text{ with a projection}

    Args:
        input_size: features of the input, I.
        hidden_size: features of the state, H.
        num_layers: layers in the stack, L; each takes the output of the one below.
        bias: whether there are ``bias_ih`` and ``bias_hh``.
        batch_first: whether input and output are (B, T, .) instead of (T, B, .); the states never are.
        dropout: probability of zeroing an element of each layer's output but the last, in training mode.
        bidirectional: whether a second set of weights reads the sequence from its end (D = 2, else 1).
        proj_size: P, size to which h is projected (Sak, Senior and Beaufays 2014); 0 for no projection (P = H).
        device, dtype: of the parameters.
        recompute: keep only h and c of every step for the backward pass, not the gates, which it then computes again:
            less than half the memory, more time, the same numbers.
        input_dropout: in training mode, probability of zeroing a feature of the input, the same at all steps of a row
            (Gal and Ghahramani 2016; ``dropout`` of a Keras layer). Of the first layer: those above have ``dropout``.
        recurrent_dropout: in training mode, probability of zeroing a unit of h where it meets W_hh, the same at all
            steps of a row, in every layer and direction (Gal and Ghahramani 2016). Nothing but that product sees it.
        weight_dropout: in training mode, probability of zeroing an element of every W_hh, drawn once a call (Wan et al.
            2013; Merity, Keskar and Socher 2017).
        zoneout, zoneout_cell: in training mode, probability of a unit to keep its h, or its c, of the step before,
            drawn for each row and step; in eval mode the mean of both, weighted by it (Krueger et al. 2017). The new h
            is made of the new c, also where the old one is kept.
        activation: the function of g and, in h, of c in place of tanh: ``"tanh"``, ``"sigmoid"``, ``"relu"``,
            ``"hard_sigmoid"`` (x / 6 + 1 / 2 between 0 and 1, as ``torch.nn.Hardsigmoid``), ``"softsign"`` or
            ``"identity"``.
        recurrent_activation: that of i, f and o in place of the logistic function, one of the same.
        reset_after: only ``True``; :class:`GRU` has it.
        recurrent_bias: ``False`` for no ``bias_hh``: one bias per gate.
        peephole: i and f see the c before the step, o the one after it (Gers and Schmidhuber 2000):
            ``weight_peephole_l{k}`` times c is added to what :math:`\sigma` is taken of.
        coupled_gates: i = 1 - f; the rows of i are without effect (Greff et al. 2015).
        num_heads: W_hh is block-diagonal, of so many blocks of one size: the units of a head see the h of their own
            head alone (sLSTM, Beck et al. 2024; FlashRNN, Poeppel et al. 2024; DreamerV3, Hafner et al. 2023). It
            divides ``hidden_size``. Not with a projection, and only when the layer is made: ``weight_hh_l{k}`` is
            (4*H, H / num_heads), in the row of unit u of a gate the columns of its head, u // (H / num_heads).
        layer_norm: layer normalisation (Ba, Kiros and Hinton 2016) of W_ih x and of W_hh h, each over all gates
            together, and of c where h is made of it. With :math:`\text{LN}(a)` for a less its mean over
            :math:`\sqrt{\text{var}(a) + 10^{-5}}`, the functions of the gates are taken of :math:`\gamma_{ih} \odot
            \text{LN}(W_{ih} x_t) + b_{ih} + \gamma_{hh} \odot \text{LN}(W_{hh} h_{t-1}) + b_{hh}`, and :math:`h_t = o
            \odot \tanh(\gamma_c \odot \text{LN}(c_t) + \beta_c)`; c goes on as it is. Means and variances are of one
            row in one step.
        cell_clip: c is clamped between minus and plus this in every step, before o and h are made of it (Sak, Senior
            and Beaufays 2014; ``cell_clip`` of TensorFlow's ``LSTMCell``). ``None`` for not at all.
        recurrent_grad_clip: what comes back to each h from the step after it is clamped between minus and plus this,
            before the gradient of the output at that step is added (FlashRNN, Poeppel et al. 2024). ``None`` for not
            at all.
        bptt_steps: k, gradients stop at every k-th step, as if the sequence were given in slices of k steps with the
            state detached between them (truncated back-propagation through time). ``None`` for none. In one direction.
        stateful: begin where the last call ended, row by row, without its gradient, unless ``hx`` is given;
            :meth:`reset_state` begins anew. What is carried is in the buffers ``carried_h`` and ``carried_c``, in a
            process group plain attributes, which move with the layer and are no part of its ``state_dict``. In one
            direction.
        init: ``"torch"``, or ``"keras"``: W_ih by Glorot and Bengio 2010, W_hh orthogonal, each over all gates
            together (of each head by itself), biases zero but 1 for the forget gate. How :meth:`reset_parameters`
            draws.
        forget_bias: first value of ``bias_ih + bias_hh`` of the forget gate; ``None`` for that of ``init``.

    Raises:
        TypeError, ValueError: naming the argument that has another type or is out of range.

    Parameters, for layer k, and with suffix ``_reverse`` for the second direction, each drawn uniformly between
    :math:`\pm 1 / \sqrt{H}`: ``weight_ih_l{k}`` (4*H, I; D*P in place of I for k > 0), ``weight_hh_l{k}`` (4*H, P),
    ``bias_ih_l{k}`` and ``bias_hh_l{k}`` (4*H), ``weight_hr_l{k}`` (P, H) with a projection, ``weight_peephole_l{k}``
    (3*H) with ``peephole``. Rows in the order i, f, g, o, of peepholes i, f, o. With ``layer_norm`` also the gains
    ``weight_norm_ih_l{k}`` and ``weight_norm_hh_l{k}`` (4*H) and ``weight_norm_c_l{k}`` (H), first of 1, and with
    ``bias`` ``bias_norm_c_l{k}`` (H), first of 0.

    Differences from ``torch.nn.LSTM``: arguments that it would misread or fail on in its depths are errors that name
    them, float16 works on the CPU under autocast, and ``isinstance(layer, torch.nn.LSTM)`` is false.

    Example::

        >>> layer = fused_rnn.LSTM(10, 20, num_layers=2)
        >>> output, (h_n, c_n) = layer(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
    """

    _torch_class = nn.LSTM

    @show_options(LAYER_OPTIONS)
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        **options: Unpack[LayerOptions],
    ) -> None:
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
            options,
        )

    @overload
    def forward(
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        return_states: Literal[False] = False,
        **steps: Unpack[StepOptions],
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...

    @overload
    def forward(
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        return_states: Literal[True],
        **steps: Unpack[StepOptions],
    ) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]: ...

    @overload
    def forward(
        self, input: PackedSequence, hx: tuple[Tensor, Tensor] | None = None, *, return_states: Literal[False] = False
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]: ...

    @overload
    def forward(
        self, input: PackedSequence, hx: tuple[Tensor, Tensor] | None = None, *, return_states: Literal[True]
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]: ...

    @show_options(STEP_OPTIONS)
    def forward(self, input: Any, hx: Any = None, **steps: Unpack[ForwardOptions]) -> Any:
        """Run the layers.

        Args:
            input: (T, B, I), (B, T, I) with ``batch_first``, (T, I) without a batch, or a PackedSequence.
            hx: ``(h_0, c_0)``, (L*D, B, P) and (L*D, B, H), without B for unbatched input; ``None`` for zeros.
            lengths: steps of each row, counted from the first; integers (B), or () for unbatched input, 0 to T, on any
                device. Not with a PackedSequence.
            mask: bool, (T, B), (B, T) with ``batch_first``, (T) for unbatched input, on the input's device: True for
                each step that counts. With ``lengths`` both must say so. In any other step the row keeps its state
                exactly, in either direction, and its output is 0; what stands in the input there, NaN included,
                changes nothing, and its gradient is 0. A row of no step ends in its initial state. Not with a
                PackedSequence.
            reset: bool, shaped like ``mask``, on the input's device: where True the row's state is thrown away before
                that step, in every layer, and begins anew, as at the first step of an episode; the reverse direction
                begins anew after it has read that step. No gradient goes from one side to the other. It acts in a step
                that does not count, too. Not with a PackedSequence.
            reset_state: ``(h, c)`` that rows begin anew from, shaped like ``hx``; ``None`` for zeros. Only with
                ``reset``.
            return_states: whether to return the states of every step, too.

        Returns:
            ``(output, (h_n, c_n))``: the last layer's h at all steps, as ``input`` with D*P in place of I, and the
            states after the last step, as ``hx``. For packed input the output is packed, and the states are in the
            order of the sequences before packing.

            With ``return_states`` ``(output, (h_n, c_n), (h, c))``: h (L*D, T, B, P) and c (L*D, T, B, H) of every
            layer and direction after every step, before ``dropout``, with gradients to any order; (L*D, B, T, .) with
            ``batch_first``, (L*D, T, .) without a batch, (L*D, N, .) in the order of packed data. In a step that does
            not count they are what the row carries on, where ``output`` is 0.

        Raises:
            TypeError: ``input`` or ``hx`` is another kind of object.
            ValueError: ``input`` has not 2 or 3 dimensions, or another dtype than the parameters.
            RuntimeError: another size, dtype or device that does not fit, a length that is out of range (not seen on
                other devices than the CPU, and by :func:`torch.compile`), or an input of no step.
        """
        return self._run(input, hx, steps)

    # The public helper methods that torch.nn.LSTM has over RNNBase: code that subclasses it calls them.

    def get_expected_cell_size(self, input: Tensor, batch_sizes: Tensor | None) -> tuple[int, int, int]:
        """Shape of c_0 for this input, (L*D, B, H)."""
        states, batch, _ = self.get_expected_hidden_size(input, batch_sizes)
        return states, batch, self.hidden_size

    def check_forward_args(  # type: ignore[override]
        self, input: Tensor, hidden: tuple[Tensor, Tensor], batch_sizes: Tensor | None
    ) -> None:
        """Raise unless input and states fit the layer. ``forward`` has its own checks and does not call this."""
        self.check_input(input, batch_sizes)
        h_size, c_size = (
            self.get_expected_hidden_size(input, batch_sizes),
            self.get_expected_cell_size(input, batch_sizes),
        )
        self.check_hidden_size(hidden[0], h_size, "hx[0]: expected {}, got {}")
        self.check_hidden_size(hidden[1], c_size, "hx[1]: expected {}, got {}")

    def permute_hidden(  # type: ignore[override]
        self, hx: tuple[Tensor, Tensor], permutation: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Both states with their batch rows in the order of ``permutation``; as they are if it is ``None``."""
        if permutation is None:
            return hx
        return hx[0].index_select(1, permutation), hx[1].index_select(1, permutation)


class _SingleState(Recurrent):
    """Layers whose state is h alone."""

    @overload
    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        *,
        return_states: Literal[False] = False,
        **steps: Unpack[StepOptions],
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        *,
        return_states: Literal[True],
        **steps: Unpack[StepOptions],
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    @overload
    def forward(
        self, input: PackedSequence, hx: Tensor | None = None, *, return_states: Literal[False] = False
    ) -> tuple[PackedSequence, Tensor]: ...

    @overload
    def forward(
        self, input: PackedSequence, hx: Tensor | None = None, *, return_states: Literal[True]
    ) -> tuple[PackedSequence, Tensor, Tensor]: ...

    @show_options(STEP_OPTIONS)
    def forward(self, input: Any, hx: Any = None, **steps: Unpack[ForwardOptions]) -> Any:
        """Run the layers.

        Args:
            input: (T, B, I), (B, T, I) with ``batch_first``, (T, I) without a batch, or a PackedSequence.
            hx: h_0 (L*D, B, H), without B for unbatched input; ``None`` for zeros.
            lengths: steps of each row, counted from the first; integers (B), or () for unbatched input, 0 to T, on any
                device. Not with a PackedSequence.
            mask: bool, (T, B), (B, T) with ``batch_first``, (T) for unbatched input, on the input's device: True for
                each step that counts. With ``lengths`` both must say so. In any other step the row keeps its state
                exactly, in either direction, and its output is 0; what stands in the input there, NaN included,
                changes nothing, and its gradient is 0. A row of no step ends in its initial state. Not with a
                PackedSequence.
            reset: bool, shaped like ``mask``, on the input's device: where True the row's state is thrown away before
                that step, in every layer, and begins anew, as at the first step of an episode; the reverse direction
                begins anew after it has read that step. No gradient goes from one side to the other. It acts in a step
                that does not count, too. Not with a PackedSequence.
            reset_state: h that rows begin anew from, shaped like ``hx``; ``None`` for zeros. Only with ``reset``.
            return_states: whether to return the states of every step, too.

        Returns:
            ``(output, h_n)``: the last layer's h at all steps, as ``input`` with D*H in place of I, and h after the
            last step, as ``hx``. For packed input the output is packed, and h_n is in the order of the sequences
            before packing.

            With ``return_states`` ``(output, h_n, h)``: h (L*D, T, B, H) of every layer and direction after every
            step, before ``dropout``, with gradients to any order; (L*D, B, T, H) with ``batch_first``, (L*D, T, H)
            without a batch, (L*D, N, H) in the order of packed data. In a step that does not count it is what the row
            carries on, where ``output`` is 0.

        Raises:
            TypeError: ``input`` or ``hx`` is another kind of object.
            ValueError: ``input`` has not 2 or 3 dimensions, or another dtype than the parameters.
            RuntimeError: another size, dtype or device that does not fit, a length that is out of range (not seen on
                other devices than the CPU, and by :func:`torch.compile`), or an input of no step.
        """
        return self._run(input, hx, steps)


class GRU(_SingleState):
    r"""Gated recurrent unit layers over a sequence, drop-in for :class:`torch.nn.GRU`.

    For each layer and step (Cho et al. 2014, with the reset gate after the product as cuDNN has it):

    .. math::
        r &= \sigma(W_{ir} x_t + b_{ir} + W_{hr} h_{t-1} + b_{hr}) \\
        z &= \sigma(W_{iz} x_t + b_{iz} + W_{hz} h_{t-1} + b_{hz}) \\
        n &= \tanh(W_{in} x_t + b_{in} + r \odot (W_{hn} h_{t-1} + b_{hn})) \\
        h_t &= (1 - z) \odot n + z \odot h_{t-1}

    Args:
        proj_size: only 0; the place it has among ``torch.nn.GRU``'s positional arguments.
        recompute: keep only h of every step for the backward pass; see :class:`LSTM`.
        activation: the function of n in place of tanh. recurrent_activation: that of r and z.
        reset_after: ``False`` for :math:`n = \tanh(W_{in} x_t + b_{in} + W_{hn} (r \odot h_{t-1}) + b_{hn})`, as Cho et
            al. have it, and Keras and ONNX by that name and ``linear_before_reset=0``.
        recurrent_bias: only ``True`` with ``reset_after``, where the reset gate acts on this bias.
        layer_norm: of W_ih x and of W_hh h as in :class:`LSTM`, each over all three gates together; the reset gate acts
            on :math:`\gamma_{hn} \odot \text{LN}(W_{hh} h_{t-1})_n + b_{hn}`. Not with ``reset_after=False``.
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype, and the other
            options but ``forget_bias``, ``peephole``, ``coupled_gates``, ``cell_clip`` and ``zoneout_cell``: as
            :class:`LSTM`.

    Raises:
        TypeError, ValueError: naming the argument that has another type or is out of range.

    Parameters: as :class:`LSTM` without a projection and without those of c, with 3*H rows in the order r, z, n.

    Differences from ``torch.nn.GRU``: see :class:`LSTM`.
    """

    _torch_class = nn.GRU

    @show_options(LAYER_OPTIONS)
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        **options: Unpack[LayerOptions],
    ) -> None:
        _checks.check_no_projection("GRU", proj_size)
        super().__init__(
            "GRU",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            0,
            device,
            dtype,
            options,
        )


class RNN(_SingleState):
    r"""Elman layers over a sequence, drop-in for :class:`torch.nn.RNN`.

    For each layer and step (Elman 1990):

    .. math::
        h_t = \tanh(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh}), \quad\text{or } \max(0, \cdot) \text{ for "relu"}

    Args:
        nonlinearity: ``"tanh"`` or ``"relu"``, or one of the others that ``activation`` of an :class:`LSTM` may be.
        proj_size: only 0; the place it has among ``torch.nn.RNN``'s positional arguments.
        recompute: without effect, h being all that is kept in any case.
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype, and the other
            options but those of gates and of a cell state: as :class:`LSTM`.

    Raises:
        TypeError, ValueError: naming the argument that has another type or is out of range.

    Parameters: as :class:`LSTM` without a projection and without those of c, with H rows.

    Differences from ``torch.nn.RNN``: see :class:`LSTM`.
    """

    _torch_class = nn.RNN

    @show_options(LAYER_OPTIONS)
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        **options: Unpack[LayerOptions],
    ) -> None:
        _checks.check_no_projection("RNN", proj_size)
        _checks.check_nonlinearity(nonlinearity)
        self.nonlinearity = nonlinearity
        super().__init__(
            f"RNN_{nonlinearity.upper()}",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            0,
            device,
            dtype,
            options,
        )
