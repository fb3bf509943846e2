"""Arguments of programs that trust nobody: every wrong one is an error, and none ends the process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.apart import run_apart
from support.cases import CELLS, Case, CellCase
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fused_rnn
from fused_rnn import functional
from fused_rnn.settings import Controls

np = pytest.importorskip("numpy")

# ---- operators ------------------------------------------------------------------------------------------------------


def faults_of(*arguments: str) -> list[str]:
    lines = run_apart("-m", "support.mutations", *arguments)
    count, word = lines[-1].split()
    assert word == "attempts" and int(count) > 1000
    return [line for line in lines if line.startswith("FAULT")]


@pytest.mark.kernels
@pytest.mark.parametrize("calls", [pytest.param("few", marks=pytest.mark.asan), "more"])
def test_every_argument_of_every_operator_is_checked(calls: str) -> None:
    assert faults_of(calls) == []


LARGE = """
import torch, fused_rnn
from fused_rnn.settings import OPERATORS_VERSION, Controls, Within
ops = torch.ops.fused_rnn
x = torch.zeros(5, 2, 3)
one, none, bits = torch.zeros(1), torch.zeros(0), torch.zeros(1, 1, 1, dtype=torch.uint8)

def giant(*shape):
    return one.reshape([1] * len(shape)).expand(shape)

def params(G, H, I, P=None):
    return [giant(G * H, I), giant(G * H, P or H), giant(G * H), giant(G * H)]

def forward(input, params, settings=(2, 1, 1, 0, 0, 0), h0=None, c0=None, within=None, save=False, **controls):
    given = list(Controls(**controls)) if controls else []
    integers, numbers = ([], []) if within is None else (within.integers(), within.numbers())
    given = [none if t is None else t for t in given]
    return ops.rnn_forward(input, h0, c0, params, given, [*settings, *integers, OPERATORS_VERSION], numbers, save)

def step(input, h, c, params, kind):
    return ops.cell_forward(input, h, c, params, [kind, 1, 1, 0, 0, 0, OPERATORS_VERSION], [], True)

