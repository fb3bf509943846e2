"""Fused counterparts of subclasses of ``torch.nn``'s recurrent classes.

``class MyLSTM(nn.LSTM)`` gets a class that derives from ``MyLSTM`` and, before ``nn.LSTM`` in the order in which
methods are looked up, from the fused class: what ``MyLSTM`` adds or overrides is its own, and ``super().forward(...)``
in it is the fused forward. ``isinstance`` of ``MyLSTM`` stays true.
"""

from __future__ import annotations

import inspect
import types
import weakref
from typing import Any

from torch import nn

__all__ = ["fused_subclass", "why_no_fused_subclass"]

# torch.nn's layers call these, the fused ones do not: to override one is to change what forward does.
_CALLED_BY_FORWARD = {
    "check_input",
    "check_hidden_size",
    "check_forward_args",
    "get_expected_hidden_size",
    "get_expected_cell_size",
    "permute_hidden",
    "_flat_weights",
    "_init_flat_weights",
    "_update_flat_weights",
    "_weights_have_changed",
}
_PICKLED_BY = {"__reduce__", "__reduce_ex__", "__getnewargs__", "__getnewargs_ex__"}

_with_both: dict[type, type] = {}
_made: weakref.WeakValueDictionary[type, type] = weakref.WeakValueDictionary()


def why_no_fused_subclass(cls: type, original: type[nn.Module], fused: type[nn.Module]) -> str | None:
    """Why objects of ``cls``, a subclass of ``original``, cannot be made fused ones; ``None`` if they can."""
    return _why_not(cls, original, fused) or _try_to_make(cls, original, fused)


def fused_subclass(cls: type, original: type[nn.Module], fused: type[nn.Module]) -> type[nn.Module]:
    """The class whose objects are ``cls``'s with the forward of ``fused``; always the same one for the same ``cls``."""
    made = _made.get(cls)
    if made is None:
        made = _made[cls] = _make_subclass(cls, original, fused)
    return made


def _make_subclass(cls: type, original: type[nn.Module], fused: type[nn.Module]) -> type[nn.Module]:
    def reduce_ex(self: Any, protocol: Any) -> Any:
        # The class has no place where pickle could find it by its name.
        _, _, *rest = super(made, self).__reduce_ex__(protocol)
        return _restore, (cls, original, fused), *rest

    namespace = {
        "_torch_class": cls,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": reduce_ex,
    }
    bases = (cls, _class_with_both(original, fused))
    made: type[nn.Module] = types.new_class(cls.__name__, bases, exec_body=lambda body: body.update(namespace))
    return made


def _restore(cls: type, original: type[nn.Module], fused: type[nn.Module]) -> nn.Module:
    """An object without attributes, for pickle and copy to fill."""
    reason = why_no_fused_subclass(cls, original, fused)
    if reason is not None:
        raise TypeError(f"this {cls.__qualname__} was converted by fused_rnn; its class is another one now: {reason}")
    made = fused_subclass(cls, original, fused)
    return made.__new__(made)


def _class_with_both(original: type[nn.Module], fused: type[nn.Module]) -> type:
    """A class in whose order the fused class stands before ``torch.nn``'s."""
    both = _with_both.get(original)
    if both is None:
        both = _with_both[original] = type(fused.__name__, (fused, original), {"__module__": __name__})
    return both


def _why_not(cls: type, original: type[nn.Module], fused: type[nn.Module]) -> str | None:
    before = cls.__mro__[: cls.__mro__.index(original)]
    own = {name for base in before for name in vars(base)}
    for base in before:
        if "forward" in vars(base) and not _calls_super_forward(vars(base)["forward"]):
            return "with a forward of its own, which does not call super().forward"
    if issubclass(cls, nn.RNNBase) and (overridden := own & _CALLED_BY_FORWARD):
        return f"with a {_list(overridden)} of its own, which the fused forward would not call"
    if overridden := own & _PICKLED_BY:
        return f"with a {_list(overridden)} of its own, which would make a torch.nn module of a pickled one"
    if taken := names_of_ours(original, fused) & set(dir(cls)):
        return f"with a {_list(taken)} of its own, a name that the fused module needs"
    return None


def _try_to_make(cls: type, original: type[nn.Module], fused: type[nn.Module]) -> str | None:
    try:
        made = fused_subclass(cls, original, fused)
        object.__setattr__(object.__new__(cls), "__class__", made)
    except Exception as error:  # whatever a metaclass or __init_subclass__ says, or slots that do not fit
        return f"of which no class can be derived: {error}"
    return None


def names_of_ours(original: type[nn.Module], fused: type[nn.Module]) -> set[str]:
    """Attributes that a fused class has and ``torch.nn``'s has not."""
    names = set(dir(fused)) - set(dir(original)) - _CALLED_BY_FORWARD  # torch.nn's objects have a _flat_weights, too
    return {name for name in names if not name.startswith("__")}


def _calls_super_forward(function: Any) -> bool:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code is not None and {"super", "forward"} <= all_names(code)


def all_names(code: types.CodeType) -> set[str]:
    """Global names and attributes that a function uses, the functions in it included."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= all_names(constant)
    return names


def _list(names: set[str]) -> str:
    return ", ".join(sorted(names))
