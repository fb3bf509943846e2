"""What code sees of a layer besides its numbers is what torch.nn of the installed version shows."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch
from support.cases import CELLS, Case, CellCase, run
from support.compare import assert_close_to_twin, assert_same, assert_within
from support.pairwise import Row, pairwise
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

import fused_rnn

LAYERS = ("LSTM", "GRU", "RNN")
CELL_NAMES = ("LSTMCell", "GRUCell", "RNNCell")


def both(name: str) -> tuple[type[nn.Module], type[nn.Module]]:
    return getattr(fused_rnn, name), getattr(nn, name)


# ---- construction -------------------------------------------------------------------------------------------------

CONSTRUCTOR_FACTORS = {
    "name": LAYERS,
    "num_layers": (1, 2, 3),
    "bias": (True, False),
    "batch_first": (False, True),
    "dropout": (0.0, 0.3),
    "bidirectional": (False, True),
    "proj_size": (None, 2),
    "nonlinearity": (None, "tanh", "relu"),
    "dtype": (None, torch.float64, torch.bfloat16),
}


def _constructible(row: Row) -> bool:
    if row["proj_size"] and row["name"] != "LSTM":
        return False
    return not row["nonlinearity"] or row["name"] == "RNN"


def _keywords(row: Row) -> tuple[str, dict[str, Any]]:
    keywords = {key: value for key, value in row.items() if value is not None}
    return keywords.pop("name"), keywords


CONSTRUCTIONS = [
    ("LSTM", (3, 4), {}),
    ("GRU", (3, 4), {}),
    ("RNN", (3, 4), {}),
    ("LSTM", (3, 4, 2, False, True, 0.25, True, 3), {}),
    ("GRU", (3, 4, 2, False, True, 0.25, True), {}),
    ("RNN", (3, 4, 2, "relu", False, True, 0.25, True), {}),
    ("RNN", (3, 4, 2, "tanh"), {}),
    ("GRU", (3, 4, 1, True, False, 0.0, False, 0), {}),
    ("LSTM", (3, 4), {"device": "cpu"}),
    ("LSTM", (), {"input_size": 3, "hidden_size": 4}),
    ("LSTM", (3, 4), {"proj_size": 0}),
    ("LSTMCell", (3, 4), {}),
    ("GRUCell", (3, 4), {}),
    ("RNNCell", (3, 4), {}),
    ("LSTMCell", (3, 4, False), {}),
    ("GRUCell", (3, 4, False), {}),
    ("RNNCell", (3, 4, False, "relu"), {}),
    ("RNNCell", (3, 4), {"nonlinearity": "relu", "dtype": torch.float64}),
    ("RNNCell", (3, 4), {"nonlinearity": "tanh"}),
    ("GRUCell", (3, 4), {"bias": None}),
    ("LSTMCell", (0, 4), {}),
    ("LSTMCell", (3, 0), {}),
] + [
    (name, (3, 4), keywords) for name, keywords in map(_keywords, pairwise(CONSTRUCTOR_FACTORS, allowed=_constructible))
]

NN_ATTRIBUTES = (
    "mode input_size hidden_size num_layers bias batch_first dropout bidirectional proj_size nonlinearity training"
).split()


@pytest.mark.filterwarnings("ignore:dropout option adds dropout", "ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("name", "args", "keywords"), CONSTRUCTIONS, ids=str)
def test_construction_equals_torch_nn(name: str, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    modules = []
    for module_type in both(name):
        torch.manual_seed(3)
        modules.append((module_type(*args, **keywords), torch.rand(2)))
    (fused, after_fused), (twin, after_twin) = modules
    assert repr(fused) == repr(twin)
    assert list(fused.state_dict()) == list(twin.state_dict())
    # initial values bit for bit, and as many numbers drawn from the generator
    assert_same(fused.state_dict(), twin.state_dict())
    assert torch.equal(after_fused, after_twin)
    for attribute in NN_ATTRIBUTES:
        assert getattr(fused, attribute, "absent") == getattr(twin, attribute, "absent"), attribute
    for (fused_name, parameter), (twin_name, expected) in zip(
        fused.named_parameters(), twin.named_parameters(), strict=True
    ):
        assert fused_name == twin_name
        assert (parameter.dtype, parameter.shape, parameter.stride()) == (
            expected.dtype,
            expected.shape,
            expected.stride(),
        )
        assert parameter.requires_grad


@pytest.mark.parametrize("name", LAYERS)
def test_structure_attributes_of_layers_equal_torch_nn(name: str) -> None:
    fused, twin = (t(3, 4, num_layers=2, bidirectional=True) for t in both(name))
    assert fused._flat_weights_names == twin._flat_weights_names
    assert fused._all_weights == twin._all_weights
    for group, expected in zip(fused.all_weights, twin.all_weights, strict=True):
        assert [w.shape for w in group] == [w.shape for w in expected]
    assert all(a is b for a, b in zip(fused._flat_weights, fused.parameters(), strict=True))


@pytest.mark.parametrize("name", LAYERS + CELL_NAMES)
def test_forward_parameters_are_those_of_torch_nn(name: str) -> None:
    fused, twin = both(name)
    ours = inspect.signature(fused.forward).parameters
    theirs = list(inspect.signature(twin.forward).parameters.values())
    # forward of torch.nn's own LSTM, GRU and RNN is overloaded for TorchScript: names and defaults are the real ones
    for parameter in theirs:
        assert parameter.name in ours
        assert ours[parameter.name].default == parameter.default
    extra = list(ours.values())[len(theirs) :]
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in extra)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "LSTM",
            ["input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size"],
        ),
        ("GRU", ["input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"]),
        (
            "RNN",
            [
                "input_size",
                "hidden_size",
                "num_layers",
                "nonlinearity",
                "bias",
                "batch_first",
                "dropout",
                "bidirectional",
            ],
        ),
        ("LSTMCell", ["input_size", "hidden_size", "bias"]),
        ("GRUCell", ["input_size", "hidden_size", "bias"]),
        ("RNNCell", ["input_size", "hidden_size", "bias", "nonlinearity"]),
    ],
)
def test_constructor_takes_its_arguments_in_the_order_of_torch_nn(name: str, expected: list[str]) -> None:
    parameters = inspect.signature(getattr(fused_rnn, name)).parameters
    assert list(parameters)[: len(expected)] == expected
    kinds = {p.kind for p in parameters.values()}
    # explicit names: skip_init reads them
    assert inspect.Parameter.VAR_POSITIONAL not in kinds
    assert inspect.Parameter.VAR_KEYWORD not in kinds
    assert {"device", "dtype"} <= set(parameters)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_rnnbase_but_not_the_classes_at_which_dynamo_breaks(name: str) -> None:
    fused, twin = both(name)
    assert issubclass(fused, nn.RNNBase)
    assert not issubclass(fused, twin)


@pytest.mark.parametrize("name", CELL_NAMES)
def test_cells_are_rnncellbase(name: str) -> None:
    assert issubclass(getattr(fused_rnn, name), nn.RNNCellBase)


def test_dropout_on_a_single_layer_warns_as_torch_nn() -> None:
    for layer_type in both("LSTM"):
        with pytest.warns(UserWarning, match="dropout.*num_layers"):
            layer_type(3, 4, dropout=0.5)


@pytest.mark.parametrize("name", LAYERS + CELL_NAMES)
def test_skip_init_builds_without_drawing(name: str) -> None:
    state = torch.random.get_rng_state()
    module = nn.utils.skip_init(getattr(fused_rnn, name), 3, 4, bias=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [p.shape for p in module.parameters()] == [p.shape for p in getattr(nn, name)(3, 4, bias=False).parameters()]


@pytest.mark.parametrize("name", LAYERS + CELL_NAMES)
def test_reset_parameters_of_a_subclass_is_called_by_the_constructor(name: str) -> None:
    class Ones(getattr(fused_rnn, name)):
        def reset_parameters(self) -> None:
            for parameter in self.parameters():
                nn.init.ones_(parameter)

    assert all((parameter == 1).all() for parameter in Ones(3, 4).parameters())


@pytest.mark.parametrize("name", LAYERS + CELL_NAMES)
def test_module_on_the_meta_device_can_be_built_and_made_real(name: str) -> None:
    module = getattr(fused_rnn, name)(3, 4, device="meta")
    assert all(parameter.is_meta for parameter in module.parameters())
    module.to_empty(device="cpu").reset_parameters()
    assert all(parameter.device.type == "cpu" for parameter in module.parameters())
    assert torch.isfinite(torch.cat([p.flatten() for p in module.parameters()])).all()


@pytest.mark.parametrize("name", LAYERS)
def test_flatten_parameters_is_harmless(name: str) -> None:
    layer = getattr(fused_rnn, name)(3, 4)
    sequence = torch.randn(5, 2, 3)
    before, parameters = layer(sequence)[0], list(layer.parameters())
    assert layer.flatten_parameters() is None
    assert torch.equal(layer(sequence)[0], before)
    assert all(a is b for a, b in zip(layer.parameters(), parameters, strict=True))


# ---- results ------------------------------------------------------------------------------------------------------

LAYOUT_FACTORS = {
    "cell": CELLS,
    "num_layers": (1, 2),
    "bidirectional": (False, True),
    "batch_first": (False, True),
    "proj": (False, True),
    "batch": (1, 3, 0),
    "steps": (1, 4),
    "dtype": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "hx": (False, True),
}
LAYOUT_CASES = [
    Case(**row) for row in pairwise(LAYOUT_FACTORS, allowed=lambda row: not row["proj"] or row["cell"] == "LSTM")
]


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    # a stride of a dimension of size 0 or 1 means nothing
    strides = tuple(s for s, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    return tensor.dtype, tuple(tensor.shape), strides if tensor.numel() else ()


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("case", LAYOUT_CASES, ids=str)
def test_shapes_strides_and_dtypes_of_results_equal_torch_nn(case: Case, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        data = case.data()
        found, expected = (case.outputs(m(data.input, data.hx)) for m in case.twins())
    assert found.keys() == expected.keys()
    for name in expected:
        # torch.nn's strides of batch_first results differ from dtype to dtype in nothing but this: a view of (T, B, .)
        assert _layout(found[name]) == _layout(expected[name]), name
        assert found[name].requires_grad == grad


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("given", [False, True], ids=["zero", "hx"])
@pytest.mark.parametrize("cell", CELLS)
def test_unbatched_call_equals_torch_nn(cell: str, given: bool, batch_first: bool) -> None:
    case = Case(cell=cell, num_layers=2, bidirectional=True, batch=1, hx=given)
    data = case.data()
    sequence = data.sequence[:, 0].detach()
    states = [state[:, 0].detach() for state in data.states]
    hx = None if not given else tuple(states) if case.has_cell_state else states[0]
    found, expected = (case.outputs(m(sequence, hx)) for m in case.replace(batch_first=batch_first).twins())
    for name in expected:
        assert _layout(found[name]) == _layout(expected[name])
    assert_close_to_twin(found, expected)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_empty_batch_gives_empty_results_and_zero_weight_gradients(cell: str, batch_first: bool) -> None:
    case = Case(cell=cell, num_layers=2, bidirectional=True, batch=0, batch_first=batch_first, hx=True)
    found, expected = (run(module, case.data()) for module in case.twins())
    assert_same(found, expected)
    assert all((found[name] == 0).all() for name in found)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("sizes", [(0, 4), (3, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_cell_of_size_zero_equals_torch_nn(cell: str, sizes: tuple[int, int]) -> None:
    case = CellCase(cell=cell, input_size=sizes[0], hidden_size=sizes[1], dtype=torch.float64)
    found, expected = (run(module, case.data()) for module in case.twins())
    assert_close_to_twin(found, expected)


@pytest.mark.parametrize("case", [*(Case(cell=cell, num_layers=2) for cell in CELLS), CellCase()], ids=str)
def test_modules_and_inputs_made_in_inference_mode_compute(case: Case | CellCase) -> None:
    with torch.inference_mode():
        module, data = case.build(fused_rnn), case.data()
        inside = run(module, data, gradients=False)
        inside = run(module, data, gradients=False)
    with torch.no_grad():
        outside = run(module, data, gradients=False)
    assert_close_to_twin(inside, run(case.build(nn), case.data(), gradients=False))
    assert_same(outside, inside)


@pytest.mark.parametrize("cell", CELLS)
def test_empty_batch_of_a_cell_equals_torch_nn(cell: str) -> None:
    case = CellCase(cell=cell, batch=0)
    found, expected = (run(module, case.data()) for module in case.twins())
    assert_same(found, expected)


@pytest.mark.parametrize("batch", [2, 0])
@pytest.mark.parametrize("name", LAYERS)
def test_no_time_step_raises_as_in_torch_nn(name: str, batch: int) -> None:
    for layer_type in both(name):
        with pytest.raises(RuntimeError, match="sequence"):
            layer_type(3, 4)(torch.zeros(0, batch, 3))


@pytest.mark.parametrize("name", ["LSTM", "LSTMCell"])
def test_list_of_two_states_is_taken_as_hx(name: str) -> None:
    module = getattr(fused_rnn, name)(3, 4)
    shape = (2, 4) if name == "LSTMCell" else (1, 2, 4)
    states = [torch.randn(shape), torch.randn(shape)]
    sequence = torch.randn(*((2, 3) if name == "LSTMCell" else (5, 2, 3)))
    by_list, by_tuple = module(sequence, states), module(sequence, tuple(states))
    assert torch.equal(by_list[0], by_tuple[0])


@pytest.mark.parametrize("name", LAYERS + CELL_NAMES)
def test_input_and_hx_can_be_given_by_keyword(name: str) -> None:
    module = getattr(fused_rnn, name)(3, 4)
    shape, state = ((2, 3), (2, 4)) if name in CELL_NAMES else ((5, 2, 3), (1, 2, 4))
    value, hidden = torch.randn(shape), torch.randn(state)
    hx = (hidden, hidden) if name.startswith("LSTM") else hidden
    found, expected = module(input=value, hx=hx), module(value, hx)
    flat = [r[0] if isinstance(r, tuple) else r for r in (found, expected)]
    assert torch.equal(*flat)


# ---- packed sequences ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_packed_run_equals_each_sequence_alone(cell: str, batch_first: bool) -> None:
    case = Case(cell=cell, num_layers=2, bidirectional=True, batch_first=batch_first)
    module = case.build(fused_rnn)
    sequences = [case.replace(batch=1, steps=n).data(seed=n).sequence[:, 0].detach() for n in (2, 5, 1, 5, 3)]
    output, states = module(pack_sequence(sequences, enforce_sorted=False))
    padded, lengths = pad_packed_sequence(output)
    assert lengths.tolist() == [2, 5, 1, 5, 3]
    h_n = states[0] if isinstance(states, tuple) else states
    for row, sequence in enumerate(sequences):
        alone, last = module(sequence)
        last = last[0] if isinstance(last, tuple) else last
        found = {"output": padded[: len(sequence), row], "h_n": h_n[:, row]}
        assert_close_to_twin(found, {"output": alone, "h_n": last})


def test_states_of_an_unsorted_pack_are_in_the_original_order() -> None:
    case = Case(cell="GRU", batch=5, packing="unsorted", hx=True)
    found, expected = (run(module, case.data(), gradients=False) for module in case.twins())
    assert_close_to_twin(found, expected)
    sorted_rows = case.data().input.sorted_indices
    assert sorted_rows.tolist() != list(range(5))


def test_packed_sequence_made_by_hand_without_indices_works() -> None:
    data, sizes = torch.randn(5, 3), torch.tensor([3, 2])
    for name in LAYERS:
        torch.manual_seed(0)
        ours = getattr(fused_rnn, name)(3, 4)(PackedSequence(data, sizes))
        torch.manual_seed(0)
        theirs = getattr(nn, name)(3, 4)(PackedSequence(data, sizes))
        assert_close_to_twin({"output": ours[0].data}, {"output": theirs[0].data})
        assert ours[0].sorted_indices is None
        assert ours[0].unsorted_indices is None


# ---- dropout between layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["padded", "unsorted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN_TANH"])
def test_same_seed_gives_the_dropout_of_torch_nn(cell: str, dtype: torch.dtype, packing: str) -> None:
    case = Case(
        cell=cell, num_layers=3, bidirectional=True, dropout=0.4, batch_first=True, packing=packing, dtype=dtype
    )
    results = []
    for module in case.twins():
        torch.manual_seed(11)
        results.append(run(module, case.data()) | {"drawn after": torch.rand(3).to(dtype)})
    assert_close_to_twin(*results)
    assert torch.equal(results[0]["drawn after"], results[1]["drawn after"])


def test_dropout_of_one_zeroes_what_upper_layers_see() -> None:
    case = Case(num_layers=2, dropout=1.0)
    found, expected = (run(module, case.data()) for module in case.twins())
    assert_close_to_twin(found, expected)
    assert found["grad(weight_ih_l1)"].count_nonzero() == 0


@pytest.mark.parametrize("mode", ["eval", "zero"])
def test_nothing_is_drawn_in_eval_mode_or_at_probability_zero(mode: str) -> None:
    case = Case(cell="GRU", num_layers=2, dropout=0.5 if mode == "eval" else 0.0)
    module = case.build(fused_rnn).train(mode == "zero")
    state = torch.random.get_rng_state()
    module(case.data().input)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_dropout_masks_differ_from_call_to_call_and_backward_uses_those_of_its_forward() -> None:
    case = Case(num_layers=2, dropout=0.5, dtype=torch.float64)
    results = []
    for module in case.twins():
        torch.manual_seed(4)
        data = case.data()
        first, second = module(data.input)[0], module(data.input)[0]
        assert not torch.equal(first, second)
        grads = [torch.autograd.grad(y.square().sum(), data.sequence)[0] for y in (second, first)]
        results.append(dict(zip(("second", "first"), grads, strict=True)))
    assert_close_to_twin(*results)


# ---- the rest of nn.Module ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", [Case(), Case("GRU", num_layers=2), Case("RNN_TANH"), CellCase(), CellCase("GRU")], ids=str
)
def test_hooks_fire_with_the_arguments_that_torch_nn_gives(case: Case | CellCase) -> None:
    logs = []
    for module in case.twins():
        log: list[Any] = []
        module.register_forward_pre_hook(lambda m, args, log=log: log.append(("pre", len(args))))
        module.register_forward_hook(lambda m, args, out, log=log: log.append(("post", type(out).__name__)))
        module.register_full_backward_hook(
            lambda m, gi, go, log=log: log.append(("backward", [None if g is None else tuple(g.shape) for g in gi]))
        )
        data = case.data()
        outputs = case.outputs(module(data.input, data.hx))
        sum(x.sum() for x in outputs.values()).backward()
        logs.append(log)
    assert [entry[0] for entry in logs[0]] == ["pre", "post", "backward"]
    assert logs[0] == logs[1]


def test_hooks_on_parameters_and_states_fire_once() -> None:
    case = Case(hx=True)
    module, data, seen = case.build(fused_rnn), case.data(), []
    module.weight_hh_l0.register_hook(lambda g: seen.append("weight"))
    data.states[0].register_hook(lambda g: seen.append("h_0"))
    module.bias_ih_l0.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    module(data.input, data.hx)[0].sum().backward()
    assert sorted(seen) == ["accumulated", "h_0", "weight"]


@pytest.mark.parametrize("case", [Case(num_layers=2), Case("GRU"), CellCase(), CellCase("RNN_TANH")], ids=str)
def test_to_another_dtype_keeps_parameter_identity_and_computes_there(case: Case | CellCase) -> None:
    module, twin = case.twins()
    before = list(module.parameters())
    module(case.data().input)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        assert module.to(dtype) is module
        assert all(a is b for a, b in zip(module.parameters(), before, strict=True))
        data = case.data().to(dtype)
        found, expected = (run(m, data, gradients=False) for m in (module, twin.to(dtype)))
        assert_close_to_twin(found, expected)


AUTOCAST_CASES = [
    *(Case(cell=cell, num_layers=2, bidirectional=True) for cell in CELLS),
    *(Case(cell=cell, hx=True, batch_first=True) for cell in CELLS),
    *(Case(cell=cell, packing="unsorted") for cell in CELLS),
    *(CellCase(cell=cell, hx=hx) for cell in CELLS for hx in (False, True)),
]


ONEDNN_BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.parametrize("lower_input", [False, True], ids=["float32 input", "bfloat16 input"])
@pytest.mark.parametrize("case", AUTOCAST_CASES, ids=str)
def test_autocast_gives_the_dtypes_and_values_of_torch_nn(case: Case | CellCase, lower_input: bool) -> None:
    # torch.nn's LSTM layers call oneDNN here. Where that has no bfloat16, on processors without AVX-512, they fail or
    # keep another dtype; their values are computed without oneDNN then, and ours keep the dtype that others give.
    without_onednn = isinstance(case, Case) and case.cell == "LSTM" and case.packing == "padded" and not ONEDNN_BFLOAT16
    results = []
    for module in case.twins():
        data = case.data()
        sequence = data.sequence.bfloat16() if lower_input else data.sequence
        onednn = torch.backends.mkldnn.flags(enabled=not without_onednn)
        with torch.autocast("cpu", dtype=torch.bfloat16), onednn:
            outputs = case.outputs(module(case.argument(sequence), data.hx))
        sum(output.float().square().sum() for output in outputs.values()).backward()
        gradients = {f"grad({name})": p.grad for name, p in (data.leaves | dict(module.named_parameters())).items()}
        results.append(outputs | gradients)
    dtypes = {k: v.dtype for k, v in results[1].items()}
    if without_onednn:
        dtypes |= dict.fromkeys(("output", "h_n", "c_n"), torch.bfloat16)
    assert {k: v.dtype for k, v in results[0].items()} == dtypes
    # both compute in bfloat16 in places, not in the same ones: outputs within its epsilon, gradients, which add up over
    # steps and rows, within a few
    limit = 16 * torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float32).eps
    found, expected = ({k: v.float() for k, v in result.items()} for result in results)
    assert_within(found, {k: v.double() for k, v in expected.items()}, limit)


@pytest.mark.parametrize("name", LAYERS)
def test_complex_layer_computes_by_the_reference(name: str) -> None:
    outputs = []
    for layer_type in both(name):
        torch.manual_seed(0)
        layer = layer_type(3, 4, dtype=torch.complex64)
        torch.manual_seed(1)
        outputs.append(layer(torch.randn(5, 2, 3, dtype=torch.complex64))[0])
    torch.testing.assert_close(*outputs)


def test_modules_live_in_containers_and_report_children() -> None:
    model = nn.ModuleDict({"a": fused_rnn.LSTM(3, 4), "b": nn.Sequential(fused_rnn.GRUCell(3, 4))})
    assert [name for name, _ in model.named_modules()] == ["", "a", "b", "b.0"]
    assert len(list(model.parameters())) == 8
    assert not model.eval().a.training


def test_public_names_of_the_package_exist() -> None:
    names = [*LAYERS, *CELL_NAMES, "functional", "reference", "convert", "revert", "patch", "use_backend", "explain"]
    assert not [name for name in names if not hasattr(fused_rnn, name)]
    assert set(names) <= set(fused_rnn.__all__)
    for namespace, function in itertools.product(
        (fused_rnn.functional, fused_rnn.reference), ("lstm", "gru", "rnn", "lstm_cell", "gru_cell", "rnn_cell")
    ):
        assert callable(getattr(namespace, function, None)), f"{namespace.__name__}.{function}"
