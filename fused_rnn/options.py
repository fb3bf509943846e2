"""Options of layers and cells as attributes. They are kept in records, so that a call of a plain one looks at one."""

from __future__ import annotations

from typing import Any

from .settings import NOTHING_AROUND, NOTHING_WITHIN

__all__ = ["in_around", "in_within"]


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
