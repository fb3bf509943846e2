"""Exchange ``torch.nn``'s recurrent modules of a model for the fused ones, and back."""

from __future__ import annotations

import copy
import logging
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn

from . import _checks
from .cells import GRUCell, LSTMCell, RNNCell
from .class_tests import methods_that_test_for
from .layers import GRU, LSTM, RNN
from .settings import CONVERT_OPTIONS, LayerOptions, show_options
from .subclasses import fused_subclass, names_of_ours, why_no_fused_subclass
from .twin import HasTwin, become_torch_nn, change_class, own_class, why_not_torch_nn

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["ConversionReport", "ConversionWarning", "convert", "revert"]

ModelT = TypeVar("ModelT", bound=nn.Module)

FUSED: dict[type[nn.Module], type[nn.Module]] = {
    fused._torch_class: fused for fused in (LSTM, GRU, RNN, LSTMCell, GRUCell, RNNCell)
}

_log = logging.getLogger("fused_rnn")


@dataclass
class ConversionReport:
    """What :func:`convert` did with a model; print it.

    Attributes:
        converted: the class, for the name in the model (``""`` is the model itself) of each module that was converted.
        left_alone: why, for the name of each recurrent module that was not.
        notes: which methods of the model ask for ``torch.nn``'s classes, which converted modules are not.
    """

    converted: dict[str, str] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"converted {_quote(name)}: {cls}" for name, cls in self.converted.items()]
        lines += [f"left alone {_quote(name)}: {reason}" for name, reason in self.left_alone.items()]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines) or "no recurrent modules"


class ConversionWarning(UserWarning):
    """Recurrent modules that :func:`convert` left as they were, and what may miss those that it converted.

    Attributes:
        left_alone: why, for each module's name in the model (``""`` is the model itself).
        notes: as in :class:`ConversionReport`.
    """

    def __init__(self, left_alone: dict[str, str], notes: list[str] | None = None) -> None:
        self.left_alone = left_alone
        self.notes = notes or []
        parts = []
        if left_alone:
            lines = [f"{_quote(name)}: {reason}" for name, reason in left_alone.items()]
            parts.append("fused_rnn.convert left alone " + "; ".join(lines))
        if self.notes:
            parts.append("after fused_rnn.convert: " + "; ".join(self.notes))
        super().__init__(". ".join(parts))


@overload
def convert(
    model: ModelT, *, inplace: bool = True, return_report: Literal[False] = False, **options: Unpack[LayerOptions]
) -> ModelT: ...


@overload
def convert(
    model: ModelT, *, inplace: bool = True, return_report: Literal[True], **options: Unpack[LayerOptions]
) -> tuple[ModelT, ConversionReport]: ...


