"""convert takes subclasses whose forward is torch.nn's, or ends in it; everything else of theirs stays theirs."""

from __future__ import annotations

import abc
import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.cases import Case, CellCase, run
from support.compare import assert_close_to_twin, assert_same
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fused_rnn


class Named(nn.LSTM):
    """Adds methods and attributes, overrides what forward does not call."""

    def __init__(self, *args: Any, name: str = "?", **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.name = name

    def zeros(self, batch: int) -> tuple[Tensor, Tensor]:
        state = torch.zeros(self.num_layers, batch, self.hidden_size)
        return state, state

    def extra_repr(self) -> str:
        return f"{self.name}, {super().extra_repr()}"

    def reset_parameters(self) -> None:
        super().reset_parameters()
        with torch.no_grad():
            self.bias_ih_l0.fill_(1)


class Recurrent(abc.ABC, nn.RNNBase):
    """An abstract mixin over the base class, with a forward that ends in the layer's."""

    @abc.abstractmethod
    def initial(self, input: Tensor) -> Any: ...

    def forward(self, input: Tensor, hx: Any = None, lengths: Tensor | None = None) -> Any:
        hx = self.initial(input) if hx is None else hx
        output, states = super().forward(input, hx=hx)
        return output if lengths is None else output * (torch.arange(len(output))[:, None, None] < lengths), states


class Mixed(Recurrent, nn.LSTM):
    def initial(self, input: Tensor) -> Any:
        state = torch.ones(self.num_layers, input.shape[1], self.hidden_size)
        return state, state


class MixedGRU(Recurrent, nn.GRU):
    def initial(self, input: Tensor) -> Any:
        return torch.ones(self.num_layers, input.shape[1], self.hidden_size)


class MyCell(nn.GRUCell):
    def doubled(self, input: Tensor) -> Tensor:
        return self(input) * 2


class Logged:
    """A mixin that comes after nn.LSTM and is no module."""

    def describe(self) -> str:
        return f"{type(self).__name__} of {self.hidden_size}"


class Last(nn.RNN, Logged):
    pass


SUBCLASSES: list[Callable[[], nn.Module]] = [
    lambda: Named(5, 7, num_layers=2, name="mine"),
    lambda: Mixed(5, 7, num_layers=2),
    lambda: MixedGRU(5, 7),
    lambda: MyCell(5, 7),
    lambda: Last(5, 7, nonlinearity="relu"),
]
FUSED = [fused_rnn.LSTM, fused_rnn.LSTM, fused_rnn.GRU, fused_rnn.GRUCell, fused_rnn.RNN]
IDS = ["Named", "Mixed", "MixedGRU", "MyCell", "Last"]


def build(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


def given(module: nn.Module) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(3, 5) if isinstance(module, nn.RNNCellBase) else torch.randn(4, 3, 5)


def numbers(module: nn.Module) -> dict[str, Tensor]:
    """Output and gradients."""
    result = module(given(module))
    output = result[0] if isinstance(result, tuple) else result
    parameters = dict(module.named_parameters())
    gradients = torch.autograd.grad(output.square().sum(), list(parameters.values()))
    return {"output": output, **{f"grad({name})": g for name, g in zip(parameters, gradients, strict=True)}}


both = pytest.mark.parametrize(("make", "fused"), list(zip(SUBCLASSES, FUSED, strict=True)), ids=IDS)


@both
def test_subclass_is_converted_with_its_numbers_and_its_class(
    make: Callable[[], nn.Module], fused: type, recwarn: pytest.WarningsRecorder
) -> None:
    module = build(make)
    cls, text, parameters = type(module), repr(module), list(module.parameters())
    expected = numbers(module)
    assert fused_rnn.convert(module) is module
    assert not recwarn.list
    assert isinstance(module, fused)
    assert isinstance(module, cls)
    assert repr(module) == text
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    assert_close_to_twin(numbers(module), expected)
    assert fused_rnn.revert(module) is module
    assert type(module) is cls
    assert_same(numbers(module), expected)


@both
@pytest.mark.kernels
def test_converted_subclass_computes_with_the_kernels(make: Callable[[], nn.Module], fused: type) -> None:
    module = fused_rnn.convert(build(make))
    result = module(given(module))
    output = result[0] if isinstance(result, tuple) else result
    assert "Gradient" in output.grad_fn.name()


def test_methods_attributes_and_overrides_of_the_subclass_are_its_own() -> None:
    module = fused_rnn.convert(build(SUBCLASSES[0]))
    assert module.zeros(2)[0].shape == (2, 2, 7)
    assert module.name == "mine"
    module.reset_parameters()
    assert (module.bias_ih_l0 == 1).all()
    mixed = fused_rnn.convert(build(SUBCLASSES[1]))
    output, _ = mixed(torch.randn(4, 3, 5), lengths=torch.tensor([[4], [2], [1]]))
    assert (output[2:, 1] == 0).all()
    assert fused_rnn.convert(build(SUBCLASSES[3])).doubled(torch.zeros(2, 5)).shape == (2, 7)
    assert fused_rnn.convert(build(SUBCLASSES[4])).describe() == "Last of 7"


def _by_pickle(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def _by_torch_save(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@both
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, _by_pickle, _by_torch_save])
def test_copies_of_a_converted_subclass_are_converted(
    make: Callable[[], nn.Module], fused: type, copied: Callable[[nn.Module], nn.Module]
) -> None:
    module = fused_rnn.convert(build(make))
    expected = numbers(module)
    twin = copied(module)
    assert twin is not module
    assert type(twin) is type(module)
    assert_same(numbers(twin), expected)
    fused_rnn.revert(twin)
    assert type(twin) is type(build(make))
    assert isinstance(module, fused)


def test_two_modules_of_a_subclass_have_one_class_after_conversion() -> None:
    first, second = (fused_rnn.convert(build(SUBCLASSES[0])) for _ in range(2))
    assert type(first) is type(second)
    assert fused_rnn.convert(first) is first


def test_options_of_convert_reach_subclasses() -> None:
    module = build(SUBCLASSES[0])
    converted = fused_rnn.convert(module, inplace=False, recompute=True)
    assert type(module) is Named
    assert converted.recompute
    assert all(a is b for a, b in zip(module.parameters(), converted.parameters(), strict=True))
    assert_close_to_twin(numbers(converted), numbers(module))
    back = fused_rnn.revert(converted, inplace=False)
    assert type(back) is Named
    assert "recompute" not in vars(back)


def test_parametrized_subclass_is_converted() -> None:
    module = build(SUBCLASSES[0])
    parametrizations.weight_norm(module, "weight_hh_l0")
    expected = numbers(module)
    fused_rnn.convert(module)
    assert isinstance(module, Named) and isinstance(module, fused_rnn.LSTM)
    assert_close_to_twin(numbers(module), expected)
    twin = copy.deepcopy(module)
    assert_close_to_twin(numbers(twin), expected)
    fused_rnn.revert(module)
    assert not isinstance(module, fused_rnn.LSTM)
    assert_same(numbers(module), expected)


def test_explain_takes_a_converted_subclass() -> None:
    module = fused_rnn.convert(build(SUBCLASSES[0]))
    assert fused_rnn.explain(module, given(module)).module == repr(module)


def test_scripting_sees_the_subclass_itself() -> None:
    cell = build(SUBCLASSES[3])
    expected = cell(given(cell))
    fused_rnn.convert(cell)
    scripted = torch.jit.script(cell)
    assert scripted.original_name == "MyCell"
    assert torch.equal(scripted(given(cell)), expected)


@pytest.mark.slow
def test_compiled_subclass_gives_the_same_numbers() -> None:
    module = fused_rnn.convert(build(SUBCLASSES[1]))
    expected = module(given(module))[0]
    found = torch.compile(lambda sequence: module(sequence)[0] + 0, backend="eager")(given(module))
    assert torch.equal(found, expected)


# ---- left alone ---------------------------------------------------------------------------------------------------


class WithOwnForward(nn.LSTM):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        return input.cumsum(0), hx


class CallsTheClass(nn.LSTM):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        return nn.LSTM.forward(self, input, hx)


class WithOwnCheck(nn.GRU):
    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        raise ValueError("never")


class WithOwnWeights(nn.GRU):
    _flat_weights = property(lambda self: [p * 2 for p in self.parameters()], lambda self, weights: None)


class WithOwnPickle(nn.GRU):
    def __reduce__(self) -> Any:
        return type(self), (self.input_size, self.hidden_size)


class WithOurName(nn.GRU):
    def _settings(self) -> str:
        return "mine"


class Final(nn.GRU):
    def __init_subclass__(cls, **keywords: Any) -> None:
        raise TypeError("Final has no subclasses")


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (WithOwnForward, r"with a forward of its own, which does not call super\(\).forward"),
        (CallsTheClass, r"with a forward of its own"),
        (WithOwnCheck, r"with a check_input of its own"),
        (WithOwnWeights, r"with a _flat_weights of its own"),
        (WithOwnPickle, r"with a __reduce__ of its own"),
        (WithOurName, r"with a _settings of its own"),
        (Final, r"of which no class can be derived: Final has no subclasses"),
    ],
)
def test_subclass_that_a_conversion_would_change_is_left_alone_with_the_reason(cls: type, reason: str) -> None:
    model = nn.ModuleDict({"mine": cls(3, 4)})
    with pytest.warns(fused_rnn.ConversionWarning, match=f"'mine': it is a {cls.__name__}, a subclass of .*{reason}"):
        fused_rnn.convert(model)
    assert type(model["mine"]) is cls


def test_module_with_an_attribute_of_a_name_of_ours_is_left_alone_with_the_reason() -> None:
    layer = nn.GRU(3, 4)
    layer.recompute = "mine"
    with pytest.warns(fused_rnn.ConversionWarning, match="attribute recompute"):
        fused_rnn.convert(layer)
    assert (type(layer), layer.recompute) == (nn.GRU, "mine")


def test_pickle_of_a_subclass_that_has_changed_since_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    data = pickle.dumps(fused_rnn.convert(build(SUBCLASSES[3])))
    monkeypatch.setattr(MyCell, "forward", WithOwnForward.forward, raising=False)
    with pytest.raises(TypeError, match="MyCell was converted.*forward of its own"):
        pickle.loads(data)


@pytest.mark.parametrize("case", [Case(), CellCase()], ids=str)
def test_subclass_without_anything_of_its_own_equals_its_base(case: Case | CellCase) -> None:
    plain, module = case.build(nn), case.build(nn)
    module.__class__ = type("Empty", (type(plain),), {})
    assert_same(run(fused_rnn.convert(module), case.data()), run(fused_rnn.convert(plain), case.data()))
