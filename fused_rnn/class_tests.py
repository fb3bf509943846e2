"""Find methods that test whether a module is of one of ``torch.nn``'s recurrent classes, by reading their source.

Such a test is false of a converted module, and what the method does for these modules, it no longer does. Only a hint:
a source that is not at hand or not understood is passed over, and nothing here raises.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import sys
import textwrap
import types
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn

from .subclasses import all_names

__all__ = ["methods_that_test_for"]

# What a function must mention before its source is read; the classes' own names stand for `case nn.LSTM():`.
_WORTH_READING = {"isinstance", "issubclass", "type", "__class__", "quantize_dynamic", *nn.modules.rnn.__all__}


class _Tests(NamedTuple):
    """What the source of a function says of classes; nothing for most functions."""

    expressions: list[ast.expr]  # each names the classes of one test
    imports: dict[str, tuple[str, str | None]]  # for each name that the body imports, the module and what of it


_tests_of: weakref.WeakKeyDictionary[types.FunctionType, _Tests] = weakref.WeakKeyDictionary()


def methods_that_test_for(cls: type, replaced: dict[type, type]) -> dict[str, list[type]]:
    """Methods of ``cls``, inherited ones included, that ask for a class that modules had before their conversion.

    ``__init__`` is left out: it has run. So is a test that is true of the new class as well.

    Args:
        cls: a module's class.
        replaced: the classes that modules had, with those that they have now.

    Returns:
        For each method's qualified name, the classes of ``replaced`` that it asks for.
    """
    found: dict[str, list[type]] = {}
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] in ("builtins", "torch", __package__):
            continue
        for name, member in list(vars(base).items()):
            if name == "__init__":
                continue
            try:
                classes = {
                    asked_for for function in _functions_of(member) for asked_for in _asked_for(function, replaced)
                }
            except Exception:  # a hint only: whatever is odd about the function
                continue
            if classes:
                found[f"{base.__qualname__}.{name}"] = sorted(classes, key=lambda asked_for: asked_for.__name__)
    return found


def _functions_of(member: Any) -> Iterator[types.FunctionType]:
    if isinstance(member, (staticmethod, classmethod)):
        members: Iterable[Any] = (member.__func__,)
    elif isinstance(member, property):
        members = (member.fget, member.fset, member.fdel)
    elif isinstance(member, functools.cached_property):
        members = (member.func,)
    else:
        members = (member,)
    for function in members:
        if isinstance(function, types.FunctionType):
            unwrapped = inspect.unwrap(function)
            if isinstance(unwrapped, types.FunctionType):
                yield unwrapped


def _asked_for(function: types.FunctionType, replaced: dict[type, type]) -> set[type]:
    tests = _tests_of.get(function)
    if tests is None:
        tests = _tests_of[function] = _read_tests(function)
    if not tests.expressions:
        return set()
    known = _known_names(function, tests.imports)
    if known.get("isinstance") is not builtins.isinstance:
        return set()
    asked_for: set[type] = set()
    for expression in tests.expressions:
        classes = set(_classes_in(expression, known))
        asked_for |= {
            original
            for original in classes & replaced.keys()
            if not any(issubclass(replaced[original], other) for other in classes)
        }
    return asked_for


def _read_tests(function: types.FunctionType) -> _Tests:
    if not all_names(function.__code__) & _WORTH_READING:
        return _Tests([], {})
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except Exception:  # no source, or one that does not begin where Python says
        return _Tests([], {})
    expressions = [expression for node in ast.walk(tree) for expression in _tested_by(node)]
    return _Tests(expressions, _imports_in(tree) if expressions else {})


def _tested_by(node: ast.AST) -> Iterator[ast.expr]:
    """The expressions that name the classes for which ``node`` is a test."""
    if isinstance(node, ast.Call):
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", None)
        if name in ("isinstance", "issubclass") and isinstance(node.func, ast.Name) and len(node.args) == 2:
            yield node.args[1]
        elif name == "quantize_dynamic":  # quantizes the modules whose type is in the set
            yield from (*node.args[1:], *(keyword.value for keyword in node.keywords))
    elif isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        if any(_is_type_of_something(side) for side in sides):
            yield from (side for side in sides if not _is_type_of_something(side))
    elif isinstance(node, ast.MatchClass):
        yield node.cls


def _is_type_of_something(node: ast.expr) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "type" and len(node.args) == 1
    return isinstance(node, ast.Attribute) and node.attr == "__class__"


def _known_names(function: types.FunctionType, imports: dict[str, tuple[str, str | None]]) -> dict[str, Any]:
    """What names mean in ``function``, as far as that is known without running it; ``None`` where it is not."""
    known: dict[str, Any] = {**vars(builtins), **function.__globals__}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        try:
            known[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            known[name] = None
    for name in _local_names(function.__code__):
        known[name] = None
    for name, (module, attribute) in imports.items():
        loaded = sys.modules.get(module)
        known[name] = loaded if attribute is None else getattr(loaded, "__dict__", {}).get(attribute)
    return known


def _local_names(code: types.CodeType) -> set[str]:
    names = {*code.co_varnames, *code.co_cellvars}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _local_names(constant)
    return names


def _imports_in(tree: ast.AST) -> dict[str, tuple[str, str | None]]:
    found: dict[str, tuple[str, str | None]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                module = alias.name if alias.asname else alias.name.partition(".")[0]
                found[alias.asname or module] = (module, None)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                found[alias.asname or alias.name] = (node.module, alias.name)
    assigned = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return {name: meaning for name, meaning in found.items() if name not in assigned}


def _classes_in(node: ast.AST, known: dict[str, Any]) -> Iterator[type]:
    """The classes that an expression names: ``nn.LSTM``, ``(nn.LSTM, nn.GRU)``, ``nn.LSTM | nn.GRU``, a constant."""
    if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
        for element in node.elts:
            yield from _classes_in(element, known)
    elif isinstance(node, ast.Dict):
        for key in node.keys:
            if key is not None:
                yield from _classes_in(key, known)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        yield from _classes_in(node.left, known)
        yield from _classes_in(node.right, known)
    else:
        yield from _flatten(_value_of(node, known))


def _value_of(node: ast.AST, known: dict[str, Any]) -> Any:
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _value_of(node.value, known)
        # of modules alone: an attribute of anything else may be computed
        return vars(owner).get(node.attr) if isinstance(owner, types.ModuleType) else None
    return None


def _flatten(value: Any) -> Iterator[type]:
    if isinstance(value, type):
        yield value
    elif isinstance(value, (tuple, list, set, frozenset, dict)):
        for element in value:
            yield from _flatten(element)
    elif isinstance(value, types.UnionType):
        yield from _flatten(value.__args__)