@show_options(CONVERT_OPTIONS)
def convert(model: Any, *, inplace: bool = True, return_report: bool = False, **options: Unpack[LayerOptions]) -> Any:
    """Make every ``torch.nn`` LSTM, GRU, RNN and cell of a model a fused one.

    A module stays the same object, of another class: its Parameters, hooks, training flag, parametrizations, place in
    the model and every other reference to it are what they were. An optimizer made before goes on working, also in the
    middle of training.

    A subclass of ``torch.nn``'s classes is converted where it has no ``forward`` of its own, or one that calls
    ``super().forward``, and overrides nothing that ``forward`` calls: its objects get a class that derives from the
    subclass and computes ``forward`` with the kernels (:func:`torch.compile` breaks the graph there, as it does at
    ``torch.nn.LSTM``). Left alone are other subclasses, modules whose ``forward`` was replaced on the object, and
    scripted ones; a :class:`ConversionWarning` names them with the reason. The names of converted modules go to the
    logger ``"fused_rnn"`` at level INFO.

    ``isinstance(module, nn.LSTM)`` is false of a converted ``nn.LSTM`` (``nn.RNNBase`` and ``nn.RNNCellBase`` are right
    for both). Where methods of the model ask so, the warning says it; what is called from outside, it cannot know: give
    the weights their first values before the conversion, where that goes by ``model.apply``, and :func:`revert` before
    ``quantize_dynamic``, which passes fused layers by.

    Args:
        model: any module, a recurrent one included.
        inplace: ``False`` leaves ``model`` as it is and converts a copy of its modules. The copy holds the very
            Parameters and buffers of ``model``; for independent ones convert ``copy.deepcopy(model)``.
        options: those of :class:`fused_rnn.LSTM` that ``torch.nn`` lacks and that leave parameters as they are, for the
            layers that are converted. ``peephole=True`` adds parameters of zeros, with which the layer computes what it
            did; an optimizer that exists does not know them.
        return_report: return a :class:`ConversionReport` as well, and warn of nothing that is in it.

    Returns:
        ``model``, or the copy; with ``return_report`` the pair ``(model, report)``.

    Raises:
        TypeError, ValueError: ``model`` is no ``torch.nn.Module``; an option is unknown, out of range, or has no
            meaning for one of the layers, which is named. Nothing is changed then.
    """
    check_model(model)
    if "num_heads" in options:
        raise TypeError(
            "num_heads: unexpected keyword argument of convert: with heads every weight_hh has another shape; make the "
            "layer with them"
        )
    if "layer_norm" in options:
        raise TypeError(
            "layer_norm: unexpected keyword argument of convert: no gains make a layer with it compute what it did; "
            "make the layer with it, or set it on the converted one"
        )
    _checks.check_names("convert", options, CONVERT_OPTIONS)
    _checks.check_options(options)
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase) and not isinstance(module, HasTwin):
            _check_fit(name, module, options)
    if not inplace:
        model = copy_sharing_tensors(model)
    report = ConversionReport()
    replaced: dict[type, type] = {}
    for name, module in model.named_modules():
        cls = own_class(module)
        original = next((base for base in cls.__mro__ if base in FUSED), None)
        reason = _why_left_alone(module, cls, original)
        if reason is not None:
            report.left_alone[name] = reason
        elif original is not None and not isinstance(module, HasTwin):
            target = FUSED[original]
            if cls is original:
                replaced[original] = target
            else:
                target = fused_subclass(cls, original, target)
            _become_fused(module, target)
            if isinstance(module, nn.RNNBase):
                for option, value in options.items():
                    setattr(module, option, value)
            report.converted[name] = cls.__name__
            _log.info("converted %s to %s", _quote(name), module)
    if replaced:
        report.notes += _notes_on_class_tests(model, replaced)
    if return_report:
        return model, report
    if report.left_alone or report.notes:
        warnings.warn(ConversionWarning(report.left_alone, report.notes), stacklevel=2)
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
    check_model(model)
    found = []
    refused = []
    for name, module in model.named_modules():
        if isinstance(module, HasTwin):
            found.append(name)
            reason = why_not_torch_nn(module)
            if reason is not None:
                refused.append(f"{_quote(name)}: {reason}")
    if refused:
        raise ValueError("model: torch.nn cannot express " + "; ".join(refused))
    if not inplace:
        model = copy_sharing_tensors(model)
    for name in found:
        become_torch_nn(model.get_submodule(name))
    return model


def _check_fit(name: str, module: nn.RNNBase, options: LayerOptions) -> None:
    try:
        _checks.check_fit_of_layer(options, module)
    except ValueError as error:
        raise ValueError(f"{error} (of {_quote(name)})") from None


def _quote(name: str) -> str:
    return f"'{name}'" if name else "the model itself"


def check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got an object of type {type(model).__name__}")


def _why_left_alone(module: nn.Module, cls: type[nn.Module], original: type[nn.Module] | None) -> str | None:
    if isinstance(module, torch.jit.ScriptModule):
        scripted = module.original_name in {original.__name__ for original in FUSED}
        return f"it is a scripted {module.original_name}" if scripted else None
    if original is None or isinstance(module, HasTwin):
        return None
    if "forward" in vars(module):
        return "its forward was replaced on the object"
    fused = FUSED[original]
    own = {*vars(module), *module._parameters, *module._buffers, *module._modules}
    if taken := names_of_ours(original, fused) & own:
        return f"it has an attribute {sorted(taken)[0]}, a name that the fused module needs"
    if cls is original:
        return None
    reason = why_no_fused_subclass(cls, original, fused)
    return reason and f"it is a {cls.__qualname__}, a subclass of torch.nn.{original.__name__} {reason}"


def _become_fused(module: Any, target: type[nn.Module]) -> None:
    if not isinstance(module, nn.RNNBase):
        change_class(module, target)
        return
    module._update_flat_weights()
    # the list that torch.nn's layers compute with: what a program wrote into it goes on to count
    weights = vars(module).pop("_flat_weights")
    change_class(module, target)
    module._flat_weights = weights


def _notes_on_class_tests(model: nn.Module, replaced: dict[type, type]) -> list[str]:
    seen: set[str] = set()
    notes = []
    for name, module in model.named_modules():
        for method, classes in methods_that_test_for(type(module), replaced).items():
            if method not in seen:
                seen.add(method)
                asked_for = ", ".join(f"torch.nn.{cls.__name__}" for cls in classes)
                notes.append(
                    f"{_quote(name)}: {method} asks for {asked_for}, which converted modules are not; ask for their "
                    "base nn.RNNBase or nn.RNNCellBase there, or build the model under fused_rnn.patch()"
                )
    return notes


def copy_sharing_tensors(model: ModelT) -> ModelT:
    memo: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers, vars(module)):
            memo.update((id(value), value) for value in held.values() if isinstance(value, Tensor))
    return copy.deepcopy(model, memo)
