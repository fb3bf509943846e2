"""Layers whose weights are stored in fewer bits, for inference on the CPU: ``quantize`` makes them of a model."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from . import _checks, backend, functional
from .convert import ConversionReport, check_model, convert, copy_sharing_tensors
from .settings import NOTHING_WITHIN, Settings, Steps
from .twin import HasTwin

__all__ = ["QuantizedCell", "QuantizedLayer", "quantize"]

_log = logging.getLogger("fused_rnn")
ModelT = TypeVar("ModelT", bound=nn.Module)

FORMATS = {"int8": torch.int8, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SCALE = "_scale"
_MATRICES = ("weight_ih", "weight_hh", "weight_hr")
MOST_COLUMNS = 65536  # whose sums of products fit 32 bits


class _Quantized(nn.Module):
    """What layers and cells share. Tensors are buffers: no gradient reaches them, and no optimizer finds them."""

    weight_dtype: torch.dtype

    def __init__(self, fused: Any, settings: Settings, named: Mapping[str, Tensor], weight_dtype: torch.dtype) -> None:
        super().__init__()
        self.weight_dtype = weight_dtype
        self.training = fused.training
        self._quantized_settings = settings
        self._original = (_without_numbers(fused),)  # in a tuple: it is none of this module's children
        parameters = {name for name, _ in fused.named_parameters()}
        order: list[str] = []
        scales: list[str] = []
        with torch.no_grad():
            for name, value in named.items():
                if name.startswith("weight_ih"):  # the next layer or direction
                    order, scales = [*order, *scales], []
                order.append(name)
                if not _is_matrix(name):
                    self.register_buffer(name, value.detach().clone(), persistent=name in parameters)
                    continue
                stored, scale = _stored(value.detach(), weight_dtype)
                self.register_buffer(name, stored)
                if scale is not None:
                    self.register_buffer(name + _SCALE, scale)
                    scales.append(name + _SCALE)
        self._names = (*order, *scales)  # of the tensors, in the operator's order

    def __del__(self) -> None:
        # The kernels find the packed weights by these tensors. Where others have them, too, the next call packs anew.
        names, buffers = vars(self).get("_names"), vars(self).get("_buffers")
        first = buffers.get(names[0]) if names and buffers else None
        if first is not None and backend is not None and backend.ops is not None:  # None: the interpreter ends
            backend.ops.forget_quantized(first)

    def _operator_params(self) -> list[Tensor]:
        buffers: dict[str, Any] = self._buffers
        return [buffers[name] for name in self._names]

    def _settings(self) -> Settings:
        return self._quantized_settings

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves to a device; the dtypes stay: ``model.half()`` means other modules."""

        def moved(t: Tensor) -> Tensor:
            result: Tensor = fn(t)
            return result if result.dtype is t.dtype else t.to(result.device)

        return super()._apply(moved, recurse)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        """Weights of the module that this was made of are quantized as they are loaded."""
        for name in self._names:
            given = state_dict.get(prefix + name)
            if not _is_matrix(name) or not isinstance(given, Tensor):
                continue
            if given.dtype is self.weight_dtype:
                # two products with it do not fit the 16 bits in which some processors sum them
                if given.dtype is torch.int8 and (given == -128).any():
                    arguments[-1].append(_checks.wrong_int8(prefix + name))
                continue
            if given.dtype is not torch.float32 or prefix + name + _SCALE in state_dict:
                arguments[-1].append(_checks.wrong_stored_dtype(prefix + name, self.weight_dtype, given.dtype))
                continue
            # weight_hh of an IndRNN is a column here
            stored, scale = _stored(given.unsqueeze(1) if given.dim() == 1 else given, self.weight_dtype)
            state_dict[prefix + name] = stored
            if scale is not None:
                state_dict[prefix + name + _SCALE] = scale
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def dequantize(self) -> nn.Module:
        """The module that this was made of, a fused one with the weights as they are stored here, in float32."""
        module = copy.deepcopy(self._original[0])
        device = self._operator_params()[0].device
        module.to_empty(device=device)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                value = self._buffers[name]
                assert value is not None
                scale = self._buffers.get(name + _SCALE)
                value = value.float() if scale is None else value.float() * scale.unsqueeze(1)
                parameter.copy_(value.view_as(parameter))
        module.train(self.training)
        return module

    def extra_repr(self) -> str:
        original = self._original[0]
        return f"{original.extra_repr()}, weights={str(self.weight_dtype).removeprefix('torch.')}"

    def _get_name(self) -> str:
        return f"Quantized{type(self._original[0]).__name__}"

    def flatten_parameters(self) -> None:
        """Does nothing: the kernels have a packed copy of the weights."""

    def _run(self, settings: Settings, input: Tensor, h: Any, c: Any, mask: Tensor | None) -> tuple[Tensor, ...]:
        _checks.check_quantized_call(self.training, input, h, c)
        ops: Any = backend.ops
        _checks.check_quantized_kernels("they are not built" if ops is None else ops.why_not_fused(input))
        results: tuple[Tensor, ...] = ops.run_quantized(settings, input, h, c, self._operator_params(), mask)
        return results