small = params(4, 4, 3)
forward(x, small)  # what all calls below would be but for their size
step(x[0], torch.zeros(2, 4), torch.zeros(2, 4), small, 2)
calls = {
    "layers": lambda: forward(x, small, settings=(2, 1, 2**62 + 1, 0, 0, 0)),
    "layers of a power": lambda: forward(x, small, settings=(2, 1, 2**62, 0, 0, 0)),
    "layers of 32 bits": lambda: forward(x, small, settings=(2, 1, 2**31, 1, 0, 0)),
    "layers below zero": lambda: forward(x, small, settings=(2, 1, -(2**63), 0, 0, 0)),
    "steps": lambda: forward(giant(2**61, 1, 1), params(4, 4, 1)),
    "rows": lambda: forward(giant(1, 2**61, 1), params(4, 4, 1)),
    "steps and rows": lambda: forward(giant(2**31, 2**31, 1), params(4, 4, 1)),
    "steps and rows, saved": lambda: forward(giant(2**30, 2**30, 1), params(4, 4, 1), save=True),
    "both directions": lambda: forward(
        giant(2**30, 2**30, 1), params(4, 4, 1) + params(4, 4, 1), settings=(2, 1, 1, 1, 0, 0)
    ),
    "two layers": lambda: forward(giant(2**30, 2**30, 1), params(1, 1, 1) * 2, settings=(0, 1, 2, 0, 0, 0)),
    "features": lambda: forward(giant(1, 1, 2**62), params(1, 1, 2**62), settings=(0, 1, 1, 0, 0, 0)),
    "features of an LSTM": lambda: forward(giant(1, 1, 2**60), params(4, 1, 2**60)),
    "units": lambda: forward(giant(2, 2**31, 2**30), params(1, 2**31, 2**30), settings=(0, 1, 1, 0, 0, 0)),
    "units of an LSTM": lambda: forward(giant(2, 2**31, 2**30), params(4, 2**29, 2**30)),
    "projection": lambda: forward(giant(1, 1, 1), [*params(4, 2, 1, P=2**59), giant(2**59, 2)]),
    "packed steps": lambda: forward(giant(2**62, 1), params(4, 4, 1), batch_sizes=torch.tensor([2**62])),
    "packed steps that overflow": lambda: forward(
        torch.zeros(4, 1), params(4, 4, 1), batch_sizes=torch.tensor([2**62] * 4 + [4])
    ),
    "packed steps of a view": lambda: forward(
        giant(2**62, 1), params(4, 4, 1), batch_sizes=torch.tensor([2**62]).expand(2**62)
    ),
    "a mask": lambda: forward(
        giant(2**61, 1, 1), params(4, 4, 1), mask=torch.ones(1, 1, dtype=torch.bool).expand(2**61, 1)
    ),
    "dropout": lambda: forward(
        giant(2**30, 2**30, 1), params(1, 1, 1) * 2, (0, 1, 2, 0, 0, 0), dropout=giant(1, 2**30, 2**30, 1)
    ),
    "resets": lambda: forward(
        giant(2**61, 1, 1), params(4, 4, 1), reset=torch.ones(1, 1, dtype=torch.bool).expand(2**61, 1)
    ),
    "resets with a state": lambda: forward(
        giant(1, 2**61, 1),
        [*params(1, 1, 1), giant(1, 2**61, 1)],
        (0, 1, 1, 0, 0, 0),
        within=Within(reset_state=True),
        reset=torch.ones(1, 1, dtype=torch.bool).expand(1, 2**61),
    ),
    "factors of h": lambda: forward(
        giant(1, 2**61, 1), params(1, 1, 1), (0, 1, 1, 0, 0, 0), recurrent_dropout=giant(1, 2**61, 1)
    ),
    "zoneout": lambda: forward(
        giant(2**30, 2**30, 1), params(1, 1, 1), (0, 1, 1, 0, 0, 0), zoneout=bits.expand(1, 2**60, 1)
    ),
    "zoneout of the cell": lambda: forward(
        giant(2**30, 2**30, 1), params(4, 4, 1), zoneout_cell=bits.expand(1, 2**60, 1)
    ),
    "peepholes": lambda: forward(
        giant(1, 1, 1), [*params(4, 2**31, 1), giant(3 * 2**31)], within=Within(peephole=True)
    ),
    "norms": lambda: forward(
        giant(1, 1, 1), [*params(4, 2**31, 1), giant(2**33), giant(2**33)], within=Within(layer_norm=True)
    ),
    "no norms": lambda: forward(x, small, within=Within(layer_norm=True)),
    "heads": lambda: forward(x, small, within=Within(num_heads=2**62)),
    "heads below zero": lambda: forward(x, small, within=Within(num_heads=-1)),
    "heads of the whole matrix": lambda: forward(x, small, within=Within(num_heads=2)),
    "heads that do not divide": lambda: forward(x, params(4, 4, 3, P=1), within=Within(num_heads=3)),
    "more heads than units": lambda: forward(x, params(4, 4, 3, P=1), within=Within(num_heads=8)),
    "heads of a projection": lambda: forward(
        x, [*params(4, 4, 3, P=1), giant(2, 4)], within=Within(num_heads=2)
    ),
    "a state": lambda: forward(
        giant(1, 2**61, 1), params(1, 1, 1), h0=giant(1, 2**61, 1), settings=(0, 1, 1, 0, 0, 0)
    ),
    "rows of a cell": lambda: step(giant(2**61, 1), giant(2**61, 1), None, params(1, 1, 1), 0),
    "units of a cell": lambda: step(giant(2**31, 1), giant(2**31, 2**31), None, params(1, 2**31, 1), 0),
    "units of an LSTM cell": lambda: step(
        giant(2**32, 1), giant(2**32, 2**30), giant(2**32, 2**30), params(4, 2**30, 1), 2
    ),
}
for name, call in calls.items():
    print(name, flush=True)
    try:
        call()
    except (RuntimeError, TypeError):
        continue
    print("FAULT accepted", name, flush=True)

