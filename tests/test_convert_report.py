"""convert says what it did, and which methods of a model ask for classes that its layers no longer are."""

from __future__ import annotations

import functools
import subprocess
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch.nn as aliased
from torch import Tensor, nn
from torch.nn import LSTM as TorchLSTM
from torch.nn import GRUCell
from torch.nn.modules import rnn

import fused_rnn
from fused_rnn.class_tests import methods_that_test_for

RECURRENT = (nn.LSTM, nn.GRU)


class Model(nn.Module):
    """A model of both kinds of layers; the subclasses below have one method that asks for a class."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4)
        self.cell = nn.GRUCell(3, 4)


def asking(method: Any) -> type[Model]:
    return type("Asking", (Model,), {"method": method, "__qualname__": "Asking"})


def notes(model: nn.Module) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a report instead of a warning
        return fused_rnn.convert(model, return_report=True)[1].notes


def by_attribute(self: Any) -> Any:
    return [m for m in self.modules() if isinstance(m, nn.LSTM)]


def by_alias(self: Any) -> Any:
    return [m for m in self.modules() if isinstance(m, aliased.LSTM)]


def by_imported_name(self: Any) -> Any:
    return isinstance(self.lstm, TorchLSTM)


def by_submodule(self: Any) -> Any:
    return isinstance(self.lstm, rnn.LSTM)


def by_tuple(self: Any) -> Any:
    return isinstance(self.lstm, (nn.Linear, nn.LSTM))


def by_union(self: Any) -> Any:
    return isinstance(self.lstm, nn.Linear | nn.LSTM)


def by_constant(self: Any) -> Any:
    return isinstance(self.lstm, RECURRENT)


def by_type(self: Any) -> Any:
    return type(self.lstm) == nn.LSTM  # noqa: E721


def by_identity(self: Any) -> Any:
    return nn.LSTM is type(self.lstm)


def by_membership(self: Any) -> Any:
    return type(self.lstm) in {nn.LSTM, nn.GRU}


def by_class_attribute(self: Any) -> Any:
    return self.lstm.__class__ is not nn.LSTM


def by_issubclass(self: Any) -> Any:
    return issubclass(type(self.lstm), nn.LSTM)


def by_match(self: Any) -> Any:
    match self.lstm:
        case nn.LSTM():
            return True
    return False


def by_import_inside(self: Any) -> Any:
    from torch.nn import LSTM as Inside

    return isinstance(self.lstm, Inside)


def by_module_import_inside(self: Any) -> Any:
    import torch.nn as inside

    return isinstance(self.lstm, inside.LSTM)


def by_nested_function(self: Any) -> Any:
    def is_recurrent(module: nn.Module) -> bool:
        return isinstance(module, nn.LSTM)

    return [m for m in self.modules() if is_recurrent(m)]


def by_quantize_dynamic(self: Any) -> Any:
    from torch.ao.quantization import quantize_dynamic

    return quantize_dynamic(self, {nn.Linear, nn.LSTM})


def _enclosed() -> Callable[..., Any]:
    wanted = nn.LSTM

    def by_closure(self: Any) -> Any:
        return isinstance(self.lstm, wanted)

    return by_closure


def _wrapped() -> Callable[..., Any]:
    @functools.wraps(by_attribute)
    def wrapper(self: Any) -> Any:
        return by_attribute(self)

    return wrapper


ASKING = [
    by_attribute,
    by_alias,
    by_imported_name,
    by_submodule,
    by_tuple,
    by_union,
    by_constant,
    by_type,
    by_identity,
    by_membership,
    by_class_attribute,
    by_issubclass,
    by_match,
    by_import_inside,
    by_module_import_inside,
    by_nested_function,
    by_quantize_dynamic,
    _enclosed(),
    _wrapped(),
    property(by_attribute),
    staticmethod(by_attribute),
    classmethod(by_attribute),
    functools.cached_property(by_attribute),
]


@pytest.mark.parametrize("method", ASKING, ids=lambda method: getattr(method, "__name__", type(method).__name__))
def test_method_that_asks_for_a_class_of_torch_nn_is_named(method: Any) -> None:
    found = notes(asking(method)())
    assert len(found) == 1
    assert "the model itself: Asking.method asks for torch.nn.LSTM, which converted modules are not" in found[0]
    assert "nn.RNNBase" in found[0] and "fused_rnn.patch()" in found[0]


def base_class(self: Any) -> Any:
    return isinstance(self.lstm, nn.RNNBase), isinstance(self.cell, nn.RNNCellBase), isinstance(self, nn.Module)


def together_with_the_base_class(self: Any) -> Any:
    return isinstance(self.lstm, (nn.LSTM, nn.RNNBase))


def together_with_ours(self: Any) -> Any:
    return isinstance(self.lstm, (nn.LSTM, fused_rnn.LSTM))


def by_name_of_the_class(self: Any) -> Any:
    return self.lstm.__class__.__name__ == "LSTM"


def kind_that_was_not_converted(self: Any) -> Any:
    return isinstance(self.lstm, (nn.GRU, nn.RNN, nn.LSTMCell))


def parameter_of_that_name(self: Any, nn: Any = SimpleNamespace(LSTM=int)) -> Any:  # noqa: B008
    return isinstance(self.lstm, nn.LSTM)


def variable_of_that_name(self: Any) -> Any:
    LSTM = int
    return isinstance(self.lstm, LSTM)


class other:
    LSTM = int


def another_owner(self: Any) -> Any:
    return isinstance(self.lstm, other.LSTM), isinstance(self.lstm, self.cell.LSTM)


def computed_class(self: Any) -> Any:
    return isinstance(self.lstm, getattr(nn, "LSTM"))  # noqa: B009


def only_made(self: Any) -> Any:
    return nn.LSTM(3, 4), type(self)


def another_isinstance(self: Any) -> Any:
    return subprocess.isinstance(self.lstm, nn.LSTM)  # type: ignore[attr-defined]


def unknown_name(self: Any) -> Any:
    return isinstance(self.lstm, Unknown)  # noqa: F821


SILENT = [
    base_class,
    together_with_the_base_class,
    together_with_ours,
    by_name_of_the_class,
    kind_that_was_not_converted,
    parameter_of_that_name,
    variable_of_that_name,
    another_owner,
    computed_class,
    only_made,
    another_isinstance,
    unknown_name,
]


@pytest.mark.parametrize("method", SILENT, ids=lambda method: method.__name__)
def test_nothing_is_said_of_what_is_not_known_to_go_wrong(method: Any) -> None:
    assert notes(asking(method)()) == []


def test_nothing_is_said_of_init_which_has_run() -> None:
    class Asks(Model):
        def __init__(self) -> None:
            super().__init__()
            assert isinstance(self.lstm, nn.LSTM)

    assert notes(Asks()) == []


def test_nothing_is_said_where_nothing_was_converted() -> None:
    class Asks(nn.Module):
        method = by_attribute

    assert notes(Asks()) == []
    model = asking(by_attribute)()
    assert notes(model)
    assert notes(model) == []


def test_method_without_source_is_passed_over() -> None:
    namespace: dict[str, Any] = {"nn": nn}
    exec("def method(self): return isinstance(self.lstm, nn.LSTM)", namespace)
    assert notes(asking(namespace["method"])()) == []


def test_nothing_is_said_under_patch_where_the_names_mean_the_fused_classes() -> None:
    model = asking(by_attribute)()
    with fused_rnn.patch():
        assert notes(model) == []


def test_subclass_that_is_still_an_instance_of_its_base_is_no_reason_to_say_something() -> None:
    class Mine(nn.LSTM):
        pass

    model = asking(by_attribute)()
    model.lstm = Mine(3, 4)
    assert notes(model) == []
    assert model.method() == [model.lstm]


def test_method_is_named_once_for_all_modules_of_its_class() -> None:
    cls = asking(by_attribute)
    model = nn.Sequential(cls(), nn.Sequential(cls(), Model()))
    found = notes(model)
    assert len(found) == 1
    assert found[0].startswith("'0': Asking.method asks")


def test_source_is_read_once_for_each_function(monkeypatch: pytest.MonkeyPatch) -> None:
    import fused_rnn.class_tests as class_tests

    def method(self: Any) -> Any:
        return isinstance(self.lstm, nn.LSTM)

    cls = asking(method)
    replaced = {nn.LSTM: fused_rnn.LSTM}
    assert methods_that_test_for(cls, replaced) == {"Asking.method": [nn.LSTM]}
    monkeypatch.setattr(class_tests.inspect, "getsource", None)
    assert methods_that_test_for(cls, replaced) == {"Asking.method": [nn.LSTM]}
    assert methods_that_test_for(cls, {GRUCell: fused_rnn.GRUCell}) == {}


def test_warning_has_the_notes_and_what_was_left_alone() -> None:
    class Own(nn.GRU):
        def forward(self, input: Tensor, hx: Any = None) -> Any:
            return input, hx

    model = asking(by_attribute)()
    model.own = Own(3, 4)
    with pytest.warns(fused_rnn.ConversionWarning) as caught:
        fused_rnn.convert(model)
    assert len(caught) == 1
    message = caught[0].message
    assert isinstance(message, fused_rnn.ConversionWarning)
    assert list(message.left_alone) == ["own"]
    assert len(message.notes) == 1
    assert "left alone 'own': it is a" in str(message)
    assert "after fused_rnn.convert: the model itself: Asking.method asks for torch.nn.LSTM" in str(message)
    assert caught[0].filename == __file__


# ---- the report ---------------------------------------------------------------------------------------------------


def test_report_names_what_was_converted_and_left_alone_and_why() -> None:
    class Mine(nn.RNN):
        pass

    model = nn.ModuleDict({"model": asking(by_attribute)(), "mine": Mine(3, 4), "head": nn.Linear(4, 2)})
    model["replaced"] = nn.GRU(3, 4)
    model["replaced"].forward = lambda *given: None
    converted, report = fused_rnn.convert(model, return_report=True)
    assert converted is model
    assert report.converted == {"model.lstm": "LSTM", "model.cell": "GRUCell", "mine": "Mine"}
    assert report.left_alone == {"replaced": "its forward was replaced on the object"}
    assert str(report).splitlines()[:4] == [
        "converted 'model.lstm': LSTM",
        "converted 'model.cell': GRUCell",
        "converted 'mine': Mine",
        "left alone 'replaced': its forward was replaced on the object",
    ]
    assert str(report).splitlines()[4].startswith("note: 'model': Asking.method asks for torch.nn.LSTM")


def test_report_of_a_copy_belongs_to_the_copy() -> None:
    model = Model()
    copied, report = fused_rnn.convert(model, inplace=False, return_report=True)
    assert type(copied.lstm) is fused_rnn.LSTM
    assert type(model.lstm) is nn.LSTM
    assert set(report.converted) == {"lstm", "cell"}


def test_report_of_a_model_without_recurrent_modules_says_so() -> None:
    assert str(fused_rnn.convert(nn.Linear(2, 2), return_report=True)[1]) == "no recurrent modules"
    assert str(fused_rnn.convert(nn.GRU(2, 2), return_report=True)[1]) == "converted the model itself: GRU"