class QuantizedLayer(_Quantized):
    """Layers of :func:`quantize`: called as the layer that they were made of.

    Tensors, in float32 but for the matrices: those of the layer by their names, with int8 matrices also a scale for
    each row, ``weight_ih_l{k}_scale`` (G*H), ``weight_hh_l{k}_scale`` (G*H) and ``weight_hr_l{k}_scale`` (P). A state
    dict of the layer itself is quantized as it is loaded.
    """

    def forward(self, input: Any, hx: Any = None, *, lengths: Any = None, mask: Any = None) -> Any:
        """Run the layers.

        Args:
            input, hx, lengths, mask: as of the layer that this was made of, in float32 on the CPU; ``input`` may be a
                PackedSequence.

        Returns:
            ``(output, (h_n, c_n))`` of an LSTM, ``(output, h_n)`` of the others, without gradients.

        Raises:
            TypeError, ValueError, RuntimeError: as the layer; also where a gradient is asked for, and in training mode
                outside of ``torch.no_grad()``.
        """
        if isinstance(input, PackedSequence):
            return self._run_packed(input, hx, lengths, mask)
        settings = self._settings()
        return self._results(self._run_padded(settings, input, hx, lengths, mask))

    def _run_padded(self, settings: Settings, input: Any, hx: Any, lengths: Any, mask: Any) -> tuple[Tensor, ...]:
        if not isinstance(input, Tensor):
            _checks.raise_input_type(settings, input)
        h, c = _checks.split_state(settings.kind, hx)
        num_steps, batch = _checks.check_layer_input(settings, input, None)
        input, h, c = _outside_autocast(input, h, c)
        _checks.check_like_stored(settings, input)
        if h is not None:
            _checks.check_layer_states(settings, h, c, batch)
            _checks.check_states_like_input(input, h, c)
        live = None
        if lengths is not None or mask is not None:
            steps = Steps(None, lengths, mask)
            _checks.check_steps(settings, steps, input, num_steps, batch)
            live = functional.live_steps(settings, steps, input, num_steps, batch)
        _checks.check_state_memory((input, *(state for state in (h, c) if state is not None)), "input, hx")
        if batch is not None:
            return self._run(settings, input, h, c, live)
        h, c = (None if state is None else state.unsqueeze(1) for state in (h, c))
        output, *states = self._run(settings._replace(batch_first=False), input.unsqueeze(1), h, c, live)
        return output.squeeze(1), *(state.squeeze(1) if state.dim() == 3 else state for state in states)

    def _results(self, results: tuple[Tensor, ...]) -> Any:
        output, h_n, c_n = results
        return output, ((h_n, c_n) if self._settings().kind.num_states else h_n)

    def _run_packed(self, input: PackedSequence, hx: Any, lengths: Any, mask: Any) -> Any:
        _checks.check_padded(Steps(input.batch_sizes, lengths, mask))
        _checks.check_sorted_indices(input)
        settings = self._settings()._replace(batch_first=False)
        padded, lengths = pad_packed_sequence(input)
        results = self._run_padded(settings, padded, hx, lengths, None)
        output, states = self._results(results)
        if input.sorted_indices is not None:
            output = output.index_select(1, input.sorted_indices)
            lengths = lengths.index_select(0, input.sorted_indices.cpu())
        data = pack_padded_sequence(output, lengths).data
        return PackedSequence(data, input.batch_sizes, input.sorted_indices, input.unsorted_indices), states


