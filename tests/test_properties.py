"""Properties that hold for any shape, found or refuted by hypothesis."""

from __future__ import annotations

import copy

import pytest
import torch
from support.backends import available_isas, fused_available
from support.cases import CELLS, Case, CellCase, Data, incoming_gradients, run
from support.compare import assert_close_to_twin, assert_same, assert_within
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fused_rnn
from fused_rnn.check import instruction_set

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")
given = hypothesis.given

pytestmark = pytest.mark.asan

# derandomize: the same examples in every run, so that a failure is there again the next time
PROFILE = hypothesis.settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)

DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
SIZES = st.integers(1, 40)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any layer and any call; sizes are drawn freely and shrink to 1."""
    cell = draw(st.sampled_from(CELLS))
    hidden_size = draw(SIZES)
    return Case(
        cell=cell,
        input_size=draw(SIZES),
        hidden_size=hidden_size,
        num_layers=draw(st.integers(1, 3)),
        bidirectional=draw(st.booleans()),
        bias=draw(st.booleans()),
        proj=cell == "LSTM" and hidden_size > 1 and draw(st.booleans()),
        batch_first=draw(st.booleans()),
        packing=draw(st.sampled_from(["padded", "sorted", "unsorted"])),
        batch=draw(st.integers(1, 20)),
        steps=draw(st.integers(1, 8)),
        hx=draw(st.booleans()),
        dtype=draw(DTYPES),
    )


@st.composite
def cell_cases(draw: st.DrawFn) -> CellCase:
    return CellCase(
        cell=draw(st.sampled_from(CELLS)),
        input_size=draw(SIZES),
        hidden_size=draw(SIZES),
        bias=draw(st.booleans()),
        batch=draw(st.none() | st.integers(1, 40)),
        hx=draw(st.booleans()),
        dtype=draw(DTYPES),
    )


def _check_against_float64(case: Case | CellCase, isa: str, seed: int) -> None:
    expected = run(copy.deepcopy(case.build(nn, seed=seed)).double(), case.data(seed=seed).to(torch.float64))
    if not fused_available():
        assert_within(run(case.build(fused_rnn, seed=seed), case.data(seed=seed)), expected)
        return
    with instruction_set(isa):
        assert_within(run(case.build(fused_rnn, seed=seed), case.data(seed=seed)), expected)


@PROFILE
@given(cases(), st.sampled_from(available_isas()), st.integers(0, 1000))
def test_any_layer_matches_float64(case: Case, isa: str, seed: int) -> None:
    _check_against_float64(case, isa, seed)


@PROFILE
@given(cell_cases(), st.sampled_from(available_isas()), st.integers(0, 1000))
def test_any_cell_matches_float64(case: CellCase, isa: str, seed: int) -> None:
    _check_against_float64(case, isa, seed)


@PROFILE
@given(cases() | cell_cases(), st.sampled_from(available_isas()), st.data())
def test_any_gradients_of_any_outputs_match_float64(case: Case | CellCase, isa: str, data: st.DataObject) -> None:
    """Some leaves and parameters need a gradient, some outputs are used: what is left out changes nothing else."""
    module, twin = case.build(fused_rnn), copy.deepcopy(case.build(nn)).double()
    arguments = case.data()
    names = sorted(arguments.leaves | dict(module.named_parameters()))
    wanted = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True), label="wanted")
    used = data.draw(
        st.lists(st.sampled_from(["output", "h_n", "c_n", "h", "c"]), min_size=1, unique=True), label="used"
    )

    def gradients(layer: nn.Module, values: Data) -> dict[str, torch.Tensor]:
        leaves = values.leaves | dict(layer.named_parameters())
        for name, leaf in leaves.items():
            leaf.requires_grad_(name in wanted)
        outputs = case.outputs(layer(values.input, values.hx))
        outputs = {name: outputs[name] for name in used if name in outputs} or outputs
        incoming = incoming_gradients(list(outputs.values()), integers=case.integers)
        torch.autograd.backward(list(outputs.values()), incoming)
        return {f"grad({name})": leaf.grad for name, leaf in leaves.items()}

    expected = gradients(twin, arguments.to(torch.float64))
    if fused_available():
        with instruction_set(isa):
            found = gradients(module, arguments)
    else:
        found = gradients(module, arguments)
    assert {name for name, gradient in found.items() if gradient is None} == {
        name for name, gradient in expected.items() if gradient is None
    }
    assert_within(
        {name: gradient for name, gradient in found.items() if gradient is not None},
        {name: gradient for name, gradient in expected.items() if gradient is not None},
    )


@PROFILE
@given(st.sampled_from(CELLS), SIZES, SIZES, st.integers(1, 12), st.integers(1, 8))
def test_relu_and_others_on_random_reals_match_float64_in_outputs(
    cell: str, input_size: int, hidden_size: int, batch: int, steps: int
) -> None:
    """Case.data gives ReLU layers integers; outputs, which have no jump, are also right on reals."""
    generator = torch.Generator().manual_seed(hidden_size)
    case = Case(cell=cell, input_size=input_size, hidden_size=hidden_size, dtype=torch.float64)
    twin = case.build(nn)
    module = copy.deepcopy(case.build(fused_rnn)).float()
    twin.load_state_dict({name: value.double() for name, value in module.state_dict().items()})
    sequence = torch.randn(steps, batch, input_size, generator=generator)
    with torch.no_grad():
        assert_within({"output": module(sequence)[0]}, {"output": twin(sequence.double())[0]})


@PROFILE
@given(
    st.sampled_from(CELLS),
    st.lists(st.integers(1, 9), min_size=1, max_size=9),
    st.booleans(),
    st.integers(1, 2),
)
def test_any_packed_batch_equals_its_rows_run_alone(
    cell: str, lengths: list[int], bidirectional: bool, num_layers: int
) -> None:
    case = Case(
        cell=cell,
        batch=len(lengths),
        steps=max(lengths),
        bidirectional=bidirectional,
        num_layers=num_layers,
        dtype=torch.float64,
    )
    module, sequence = case.build(fused_rnn), case.data().sequence.detach()
    packed = pack_padded_sequence(sequence, torch.tensor(lengths), enforce_sorted=False)
    output, states = module(packed)
    padded, found_lengths = pad_packed_sequence(output, total_length=max(lengths))
    assert found_lengths.tolist() == lengths
    h_n = states[0] if isinstance(states, tuple) else states
    for row, length in enumerate(lengths):
        alone, last = module(sequence[:length, row])
        last = last[0] if isinstance(last, tuple) else last
        assert_within(
            {"output": padded[:length, row], "h_n": h_n[:, row]}, {"output": alone.double(), "h_n": last.double()}
        )
        assert padded[length:, row].count_nonzero() == 0


@PROFILE
@given(cases())
def test_batch_first_is_the_transposed_call(case: Case) -> None:
    case = case.replace(packing="padded", batch_first=False)
    module = case.build(fused_rnn)
    other = case.replace(batch_first=True).build(fused_rnn)
    data = case.data()
    found = other(data.sequence.transpose(0, 1), data.hx)[0].transpose(0, 1)
    assert_close_to_twin({"output": found}, {"output": module(data.sequence, data.hx)[0]})


@PROFILE
@given(cases())
def test_zero_weights_give_the_values_of_the_formulas(case: Case) -> None:
    module = case.replace(hx=False).build(fused_rnn)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        output = case.outputs(module(case.data().input))["output"]
    # from zero states, zero sums give h = 0 in every cell
    assert_same({"output": output}, {"output": torch.zeros_like(output)})


@pytest.mark.kernels
@PROFILE
@given(cases(), st.integers(1, 4))
def test_any_layer_gives_the_same_bits_again_and_reference_agrees(case: Case, seed: int) -> None:
    module, data = case.build(fused_rnn, seed=seed), case.data(seed=seed)
    found = run(module, data)
    assert_same(run(module, data), found)
    with fused_rnn.use_backend("reference"):
        assert_close_to_twin(found, run(module, data))
