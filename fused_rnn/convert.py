"""Exchange ``torch.nn``'s recurrent modules of a model for the fused ones, and back."""

from __future__ import annotations

import copy
import logging
import warnings
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .cells import GRUCell, LSTMCell, RNNCell
from .layers import GRU, LSTM, RNN
from .weights import OF_ASSIGNMENT

__all__ = ["ConversionWarning", "convert", "revert"]

ModelT = TypeVar("ModelT", bound=nn.Module)

FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTM: LSTM,
    nn.GRU: GRU,
    nn.RNN: RNN,
    nn.LSTMCell: LSTMCell,
    nn.GRUCell: GRUCell,
    nn.RNNCell: RNNCell,
}
_TORCH = {fused: original for original, fused in FUSED.items()}

_log = logging.getLogger("fused_rnn")


class ConversionWarning(UserWarning):
    """Recurrent modules that :func:`convert` left as they were.

    Attributes:
        left_alone: why, for each module's name in the model (``""`` is the model itself).
    """

    def __init__(self, left_alone: dict[str, str]) -> None:
        self.left_alone = left_alone
        lines = [f"{_quote(name)}: {reason}" for name, reason in left_alone.items()]
        super().__init__("fused_rnn.convert left alone " + "; ".join(lines))


def convert(model: ModelT, *, inplace: bool = True, recompute: bool = False) -> ModelT:
    """Make every ``torch.nn`` LSTM, GRU, RNN and cell of a model a fused one.

    A module stays the same object, of another class: its Parameters, hooks, training flag, parametrizations, place in
    the model and every other reference to it are what they were. An optimizer made before goes on working, also in the
    middle of training.

    Left alone are subclasses of ``torch.nn``'s modules (what their ``forward`` does is theirs to say), modules whose
    ``forward`` was replaced on the object, and scripted ones; a :class:`ConversionWarning` names them with the reason.
    The names of converted modules go to the logger ``"fused_rnn"`` at level INFO.

    Args:
        model: any module, a recurrent one included.
        inplace: ``False`` leaves ``model`` as it is and converts a copy of its modules. The copy holds the very
            Parameters and buffers of ``model``; for independent ones convert ``copy.deepcopy(model)``.
        recompute: the option of :class:`fused_rnn.LSTM` for the layers that are converted: less memory in training.

    Returns:
        ``model``, or the copy.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``.
    """
    _check_model(model)
    if not inplace:
        model = _copy_sharing_tensors(model)
    left_alone = {}
    for name, module in model.named_modules():
        target = FUSED.get(_own_class(module))
        reason = _why_left_alone(module, target)
        if reason is not None:
            left_alone[name] = reason
        elif target is not None:
            if isinstance(module, nn.RNNBase):
                module._update_flat_weights()
                # the list that torch.nn's layers compute with: what a program wrote into it goes on to count
                weights = module.__dict__.pop("_flat_weights")
                _change_class(module, target)
                module._flat_weights = weights
                if recompute:
                    module.recompute = True
            else:
                _change_class(module, target)
            _log.info("converted %s to %s", _quote(name), module)
    if left_alone:
        warnings.warn(ConversionWarning(left_alone), stacklevel=2)
    return model


def revert(model: ModelT, *, inplace: bool = True) -> ModelT:
    """Make every fused layer and cell of a model ``torch.nn``'s again; the inverse of :func:`convert`.

    Args:
        model: any module.
        inplace: as in :func:`convert`.

    Returns:
        ``model``, or the copy.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``.
        ValueError: ``torch.nn`` cannot express some of the modules; it names all of them, and nothing is changed.
    """
    _check_model(model)
    found = []
    refused = []
    for name, module in model.named_modules():
        if any(isinstance(module, fused) for fused in _TORCH):
            target = _TORCH.get(_own_class(module))
            reason = _why_not_revertible(module, target)
            found.append(name)
            if reason is not None:
                refused.append(f"{_quote(name)}: {reason}")
    if refused:
        raise ValueError("model: torch.nn cannot express " + "; ".join(refused))
    if not inplace:
        model = _copy_sharing_tensors(model)
    for name in found:
        module = model.get_submodule(name)
        target = _TORCH[_own_class(module)]
        if isinstance(module, nn.RNNBase):
            weights = None if module._assigned_weights is None else list(module._flat_weights)
            for own in (*OF_ASSIGNMENT, "recompute"):  # of the kernels, no part of what the module computes
                module.__dict__.pop(own, None)
            _change_class(module, target)
            module._init_flat_weights()
            if weights is not None:
                module._flat_weights = weights
        else:
            _change_class(module, target)
    return model


def _quote(name: str) -> str:
    return f"'{name}'" if name else "the model itself"


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got an object of type {type(model).__name__}")


def _own_class(module: nn.Module) -> type[nn.Module]:
    """The class a module was made from: a parametrized one has a subclass of its own, with a property per tensor."""
    cls = type(module)
    return cls.__bases__[0] if parametrize.is_parametrized(module) else cls


def _change_class(module: nn.Module, target: type[nn.Module]) -> None:
    cls = type(module)
    if parametrize.is_parametrized(module):
        members = {
            name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__", "__doc__")
        }
        target = type(cls.__name__, (target,), members)
    module.__class__ = target


def _why_left_alone(module: nn.Module, target: type[nn.Module] | None) -> str | None:
    if target is not None:
        return "its forward was replaced on the object" if "forward" in vars(module) else None
    if isinstance(module, torch.jit.ScriptModule):
        scripted = module.original_name in {original.__name__ for original in FUSED}
        return f"it is a scripted {module.original_name}" if scripted else None
    for original in FUSED:
        if isinstance(module, original):
            return f"it is a {_own_class(module).__qualname__}, a subclass of torch.nn.{original.__name__}"
    return None


def _why_not_revertible(module: nn.Module, target: type[nn.Module] | None) -> str | None:
    if target is None:
        return f"it is a {_own_class(module).__qualname__}, a subclass of a fused_rnn module"
    return "its forward was replaced on the object" if "forward" in vars(module) else None


def _copy_sharing_tensors(model: ModelT) -> ModelT:
    memo: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers, vars(module)):
            memo.update((id(value), value) for value in held.values() if isinstance(value, Tensor))
    return copy.deepcopy(model, memo)
