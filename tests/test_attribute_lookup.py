"""Weights are found by attribute where a class looks its attributes up itself, as probabilistic programs do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.cases import CELLS, Case, CellCase, run
from support.compare import assert_close_to_twin, assert_same
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fused_rnn

CASES = [
    *(Case(cell=cell, num_layers=2, bidirectional=True) for cell in CELLS),
    *(CellCase(cell=cell) for cell in CELLS),
    CellCase("GRU", bias=False),
]


def recurrent_weight(case: Case | CellCase) -> str:
    return "weight_hh" if isinstance(case, CellCase) else "weight_hh_l0"


class Recording:
    """A mixin that sees every Parameter when it is read, and gives out another tensor for some."""

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)  # type: ignore[misc]
        if isinstance(value, nn.Parameter):
            self.__dict__.setdefault("read", []).append(name)
            return self.__dict__.get("instead", {}).get(name, value)
        return value


def with_mixin(module: nn.Module, mixin: type) -> nn.Module:
    """As ``pyro.nn.module.to_pyro_module_`` does: another class for an object that exists."""
    cls = type(module)
    module.__class__ = type("Mixed" + cls.__name__, (mixin, cls), {})
    return module


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_weight_is_read_as_an_attribute_where_the_class_has_a_getattr(case: Case | CellCase) -> None:
    module = with_mixin(case.build(fused_rnn), Recording)
    names = [name for name, _ in module.named_parameters()]
    module.read = []
    run(module, case.data(), gradients=False)
    assert [name for name in names if name in module.read] == names


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_getattr_gives_is_computed_with_and_gets_the_gradient(case: Case | CellCase) -> None:
    name = recurrent_weight(case)
    plain, module = case.build(fused_rnn), with_mixin(case.build(fused_rnn), Recording)
    leaf = (getattr(plain, name).detach() * 2).requires_grad_()
    setattr(plain, name, nn.Parameter(leaf.detach()))
    module.instead = {name: leaf}
    expected = run(plain, case.data())
    data = case.data()
    outputs = case.outputs(module(data.input, data.hx))
    assert_same({key: expected[key] for key in outputs}, outputs)
    assert torch.autograd.grad(sum(output.sum() for output in outputs.values()), leaf)[0].abs().sum() > 0


@pytest.mark.parametrize("case", [Case(), CellCase()], ids=str)
def test_getattribute_of_a_subclass_is_asked(case: Case | CellCase) -> None:
    name = recurrent_weight(case)

    class Asked:
        def __getattribute__(self, attribute: str) -> Any:
            if attribute == name:
                return super().__getattribute__("_parameters")[name] * 2
            return super().__getattribute__(attribute)

    plain = case.build(fused_rnn)
    module = with_mixin(case.build(fused_rnn), Asked)
    with torch.no_grad():
        getattr(plain, name).mul_(2)
    assert_same(run(module, case.data(), gradients=False), run(plain, case.data(), gradients=False))


@pytest.mark.parametrize("case", [Case(), CellCase()], ids=str)
def test_property_of_a_subclass_is_asked(case: Case | CellCase) -> None:
    name = recurrent_weight(case)
    plain, module = case.build(fused_rnn), case.build(fused_rnn)
    doubled = property(lambda self: self._parameters[name] * 2)
    module.__class__ = type("Doubled", (type(module),), {name: doubled})
    with torch.no_grad():
        getattr(plain, name).mul_(2)
    assert_same(run(module, case.data(), gradients=False), run(plain, case.data(), gradients=False))


@pytest.mark.parametrize("case", [Case(num_layers=2), CellCase()], ids=str)
def test_class_of_its_own_lookup_keeps_what_else_a_layer_can(case: Case | CellCase) -> None:
    name = recurrent_weight(case)
    module, plain = with_mixin(case.build(fused_rnn), Recording), case.build(fused_rnn)
    for one in (module, plain):
        parametrizations.weight_norm(one, name)
    assert_close_to_twin(run(module, case.data()), run(plain, case.data()))
    twin = copy.deepcopy(module)
    assert_same(run(twin, case.data()), run(module, case.data()))
    if isinstance(case, Case):
        module = with_mixin(case.build(fused_rnn), Recording)
        plain = case.build(fused_rnn)
        for one in (module, plain):
            one._flat_weights[1] = one.weight_hh_l0 * 2
        assert_same(run(module, case.data(), gradients=False), run(plain, case.data(), gradients=False))


@pytest.mark.parametrize("case", [Case(), CellCase()], ids=str)
def test_plain_subclass_reads_the_dictionary_as_its_base_does(case: Case | CellCase) -> None:
    base = type(case.build(fused_rnn))

    class Plain(base):
        def extra(self) -> None:
            pass

    assert Plain._params is base._params


@pytest.mark.slow
@pytest.mark.parametrize("case", [Case(), CellCase()], ids=str)
def test_subclass_with_a_weight_of_its_own_making_compiles_without_a_graph_break(case: Case | CellCase) -> None:
    name = recurrent_weight(case)
    module = case.build(fused_rnn)
    module.__class__ = type("Doubled", (type(module),), {name: property(lambda self: self._parameters[name] * 2)})
    sequence = case.data().sequence.detach()
    expected = case.outputs(module(sequence))
    found = case.outputs(torch.compile(module, fullgraph=True, backend="eager")(sequence))
    assert_same(found, expected)


# ---- mode ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["NONSENSE", "lstm", None, ["LSTM"]])
def test_mode_that_is_none_is_refused_by_name(mode: Any) -> None:
    layer = fused_rnn.LSTM(3, 4)
    layer.mode = mode
    sequence: Tensor = torch.randn(5, 2, 3)
    with pytest.raises(ValueError, match=r"^mode: expected one of .*'LSTM'.*, got "):
        layer(sequence)
