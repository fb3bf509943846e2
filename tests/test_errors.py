"""Wrong calls: each names the argument, says what it got and what it needs, with the error type of torch.nn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fused_rnn
from fused_rnn import functional

np = pytest.importorskip("numpy")

SEQUENCE = torch.zeros(5, 2, 3)
STEP = torch.zeros(2, 3)
STATE = torch.zeros(1, 2, 4)
PACKED = pack_padded_sequence(SEQUENCE, torch.tensor([5, 3]))


@dataclasses.dataclass(frozen=True)
class Wrong:
    """A malformed call.

    Attributes:
        name: of the test.
        call: makes the call with the classes of a library, fused_rnn or torch.nn.
        error: type that must be raised.
        argument: that the message must begin with.
        expected, got: what the message must contain after these words.
        like_torch: whether torch.nn raises the same type; False where its error is an accident (AttributeError from
            inside, a message about another operator) or where it accepts the call.
    """

    name: str
    call: Callable[[Any], Any]
    error: type[Exception]
    argument: str
    expected: str
    got: str
    like_torch: bool = True

    def __str__(self) -> str:
        return self.name


def layer(
    name: str, *args: Any, change: dict[str, torch.Tensor] | None = None, **keywords: Any
) -> Callable[[Any], Any]:
    """A call of a layer (or cell) of sizes 3 and 4, with some parameters replaced."""

    def call(library: Any) -> Any:
        module = getattr(library, name)(3, 4, **keywords)
        for parameter, values in (change or {}).items():
            setattr(module, parameter, nn.Parameter(values))
        return module(*args)

    return call


def build(name: str, *args: Any, **keywords: Any) -> Callable[[Any], Any]:
    return lambda library: getattr(library, name)(*args, **keywords)


def hx_of(name: str, state: torch.Tensor) -> Any:
    return (state, state) if name.startswith("LSTM") else state


def first_state(name: str) -> str:
    return "hx[0]" if name.startswith("LSTM") else "hx"


def wrong_layer_calls(name: str) -> list[Wrong]:
    """The mistakes that any of the three layers can be given."""
    rnn_state = first_state(name)

    def with_state(state: torch.Tensor, value: Any = SEQUENCE) -> Callable[[Any], Any]:
        return layer(name, value, hx_of(name, state))

    bad_sum = PackedSequence(torch.zeros(8, 3), torch.tensor([2, 2, 1]))
    rising = PackedSequence(torch.zeros(5, 3), torch.tensor([1, 2, 2]))
    wide = pack_padded_sequence(torch.zeros(5, 2, 7), torch.tensor([5, 3]))
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[name] * 4
    return [
        Wrong(f"{name} input of the wrong width", layer(name, torch.zeros(5, 2, 7)), RuntimeError, "input", "3", "7"),
        Wrong(f"{name} input of 1 dimension", layer(name, torch.zeros(3)), ValueError, "input", "3 dim", "1"),
        Wrong(f"{name} input of 4 dimensions", layer(name, SEQUENCE[None]), ValueError, "input", "3 dim", "4"),
        Wrong(f"{name} double input", layer(name, SEQUENCE.double()), ValueError, "input", "float32", "float64"),
        Wrong(f"{name} integer input", layer(name, SEQUENCE.long()), ValueError, "input", "float32", "int64"),
        Wrong(
            f"{name} input on another device",
            layer(name, SEQUENCE.to("meta")),
            RuntimeError,
            "weight_ih_l0",
            "meta",
            "cpu",
        ),
        Wrong(f"{name} input None", layer(name, None), TypeError, "input", "Tensor", "None", like_torch=False),
        Wrong(f"{name} input a list", layer(name, [1.0]), TypeError, "input", "Tensor", "list", like_torch=False),
        Wrong(
            f"{name} input a numpy array",
            layer(name, np.zeros((5, 2, 3), dtype=np.float32)),
            TypeError,
            "input",
            "Tensor",
            "ndarray",
            like_torch=False,
        ),
        Wrong(f"{name} no step", layer(name, SEQUENCE[:0]), RuntimeError, "input", "at least one", "(0, 2, 3)"),
        Wrong(f"{name} no step, no row", layer(name, SEQUENCE[:0, :0]), RuntimeError, "input", "at least one", "(0, 0"),
        Wrong(
            f"{name} hx of another batch",
            with_state(torch.zeros(1, 3, 4)),
            RuntimeError,
            rnn_state,
            "(1, 2, 4)",
            "(1, 3, 4)",
        ),
        Wrong(
            f"{name} hx of more layers",
            with_state(torch.zeros(2, 2, 4)),
            RuntimeError,
            rnn_state,
            "(1, 2, 4)",
            "(2, 2, 4)",
        ),
        Wrong(
            f"{name} hx of another width",
            with_state(torch.zeros(1, 2, 5)),
            RuntimeError,
            rnn_state,
            "(1, 2, 4)",
            "(1, 2, 5)",
        ),
        Wrong(
            f"{name} hx of 2 dimensions", with_state(torch.zeros(1, 4)), RuntimeError, rnn_state, "(1, 2, 4)", "(1, 4)"
        ),
        Wrong(
            f"{name} hx of 3 dimensions, unbatched",
            with_state(STATE, SEQUENCE[:, 0]),
            RuntimeError,
            rnn_state,
            "(1, 4)",
            "(1, 2, 4)",
        ),
        Wrong(f"{name} double hx", with_state(STATE.double()), RuntimeError, rnn_state, "float32", "float64"),
        Wrong(f"{name} hx a string", layer(name, SEQUENCE, "a"), TypeError, "hx", "", "'a'", like_torch=False),
        Wrong(
            f"{name} hx of a 1-tuple",
            layer(name, SEQUENCE, (STATE,)),
            RuntimeError if name == "LSTM" else TypeError,
            "hx",
            "",
            "tuple",
            like_torch=False,
        ),
        Wrong(
            f"{name} packed, hx of 2 dimensions",
            with_state(STATE[0], PACKED),
            RuntimeError,
            rnn_state,
            "(1, 2, 4)",
            "(2, 4)",
            like_torch=name != "LSTM",
        ),
        Wrong(
            f"{name} packed, hx of another batch",
            with_state(torch.zeros(1, 3, 4), PACKED),
            RuntimeError,
            rnn_state,
            "(1, 2, 4)",
            "(1, 3, 4)",
        ),
        Wrong(f"{name} packed input of the wrong width", layer(name, wide), RuntimeError, "input", "3", "7"),
        Wrong(
            f"{name} packed double",
            layer(name, PACKED._replace(data=PACKED.data.double())),
            ValueError,
            "input",
            "float32",
            "float64",
            like_torch=name != "LSTM",
        ),
        Wrong(
            f"{name} batch_sizes of a smaller sum",
            layer(name, bad_sum),
            RuntimeError,
            "batch_sizes",
            "8",
            "5",
            like_torch=False,
        ),
        Wrong(
            f"{name} batch_sizes that rise", layer(name, rising), RuntimeError, "batch_sizes", "never rise", "[1, 2, 2]"
        ),
        Wrong(
            f"{name} weight_hh of another shape",
            layer(name, SEQUENCE, change={"weight_hh_l0": torch.zeros(7, 7)}),
            RuntimeError,
            "weight_hh_l0",
            f"({gates}, 4)",
            "(7, 7)",
            like_torch=name != "LSTM",
        ),
        Wrong(
            f"{name} weight_ih of another shape",
            layer(name, SEQUENCE, change={"weight_ih_l0": torch.zeros(7, 7)}),
            RuntimeError,
            "weight_ih_l0",
            f"({gates}, 3)",
            "(7, 7)",
            like_torch=name != "LSTM",
        ),
        Wrong(
            f"{name} bias of another shape",
            layer(name, SEQUENCE, change={"bias_hh_l0": torch.zeros(7)}),
            RuntimeError,
            "bias_hh_l0",
            f"({gates},)",
            "(7,)",
        ),
        Wrong(
            f"{name} double bias",
            layer(name, SEQUENCE, change={"bias_ih_l0": torch.zeros(gates).double()}),
            RuntimeError,
            "bias_ih_l0",
            "float32",
            "float64",
        ),
        Wrong(
            f"{name} double weight_hh",
            layer(name, SEQUENCE, change={"weight_hh_l0": torch.zeros(gates, 4).double()}),
            RuntimeError,
            "weight_hh_l0",
            "float32",
            "float64",
        ),
    ]


def wrong_cell_calls(name: str) -> list[Wrong]:
    state = first_state(name)

    def with_state(hidden: torch.Tensor, value: torch.Tensor = STEP) -> Callable[[Any], Any]:
        return layer(name, value, hx_of(name, hidden))

    return [
        Wrong(f"{name} input of the wrong width", layer(name, torch.zeros(2, 7)), RuntimeError, "input", "3", "7"),
        Wrong(f"{name} input of 3 dimensions", layer(name, SEQUENCE), ValueError, "input", "2 dim", "(5, 2, 3)"),
        Wrong(f"{name} input of 0 dimensions", layer(name, torch.tensor(1.0)), ValueError, "input", "2 dim", "()"),
        Wrong(f"{name} double input", layer(name, STEP.double()), RuntimeError, "input", "float32", "float64"),
        Wrong(f"{name} input None", layer(name, None), TypeError, "input", "Tensor", "None", like_torch=False),
        Wrong(
            f"{name} packed input",
            layer(name, PACKED),
            TypeError,
            "input",
            "Tensor",
            "PackedSequence",
            like_torch=False,
        ),
        Wrong(f"{name} hx of another batch", with_state(torch.zeros(3, 4)), RuntimeError, state, "(2, 4)", "(3, 4)"),
        Wrong(
            f"{name} hx of batch 1 is not broadcast",
            with_state(torch.zeros(1, 4)),
            RuntimeError,
            state,
            "(2, 4)",
            "(1, 4)",
        ),
        Wrong(f"{name} hx of another width", with_state(torch.zeros(2, 5)), RuntimeError, state, "(2, 4)", "(2, 5)"),
        Wrong(f"{name} hx of 3 dimensions", with_state(STATE), ValueError, state, "(2, 4)", "(1, 2, 4)"),
        Wrong(f"{name} hx of 1 dimension, batched", with_state(torch.zeros(4)), RuntimeError, state, "(2, 4)", "(4,)"),
        Wrong(f"{name} double hx", with_state(torch.zeros(2, 4).double()), RuntimeError, state, "float32", "float64"),
        Wrong(
            f"{name} weight_hh of another shape",
            layer(name, STEP, change={"weight_hh": torch.zeros(7, 7)}),
            RuntimeError,
            "weight_hh",
            "4)",
            "(7, 7)",
        ),
    ]


def wrong_constructions(name: str) -> list[Wrong]:
    """Constructor arguments that any layer refuses."""

    def wrong(
        error: type[Exception], argument: str, value: Any, expected: str, got: str, like_torch: bool = True
    ) -> Wrong:
        keywords = {"input_size": 3, "hidden_size": 4} | {argument: value}
        return Wrong(
            f"{name} {argument}={value!r}", build(name, **keywords), error, argument, expected, got, like_torch
        )

    return [
        wrong(ValueError, "hidden_size", 0, "at least 1", "0"),
        wrong(ValueError, "hidden_size", -1, "at least 1", "-1"),
        wrong(TypeError, "hidden_size", 2.0, "int", "2.0"),
        wrong(ValueError, "input_size", 0, "at least 1", "0"),
        wrong(TypeError, "input_size", "a", "int", "'a'"),
        wrong(ValueError, "num_layers", 0, "at least 1", "0"),
        wrong(TypeError, "num_layers", 1.0, "int", "1.0"),
        wrong(TypeError, "num_layers", "1", "int", "'1'"),
        wrong(ValueError, "dropout", -0.1, "0 to 1", "-0.1"),
        wrong(ValueError, "dropout", 1.1, "0 to 1", "1.1"),
        wrong(ValueError, "dropout", "a", "0 to 1", "'a'"),
        wrong(ValueError, "dropout", True, "0 to 1", "True"),
        wrong(TypeError, "bias", 1, "bool", "1"),
        wrong(TypeError, "bias", None, "bool", "None"),
        wrong(TypeError, "batch_first", 1, "bool", "1"),
        wrong(TypeError, "bidirectional", 1, "bool", "1", like_torch=False),
    ]


OTHERS = [
    Wrong(
        "LSTM hx one tensor", layer("LSTM", SEQUENCE, STATE), TypeError, "hx", "(h_0, c_0)", "Tensor", like_torch=False
    ),
    Wrong("LSTM hx of three", layer("LSTM", SEQUENCE, (STATE,) * 3), RuntimeError, "hx", "two", "3"),
    Wrong(
        "LSTM c_0 None", layer("LSTM", SEQUENCE, (STATE, None)), TypeError, "hx[1]", "Tensor", "None", like_torch=False
    ),
    Wrong(
        "LSTM c_0 of another width",
        layer("LSTM", SEQUENCE, (STATE, torch.zeros(1, 2, 5))),
        RuntimeError,
        "hx[1]",
        "(1, 2, 4)",
        "(1, 2, 5)",
    ),
    Wrong(
        "LSTM c_0 double", layer("LSTM", SEQUENCE, (STATE, STATE.double())), RuntimeError, "hx[1]", "float32", "float64"
    ),
    Wrong(
        "LSTM h_0 of hidden_size with a projection",
        layer("LSTM", SEQUENCE, (STATE, STATE), proj_size=2),
        RuntimeError,
        "hx[0]",
        "(1, 2, 2)",
        "(1, 2, 4)",
    ),
    Wrong(
        "LSTM weight_hr of another shape",
        layer("LSTM", SEQUENCE, proj_size=2, change={"weight_hr_l0": torch.zeros(3, 4)}),
        RuntimeError,
        "weight_hr_l0",
        "(2, 4)",
        "(3, 4)",
    ),
    Wrong(
        "GRU hx a pair", layer("GRU", SEQUENCE, (STATE, STATE)), TypeError, "hx", "Tensor", "tuple", like_torch=False
    ),
    Wrong(
        "RNN hx a pair", layer("RNN", SEQUENCE, (STATE, STATE)), TypeError, "hx", "Tensor", "tuple", like_torch=False
    ),
    Wrong("LSTMCell hx one tensor", layer("LSTMCell", STEP, torch.zeros(2, 4)), TypeError, "hx", "two", "Tensor"),
    Wrong(
        "GRUCell hx a pair",
        layer("GRUCell", STEP, (STATE[0], STATE[0])),
        TypeError,
        "hx",
        "Tensor",
        "tuple",
        like_torch=False,
    ),
    Wrong(
        "RNN nonlinearity",
        build("RNN", 3, 4, nonlinearity="gelu"),
        ValueError,
        "nonlinearity",
        "'tanh'",
        "'gelu'",
    ),
    Wrong(
        "RNNCell nonlinearity",
        build("RNNCell", 3, 4, nonlinearity="gelu"),
        ValueError,
        "nonlinearity",
        "'tanh'",
        "'gelu'",
        like_torch=False,
    ),
    Wrong("GRU proj_size=2", build("GRU", 3, 4, proj_size=2), ValueError, "proj_size", "", "2"),
    Wrong("RNN proj_size=2", build("RNN", 3, 4, proj_size=2), ValueError, "proj_size", "", "2"),
    Wrong(
        "LSTM proj_size of hidden_size", build("LSTM", 3, 4, proj_size=4), ValueError, "proj_size", "hidden_size", "4"
    ),
    Wrong("LSTM negative proj_size", build("LSTM", 3, 4, proj_size=-1), ValueError, "proj_size", "0", "-1"),
    Wrong("LSTM proj_size=1.5", build("LSTM", 3, 4, proj_size=1.5), TypeError, "proj_size", "int", "1.5"),
    Wrong("LSTMCell hidden_size=2.0", build("LSTMCell", 3, 2.0), TypeError, "hidden_size", "int", "2.0"),
    Wrong("GRUCell input_size=2.5", build("GRUCell", 2.5, 4), TypeError, "input_size", "int", "2.5"),
]

WRONG_CALLS = [
    *(wrong for name in ("LSTM", "GRU", "RNN") for wrong in wrong_layer_calls(name)),
    *(wrong for name in ("LSTMCell", "GRUCell", "RNNCell") for wrong in wrong_cell_calls(name)),
    *(wrong for name in ("LSTM", "GRU", "RNN") for wrong in wrong_constructions(name)),
    *OTHERS,
]


@pytest.mark.parametrize("wrong", WRONG_CALLS, ids=str)
def test_message_names_the_argument_what_it_got_and_what_it_needs(wrong: Wrong) -> None:
    with pytest.raises(wrong.error) as caught:
        wrong.call(fused_rnn)
    message = str(caught.value)
    argument, colon, rest = message.partition(": ")
    assert colon
    assert argument == (wrong.argument or argument)
    # a sentence after the semicolon may say what to do
    demand, got, given = rest.partition(", got ")
    assert got, message
    assert demand.startswith("expected ")
    assert wrong.expected in demand, message
    assert wrong.got in given, message


@pytest.mark.parametrize("wrong", [wrong for wrong in WRONG_CALLS if wrong.like_torch], ids=str)
def test_error_type_is_that_of_torch_nn(wrong: Wrong) -> None:
    with pytest.raises(Exception) as caught:
        wrong.call(nn)
    assert type(caught.value) is wrong.error


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_missing_or_unknown_constructor_arguments_are_type_errors(name: str) -> None:
    module_type = getattr(fused_rnn, name)
    for args, keywords in (((), {}), ((3,), {}), ((3, 4), {"foo": 1})):
        with pytest.raises(TypeError):
            module_type(*args, **keywords)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_refused_call_leaves_the_layer_usable(name: str) -> None:
    module = getattr(fused_rnn, name)(3, 4)
    expected = module(SEQUENCE + 1)[0]
    with pytest.raises(ValueError, match="input"):
        module(SEQUENCE.double())
    assert torch.equal(module(SEQUENCE + 1)[0], expected)


# ---- functional ---------------------------------------------------------------------------------------------------

LSTM_PARAMS = [torch.zeros(16, 3), torch.zeros(16, 4), torch.zeros(16), torch.zeros(16)]
GRU_PARAMS = [torch.zeros(12, 3), torch.zeros(12, 4), torch.zeros(12), torch.zeros(12)]
RNN_PARAMS = [torch.zeros(4, 3), torch.zeros(4, 4), torch.zeros(4), torch.zeros(4)]

FUNCTIONAL_CALLS = [
    (
        "too few params",
        lambda: functional.lstm(SEQUENCE, None, LSTM_PARAMS[:2]),
        RuntimeError,
        "params",
        "expected 4.*got 2",
    ),
    (
        "too many params",
        lambda: functional.gru(SEQUENCE, None, GRU_PARAMS, bias=False),
        RuntimeError,
        "params",
        "expected 2.*got 4",
    ),
    (
        "weights for more layers",
        lambda: functional.rnn(SEQUENCE, None, RNN_PARAMS, num_layers=2),
        RuntimeError,
        "params",
        "expected 8.*got 4",
    ),
    ("params None", lambda: functional.lstm(SEQUENCE, None, None), TypeError, "", "got None"),
    ("params empty", lambda: functional.gru(SEQUENCE, None, []), (TypeError, RuntimeError), "", "got"),
    ("params of lists", lambda: functional.gru(SEQUENCE, None, [[1.0]]), TypeError, "", "expected.*got"),
    (
        "a parameter None",
        lambda: functional.rnn(SEQUENCE, None, [*RNN_PARAMS[:3], None]),
        TypeError,
        "bias_hh_l0",
        "expected a Tensor.*got None",
    ),
    (
        "hx one tensor for lstm",
        lambda: functional.lstm(SEQUENCE, STATE, LSTM_PARAMS),
        TypeError,
        "hx",
        r"\(h_0, c_0\).*got a Tensor",
    ),
    (
        "hx a pair for gru",
        lambda: functional.gru(SEQUENCE, (STATE, STATE), GRU_PARAMS),
        TypeError,
        "hx",
        "expected a Tensor.*got a tuple",
    ),
    (
        "nonlinearity",
        lambda: functional.rnn(SEQUENCE, None, RNN_PARAMS, nonlinearity="gelu"),
        ValueError,
        "nonlinearity",
        "'tanh'.*got 'gelu'",
    ),
    (
        "packed sequence itself",
        lambda: functional.lstm(PACKED, None, LSTM_PARAMS),
        TypeError,
        "input",
        "expected a Tensor.*got a PackedSequence",
    ),
    (
        "batch_sizes a list",
        lambda: functional.gru(PACKED.data, None, GRU_PARAMS, batch_sizes=[2, 2, 2, 1, 1]),
        TypeError,
        "batch_sizes",
        "expected a Tensor.*got a list",
    ),
    (
        "batch_sizes of floats",
        lambda: functional.gru(PACKED.data, None, GRU_PARAMS, batch_sizes=PACKED.batch_sizes.float()),
        RuntimeError,
        "batch_sizes",
        "expected int64.*got torch.float32",
    ),
    (
        "batch_sizes empty",
        lambda: functional.gru(PACKED.data, None, GRU_PARAMS, batch_sizes=PACKED.batch_sizes[:0]),
        RuntimeError,
        "batch_sizes",
        "expected at least one.*got",
    ),
    (
        "batch_sizes with a zero",
        lambda: functional.gru(PACKED.data[:4], None, GRU_PARAMS, batch_sizes=torch.tensor([2, 2, 0])),
        RuntimeError,
        "batch_sizes",
        r"expected positive.*got \[2, 2, 0\]",
    ),
    (
        "batch_sizes with 3-D input",
        lambda: functional.gru(SEQUENCE, None, GRU_PARAMS, batch_sizes=PACKED.batch_sizes),
        RuntimeError,
        "input",
        r"expected 2 dim.*got \(5, 2, 3\)",
    ),
    (
        "dropout above one",
        lambda: functional.gru(SEQUENCE, None, GRU_PARAMS, dropout=2.0),
        ValueError,
        "dropout",
        "0 to 1.*got 2.0",
    ),
    (
        "rows of another cell",
        lambda: functional.lstm(SEQUENCE, None, GRU_PARAMS),
        RuntimeError,
        "weight_hh_l0|weight_ih_l0",
        r"expected.*got \(12, [34]\)",
    ),
    (
        "cell weight of another shape",
        lambda: functional.lstm_cell(STEP, None, LSTM_PARAMS[0], LSTM_PARAMS[1][:, :3]),
        RuntimeError,
        "w_hh",
        r"expected \(16, 4\), got \(16, 3\)",
    ),
    (
        "cell nonlinearity",
        lambda: functional.rnn_cell(STEP, None, *RNN_PARAMS, nonlinearity="gelu"),
        ValueError,
        "nonlinearity",
        "got 'gelu'",
    ),
    (
        "use_backend of an unknown name",
        lambda: fused_rnn.use_backend("cuda"),
        ValueError,
        "name",
        "'reference'.*got 'cuda'",
    ),
]


@pytest.mark.parametrize(
    ("call", "error", "argument", "words"),
    [row[1:] for row in FUNCTIONAL_CALLS],
    ids=[row[0] for row in FUNCTIONAL_CALLS],
)
def test_functional_message_names_the_argument(
    call: Callable[[], Any], error: type[Exception] | tuple[type[Exception], ...], argument: str, words: str
) -> None:
    with pytest.raises(error, match=f"^({argument or '.*'}): .*{words}"):
        call()


def test_there_are_enough_wrong_calls() -> None:
    assert len(WRONG_CALLS) + len(FUNCTIONAL_CALLS) >= 40
    assert len({wrong.name for wrong in WRONG_CALLS}) == len(WRONG_CALLS)
