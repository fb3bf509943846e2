"""How layers and cells find their weights where the usual way, the module's dictionary of Parameters, is not theirs."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from . import _checks

_WEIGHT = re.compile(r"(weight|bias)_(ih|hh|hr|peephole|norm_ih|norm_hh|norm_c)(_l\d+(_reverse)?)?")


def narrow_to_heads(module: nn.Module, num_heads: int) -> None:
    """Every W_hh (G*H, H) without the columns of other heads: (G*H, H / num_heads). It has no values yet."""
    for name, w_hh in list(module.named_parameters(recurse=False)):
        if name.startswith("weight_hh"):
            rows, columns = w_hh.shape
            setattr(module, name, nn.Parameter(w_hh.detach().new_empty(rows, columns // num_heads)))


def widen_to_gates(module: nn.Module, num_gates: int) -> None:
    """Every parameter (H, .) of a plain RNN for a cell of more gates: (G*H, .). It has no values yet."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        rows, *columns = parameter.shape
        setattr(module, name, nn.Parameter(parameter.detach().new_empty(num_gates * rows, *columns)))


class ByAttribute:
    """Lets classes with an attribute lookup of their own find the weights by it, as ``torch.nn``'s modules do.

    The dictionary of Parameters is faster to read, which small calls feel, but passes by whatever a class does when its
    attributes are read: Pyro registers and samples them there. Told apart once for each class, not in each call.
    """

    def _params(self) -> list[Any]:
        raise NotImplementedError

    def _params_by_attribute(self) -> list[Any]:
        raise NotImplementedError

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if _looks_up_weights_itself(cls):
            cls._params = cls._params_by_attribute  # type: ignore[method-assign]


def _looks_up_weights_itself(cls: Any) -> bool:
    return (
        cls.__getattr__ is not nn.Module.__getattr__
        or cls.__getattribute__ is not object.__getattribute__
        or any(_WEIGHT.fullmatch(name) for base in cls.__mro__ for name in vars(base))
    )


class _Assigned(NamedTuple):
    """What was assigned to ``_flat_weights``, and the weights by name as they were then; ``None`` for a missing one."""

    weights: list[Tensor | None]
    replaced: list[weakref.ref[Tensor] | None]


OF_ASSIGNMENT = ("_assigned_weights", "_params")  # what a layer has in its __dict__ while such weights hold


class FlatWeights(list[Tensor | None]):
    """``layer._flat_weights``: what is written into the list, the layer computes with."""

    def __init__(self, layer: FlatWeightsMixin, weights: Iterable[Tensor | None]) -> None:
        super().__init__(weights)
        self._layer = layer

    def __reduce_ex__(self, protocol: Any) -> Any:
        return list, (list(self),)  # a copy belongs to no layer


def _writing_through(change: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: FlatWeights, *args: Any, **keywords: Any) -> Any:
        result = change(self, *args, **keywords)
        self._layer._flat_weights = list(self)
        return result

    return method


for _name in ("__setitem__ __delitem__ __iadd__ __imul__ append clear extend insert pop remove reverse sort").split():
    setattr(FlatWeights, _name, _writing_through(getattr(list, _name)))


class FlatWeightsMixin(nn.RNNBase):
    """``_flat_weights`` of ``torch.nn.RNNBase``: the list that its layers compute with.

    Here it is made when asked for, from the weights by name. What a program assigns to it, or writes into it, goes
    before these as in ``torch.nn``: until a weight by its name is another one than at that time, which ``.to(...)``,
    ``layer.weight_hh_l0 = ...`` and ``functional_call`` bring about. A copy or pickle has the weights by name alone.
    """

    _assigned_weights: _Assigned | None = None

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return FlatWeights(self, self._weights_in_use())

    @_flat_weights.setter
    def _flat_weights(self, weights: Any) -> None:
        names = self._flat_weights_names
        if not isinstance(weights, list):
            raise TypeError(
                f"_flat_weights: expected a list of {len(names)} Tensors ({', '.join(names)}), "
                f"got {_checks._describe(weights)}"
            )
        by_name = self._weights_by_name()
        if _are_same(weights, by_name):
            self._forget_assigned_weights()
        else:
            replaced = [None if weight is None else weakref.ref(weight) for weight in by_name]
            self.__dict__["_assigned_weights"] = _Assigned(list(weights), replaced)
            # On the object, before the class's: a call of a layer without such weights does not even ask for them.
            self.__dict__["_params"] = self._weights_in_use

    def _forget_assigned_weights(self) -> None:
        for name in OF_ASSIGNMENT:
            self.__dict__.pop(name, None)

    def _weights_by_name(self) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    def _weights_in_use(self) -> list[Any]:
        """Those that were assigned, as long as they hold, else those by name."""
        by_name = self._weights_by_name()
        assigned = self._assigned_weights
        if assigned is None:
            return by_name
        for weight, replaced in zip(by_name, assigned.replaced, strict=True):
            if weight is not None and replaced is not None and replaced() is not weight:
                self._forget_assigned_weights()
                return by_name
        return list(assigned.weights)

    def __setattr__(self, name: str, value: Any) -> None:
        # RNNBase's would build the list to write into it.
        super(nn.RNNBase, self).__setattr__(name, value)
        if "_assigned_weights" in self.__dict__ and name in self._flat_weights_names:
            weights = self._weights_in_use()
            weights[self._flat_weights_names.index(name)] = value
            self._flat_weights = weights

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name not in OF_ASSIGNMENT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # One of torch.nn's layers has the list itself.
        super().__setstate__({name: value for name, value in state.items() if name != "_flat_weights"})


def _are_same(weights: list[Any], others: list[Any]) -> bool:
    return len(weights) == len(others) and all(a is b for a, b in zip(weights, others))
