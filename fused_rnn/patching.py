"""Let ``torch.nn``'s names mean the fused classes, in a block or for the whole process."""

from __future__ import annotations

import contextlib
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

_lock = threading.Lock()
_standing: set[patch] = set()  # those that no `with` statement has taken for its own
_open_blocks = 0
_times_undone = 0  # a block that unpatch() has ended must not count when it is left
_replaced: list[tuple[Any, str, Any, Any]] = []  # owner, attribute, what was there, what is there now


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
    ``torch._dynamo.config.allow_rnn`` is true as long.
    """

    def __init__(self) -> None:
        # Nothing tells here whether a `with` follows, so this stands until __enter__ takes it back.
        self._entered_after: list[int] = []
        with _lock:
            _standing.add(self)
            _update()

    def __enter__(self) -> patch:
        global _open_blocks
        with _lock:
            _standing.discard(self)
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
            _standing.discard(self)
            _update()
        return super().__call__(function)


def unpatch() -> None:
    """Give ``torch.nn`` its names back: undo every :class:`patch` of the process, whether statement or block.

    A block that is still open, in whichever thread, is over with this; that it is left later changes nothing. Layers
    that were made meanwhile stay what they are (:func:`revert` changes them). Harmless where nothing is patched.
    """
    global _open_blocks, _times_undone
    with _lock:
        _standing.clear()
        _open_blocks = 0
        _times_undone += 1
        _update()


def _update() -> None:
    """Make the names mean what they should, by the statements and blocks that count. The caller holds the lock."""
    wanted = bool(_standing) or _open_blocks > 0
    if wanted and not _replaced:
        for place in _PLACES:
            for original, fused in FUSED.items():
                _replace(place, original.__name__, fused)
        # Dynamo asks isinstance(module, torch.nn.LSTM) when it compiles, which is now true of layers that it can trace.
        with contextlib.suppress(ImportError):
            import torch._dynamo.config as compiler

            _replace(compiler, "allow_rnn", True)
    elif not wanted:
        while _replaced:
            owner, name, before, ours = _replaced.pop()
            if getattr(owner, name) is ours:  # and not what somebody else has put there since
                setattr(owner, name, before)


def _replace(owner: Any, name: str, ours: Any) -> None:
    _replaced.append((owner, name, getattr(owner, name), ours))
    setattr(owner, name, ours)