class QuantizedCell(_Quantized):
    """Cells of :func:`quantize`: one step, called as the cell that they were made of. Tensors as a layer's."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        """One step.

        Args:
            input, hx: as of the cell that this was made of, in float32 on the CPU.

        Returns:
            ``(h, c)`` of an LSTM cell, h of the others, without gradients.

        Raises:
            TypeError, ValueError, RuntimeError: as :meth:`QuantizedLayer.forward`.
        """
        settings = self._settings()
        if not isinstance(input, Tensor):
            _checks.raise_input_type(settings, input)
        h, c = _checks.split_state(settings.kind, hx)
        sizes = _checks.check_cell_input(settings, input, h, c)
        input, h, c = _outside_autocast(input, h, c)
        _checks.check_like_stored(settings, input)
        if h is not None:
            _checks.check_states_like_input(input, h, c)
        _checks.check_state_memory((input, *(state for state in (h, c) if state is not None)), "input, hx")

        def as_layer(state: Tensor | None) -> Tensor | None:
            return None if state is None else state.reshape(1, *(sizes or (1,)), -1)

        _, h, c = self._run(settings, input.reshape(1, *(sizes or (1,)), -1), as_layer(h), as_layer(c), None)
        assert h is not None and c is not None
        h = h.reshape(*sizes, -1)
        return (h, c.reshape(*sizes, -1)) if settings.kind.num_states else h


def _original_attribute(name: str) -> property:
    return property(lambda self: getattr(self._original[0], name), doc=f"``{name}`` of the original module.")


# What programs read of a layer or cell.
_OF_SIZES = ("input_size", "hidden_size", "num_layers", "proj_size", "bidirectional", "batch_first")
for _name in (*_OF_SIZES, "bias", "dropout", "mode", "nonlinearity"):
    setattr(_Quantized, _name, _original_attribute(_name))


@overload
def quantize(
    model: ModelT,
    dtype: torch.dtype = torch.int8,
    *,
    weights: str | None = None,
    inplace: bool = False,
    return_report: Literal[False] = False,
) -> ModelT: ...


@overload
def quantize(
    model: ModelT,
    dtype: torch.dtype = torch.int8,
    *,
    weights: str | None = None,
    inplace: bool = False,
    return_report: Literal[True],
) -> tuple[ModelT, ConversionReport]: ...


def quantize(
    model: Any,
    dtype: torch.dtype = torch.int8,
    *,
    weights: str | None = None,
    inplace: bool = False,
    return_report: bool = False,
) -> Any:
    """Store the weights of every LSTM, GRU, RNN and cell of a model in fewer bits, for inference on the CPU.

    int8: each row of a matrix is rounded to multiples of a scale of its own (symmetric, its largest value is 127), each
    row of activations, x and h, to 256 values over its range at every step. Products are summed exactly, in int32;
    gates, c and everything else stay float32. A quarter of the bytes, and with it of the time where a step waits for
    its weights. What it does to the numbers is in docs/quantization.md.

    bfloat16 and float16: the weights are rounded to them, and what is computed stays float32: half the bytes on any
    processor. (``fused_rnn.Stream(module, dtype=torch.bfloat16)`` is another thing: there x and h are bfloat16, too.)

    The layers keep their place, their shape and their state dict's names; other modules are not touched. ``Stream`` and
    ``StreamPool`` take quantized layers. What was left alone is logged, and in the report: modules that are not float32
    or on another device, custom cells, a GRU with ``reset_after=False``, ``stateful`` layers, modules with
    parametrizations or hooks, and what :func:`fused_rnn.convert` leaves alone.

    Args:
        model: any module, a recurrent one included, of :mod:`fused_rnn` or :mod:`torch.nn`. Options that act in
            training alone do nothing any more.
        dtype: ``torch.int8``, ``torch.bfloat16`` or ``torch.float16``.
        weights: the same by name, ``"int8"``, ``"bfloat16"`` or ``"float16"``, in place of ``dtype``.
        inplace: whether ``model`` itself is changed; otherwise a copy, which shares the tensors of modules that are
            not quantized. A layer that is the model itself stays what it is, and another one is returned.
        return_report: return a :class:`fused_rnn.ConversionReport` as well.

    Returns:
        the model, in which such modules are :class:`QuantizedLayer` and :class:`QuantizedCell`; with ``return_report``
        the pair ``(model, report)``.

    Raises:
        TypeError, ValueError: ``model`` is no module; another dtype; nothing in the model could be quantized, with the
            reasons.

    Example::

        >>> model = torch.nn.LSTM(32, 64).eval()
        >>> small = fused_rnn.quantize(model)
        >>> output, (h_n, c_n) = small(torch.randn(10, 1, 32))
        >>> small.weight_ih_l0.dtype
        torch.int8
    """
    check_model(model)
    weight_dtype = _checks.check_weight_dtype(dtype, weights, FORMATS)
    _checks.check_flag("inplace", inplace)
    if not inplace:
        model = copy_sharing_tensors(model)
    report = ConversionReport()
    made: dict[int, _Quantized | str] = {}  # a module that stands in two places is one module afterwards, too
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            continue
        if id(module) not in made:
            made[id(module)] = _quantized(module, weight_dtype)
        result = made[id(module)]
        if isinstance(result, str):
            report.left_alone[name] = result
            _log.info("not quantized: %s: %s", name or "the model itself", result)
            continue
        report.converted[name] = type(module).__name__
        if name:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, result)
        else:
            model = result
    _checks.check_any_quantized(report.converted, report.left_alone)
    return (model, report) if return_report else model


def _quantized(module: Any, weight_dtype: torch.dtype) -> _Quantized | str:
    """The quantized module, or why there is none."""
    if any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)):
        return "it has hooks, which would be lost"
    if parametrize.is_parametrized(module):
        return "it has parametrizations: remove them first"
    fused = module
    if not isinstance(module, HasTwin):
        fused, report = convert(module, inplace=False, return_report=True)
        if not isinstance(fused, HasTwin):
            return report.left_alone.get("", "it is none of the layers and cells that can be converted")
    if "forward" in vars(fused) or not _first_forward(type(fused)).__module__.startswith("fused_rnn."):
        return "it has a forward of its own"
    params = fused._params()
    for t in params:
        if t.device.type != "cpu" or t.dtype is not torch.float32:
            return f"it has {t.dtype} on {t.device}, and only float32 on cpu can be quantized"
    settings: Settings = fused._settings()
    around = settings.around
    within = None if settings.within is None else settings.within.in_mode(False)
    sizes = (settings.input_size, settings.hidden_size, settings.state_size * settings.num_directions)
    if settings.kind not in (0, 1, 2, 3):
        return "it is a custom cell"
    if around is not None and around.stateful:
        return "it is stateful=True; a Stream of the quantized layer keeps its state, too"
    if within is not None and not within.reset_after:
        return "it has reset_after=False, for which there are no kernels"
    if min(sizes) == 0 or max(sizes) > MOST_COLUMNS:
        return f"it has a size of 0 or of more than {MOST_COLUMNS}, for which sums may not fit 32 bits"
    names = list(settings.cell_names) if settings.is_cell else list(fused._flat_weights_names)
    if around is not None:
        if settings.num_biases == 1:
            names = [other for name in names for other in (name, *_second_bias(name))]
        with torch.no_grad():
            params = functional._params_of_operator(settings, around.in_eval_mode(), params)
    if within is not None:
        within = within._replace(bptt_steps=None, recurrent_grad_clip=None)
    settings = settings._replace(
        around=None,
        within=None if within == NOTHING_WITHIN else within,
        recompute=False,
        dropout=0.0,
        cell_names=tuple(names) if settings.is_cell else (),
    )
    cls = QuantizedCell if settings.is_cell else QuantizedLayer
    result = cls(fused, settings, dict(zip(names, params, strict=True)), weight_dtype)
    if not all(t.isfinite().all() for t in result.buffers()):
        return f"it has weights that are not finite, or not as {weight_dtype}"
    return result


def _without_numbers(fused: Any) -> Any:
    """A copy on the device meta: everything that is no tensor, and what it can be dequantized into."""
    empty: dict[int, Any] = {id(t): torch.empty_like(t, device="meta") for t in fused.buffers()}
    for p in fused.parameters():
        empty[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
    return copy.deepcopy(fused, empty)


def _first_forward(cls: type) -> type:
    return next(base for base in cls.__mro__ if "forward" in vars(base))


def _second_bias(name: str) -> tuple[str, ...]:
    return (name.replace("bias_ih", "bias_hh"),) if name.startswith("bias_ih") else ()


def _is_matrix(name: str) -> bool:
    return name.startswith(_MATRICES) and not name.endswith(_SCALE)


def _stored(matrix: Tensor, weight_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A matrix in this dtype, and the scales of its rows."""
    if weight_dtype is not torch.int8:
        return matrix.to(weight_dtype), None
    scale = matrix.abs().flatten(1).amax(1) / 127
    units = torch.where(scale > 0, scale, torch.ones_like(scale)).unsqueeze(1)
    return (matrix / units).round_().clamp_(-127, 127).to(torch.int8), scale


def _outside_autocast(input: Tensor, *states: Tensor | None) -> tuple[Any, ...]:
    """In a region of autocast float32, in which the weights were calibrated."""
    if torch.compiler.is_compiling() or not torch.is_autocast_enabled("cpu"):
        return (input, *states)
    return tuple(t.float() if t is not None and t.dtype in _FROM_AUTOCAST else t for t in (input, *states))


_FROM_AUTOCAST = (torch.bfloat16, torch.float16)
