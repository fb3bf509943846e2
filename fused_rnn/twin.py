"""The ``torch.nn`` module that computes what a fused one does, with the same Parameter objects."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

from torch import nn
from torch.nn.utils import parametrize

from .options import changed_options
from .settings import CELL_OPTIONS, LAYER_OPTIONS, OTHER_NONLINEARITIES
from .weights import OF_ASSIGNMENT

_log = logging.getLogger("fused_rnn")

# Unknown to torch.nn; why_not_torch_nn has seen that what a module computes does not depend on their values.
_LEFT_BEHIND = (*LAYER_OPTIONS, "_around", "_within", *OF_ASSIGNMENT)
# What is left of the first values of the parameters is the parameters.
_CHANGE_NUMBERS = {
    name: default for name, default in LAYER_OPTIONS.items() if name not in ("recompute", "init", "forget_bias")
}


class HasTwin:
    """What layers and cells share as counterparts of ``torch.nn``'s modules."""

    _torch_class: ClassVar[type[nn.Module]]  # in the class itself: a subclass is no counterpart

    def __prepare_scriptable__(self) -> nn.Module:
        """The module that :func:`torch.jit.script` compiles in place of this one: ``torch.nn``'s.

        ``torch.jit.script`` puts it into the model that it is given, too.

        Raises:
            RuntimeError: there is none; the message has the reason.
        """
        assert isinstance(self, nn.Module)
        is_subclass = "_torch_class" not in vars(own_class(self))
        if is_subclass and not type(self).forward.__module__.startswith(f"{__package__}."):
            return self  # its forward is as fit for TorchScript as its author made it
        reason = why_not_torch_nn(self) or _why_not_scriptable(self)
        if reason is not None:
            raise RuntimeError(f"torch.jit.script: cannot express the fused_rnn module {self}: {reason}")
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        become_torch_nn(twin)
        _log.info(
            "torch.jit.script takes torch.nn's %s for the fused one, in the model that it was given, too; "
            "fused_rnn.convert(model) brings the fused one back",
            twin,
        )
        return twin


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class a module was made from: a parametrized one has a subclass of its own, with a property per tensor."""
    cls = type(module)
    return cls.__bases__[0] if parametrize.is_parametrized(module) else cls


def change_class(module: nn.Module, target: type[nn.Module]) -> None:
    """Make ``module`` an object of ``target``, with the properties of its parametrized tensors."""
    cls = type(module)
    if parametrize.is_parametrized(module):
        made_anew = ("__dict__", "__weakref__", "__doc__", "_params")
        members = {name: value for name, value in vars(cls).items() if name not in made_anew}
        target = type(cls.__name__, (target,), members)
    object.__setattr__(module, "__class__", target)


def why_not_torch_nn(module: Any) -> str | None:
    """Why ``torch.nn`` has nothing that computes what this fused module does; ``None`` if it has.

    Options that ``torch.nn`` lacks and that change the numbers belong here.
    """
    cls = own_class(module)
    if "_torch_class" not in vars(cls):
        is_ours = cls.__module__.startswith(f"{__package__}.")
        return (
            f"torch.nn has no {cls.__name__}"
            if is_ours
            else f"it is a {cls.__qualname__}, a subclass of a fused_rnn module"
        )
    options = _CHANGE_NUMBERS if isinstance(module, nn.RNNBase) else CELL_OPTIONS
    changed = changed_options(module, options)
    if (nonlinearity := getattr(module, "nonlinearity", "tanh")) in OTHER_NONLINEARITIES:
        changed = {"nonlinearity": nonlinearity} | changed
    for name, value in changed.items():
        return f"it has {name}={value!r}, which torch.nn.{vars(cls)['_torch_class'].__name__} has not"
    return "its forward was replaced on the object" if "forward" in vars(module) else None


def become_torch_nn(module: Any) -> None:
    """Change a fused module, of which :func:`why_not_torch_nn` has nothing to say, into ``torch.nn``'s in place."""
    target = own_class(module)._torch_class  # type: ignore[attr-defined]
    is_layer = isinstance(module, nn.RNNBase)
    assigned = list(module._flat_weights) if is_layer and module._assigned_weights is not None else None
    for name in _LEFT_BEHIND:
        vars(module).pop(name, None)
    change_class(module, target)
    if is_layer:
        module._init_flat_weights()
        if assigned is not None:
            module._flat_weights = assigned


def _why_not_scriptable(module: Any) -> str | None:
    if not parametrize.is_parametrized(module):
        return None
    names = ", ".join(module.parametrizations)
    return (
        f"TorchScript knows no parametrizations, and {names} of it has some; "
        f"torch.nn.utils.parametrize.remove_parametrizations(layer, {next(iter(module.parametrizations))!r}) "
        "makes a Parameter of their result"
    )
