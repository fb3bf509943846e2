"""Differential privacy: gradients of every example of a batch, as Opacus wants them, without a loop over examples.

Importing this module tells Opacus of our layers and cells: ``ModuleValidator.fix(model)`` makes of each one that Opacus
trains, as it makes ``DPLSTM`` of ``torch.nn.LSTM``, and everything else is Opacus' own::

    import fused_rnn.opacus
    from opacus import PrivacyEngine
    from opacus.validators import ModuleValidator

    model = ModuleValidator.fix(fused_rnn.convert(model))
    model, optimizer, loader = PrivacyEngine().make_private(module=model, optimizer=..., data_loader=loader, ...)

The gradient of W_ih for an example is the sum over its steps of the outer products of gate gradients and inputs, and so
with W_hh and the states before each step (Abadi et al. 2016 clip these gradients). The operator ``rnn_backward_each``
gives them for all examples at once.

Opacus' hooks see what a module is called with and the gradient of the one tensor that it returns. A layer of ours has
its weights in parts for them, one for each layer of a stack; the names in its ``state_dict`` stay what they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from opacus.grad_sample import register_grad_sampler
from opacus.validators.errors import ShouldReplaceModuleError, UnsupportedModuleError
from opacus.validators.utils import register_module_fixer, register_module_validator
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import _checks, backend, functional
from .cells import GRUCell, LSTMCell, RNNCell
from .indrnn import IndRNN, IndRNNCell
from .layers import GRU, LSTM, RNN, _rows
from .options import changed_options
from .settings import CELL_OPTIONS, EVERY_STEP, LAYER_OPTIONS, CellKind, Controls, Settings, Steps

__all__ = ["PrivateGRU", "PrivateGRUCell", "PrivateLSTM", "PrivateLSTMCell", "PrivateRNN", "PrivateRNNCell"]

# Options of a layer that change no gradient, and those whose gradients of examples the kernels give.
_TAKEN = {"recompute", "init", "forget_bias"}
_TAKEN |= {"activation", "recurrent_activation", "peephole", "coupled_gates", "num_heads", "layer_norm", "cell_clip"}
_TAKEN |= {"recurrent_grad_clip"}


class _Saved(NamedTuple):
    """What a part's forward pass was given, and what it has computed and kept; letters as in ``ops.py``, L = 1."""

    input: Tensor  # (T, B, I), or (N, I) with batch_sizes
    h0: Tensor  # (D, B, H)
    c0: Tensor  # (D, B, H), or (0,) without a cell state
    batch_sizes: Tensor  # int64 (T), or (0,)
    order: Tensor  # int64 (B): of the examples among the rows; or (0,) for the same
    output: Tensor
    h_n: Tensor
    c_n: Tensor
    gates: Tensor
    cells: Tensor
    hidden: Tensor

    @property
    def controls(self) -> Controls:
        return Controls(self.batch_sizes if self.batch_sizes.numel() else None)

    def split(self, flat: Tensor) -> list[Tensor]:
        """Output, h_n and c_n of all their elements one behind the other."""
        shapes = [t.shape for t in (self.output, self.h_n, self.c_n)]
        parts = flat.split([shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


class _Part(nn.Module):
    """The weights of one layer in all its directions: what Opacus hangs its hooks on."""

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        for name, weight in weights.items():
            self.register_parameter(name, weight)

    def run(
        self, settings: Settings, input: Tensor, h0: Tensor, c0: Tensor | None, batch_sizes: Tensor | None, order: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(output, h_n, c_n)`` of a checked call, by way of the hooks."""
        assert backend.ops is not None
        controls = Controls(batch_sizes)
        weights = list(self.parameters())
        with torch.no_grad():
            results = backend.ops.forward_for_backward(settings, input, h0, c0, weights, controls)
        nothing = torch.empty(0, dtype=torch.int64)
        given = (
            input,
            h0,
            input.new_empty(0) if c0 is None else c0,
            nothing if batch_sizes is None else batch_sizes,
            nothing if order is None else order,
        )
        saved = _Saved(*given, *results)
        self.settings = settings
        self.max_batch_len = h0.shape[1]  # Opacus' name
        # Opacus moves the second dimension to the front where it is told that batches are there: of one element each,
        # neither matters.
        flat = self(*(t[None, None] for t in saved))
        output, h_n, c_n = saved.split(flat[0, 0])
        return output, h_n, c_n

    def forward(self, *saved: Tensor) -> Tensor:
        return _Recorded.apply(self.settings, *saved, *self.parameters())

    @torch.no_grad()
    def grad_samples(self, activations: Sequence[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
        """The gradient of each weight for each example, (B, *shape); none for weights that are not trained."""
        assert backend.ops is not None
        saved = _Saved(*(t[0, 0] for t in activations))
        weights = list(self.parameters())
        needs = [weight.requires_grad for weight in weights]
        samples = backend.ops.gradients_of_examples(
            self.settings, saved.split(backprops[0, 0]), *saved[:2], _or_none(saved.c0), weights, saved.controls,
            saved[5:], needs,
        )  # fmt: skip
        if saved.order.numel():
            samples = [t.index_select(0, saved.order) if needed else t for t, needed in zip(samples, needs)]
        return {weight: t for weight, t, needed in zip(weights, samples, needs) if needed}


def _or_none(tensor: Tensor) -> Tensor | None:
    return tensor if tensor.numel() or tensor.dim() > 1 else None


class _Recorded(torch.autograd.Function):
    """The results of a forward pass that is over, (1, 1, elements of all), and their gradient."""

    @staticmethod
    def forward(ctx: Any, settings: Settings, *tensors: Tensor) -> Tensor:
        ctx.settings = settings
        ctx.save_for_backward(*tensors)
        saved = _Saved(*(t[0, 0] for t in tensors[: len(_Saved._fields)]))
        return torch.cat([t.flatten() for t in (saved.output, saved.h_n, saved.c_n)])[None, None]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        assert backend.ops is not None
        count = len(_Saved._fields)
        tensors = ctx.saved_tensors
        saved, weights = _Saved(*(t[0, 0] for t in tensors[:count])), tensors[count:]
        needed = ctx.needs_input_grad[1:]
        needs = [needed[0], needed[1], needed[2], *needed[count:]]
        grads = backend.ops.backward_of_saved(
            ctx.settings, saved.split(grad[0, 0]), *saved[:2], _or_none(saved.c0), weights, saved.controls, saved[5:],
            needs,
        )  # fmt: skip
        of_states = [g[None, None] if need else None for g, need in zip(grads[:3], needs)]
        of_weights = [g if need else None for g, need in zip(grads[3], needs[3:])]
        return (None, *of_states, *([None] * (count - 3)), *of_weights)


@register_grad_sampler(_Part)
def _grad_samples(part: _Part, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    return part.grad_samples(activations, backprops)


class _HasParts(nn.Module):
    """A layer or cell whose weights are in its parts, and found under their names all the same."""

    def __getattr__(self, name: str) -> Any:
        for part in self.__dict__.get("_modules", {}).get("parts", ()):
            if name in part._parameters:
                return part._parameters[name]
        return super().__getattr__(name)

    def _is_sampled(self) -> bool:
        """Whether this call is one of which Opacus wants the gradients of examples."""
        return self.training and torch.is_grad_enabled() and any(part._backward_hooks for part in self.parts)

    def _check_sampled(self, settings: Settings, input: Any, why_reference: str | None, batch: int | None) -> None:
        if batch is None:
            raise RuntimeError("input: expected a batch, of whose rows Opacus takes the gradients, got none")
        if functional.autocast_region(settings, input) is not None:
            raise RuntimeError("autocast: expected none while Opacus takes gradients of examples")
        if why_reference is not None or backend.ops is None:
            raise RuntimeError(f"Opacus: expected a call for the kernels: {why_reference or 'they are not built'}")
        is_plain = settings.within is None and settings.state_size == settings.hidden_size
        if not is_plain and not backend.ops.has_gradients_of_examples(input, settings.kind):
            raise RuntimeError(
                "input: expected float32 or float64 on the CPU while Opacus takes gradients of examples of what has "
                f"options or a projection, got {input.dtype} on {input.device}"
            )

    def state_dict(self, *args: Any, **keywords: Any) -> Any:
        state = super().state_dict(*args, **keywords)
        prefix = keywords.get("prefix", args[1] if len(args) > 1 else "")
        for name, weight in [(name, state[name]) for name in state if name.startswith(f"{prefix}parts.")]:
            del state[name]
            state[prefix + name.rpartition(".")[2]] = weight
        return state

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for index, part in enumerate(self.parts):
            for name in part._parameters:
                if prefix + name in state_dict:
                    state_dict[f"{prefix}parts.{index}.{name}"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class _PrivateLayer(_HasParts):
    def _run(self, input: Any, hx: Any, steps: Any) -> Any:
        if not self._is_sampled():
            return super()._run(input, hx, steps)  # type: ignore[misc]
        for name, value in steps.items():
            if value is not EVERY_STEP._asdict()[name]:
                raise RuntimeError(f"{name}: expected {EVERY_STEP._asdict()[name]} while Opacus takes gradients of "
                                   "examples; pack rows of several lengths")  # fmt: skip
        packed = input if isinstance(input, PackedSequence) else None
        data, batch_sizes, order, back = packed or (input, None, None, None)
        settings: Settings = self._settings()._replace(recompute=False)
        if packed is not None:
            _checks.check_sorted_indices(packed)
        if order is not None and hx is not None:
            h, c = _checks.split_state(settings.kind, hx)
            assert h is not None
            _checks.check_layer_states(settings, h, c, order.numel())
            hx = _rows(hx, order)
        call = functional.prepare_layers(settings, data, hx, self._params(), Steps(batch_sizes))
        batch = call.batch if batch_sizes is None else int(batch_sizes[0])
        self._check_sampled(settings, data, call.why_reference, batch)
        x, h, c = call.input, call.h, call.c
        if settings.batch_first and packed is None:
            x = x.transpose(0, 1)
        directions = settings.num_directions
        if h is None:
            states_of_zeros = x.new_zeros(settings.num_layers * directions, batch or 0, settings.hidden_size)
            h = states_of_zeros[..., : settings.state_size]
            c = states_of_zeros if settings.kind is CellKind.LSTM else None
        one_layer = settings._replace(num_layers=1, batch_first=False, dropout=0.0)
        states: list[tuple[Tensor, Tensor]] = []
        for index, part in enumerate(self.parts):
            rows = slice(index * directions, (index + 1) * directions)
            of_part = one_layer._replace(input_size=x.shape[-1])
            if settings.dropout and index > 0:
                x = nn.functional.dropout(x, settings.dropout, training=True)
            x, h_n, c_n = part.run(of_part, x, h[rows], None if c is None else c[rows], batch_sizes, back)
            states.append((h_n, c_n))
        hx = torch.cat([h for h, _ in states])
        if c is not None:
            hx = (hx, torch.cat([c for _, c in states]))
        if packed is not None:
            return PackedSequence(x, batch_sizes, order, back), hx if back is None else _rows(hx, back)
        return x.transpose(0, 1) if settings.batch_first else x, hx


class _PrivateCell(_HasParts):
    def _run(self, input: Any, hx: Any, reset: Any, reset_state: Any) -> Any:
        if not self._is_sampled():
            return super()._run(input, hx, reset, reset_state)  # type: ignore[misc]
        if reset is not None:
            raise RuntimeError("reset: expected None while Opacus takes gradients of examples")
        settings: Settings = self._settings()
        call = functional.prepare_cell(settings, input, hx, self._params())
        self._check_sampled(settings, input, call.why_reference, call.batch)
        assert call.h is not None
        layer = settings._replace(cell_names=())
        c = None if call.c is None else call.c[None]
        _, h_n, c_n = self.parts[0].run(layer, call.input[None], call.h[None], c, None, None)
        return h_n[0] if c is None else (h_n[0], c_n[0])


class PrivateLSTM(_PrivateLayer, LSTM):
    """An :class:`fused_rnn.LSTM` that Opacus trains; ``ModuleValidator.fix`` makes it."""


class PrivateGRU(_PrivateLayer, GRU):
    """An :class:`fused_rnn.GRU` that Opacus trains; ``ModuleValidator.fix`` makes it."""


class PrivateRNN(_PrivateLayer, RNN):
    """An :class:`fused_rnn.RNN` that Opacus trains; ``ModuleValidator.fix`` makes it."""


class PrivateLSTMCell(_PrivateCell, LSTMCell):
    """An :class:`fused_rnn.LSTMCell` that Opacus trains; ``ModuleValidator.fix`` makes it."""


class PrivateGRUCell(_PrivateCell, GRUCell):
    """An :class:`fused_rnn.GRUCell` that Opacus trains; ``ModuleValidator.fix`` makes it."""


class PrivateRNNCell(_PrivateCell, RNNCell):
    """An :class:`fused_rnn.RNNCell` that Opacus trains; ``ModuleValidator.fix`` makes it."""


_PRIVATE: dict[type, type] = {
    LSTM: PrivateLSTM,
    GRU: PrivateGRU,
    RNN: PrivateRNN,
    LSTMCell: PrivateLSTMCell,
    GRUCell: PrivateGRUCell,
    RNNCell: PrivateRNNCell,
}


def _why_not(module: Any) -> str | None:
    if isinstance(module, (IndRNN, IndRNNCell)):
        return "its W_hh are vectors"
    is_layer = isinstance(module, nn.RNNBase)
    changed = changed_options(module, LAYER_OPTIONS if is_layer else CELL_OPTIONS)
    for name, value in changed.items():
        if name not in _TAKEN:
            return f"it has {name}={value!r}"
    names = module._flat_weights_names if is_layer else ("weight_ih", "weight_hh")
    missing = [name for name in names if not isinstance(module._parameters.get(name), nn.Parameter)]
    return f"its {missing[0]} is no Parameter of its own" if missing else None


@register_module_validator([*_PRIVATE, IndRNN, IndRNNCell])
def _validate(module: nn.Module) -> list[Any]:
    reason = _why_not(module)
    if reason is not None:
        return [UnsupportedModuleError(f"no gradients of examples for {module}: {reason}")]
    return [ShouldReplaceModuleError(f"{module}: opacus.validators.ModuleValidator.fix(model) makes it one for Opacus")]


@register_module_fixer(list(_PRIVATE))
def _fix(module: Any) -> nn.Module:
    if (reason := _why_not(module)) is not None:
        raise UnsupportedModuleError(f"no gradients of examples for {module}: {reason}")
    is_layer = isinstance(module, nn.RNNBase)
    groups = module._all_weights if is_layer else [[*module._names, *module._names_of_options()]]
    per_layer = 2 if getattr(module, "bidirectional", False) else 1
    parameters = module._parameters
    parts = []
    for first in range(0, len(groups), per_layer):
        names = [name for group in groups[first : first + per_layer] for name in group]
        parts.append(_Part({name: parameters.pop(name) for name in names if parameters[name] is not None}))
    module.__class__ = _PRIVATE[type(module)]
    module.parts = nn.ModuleList(parts)
    return module