# Nothing to compute, however many steps there are of it.
no_row = torch.ones(1, 0, dtype=torch.bool).expand(2**62, 0)
empty = forward(torch.zeros(1, 0, 3).expand(2**62, 0, 3), small, mask=no_row)
assert empty[0].shape == (2**62, 0, 4)
print("end", flush=True)
"""


@pytest.mark.kernels
@pytest.mark.asan
def test_no_product_of_sizes_overflows_before_it_is_checked() -> None:
    lines = run_apart("-c", LARGE)
    assert lines[-1] == "end" and not [line for line in lines if line.startswith("FAULT")]


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cell", CELLS)
def test_what_the_operator_saves_of_masked_calls_is_zeros_behind_the_live_steps(cell: str, dtype: torch.dtype) -> None:
    """It returns that memory, so whatever was freed there before must not show."""
    case = Case(cell, num_layers=2, bidirectional=True, dtype=dtype)
    layer, x = case.build(fused_rnn), case.data().sequence.detach()
    mask = torch.ones(case.steps, case.batch, dtype=torch.bool)
    controls = Controls(mask=mask).flatten(x)
    mask[1::2, 1] = mask[:, 2] = False
    live, all_rows = int(mask.sum()), mask.numel()
    settings, numbers = layer._settings().flatten()
    params, controls = [p.detach() for p in layer.parameters()], Controls(mask=mask).flatten(x)
    for _ in range(3):  # what the first saves is overwritten and freed, and the others lie there
        results = torch.ops.fused_rnn.rnn_forward(x, None, None, params, controls, settings, numbers, True)
        for saved in results[3:]:
            if not saved.numel():
                continue
            assert saved.shape[1] == all_rows and saved.is_contiguous()
            used = saved.numel() // all_rows * live
            assert saved.flatten()[used:].count_nonzero() == 0
            # tanh and sigmoid of random sums are never zero; ReLU is
            assert saved.flatten()[:used].isfinite().all() and saved.flatten()[:used].count_nonzero() > used // 4
            saved.fill_(float("nan"))
        del results, saved


# ---- tensors without memory -----------------------------------------------------------------------------------------

WITHOUT_MEMORY = """
import sys
from test_untrusted import spoilt, without_memory_calls

backend = sys.argv[1]
for way in ("inference", "training", "autocast", "bfloat16"):
    for name, (call, tensor, expected) in without_memory_calls(backend, way).items():
        for left in ("freed", "cut"):
            what = f"{backend}, {way}, {name} {left}"
            print(what, flush=True)
            restore = spoilt(tensor, left)
            try:
                call()
                print("FAULT accepted", what, flush=True)
            except RuntimeError as error:
                message = str(error).splitlines()[0]
                if not message.startswith(f"{expected}: expected a tensor with memory, "):
                    print("FAULT", what, "says", message[:150], flush=True)
            restore()
            call()
print("end", flush=True)
"""


def spoilt(t: Tensor, left: str) -> Callable[[], None]:
    """Takes a tensor's memory away, all or its end; the result gives it back."""
    values, storage = t.detach().clone(), t.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0 if left == "freed" else (t.storage_offset() + t.numel()) * t.element_size() - 1)

    def restore() -> None:
        storage.resize_(size)
        with torch.no_grad():
            t.copy_(values)

    return restore


