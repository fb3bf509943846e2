"""Options of layers and cells as attributes. They are kept in records, so that a call of a plain one looks at one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .settings import NOTHING_AROUND, NOTHING_WITHIN, Within

__all__ = ["HasOptionsWithin", "changed_options", "in_around", "in_within", "set_options"]


def in_around(name: str) -> Any:
    """An attribute that is a field of the module's :class:`Around`."""
    return _in_record("_around", NOTHING_AROUND, name)


def in_within(name: str) -> Any:
    """An attribute that is a field of the module's :class:`Within`."""
    return _in_record("_within", NOTHING_WITHIN, name)


def _in_record(attribute: str, nothing: Any, name: str) -> Any:
    def get(self: Any) -> Any:
        if name in self._modules:  # a subclass's own part of this name, as self.activation = nn.ReLU() makes
            return self._modules[name]
        return getattr(getattr(self, attribute) or nothing, name)

    def put(self: Any, value: Any) -> None:
        self._prepare_option(name, value)
        record = (getattr(self, attribute) or nothing)._replace(**{name: value})
        self.__dict__[attribute] = None if record == nothing else record

    return property(get, put)


class HasOptionsWithin:
    """The options that layers and cells share as attributes; both have more of them."""

    _within: Within | None = None  # also of those that were made, or pickled, before there were any

    recurrent_dropout: float = in_within("recurrent_dropout")
    zoneout: float = in_within("zoneout")
    zoneout_cell: float = in_within("zoneout_cell")
    activation: str = in_within("activation")
    recurrent_activation: str = in_within("recurrent_activation")
    reset_after: bool = in_within("reset_after")
    peephole: bool = in_within("peephole")
    coupled_gates: bool = in_within("coupled_gates")
    num_heads: int = in_within("num_heads")
    layer_norm: bool = in_within("layer_norm")
    cell_clip: float | None = in_within("cell_clip")


def set_options(module: Any, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Give a module the options that its constructor was given, in the order of ``defaults``: one may need another."""
    for name, default in defaults.items():
        value = given.get(name, default)
        if value != default:
            setattr(module, name, value)


def changed_options(module: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a module that have another value than their default."""
    return {name: value for name, default in defaults.items() if (value := getattr(module, name)) != default}
