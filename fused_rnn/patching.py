"""Let ``torch.nn``'s names mean the fused classes, in a block or for the whole process."""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any, TypeVar

from torch import nn

from .convert import FUSED

__all__ = ["patch", "unpatch"]

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

# torch.nn's classes are looked up in these three places.
_PLACES: tuple[ModuleType, ...] = (nn, nn.modules, nn.modules.rnn)

_COMPILER = "torch._dynamo.config"

_lock = threading.RLock()  # __del__ may run anywhere
_statements = 0
_open_blocks = 0
_times_undone = 0  # a block that unpatch() has ended must not count when it is left
_replaced: dict[tuple[ModuleType, str], tuple[Any, Any]] = {}  # what was there, and what is there now


class patch(contextlib.ContextDecorator):
    """Let ``torch.nn.LSTM``, ``GRU``, ``RNN`` and the cells mean the fused ones.

    As a statement from here on, in a ``with`` statement for the block::

        fused_rnn.patch()            # from here on, until fused_rnn.unpatch()
        with fused_rnn.patch():      # in this block
            model = SomebodyElsesModel()  # says nn.LSTM(...) inside

    Either holds for the whole process, other threads included; blocks may be nested, and after the last that is open
    the names mean ``torch.nn``'s again unless the statement stands. It reaches code that looks the class up when it
    runs, as ``nn.LSTM`` or ``torch.nn.LSTM``, and what is imported meanwhile: ``from torch.nn import LSTM`` and ``class
    MyLSTM(nn.LSTM)``. What was imported before, it cannot reach: use :func:`convert` for such a model.

    While it holds, ``isinstance(module, nn.LSTM)`` is true of fused layers only: make or convert a program's layers
    while it holds, and test them while it holds. ``torch.nn``'s own layers cannot be pickled meanwhile, because their
    class is not found by its name. For :func:`torch.compile`, which breaks the graph at ``torch.nn.LSTM`` by that test,
    the statement sets ``torch._dynamo.config.allow_rnn`` as long; a block does where the compiler is loaded already.
    """

    def __init__(self) -> None:
        global _statements
        self._entered_after: list[int] = []
        # Nothing tells here whether a `with` follows, so this is a statement until __enter__ takes it back.
        with _lock:
            self._stated_after: int | None = _times_undone
            _statements += 1
            _update()

    def _take_back(self) -> None:
        global _statements
        if self._stated_after == _times_undone:
            _statements -= 1
        self._stated_after = None

    def __del__(self) -> None:
        # The object of a statement goes at once, that of a block has been entered by then. Loading the compiler takes a
        # second, for which a block that only builds a model should not wait.
        if self._stated_after is not None and not sys.is_finalizing():
            with contextlib.suppress(ImportError):
                importlib.import_module(_COMPILER)
            with _lock:
                _update()

    def __enter__(self) -> patch:
        global _open_blocks
        with _lock:
            self._take_back()
            self._entered_after.append(_times_undone)
            _open_blocks += 1
            _update()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global _open_blocks
        with _lock:
            if self._entered_after.pop() == _times_undone:
                _open_blocks -= 1
            _update()

    def __call__(self, function: FunctionT) -> FunctionT:
        """As a decorator: the block is each call of ``function``."""
        with _lock:
            self._take_back()
            _update()
        return super().__call__(function)


def unpatch() -> None:
    """Give ``torch.nn`` its names back: undo every :class:`patch` of the process, whether statement or block.

    A block that is still open, in whichever thread, is over with this; that it is left later changes nothing. Layers
    that were made meanwhile stay what they are (:func:`revert` changes them). Harmless where nothing is patched.
    """
    global _statements, _open_blocks, _times_undone
    with _lock:
        _statements = _open_blocks = 0
        _times_undone += 1
        _update()


def _update() -> None:
    """Make the names mean what they should, by the statements and blocks that count. The caller holds the lock."""
    if _statements + _open_blocks > 0:
        for place in _PLACES:
            for original, fused in FUSED.items():
                _replace(place, original.__name__, fused)
        # Dynamo asks isinstance(module, torch.nn.LSTM) when it compiles, which is now true of layers that it can trace.
        if _COMPILER in sys.modules:
            _replace(sys.modules[_COMPILER], "allow_rnn", True)
    else:
        while _replaced:
            (owner, name), (before, ours) = _replaced.popitem()
            if getattr(owner, name) is ours:  # and not what somebody else has put there since
                setattr(owner, name, before)


def _replace(owner: ModuleType, name: str, ours: Any) -> None:
    if (owner, name) not in _replaced:
        _replaced[owner, name] = getattr(owner, name), ours
        setattr(owner, name, ours)