def without_memory_calls(backend: str, way: str) -> dict[str, tuple[Callable[[], Any], Tensor, str]]:
    """By name: a call, and the tensor that is without memory in it, and what the caller calls that."""
    found: dict[str, tuple[Callable[[], Any], Tensor, str]] = {}

    def add(label: str, call: Callable[[], Any], named: dict[str, Tensor]) -> None:
        def in_context() -> Any:
            with fused_rnn.use_backend(backend), torch.autocast("cpu", enabled=way == "autocast"):
                with torch.set_grad_enabled(way == "training"):
                    return call()

        for name, t in named.items():
            found[f"{label}: {name}"] = in_context, t, name

    dtype = torch.bfloat16 if way == "bfloat16" else torch.float32
    for cell in ("LSTM", "GRU", "RNN_RELU"):
        case = Case(cell, num_layers=2, bidirectional=True, hx=True, proj=cell == "LSTM", dtype=dtype)
        layer, data = case.build(fused_rnn), case.data()
        x, states = data.sequence.detach(), tuple(s.detach() for s in data.states)
        hx = states if case.has_cell_state else states[0]
        state_names = ("hx[0]", "hx[1]") if case.has_cell_state else ("hx",)
        named = {"input": x} | dict(zip(state_names, states, strict=True)) | dict(layer.named_parameters())
        add(cell, lambda layer=layer, x=x, hx=hx: layer(x, hx), named)
        mask, lengths = torch.ones(6, 4, dtype=torch.bool), torch.tensor([6, 5, 2, 6])
        mask[2:, 1] = False
        options = {"mask": mask, "lengths": lengths}
        some = {name: named[name] for name in ("input", state_names[-1], "weight_hh_l1_reverse")}
        add(f"{cell} masked", lambda layer=layer, x=x, hx=hx, o=options: layer(x, hx, **o), some | options)
        reset, fresh = ~mask, tuple(s.clone() for s in states)
        options = {"reset": reset, "reset_state": fresh if case.has_cell_state else fresh[0]}
        fresh_names = [name.replace("hx", "reset_state") for name in state_names]
        anew = {"reset": reset} | dict(zip(fresh_names, fresh, strict=True))
        add(f"{cell} reset", lambda layer=layer, x=x, hx=hx, o=options: layer(x, hx, **o), some | anew)
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        parts = {"input": packed.data, "batch_sizes": packed.batch_sizes, state_names[-1]: states[-1]}
        orders = {"sorted_indices": packed.sorted_indices, "unsorted_indices": packed.unsorted_indices}
        add(f"{cell} packed", lambda layer=layer, p=packed, hx=hx: layer(p, hx), parts | orders)
        function = getattr(functional, cell.partition("_")[0].lower())
        more = {"nonlinearity": "relu"} if cell == "RNN_RELU" else {"proj_size": 3} if cell == "LSTM" else {}
        params = list(layer.parameters())
        add(
            f"functional {cell}",
            lambda f=function, x=x, hx=hx, p=params, m=more: f(x, hx, p, num_layers=2, bidirectional=True, **m),
            {name: named[name] for name in ("input", state_names[0], "bias_ih_l0")},
        )
    for cell in CELLS:
        one = CellCase(cell, dtype=dtype)
        module, data = one.build(fused_rnn), one.data()
        x, states = data.sequence.detach(), tuple(s.detach() for s in data.states)
        hx = states if one.has_cell_state else states[0]
        state_names = ("hx[0]", "hx[1]") if one.has_cell_state else ("hx",)
        named = {"input": x} | dict(zip(state_names, states, strict=True)) | dict(module.named_parameters())
        add(f"{cell}Cell", lambda module=module, x=x, hx=hx: module(x, hx), named)
        reset, fresh = torch.tensor([True, False, False, True]), tuple(s.clone() for s in states)
        options = {"reset": reset, "reset_state": fresh if one.has_cell_state else fresh[0]}
        fresh_names = [name.replace("hx", "reset_state") for name in state_names]
        anew = {"reset": reset} | dict(zip(fresh_names, fresh, strict=True))
        add(f"{cell}Cell reset", lambda module=module, x=x, hx=hx, o=options: module(x, hx, **o), named | anew)
    weights = [torch.zeros(12, 3), torch.zeros(12, 4), torch.zeros(12), torch.zeros(12)]
    step = torch.zeros(2, 3)
    names = dict(zip(("w_ih", "w_hh", "b_ih", "b_hh"), weights, strict=True))
    add("functional gru_cell", lambda: functional.gru_cell(step, None, *weights), names | {"input": step})
    return found


# The reference is Python, in which sanitizers have nothing to see.
@pytest.mark.kernels
@pytest.mark.parametrize("backend", [pytest.param("auto", marks=pytest.mark.asan), "reference"])
def test_a_tensor_whose_memory_is_gone_is_an_error_that_names_it(backend: str) -> None:
    lines = run_apart("-c", WITHOUT_MEMORY, backend)
    assert lines[-1] == "end" and len(lines) > 500
    assert not [line for line in lines if line.startswith("FAULT")]


SAVED_MEMORY = """
import torch, fused_rnn
from support.cases import Case, CellCase

for case in (Case(num_layers=2, hx=True), Case("GRU", hx=True), CellCase("LSTM"), CellCase("RNN_TANH")):
    for which in ("input", "state", "parameter", "output"):
        module, data = case.build(fused_rnn), case.data()
        x, states = data.sequence * 1, tuple(s * 1 for s in data.states)
        result = module(x, states if case.has_cell_state else states[0])
        output = next(iter(case.outputs(result).values()))
        loss = output.sum()
        freed = {"input": x, "state": states[0], "parameter": list(module.parameters())[1], "output": output}[which]
        print(case, which, flush=True)
        freed.untyped_storage().resize_(0)
        needed = which != "output" or not isinstance(case, CellCase)  # a cell's new state may also be changed in place
        try:
            loss.backward()
            if needed:
                print("FAULT accepted", flush=True)
        except RuntimeError as error:
            if "whose storage was freed" not in str(error):
                print("FAULT says", str(error)[:200], flush=True)
print("end", flush=True)
"""


@pytest.mark.kernels
@pytest.mark.asan
def test_memory_that_went_between_the_passes_is_an_error_of_the_backward_pass() -> None:
    lines = run_apart("-c", SAVED_MEMORY)
    assert lines[-1] == "end" and not [line for line in lines if line.startswith("FAULT")]


# ---- numbers, flags and orders that a caller gives ------------------------------------------------------------------

SEQUENCE, STATE, LENGTHS = torch.zeros(5, 2, 3), torch.zeros(1, 2, 4), torch.tensor([5, 3])
PACKED = pack_padded_sequence(SEQUENCE[:, [0, 1, 0]], torch.tensor([5, 2, 4]), enforce_sorted=False)
ROWS = {"lstm": 16, "gru": 12, "rnn": 4}


def params_of(name: str) -> list[Tensor]:
    rows = ROWS[name]
    return [torch.zeros(rows, 3), torch.zeros(rows, 4), torch.zeros(rows), torch.zeros(rows)]


# Keyword, value, error, what stands after "expected" and after "got".
OPTIONS: list[tuple[str, Any, type[Exception], str, str]] = [
    ("num_layers", 2**40, RuntimeError, f"{2**40 * 4} tensors", "4"),
    ("num_layers", 2**62 + 1, RuntimeError, "tensors", "4"),
    ("num_layers", 0, ValueError, "at least 1", "0"),
    ("num_layers", -1, ValueError, "at least 1", "-1"),
    ("num_layers", 1.0, TypeError, "an int", "1.0"),
    ("num_layers", "1", TypeError, "an int", "'1'"),
    ("num_layers", None, TypeError, "an int", "None"),
    ("num_layers", torch.tensor(1), TypeError, "an int", "a Tensor"),
    ("bidirectional", "yes", TypeError, "a bool", "'yes'"),
    ("bidirectional", 1, TypeError, "a bool", "1"),
    ("bidirectional", None, TypeError, "a bool", "None"),
    ("bidirectional", np.bool_(False), TypeError, "a bool", "numpy"),
    ("batch_first", 1, TypeError, "a bool", "1"),
    ("batch_first", "no", TypeError, "a bool", "'no'"),
    ("bias", 1, TypeError, "a bool", "1"),
    ("bias", None, TypeError, "a bool", "None"),
    ("training", "no", TypeError, "a bool", "'no'"),
    ("training", 0, TypeError, "a bool", "0"),
    ("recompute", 1, TypeError, "a bool", "1"),
    ("dropout", float("nan"), ValueError, "a number from 0 to 1", "nan"),
    ("dropout", 1.5, ValueError, "a number from 0 to 1", "1.5"),
    ("dropout", True, ValueError, "a number from 0 to 1", "True"),
    ("dropout", "0.5", ValueError, "a number from 0 to 1", "'0.5'"),
    ("dropout", None, ValueError, "a number from 0 to 1", "None"),
    ("dropout", torch.tensor(0.5), ValueError, "a number from 0 to 1", "a Tensor"),
    ("batch_sizes", [2, 2, 2, 1, 1], TypeError, "a Tensor", "a list"),
    ("batch_sizes", torch.tensor([2], device="meta"), RuntimeError, "on the CPU", "meta"),
    ("lengths", LENGTHS.to("meta"), RuntimeError, "values", "meta"),
    ("lengths", LENGTHS.float(), RuntimeError, "an integer dtype", "torch.float32"),
    ("lengths", 5, TypeError, "a Tensor or None", "5"),
    ("mask", torch.ones(5, 2, device="meta") > 0, RuntimeError, "on cpu", "meta"),
    ("mask", True, TypeError, "a Tensor or None", "True"),
    ("reset", torch.ones(5, 2, device="meta") > 0, RuntimeError, "on cpu", "meta"),
    ("reset", True, TypeError, "a Tensor or None", "True"),
]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(
    ("argument", "value", "error", "expected", "got"), OPTIONS, ids=[f"{row[0]}={str(row[1])[:12]}" for row in OPTIONS]
)
def test_an_option_that_is_wrong_is_named(
    name: str, argument: str, value: Any, error: type[Exception], expected: str, got: str, backend: str
) -> None:
    x = SEQUENCE[:, 0] if argument == "batch_sizes" else SEQUENCE
    with fused_rnn.use_backend(backend), pytest.raises(error) as caught:
        getattr(functional, name)(x, None, params_of(name), **{argument: value})
    said, _, rest = str(caught.value).partition(": ")
    demand, _, found = rest.partition(", got ")
    assert said == ("params" if error is RuntimeError and argument == "num_layers" else argument)
    assert expected in demand and got in found, rest


@pytest.mark.parametrize("value", [np.int64(1), np.int32(1), True])
def test_numbers_that_python_takes_for_ints_are_layers(value: Any) -> None:
    result = functional.gru(SEQUENCE + 1, None, params_of("gru"), num_layers=value)
    assert torch.equal(result[0], functional.gru(SEQUENCE + 1, None, params_of("gru"))[0])


@pytest.mark.parametrize(
    ("value", "error", "got"),
    [
        (1.5, TypeError, "1.5"),
        ("2", TypeError, "'2'"),
        (-1, ValueError, "-1"),
        (4, ValueError, "4"),
        (2**40, ValueError, ""),
    ],
)
def test_a_projection_that_is_wrong_is_named(value: Any, error: type[Exception], got: str) -> None:
    with pytest.raises(error, match=f"^proj_size: expected .*, got {got}"):
        functional.lstm(SEQUENCE, None, params_of("lstm"), proj_size=value)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0), (1, 3)])
def test_a_first_weight_without_a_unit_or_a_feature_is_named(name: str, shape: tuple[int, int]) -> None:
    if shape == (1, 3) and name == "rnn":
        pytest.skip("a unit of it")
    with pytest.raises(RuntimeError, match=rf"^weight_ih_l0: expected .*, got \({shape[0]}, {shape[1]}\)"):
        getattr(functional, name)(SEQUENCE, None, [torch.zeros(shape), *params_of(name)[1:]])


def order(*places: int) -> Tensor:
    return torch.tensor(places)


# The batch has rows of 5, 4 and 2 steps, which stood at places 0, 2 and 1.
ORDERS: list[tuple[str, Any, Any, type[Exception], str, str, str]] = [
    ("shorter", order(0, 2), order(0, 2, 1), RuntimeError, "sorted_indices", "(3,)", "(2,)"),
    ("longer", order(0, 2, 1, 3), order(0, 2, 1), RuntimeError, "sorted_indices", "(3,)", "(4,)"),
    ("empty", order().long(), order(0, 2, 1), RuntimeError, "sorted_indices", "(3,)", "(0,)"),
    ("of two dimensions", order(0, 2, 1)[None], order(0, 2, 1), RuntimeError, "sorted_indices", "(3,)", "(1, 3)"),
    ("one scalar", torch.tensor(0), order(0, 2, 1), RuntimeError, "sorted_indices", "(3,)", "()"),
    ("out of range", order(0, 2, 3), order(0, 2, 1), RuntimeError, "sorted_indices", "0 to 2", "[0, 2, 3]"),
    ("far out of range", order(0, 2**62, 1), order(0, 2, 1), RuntimeError, "sorted_indices", "0 to 2", str(2**62)),
    ("negative", order(0, -1, 1), order(0, 2, 1), RuntimeError, "sorted_indices", "0 to 2", "-1"),
    ("twice the same", order(0, 2, 2), order(0, 2, 1), RuntimeError, "sorted_indices", "once", "[0, 2, 2]"),
    ("of floats", order(0, 2, 1).float(), order(0, 2, 1), RuntimeError, "sorted_indices", "int64", "torch.float32"),
    ("of bools", order(0, 2, 1) > 0, order(0, 2, 1), RuntimeError, "sorted_indices", "int64", "torch.bool"),
    ("on meta", order(0, 2, 1).to("meta"), order(0, 2, 1), RuntimeError, "sorted_indices", "on cpu", "meta"),
    ("a list", [0, 2, 1], order(0, 2, 1), TypeError, "sorted_indices", "a Tensor", "a list"),
    ("no inverse", order(0, 2, 1), order(0, 1, 2), RuntimeError, "unsorted_indices", "inverse", "[0, 1, 2]"),
    ("its inverse out of range", order(0, 2, 1), order(0, 2, 3), RuntimeError, "unsorted_indices", "0 to 2", "3"),
    ("its inverse shorter", order(0, 2, 1), order(0, 2), RuntimeError, "unsorted_indices", "(3,)", "(2,)"),
    ("its inverse alone shorter", None, order(0, 1), RuntimeError, "unsorted_indices", "(3,)", "(2,)"),
    ("its inverse of floats", None, order(0, 2, 1).float(), RuntimeError, "unsorted_indices", "int64", "float32"),
]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize(
    ("sorted_indices", "unsorted_indices", "error", "argument", "expected", "got"),
    [row[1:] for row in ORDERS],
    ids=[row[0].replace(" ", "-") for row in ORDERS],
)
def test_an_order_of_a_packed_batch_that_is_none_is_named(
    name: str,
    sorted_indices: Any,
    unsorted_indices: Any,
    error: type[Exception],
    argument: str,
    expected: str,
    got: str,
    with_state: bool,
    backend: str,
) -> None:
    # not through its constructor, which makes one order of the other
    packed = PACKED._replace(sorted_indices=order(0, 2, 1))
    packed = tuple.__new__(PackedSequence, (packed.data, packed.batch_sizes, sorted_indices, unsorted_indices))
    state = torch.zeros(1, 3, 4)
    hx = None if not with_state else (state, state) if name == "LSTM" else state
    with fused_rnn.use_backend(backend), pytest.raises(error) as caught:
        getattr(fused_rnn, name)(3, 4)(packed, hx)
    said, _, rest = str(caught.value).partition(": ")
    demand, _, found = rest.partition(", got ")
    assert said == argument and expected in demand and got in found, rest


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_orders_of_either_integer_dtype_and_orders_that_are_right_are_taken(name: str) -> None:
    layer, twin = getattr(fused_rnn, name)(3, 4), getattr(nn, name)(3, 4)
    twin.load_state_dict(layer.state_dict())
    packed = pack_padded_sequence(torch.randn(5, 3, 3), torch.tensor([2, 5, 4]), enforce_sorted=False)
    expected = twin(packed)[0].data
    for dtype in (torch.int64, torch.int32):
        orders = (packed.sorted_indices.to(dtype), packed.unsorted_indices.to(dtype))
        given = tuple.__new__(PackedSequence, (packed.data, packed.batch_sizes, *orders))
        torch.testing.assert_close(layer(given)[0].data, expected)


def test_a_layer_whose_settings_were_changed_to_nonsense_says_so() -> None:
    layer = fused_rnn.GRU(3, 4)
    for attribute, value in (("num_layers", 2**40), ("bidirectional", True), ("bias", False), ("hidden_size", 2**40)):
        changed = copy.copy(layer)
        setattr(changed, attribute, value)
        with pytest.raises(RuntimeError, match="^(params|weight_ih_l0): expected .*, got "):
            changed(SEQUENCE)
